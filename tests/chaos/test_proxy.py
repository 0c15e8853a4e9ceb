"""The connection breaks, stalls and goes silent at each byte of a publish, of its confirm, and of a commit.

For each byte a run is dispatched and done while a proxy does its worst at that place, once. Several lanes, each with a
proxy, a dispatcher and a worker, go on side by side, since most of the time is spent waiting for what was lost.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Literal, NamedTuple

import pytest
from tests.chaos.places import NAMES, Place, Servers, open_place
from tests.chaos.sizes import full, say, short
from tests.services.proxy import Direction, Proxy

from paigeant.activity import ActivityRegistry
from paigeant.app import Paigeant
from paigeant.context import StepContext
from paigeant.errors import StoreUnavailable
from paigeant.observer import Event
from paigeant.settings import Settings
from paigeant.slip import RunStatus, Step
from paigeant.workflow import Workflow

What = Literal["publish", "commit"]
How = Literal["cut", "delay", "blackhole"]

TIMES = {"lease": 1.0, "heartbeat": 0.2, "sweep_interval": 0.25, "grace": 0.5}
BOUND = TIMES["lease"] + TIMES["sweep_interval"] + 5.0
SILENCE: dict[How, float] = {"cut": 0.0, "delay": 0.1, "blackhole": TIMES["lease"] * 1.25}
"""For how many seconds nothing passes, from the byte on."""

DIRECTIONS: tuple[Direction, Direction] = ("to_server", "to_client")


class Fault(NamedTuple):
    """What happens after so many bytes in this direction."""

    how: How
    direction: Direction
    byte: int


class Lane:
    """A dispatcher and a worker of topics of their own. One of them reaches one of its servers through a proxy."""

    def __init__(self, number: int, place: Place, what: What, proxy: Proxy) -> None:
        self.proxy = proxy
        self.executed: Counter[tuple[str, str]] = Counter()
        self.lost: Counter[tuple[str, str]] = Counter()
        self.sizes: list[dict[Direction, int]] = []
        self._name = f"work{number}"
        self._what = what
        self._fault: Fault | None = None
        self._before = dict(proxy.passed)
        activity = ActivityRegistry()

        @activity.execute(name=self._name)
        async def work(context: StepContext) -> str:
            self.executed[context.workflow_id, context.step_id] += 1
            if context.step_id == "s0":
                self._arm_for("commit")
            else:
                self._measure_for("commit")
            return context.step_id

        url = place.store_url if what == "commit" else place.transport_url
        through = {key: proxy.url(value) if value == url else value for key, value in place.settings.items()}
        far = Paigeant(Settings(**TIMES, **through), activities=activity, observers=[self])
        near = Paigeant(Settings(**TIMES, **place.settings), activities=activity, observers=[self])
        self.dispatcher, self.worker = (far, near) if what == "publish" else (near, far)
        self.near = near

    def observe(self, event: Event) -> None:
        """Note which steps were lost: they may be executed again."""
        if event.name in ("step.lost", "step.swept"):
            self.lost[event.workflow_id, event.step] += 1

    async def do(self, run_id: str, fault: Fault | None) -> float:
        """Have a run done while this happens. Gives after how many seconds all was well again."""
        self._fault = fault
        cuts = self.proxy.cuts
        self._arm_for("publish")
        healing = asyncio.create_task(self._heal(cuts, fault))
        steps = [Step(self._name, id="s0"), Step(self._name, id="s1")]
        while True:
            try:
                await self.dispatcher.dispatch(Workflow("proxied", steps), workflow_id=run_id)
                break
            except StoreUnavailable:  # whoever isn't sure tries again
                await asyncio.sleep(0.05)
        self._measure_for("publish")
        result = await self.near.run(run_id).wait(timeout=60.0)
        ended = time.monotonic()
        assert result.status is RunStatus.COMPLETED
        assert result.outputs == {"s0": "s0", "s1": "s1"}
        if fault is None:
            healing.cancel()
            return 0.0
        async with asyncio.timeout(30.0):  # at the latest a sweep or a beat passes that byte
            return ended - await healing

    async def _heal(self, cuts: int, fault: Fault | None) -> float:
        while self.proxy.cuts == cuts:  # noqa: ASYNC110  # another thread's affair
            await asyncio.sleep(0.002)
        await asyncio.sleep(SILENCE["cut" if fault is None else fault.how])
        await asyncio.to_thread(self.proxy.resume)
        return time.monotonic()

    def _arm_for(self, what: What) -> None:
        if what != self._what:
            return
        self._before = dict(self.proxy.passed)
        fault, self._fault = self._fault, None
        if fault is not None:
            ending: Literal["reset", "blackhole"] = "reset" if fault.how == "cut" else "blackhole"
            self.proxy.cut_after(fault.direction, fault.byte, ending=ending)

    def _measure_for(self, what: What) -> None:
        if what == self._what:
            self.sizes.append({each: self.proxy.passed[each] - self._before[each] for each in DIRECTIONS})


@asynccontextmanager
async def open_lane(number: int, place: Place, what: What) -> AsyncIterator[Lane]:
    """A lane with its worker at work."""
    server = place.store if what == "commit" else place.broker
    async with AsyncExitStack() as stack:
        lane = Lane(number, place, what, stack.enter_context(Proxy(server.host, server.port)))
        for app in (lane.dispatcher, lane.worker):
            await stack.enter_async_context(app)
        worker = lane.worker.worker()
        working = asyncio.create_task(worker.run())
        try:
            yield lane
        finally:
            await worker.stop(grace=5.0)
            await working


def bytes_of(size: int, sample: int | None) -> list[int]:
    """All places where a cut can be: before the first byte, behind each. Or a sample, first and last among them."""
    if sample is None or size < sample:
        return list(range(size + 1))
    return sorted({size * number // (sample - 1) for number in range(sample)})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", ["publish", "commit"])
@pytest.mark.parametrize(("sample", "count"), [short(4, 8), full(None, 16)])
async def test_the_connection_fails_at_each_byte(
    servers: Servers, name: str, what: What, sample: int | None, count: int
) -> None:
    """Cut, held up, or silent for longer than the lease: each run is done, each step once unless its lease was lost."""
    with open_place(servers, name) as place:
        async with AsyncExitStack() as stack:
            lanes = [
                await stack.enter_async_context(open_lane(number, place, what)) for number in range(count)
            ]
            for number in range(5):
                await lanes[0].do(f"probe-{number}", None)
            sizes = {each: min(size[each] for size in lanes[0].sizes) for each in DIRECTIONS}
            faults = [
                Fault(how, direction, byte)
                for how in SILENCE
                for direction in DIRECTIONS
                for byte in bytes_of(sizes[direction], sample)
            ]
            left = iter(enumerate(faults))
            waits: dict[Fault, float] = {}

            async def work_off(lane: Lane) -> None:
                for number, fault in left:
                    waits[fault] = await lane.do(f"fault-{number}", fault)

            async with asyncio.TaskGroup() as group:
                for lane in lanes:
                    group.create_task(work_off(lane))
            executed = sum((lane.executed for lane in lanes), Counter())
            lost = sum((lane.lost for lane in lanes), Counter())
    slowest = max(waits, key=lambda fault: waits[fault])
    say(
        f"{name}: {len(faults)} faults at {sizes['to_server']} bytes of a {what} and {sizes['to_client']} of the "
        f"answer; {sum(executed.values()) - 2 * (len(faults) + 5)} repeats; slowest {slowest}: {waits[slowest]:.1f} s"
    )
    assert len(executed) == 2 * (len(faults) + 5)
    unexplained = {key: times for key, times in executed.items() if times > 1 + lost[key]}
    assert not unexplained
    assert waits[slowest] < BOUND
