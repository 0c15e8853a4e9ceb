"""The connection breaks, stalls and goes silent at each byte of a publish, of its confirm, and of a commit.

For each byte a run is dispatched, done and undone while a proxy does its worst at that place, once. Several lanes, each
with a proxy, a dispatcher and a worker, go on side by side, since most of the time is spent waiting for what was lost.
The places go beyond the longest exchange that was measured, and on until one really lay behind the end of its own: so
no byte is left out, should an exchange be longer than the sample.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import pytest
from tests.chaos.pace import Pace
from tests.chaos.places import NAMES, Place, Servers, open_place
from tests.chaos.sizes import full, say, short
from tests.kill.audit import audit
from tests.kill.roles import Loser, execute, keep_diary, steps_of
from tests.patience import PATIENCE
from tests.services.proxy import Direction, Proxy

from paigeant.activity import ActivityRegistry
from paigeant.app import Paigeant
from paigeant.context import StepContext
from paigeant.errors import NonRetryableError, StoreUnavailable
from paigeant.observer import Event
from paigeant.settings import Settings
from paigeant.slip import RunStatus, Step
from paigeant.workflow import Workflow

What = Literal["publish", "commit"]
How = Literal["cut", "delay", "blackhole"]

TIMES = {"lease": 1.0, "heartbeat": 0.2, "sweep_interval": 0.25, "grace": 0.5}
SILENCE: dict[How, float] = {"cut": 0.0, "delay": 0.1, "blackhole": TIMES["lease"] * 1.25}
"""For how many seconds nothing passes, from the byte on."""

PROBES = 5
"""Runs that are done without a fault, to see how long an exchange is."""

MARGIN = 24
"""So many bytes beyond the longest of these are tried, too."""

RUNS = range(1_000_003, 10_000_000, 10)
"""The numbers of runs: all fail at their end and are undone (`roles.steps_of`), and have ids of one length."""

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
        self.executed: Counter[tuple[str, str, bool]] = Counter()
        self.lost: Counter[tuple[str, str]] = Counter()
        self.hit = False
        """Whether the last fault came within the exchange, and not behind its end."""
        self.sizes: list[dict[Direction, int]] = []
        self._name = f"work{number}"
        self._what = what
        self._fault: Fault | None = None
        self._cuts = 0
        self._before = dict(proxy.passed)
        activity = self._activities()
        url = place.store_url if what == "commit" else place.transport_url
        through = {key: proxy.url(value) if value == url else value for key, value in place.settings.items()}
        far = Paigeant(Settings(**TIMES, **through), activities=activity, observers=[self, Loser()])
        near = Paigeant(Settings(**TIMES, **place.settings), activities=activity, observers=[self, Loser()])
        self.dispatcher, self.worker = (far, near) if what == "publish" else (near, far)
        self.near = near

    def _activities(self) -> ActivityRegistry:
        activity = ActivityRegistry()

        async def executed(context: StepContext, *, undo: bool = False) -> str:
            self.executed[context.workflow_id, context.step_id, undo] += 1
            return await execute(context, undo=undo)

        @activity.execute(name=f"work-{self._name}", topic=self._name)
        async def work(context: StepContext) -> str:
            if context.step_id == "s0":
                self._arm_for("commit")
            elif context.step_id == "s1":
                self._measure_for("commit")
            return await executed(context)

        @activity.compensate(f"work-{self._name}")
        async def unwork(context: StepContext, output: str) -> None:
            await executed(context, undo=True)

        @activity.execute(name=f"fail-{self._name}", topic=self._name)
        async def fail(context: StepContext) -> str:
            await executed(context)
            raise NonRetryableError("planned")

        return activity

    def observe(self, event: Event) -> None:
        """Note which steps were lost: they may be executed again."""
        if event.name in ("step.lost", "step.swept"):
            self.lost[event.workflow_id, event.step] += 1

    async def do(self, number: int, fault: Fault | None) -> float:
        """Have a run done while this happens. Gives after how many seconds all was well again."""
        self._fault = fault
        self._cuts = cuts = self.proxy.cuts
        run_id = f"r{number}"
        self._arm_for("publish")
        healing = asyncio.create_task(self._heal(cuts, fault))
        steps = [Step(f"{name}-{self._name}", id=f"s{place}") for place, name in enumerate(steps_of(number))]
        while True:
            try:
                await self.dispatcher.dispatch(Workflow("proxied", steps), workflow_id=run_id)
                break
            except StoreUnavailable:  # whoever isn't sure tries again
                await asyncio.sleep(0.05)
        self._measure_for("publish")
        result = await self.near.run(run_id).wait(timeout=PATIENCE)
        ended = time.monotonic()
        assert result.status is RunStatus.COMPENSATED
        if fault is None:
            healing.cancel()
            return 0.0
        if self.proxy.cuts == cuts:  # nothing has got as far as that byte
            healing.cancel()
            await asyncio.to_thread(self.proxy.resume)
            return 0.0
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
            self.hit = self.proxy.cuts > self._cuts
            self.sizes.append({each: self.proxy.passed[each] - self._before[each] for each in DIRECTIONS})


@dataclass
class Books:
    """Where the runs of a test are recorded, and their executions."""

    folder: Path
    store: str


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
    """All places where a cut can be: before the first byte, behind each, and some more. Or a sample of `size` bytes."""
    if sample is None:
        return list(range(size + MARGIN + 1))
    return sorted({size * number // (sample - 1) for number in range(sample)})


def by_kind(faults: Iterable[Fault]) -> list[list[Fault]]:
    """The faults of each kind in each direction."""
    kinds: dict[tuple[How, Direction], list[Fault]] = {}
    for fault in faults:
        kinds.setdefault((fault.how, fault.direction), []).append(fault)
    return list(kinds.values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", ["publish", "commit"])
@pytest.mark.parametrize(("sample", "count"), [short(4, 8), full(None, 16)])
async def test_the_connection_fails_at_each_byte(
    servers: Servers, pace: Pace, tmp_path: Path, name: str, what: What, sample: int | None, count: int
) -> None:
    """Cut, held up, or silent for longer than the lease: each run is done and undone, once unless a lease was lost."""
    keep_diary(tmp_path)
    with open_place(servers, name) as place:
        async with AsyncExitStack() as stack:
            lanes = [
                await stack.enter_async_context(open_lane(number, place, what)) for number in range(count)
            ]
            for number in RUNS[:PROBES]:
                await lanes[0].do(number, None)
            sizes = {each: max(size[each] for size in lanes[0].sizes) for each in DIRECTIONS}
            faults = [
                Fault(how, direction, byte)
                for how in SILENCE
                for direction in DIRECTIONS
                for byte in bytes_of(sizes[direction], sample)
            ]
            left, numbers = iter(faults), iter(RUNS[PROBES:])
            waits: dict[Fault, float] = {}
            hits: set[Fault] = set()

            async def suffer(lane: Lane, fault: Fault) -> None:
                waits[fault] = await lane.do(next(numbers), fault)
                if lane.hit:
                    hits.add(fault)

            async def work_off(lane: Lane) -> None:
                for fault in left:
                    await suffer(lane, fault)

            async with asyncio.TaskGroup() as group:
                for lane in lanes:
                    group.create_task(work_off(lane))
            if sample is None:
                for fault in [max(each) for each in by_kind(faults)]:
                    while fault in hits:
                        fault = fault._replace(byte=fault.byte + 1)
                        await suffer(lanes[0], fault)
        runs = RUNS[: PROBES + len(waits)]
        repeats = audit(Books(tmp_path, place.store_url), runs=runs, killed={os.getpid()})
        executed = sum((lane.executed for lane in lanes), Counter())
        lost = sum((lane.lost for lane in lanes), Counter())
    slowest = max(waits, key=lambda fault: waits[fault])
    say(
        f"{name}: {len(waits)} faults at {sizes['to_server']} bytes of a {what} and {sizes['to_client']} of the "
        f"answer, {len(hits)} within it; {repeats} repeats; slowest {slowest}: {waits[slowest]:.1f} s"
    )
    unexplained = {key: times for key, times in executed.items() if times > 1 + lost[key[:2]]}
    assert not unexplained
    assert waits[slowest] < TIMES["lease"] + TIMES["sweep_interval"] + pace.seconds(5.0)
