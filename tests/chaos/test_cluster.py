"""A RabbitMQ of three nodes: the one that all are connected to is killed, and what stands before them names another."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.chaos.pace import Pace
from tests.chaos.places import Servers, bound
from tests.chaos.sizes import full, say
from tests.chaos.test_restarts import restart_all_the_time
from tests.kill.audit import audit, recoveries, stragglers, usual_wait
from tests.kill.nursery import Nursery
from tests.kill.sql import make_tables
from tests.services.proxy import Proxy
from tests.services.rabbitmq import RabbitCluster


class Balanced:
    """A cluster behind one address, as a load balancer has it: connections end with their node, and go to the next."""

    def __init__(self, cluster: RabbitCluster, proxy: Proxy, hands: Executor) -> None:
        self._nodes = deque(cluster.nodes)
        self._proxy = proxy
        self._hands = hands
        self._coming: Future[None] | None = None

    def kill(self) -> None:
        """SIGKILL to the node that all are connected to, once the one before it has come back."""
        if self._coming is not None:
            self._coming.result()
        self._nodes[0].kill()

    def lead_on(self) -> None:
        """Connect to the next one, while the dead one comes back to a cluster that has gone on without it."""
        self._coming = self._hands.submit(self._nodes[0].start)
        self._nodes.rotate(-1)
        self._proxy.target = (self._nodes[0].host, self._nodes[0].port)


@pytest.mark.parametrize(("runs", "kills"), [full(4_000, 6)])
def test_a_node_of_a_cluster_is_killed(
    tmp_path: Path, servers: Servers, pace: Pace, runs: int, kills: int
) -> None:
    """Its queues elect other leaders; within lease + sweep + 5 s all goes on, once each."""
    began = time.monotonic()
    with RabbitCluster() as cluster, servers.store.database() as store:
        make_tables(store)
        with Proxy(cluster.nodes[0].host, cluster.nodes[0].port) as proxy, ThreadPoolExecutor() as hands:
            balanced = Balanced(cluster, proxy, hands)
            url = proxy.url(cluster.nodes[0].url)
            with Nursery(tmp_path, store_url=store, transport_url=url) as nursery:
                first, healed = restart_all_the_time(
                    nursery,
                    runs=runs,
                    restarts=kills,
                    local=False,
                    stop=balanced.kill,
                    start=balanced.lead_on,
                    settle=cluster.write_down,
                )
            repeats = audit(nursery, runs=range(runs))
            waits, usual = recoveries(nursery, healed), usual_wait(nursery, first)
            recovered = ", ".join(f"{wait:.1f}" for wait in waits)
            say(
                f"cluster: {kills} nodes killed in {time.monotonic() - began:.1f} s and {runs} runs; "
                f"{repeats} repeats; recovered within {recovered} s, usual {usual:.1f} s"
            )
            assert stragglers(nursery, healed, within=bound(pace) + usual) == {}
            assert repeats == 0
