"""A small world in one process and in virtual time: real workers and dispatchers on adapters that betray them.

Each call that a worker makes to the store or the transport passes its `Node`, before and after the effect. There the
seed decides whether the node dies (from then on its calls hang for ever and do nothing, whatever cleaning up it tries),
freezes for longer than its lease and goes on, waits a little, or gets no answer though the effect was had.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextvars import Context, ContextVar
from types import SimpleNamespace
from typing import Any
from unittest import mock

from tests.simulation.loop import Stalled, VirtualLoop
from tests.simulation.plan import UNDO_ATTEMPTS, Behaviour, Plan, RunPlan, plan
from tests.simulation.watch import Violation, Watch, judge_end, need

from paigeant.activity import ActivityRegistry
from paigeant.claim import Limits
from paigeant.context import StepContext
from paigeant.control import Control
from paigeant.dispatcher import Dispatcher
from paigeant.errors import (
    InvalidTransition,
    NonRetryableError,
    RunNotFound,
    StoreUnavailable,
    TransportUnavailable,
)
from paigeant.forwarder import Forwarder
from paigeant.heartbeat import Heartbeat
from paigeant.message import PaigeantMessage
from paigeant.observer import Event, Observers
from paigeant.retry import RetryPolicy
from paigeant.slip import RUN_ENDED, Phase, RunStatus, StepStatus
from paigeant.store import Refused, StepKey, StepRecord
from paigeant.stores.memory import MemoryStore
from paigeant.transports.memory import MemoryTransport
from paigeant.worker import ActivityWorker

__all__ = ["World", "play"]

LEASE, HEARTBEAT, SWEEP, GRACE = 3.0, 1.0, 0.7, 1.5
HORIZON = 120.0
"""Seconds that are enough for any run of a plan to end once no fault hits any more."""

TOPICS = ("left", "right")
GARBAGE = b'{"spec_version": "1.0", "spec_version": "1.0"}'
BEGINNING = 1_800_000_000.0

NODE: ContextVar[Node] = ContextVar("node")
"""The node that the current task belongs to."""


class Node:
    """A process, as far as faults know one: a worker, or a client that dispatches."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.dead = False
        self.frozen_until = 0.0
        self.troubled = False
        self.leaving = False
        self.died: asyncio.Future[None] = world.loop.create_future()
        self.worker: ActivityWorker | None = None
        self.active = 0
        self.owed: dict[str, int] = {}
        self.unacked_claims: dict[StepKey, int] = {}
        self.recorded: set[tuple[StepKey, int]] = set()

    def kill(self) -> None:
        """From now on nothing it does has any effect."""
        if not self.dead:
            self.world.tell(self, "DIES")
            self.dead = self.troubled = True
            self.died.set_result(None)

    def freeze(self, seconds: float) -> None:
        """It does nothing for so long, and then goes on as if nothing had happened."""
        self.world.tell(self, f"FREEZES for {seconds:.1f}")
        self.troubled = True
        self.frozen_until = max(self.frozen_until, self.world.loop.time() + seconds)

    @property
    def blocked(self) -> bool:
        """Whether nothing reaches it now."""
        return self.dead or self.frozen_until > self.world.loop.time()

    async def gate(self) -> None:
        """A moment at which anything can happen to it."""
        world, faults = self.world, self.world.faults
        if faults is not None and not self.dead:
            chance = world.rng.random()
            if chance < faults.crash:
                self.kill()
            elif chance < faults.crash + faults.pause and self.worker is not None:
                self.freeze(world.rng.uniform(0.5, 3.0) * LEASE)
            elif chance > 1 - faults.delay:
                await asyncio.sleep(world.rng.random() * 0.1)
        await self.thaw()

    async def thaw(self) -> None:
        """Wait until it isn't frozen; for ever when it is dead."""
        while (left := self.frozen_until - self.world.loop.time()) > 0:  # noqa: ASYNC110  # it may change meanwhile
            await asyncio.sleep(min(left, 0.5))
        if self.dead:
            await self.world.limbo()

    async def stay(self, seconds: float) -> None:
        """Work for so long."""
        await asyncio.sleep(seconds)
        await self.thaw()

    async def call(
        self,
        operation: str,
        effect: Callable[[], Awaitable[Any]],
        *,
        check: Callable[[Any], None] | None = None,
    ) -> Any:
        """Have an effect on the store, or not, and get an answer, or not."""
        world = self.world
        await self.gate()
        if self.worker is not None and self._hit("refuse"):
            self.troubled |= operation in ("release_steps", "sign_off")
            raise StoreUnavailable("not now")
        answer: Any = None
        error: Exception | None = None
        try:
            answer = await effect()
        except (InvalidTransition, RunNotFound) as exc:
            error = exc
        except AssertionError as exc:  # the store itself has seen that something is wrong
            world.judge(_fail, f"the store, asked to {operation}: {exc}")
            raise
        world.looked(self, operation, answer if error is None else error)
        if check is not None:
            world.judge(check, answer)
        await self.gate()
        if self._hit("lose_answer"):
            self.troubled = True
            raise StoreUnavailable("the answer is lost")
        if error is not None:
            raise error
        return answer

    def _hit(self, fault: str) -> bool:
        faults = self.world.faults
        likely = 0.0 if faults is None else getattr(faults, fault)
        return bool(likely and self.world.rng.random() < likely)


class NodeStore:
    """The store as a node sees it."""

    publishes = False

    def __init__(self, node: Node) -> None:
        self._node = node
        self._store = node.world.store
        self.grace = self._store.grace

    def __getattr__(self, operation: str) -> Callable[..., Awaitable[Any]]:
        method = getattr(self._store, operation)

        async def call(*args: Any, **options: Any) -> Any:
            return await self._node.call(operation, lambda: method(*args, **options))

        setattr(self, operation, call)
        return call

    async def claim_step(self, request: Any) -> Any:
        def check(answer: Any) -> None:
            claims = self._node.unacked_claims
            claims[request.key] = claims.get(request.key, 0) + 1

        return await self._node.call("claim_step", lambda: self._store.claim_step(request), check=check)

    async def record_step_result(self, result: Any, posting: Any = None) -> Any:
        before: list[StepRecord | None] = []

        async def effect() -> Any:
            before.append(self._store._steps.get(result.key.workflow_id, {}).get(result.key))
            return await self._store.record_step_result(result, posting)

        def check(answer: Any) -> None:
            old, new = before[0], self._store._steps[result.key.workflow_id].get(result.key)
            held = old is not None and (old.epoch, old.worker) == (result.epoch, result.worker)
            succeeded = result.status in (StepStatus.COMPLETED, StepStatus.SKIPPED, StepStatus.COMPENSATED)
            mine = (result.key, result.epoch)
            if isinstance(answer, Refused):
                need(old is new, "I8 refused, and yet it changed", result.key)
                if answer.reason == "arrived":  # the worker goes on with it at once
                    went_back = self._node.world.watch.went_back
                    went_back[result.key] = went_back.get(result.key, 0) + 1
                return
            again = mine in self._node.recorded
            need(old is not new or again, "I2 said to be recorded, but wasn't", mine, result.status, old)
            need(held or again or succeeded, "I8 a stale failure took effect", result, old)
            need(held or again or not result.strict, "I8 a stale result took effect", result, old)
            self._node.recorded.add(mine)

        return await self._node.call("record_step_result", effect, check=check)

    def on_turn(self, heard: Callable[[], None]) -> Callable[[], None]:
        return self._store.on_turn(lambda: None if self._node.blocked else heard())


class NodeTransport:
    """The transport as a node sees it."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._transport = node.world.transport

    async def publish(self, topic: str, message: PaigeantMessage, *, delay: float = 0) -> None:
        node, transport = self._node, self._transport
        await node.gate()
        if node._hit("drop"):
            if node.world.rng.random() < 0.5:
                raise TransportUnavailable("not now")
            return
        await transport.publish(topic, message, delay=delay)
        node.world.tell(node, f"publishes {message.message_id} in {delay:.1f}")
        node.world.published(topic, message.message_id)
        await node.gate()

    async def subscribe(self, topic: str, *, prefetch: int = 1) -> AsyncIterator[PaigeantMessage]:
        node, transport = self._node, self._transport
        await node.gate()
        inner = transport.subscribe(topic, prefetch=prefetch)
        async with contextlib.aclosing(inner):  # type: ignore[type-var]
            async for message in inner:
                await node.gate()
                for _ in range(2 if node._hit("twice") else 1):
                    node.owed[message.message_id] = node.owed.get(message.message_id, 0) + 1
                    node.world.tell(node, f"gets {message.message_id}")
                    yield message

    async def ack(self, message_id: str) -> None:
        node = self._node
        await node.gate()
        node.world.judge(node.world.check_ack, node, message_id)
        await self._transport.ack(message_id)
        node.owed[message_id] = node.owed.get(message_id, 0) - 1
        node.world.tell(node, f"acks {message_id}")
        await node.gate()
        if node._hit("drop"):
            raise TransportUnavailable("the connection broke")

    async def nack(self, message_id: str, *, delay: float = 0) -> None:
        node = self._node
        await node.gate()
        await self._transport.nack(message_id, delay=delay)
        node.owed[message_id] = node.owed.get(message_id, 0) - 1
        node.world.tell(node, f"nacks {message_id} for {delay:.1f}")
        await node.gate()


class Broker(MemoryTransport):
    """The memory transport, that gives nothing to the dead and the frozen."""

    def __init__(self, clock: Any) -> None:
        super().__init__(clock=clock)
        # Sets of events are walked through in the order of their addresses; these keep the order of their making.
        self._wakers = Ordered()

    def _take(self, topic: str) -> str | None:
        return None if NODE.get().blocked else super()._take(topic)

    async def _sleep(self, topic: str, waker: asyncio.Event) -> None:
        await NODE.get().thaw()
        await super()._sleep(topic, waker)

    def redeliver(self) -> None:
        """Have all that was delivered and not yet acked delivered once more."""
        for message_id, held in self._messages.items():
            self._give_back(message_id, held, self.clock.now())
        self.wake()


class Ordered(dict[str, Any]):
    """For each topic, its wakers in the order in which they came."""

    class Wakers(dict[Any, None]):
        def add(self, waker: Any) -> None:
            self[waker] = None

        def discard(self, waker: Any) -> None:
            self.pop(waker, None)

    def setdefault(self, topic: str, default: Any = None) -> Any:
        return super().setdefault(topic, Ordered.Wakers())


class TaskHeartbeat(Heartbeat):
    """The heartbeat as a task in virtual time in place of its thread, with the time that a thread would take."""

    node: Node

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._due = asyncio.Event()
        await self._beat(frozenset())
        self._task = asyncio.create_task(self._run_in_loop())

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def soon(self) -> None:
        self._due.set()

    async def _run_in_loop(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.interval):
                    await self._due.wait()
            self._due.clear()
            with contextlib.suppress(StoreUnavailable):
                self._ask_loop()
                await self._beat(frozenset(self._running()))

    async def _beat(self, running: Any) -> None:
        async def effect() -> None:
            self._beat_once(running)

        await self.node.call("beat", effect)


class World:
    """All that a seed plays, and what was seen of it."""

    def __init__(self, seed: int, *, trace: Callable[[str], None] | None = None) -> None:
        self.rng = random.Random(seed)
        self.plan: Plan = plan(self.rng)
        self.faults = self.plan.faults
        self.loop = VirtualLoop()
        self.trace = trace
        self.store = MemoryStore(clock=self, grace=GRACE, inline_bytes=self.plan.inline_bytes)
        self.transport = Broker(self)
        self.transport.bury_with(self.store.bury)
        self.nodes: list[Node] = []
        self.by_id: dict[str, Node] = {}
        self.runs = {run.id: run for run in self.plan.runs}
        self.executions: dict[StepKey, int] = {}
        self.cancelled: set[str] = set()
        self.sent: set[tuple[str, str]] = set()
        self.cancelling: list[asyncio.Task[None]] = []
        self.leaving: list[asyncio.Future[None]] = []
        self.merciful: set[str] = set()
        self.mail: list[tuple[str, str, bytes]] = []
        self.violation: BaseException | None = None
        self.done = asyncio.Event()
        self.dispatched: set[str] = set()
        self._limbo: asyncio.Future[None] = self.loop.create_future()
        self.watch = Watch(
            now=self.now, grace=GRACE, attempts=self.most_attempts, inline_bytes=self.plan.inline_bytes
        )
        self.tell(None, f"{self.plan}")

    def now(self) -> float:
        """The time on the clock of the store."""
        return BEGINNING + self.loop.time()

    def tell(self, node: Node | None, what: str) -> None:
        """Note it, when somebody reads along."""
        if self.trace is not None:
            self.trace(f"{self.loop.time():8.3f} {node.name if node else '':8} {what}")

    async def limbo(self) -> None:
        """Where the calls of the dead are, until the world ends."""
        await asyncio.shield(self._limbo)
        raise asyncio.CancelledError

    # -- judging

    def judge(self, check: Callable[..., None], *args: Any) -> None:
        """Keep the first violation and end the world by it."""
        if self.violation is None:
            try:
                check(*args)
            except (Violation, AssertionError) as exc:
                self.violation = exc
                self.tell(None, f"VIOLATION {exc}")
                self.done.set()

    def looked(self, node: Node, operation: str, answer: Any) -> None:
        """An effect was had on the store."""
        if self.trace is not None and operation not in ("now", "list_workers", "load_run"):
            self.tell(node, f"{operation} -> {answer}")
        self.judge(self.watch.look, self.store, operation)
        for row, by in self.watch.freed:
            self.judge(self._check_freed, row, by, node)
        self.watch.freed.clear()

    def _check_freed(self, row: StepRecord, operation: str, by: Node) -> None:
        """I16: a step is only taken from a worker that died, froze, was cut off from the store, or leaves."""
        holder = self.by_id[row.worker or ""]
        fair = holder.troubled or (holder.leaving and operation in ("release_steps", "sign_off"))
        need(fair, "I16", operation, "took from a healthy worker", row.key, holder.name)

    def most_attempts(self, key: StepKey) -> int:
        """The attempts that the step may have."""
        if key.phase is Phase.UNDO:
            return UNDO_ATTEMPTS
        behaviour = self.runs[key.workflow_id].steps.get(key.step)
        return DEFAULT.attempts if behaviour is None else behaviour.attempts

    def check_ack(self, node: Node, message_id: str) -> None:
        """I10: no ack before the store has given an answer to the claim that the message asks for."""
        run_id, step, phase, _ = message_id.split("/")
        key = StepKey(run_id, step, Phase(phase))
        left = node.unacked_claims[key] = node.unacked_claims.get(key, 0) - 1
        need(left >= 0, "I10 acked before its step was claimed:", message_id)

    def published(self, topic: str, message_id: str) -> None:
        """Keep a copy of the message, to be delivered again at the wrong time."""
        self.mail.append((topic, message_id, self.transport._messages[message_id].body))

    # -- what activities do

    async def execute(
        self, context: StepContext, seen: dict[str, Any], *, undo: bool, output: Any = None
    ) -> Any:
        """An execution of a step or its undo: note it, take some time, and end as planned."""
        node = NODE.get()
        await node.thaw()
        key = StepKey(context.workflow_id, context.step_id, Phase.UNDO if undo else Phase.DO)
        run = self.runs[key.workflow_id]
        behaviour = run.steps.get(key.step, DEFAULT)
        number = self.executions[key] = self.executions.get(key, 0) + 1
        self.tell(node, f"executes {key} attempt {context.attempt}, the {number}. time")
        self.judge(self._check_execution, node, key, context, seen, output)
        fails = behaviour.undo_fails if undo else behaviour.fails
        fail = run.id not in self.merciful and (fails < 0 or context.attempt <= fails)
        late = fail and behaviour.kind == "slow" and not undo
        if run.cancelled_in == key.step and not undo and number == 1 and run.id not in self.merciful:
            self.cancelling.append(self.loop.create_task(self._until_cancelled(run), context=Context()))
        node.active += 1
        try:
            most = 0.4 if behaviour.kind == "slow" else 2.0
            await node.stay(5.0 if late else min(most, self.rng.choice((0.0, 0.0, 0.0, 0.1, 0.1, 0.4, 2.0))))
        finally:
            node.active -= 1
        if fail:
            raise RuntimeError("planned")
        if behaviour.kind == "doomed" and not undo and run.id not in self.merciful:
            raise NonRetryableError("planned")
        if undo:
            return None
        if behaviour.kind == "waiter":
            value = await context.wait_for(f"go {key.step}")
            self.judge(lambda: need(value == key.step, "I2 another signal's value", key, value))
        if behaviour.kind == "sleeper":
            await context.sleep(self.rng.choice((0.3, 1.5, 4.0)))
        token = f"{key.step}#{number}"
        if number % 2:
            await context.save_variable(f"v_{key.step}", token)
        if behaviour.kind == "reviser":
            context.insert("work")
        if behaviour.kind == "ender":
            context.terminate()
        return token

    def _check_execution(
        self, node: Node, key: StepKey, context: StepContext, seen: dict[str, Any], output: Any
    ) -> None:
        rows = self.store._steps[key.workflow_id]
        row = rows.get(key)
        counted = row is None or row.attempt >= context.attempt or row.epoch > context.attempt
        need(counted, "I9 an attempt that was not counted", key, context.attempt, row)
        need(context.attempt <= self.most_attempts(key), "I9 too many attempts", key, context.attempt)
        assert node.worker is not None
        need(node.active < node.worker.concurrency, "I15 too many at once on", node.name, node.active)
        if key.phase is Phase.UNDO:
            done = rows[key._replace(phase=Phase.DO)]
            need(done.output == f'"{output}"'.encode(), "I6 undone with", output, "recorded", done.output)
            return
        before = {
            r.step: r for r in rows.values() if r.phase is Phase.DO and (row is None or r.seq < row.seq)
        }
        for step, earlier in before.items():
            if earlier.output is not None and self.plan.inline_bytes:
                found = f'"{seen.get(step)}"'.encode()
                need(found == earlier.output, "I3", key, "was given", found, "recorded is", earlier.output)

    # -- nodes

    def start_worker(self) -> None:
        """A new worker process starts."""
        node = Node(self, f"w{len(self.by_id)}")
        store, transport = NodeStore(node), NodeTransport(node)
        forwarder = Forwarder(store, transport, ACTIVITIES, inline_bytes=self.plan.inline_bytes)  # type: ignore[arg-type]
        limits = Limits(
            retry=RetryPolicy(attempts=DEFAULT.attempts, base=0.2, cap=0.8),
            local_steps=self.plan.local_steps,
            inline_bytes=self.plan.inline_bytes,
            persist=LEASE,
        )
        worker = ActivityWorker(
            store,  # type: ignore[arg-type]
            transport,  # type: ignore[arg-type]
            ACTIVITIES,
            forwarder,
            concurrency=self.plan.concurrency,
            topics=TOPICS,
            lease=LEASE,
            heartbeat=HEARTBEAT,
            sweep_interval=SWEEP,
            shutdown_grace=0.2,
            limits=limits,
            observers=Observers([self._Teller(node)] if self.trace else []),
            chance=self.rng.random,
        )
        beat = TaskHeartbeat(
            self.store,
            worker.heartbeat.worker,
            lease=LEASE,
            interval=HEARTBEAT,
            running=worker.heartbeat._running,
            lose=worker.heartbeat._lose,
        )
        beat.node = node
        worker.heartbeat = beat
        node.worker = worker
        self.nodes.append(node)
        self.by_id[worker.id] = node
        self.tell(node, f"starts as {worker.id}")
        node.task = asyncio.create_task(self._live(node))  # type: ignore[attr-defined]

    class _Teller:
        def __init__(self, node: Node) -> None:
            self.node = node

        def observe(self, event: Event) -> None:
            error = f" {event.error}" if event.error else ""
            self.node.world.tell(self.node, f"  {event.name} {event.workflow_id}/{event.step}{error}")

    async def _live(self, node: Node) -> None:
        assert node.worker is not None
        NODE.set(node)
        running = asyncio.create_task(node.worker.run())
        await asyncio.wait({running, node.died}, return_when=asyncio.FIRST_COMPLETED)
        self.nodes.remove(node)
        if not node.dead:
            self.judge(_check_error, "a worker", running)  # one that can't sign on says so and ends
        await asyncio.sleep(self.rng.uniform(0.05, 1.5))
        if len(self.nodes) < self.plan.workers:
            self.start_worker()

    async def _leave(self, node: Node) -> None:
        """A worker is asked to stop, as a deployment does."""
        node.leaving = True
        self.tell(node, "LEAVES")
        assert node.worker is not None
        await node.worker.stop(grace=self.rng.choice((0.0, 0.1, 1.0)))
        self.tell(node, "has left")
        if not node.troubled:
            self.judge(self._check_left, node)

    def _check_left(self, node: Node) -> None:
        assert node.worker is not None
        held = [row for row in self.store.rows(StepStatus.RUNNING) if row.worker == node.worker.id]
        need(not held, "I16 left with steps in its hands", held)

    # -- what happens from outside

    async def _client(self, run: RunPlan) -> None:
        """Dispatch the run, again and again until it is said to be started; a client may die as well."""
        await asyncio.sleep(run.begins)
        while run.id not in self.dispatched:
            await self._as_client(lambda dispatcher, _: self._dispatch(dispatcher, run))
            await asyncio.sleep(0.2)
        if run.cancelled_after is not None:
            await asyncio.sleep(run.cancelled_after)
            await self._until_cancelled(run)

    async def _sender(self, run: RunPlan, name: str) -> None:
        """Send a signal at some moment, and again while it isn't known whether it is kept: it may come twice."""
        await asyncio.sleep(self.rng.choice((0.0, 0.5, 2.0, 5.0)) * self.rng.random())
        while (run.id, name) not in self.sent:
            await self._as_client(lambda _, control: self._send(control, run, name))
            await asyncio.sleep(0.2)

    async def _send(self, control: Control, run: RunPlan, name: str) -> None:
        try:
            await control.signal(run.id, name, name.removeprefix("go "))
        except RunNotFound:
            return
        except InvalidTransition:
            pass  # it has ended
        self.sent.add((run.id, name))

    async def _until_cancelled(self, run: RunPlan) -> None:
        while run.id not in self.cancelled:
            await self._as_client(lambda _, control: self._cancel(control, run))
            await asyncio.sleep(0.2)

    async def _as_client(self, act: Callable[[Dispatcher, Control], Awaitable[None]]) -> None:
        node = Node(self, "client")
        store, transport = NodeStore(node), NodeTransport(node)
        forwarder = Forwarder(store, transport, ACTIVITIES, inline_bytes=self.plan.inline_bytes)  # type: ignore[arg-type]
        dispatcher = Dispatcher(store, forwarder, ACTIVITIES)  # type: ignore[arg-type]
        control = Control(store, forwarder)  # type: ignore[arg-type]
        task = asyncio.ensure_future(act(dispatcher, control))
        await asyncio.wait({task, node.died}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            self.judge(_check_error, "a client", task)

    async def _dispatch(self, dispatcher: Dispatcher, run: RunPlan) -> None:
        await dispatcher.dispatch(run.workflow, {"go": True}, workflow_id=run.id)
        self.judge(lambda: need(run.id in self.store._runs, "I1 dispatched, but not there", run.id))
        self.dispatched.add(run.id)

    async def _cancel(self, control: Control, run: RunPlan) -> None:
        with contextlib.suppress(InvalidTransition):
            await control.cancel(run.id)
        self.cancelled.add(run.id)

    async def _retry(self, control: Control, run: RunPlan) -> None:
        with contextlib.suppress(InvalidTransition):
            await control.retry(run.id)

    async def _chaos(self) -> None:
        """What happens to the transport and to processes at no particular moment."""
        rng, faults, transport = self.rng, self.plan.faults, self.transport
        while self.faults is not None:
            await asyncio.sleep(0.5)
            if self.faults is None:
                return
            if rng.random() < faults.replay and self.mail:
                topic, message_id, body = rng.choice(self.mail)
                self.tell(None, f"REPLAYS {message_id}")
                transport.put(topic, message_id, body, delay=rng.choice((0.0, 0.3)))
            if rng.random() < faults.wipe:
                self.tell(None, "WIPES the transport")
                transport._messages.clear()
            if rng.random() < faults.redeliver:
                transport.redeliver()
            if self.nodes and rng.random() < faults.kill:
                rng.choice(self.nodes).kill()
            if self.nodes and rng.random() < faults.restart:
                node = rng.choice(self.nodes)
                if not node.leaving and node.worker is not None and node.worker.id in self.store._workers:
                    self.leaving.append(asyncio.ensure_future(self._leave(node)))

    # -- the whole

    async def run(self) -> None:
        """Play the plan; afterwards `violation` says what was wrong."""
        main = asyncio.ensure_future(self._story())
        ended = asyncio.ensure_future(self.done.wait())
        await asyncio.wait({main, ended}, return_when=asyncio.FIRST_COMPLETED)
        if main.done() and (error := main.exception()) is not None and self.violation is None:
            self.violation = error

    async def _story(self) -> None:
        if self.plan.garbage:
            self.transport.put(TOPICS[0], "garbage", GARBAGE)
        for _ in range(self.plan.workers):
            self.start_worker()
        clients = [asyncio.ensure_future(self._client(run)) for run in self.plan.runs]
        clients += [
            asyncio.ensure_future(self._sender(run, name)) for run in self.plan.runs for name in run.signals
        ]
        chaos = asyncio.ensure_future(self._chaos())
        await asyncio.sleep(self.plan.faulty_for)
        self.heal()
        await asyncio.gather(chaos, *clients, *self.cancelling)
        await self._until_ended()
        self.judge(self._check_end)
        await self._operate()
        if self.violation is None:
            await self._stop_all()
            self.judge(self._check_put_away)

    def heal(self) -> None:
        """From now on no fault hits, and who was frozen goes on."""
        self.tell(None, "FAULTS END")
        self.faults = None  # type: ignore[assignment]
        for node in self.by_id.values():
            node.frozen_until = min(node.frozen_until, self.loop.time())
        if not self.nodes:
            self.start_worker()

    async def _until_ended(self) -> None:
        until = self.loop.time() + HORIZON
        while any(run.status not in RUN_ENDED for run in self.store._runs.values()):
            if self.loop.time() > until:
                self.judge(judge_end, self.store)
                return
            await asyncio.sleep(0.25)

    async def _operate(self) -> None:
        """An operator takes up what failed, and it ends again: for good, as all have a lease again by then."""
        await asyncio.sleep(LEASE)
        for run in self.plan.runs:
            status = self.store._runs[run.id].status
            if not run.retried or status not in (RunStatus.FAILED, RunStatus.COMPENSATION_FAILED):
                continue
            self.merciful.add(run.id)
            self.tell(None, f"RETRIES {run.id}")
            for topic, message_id, body in self.mail:
                # What was sent before the retry comes once more, some of it before what is sent now, or in its place.
                if message_id.startswith(f"{run.id}/") and self.rng.random() < 0.5:
                    self.transport.put(topic, message_id, body, delay=self.rng.choice((0.2, 0.2, 0.5)))
            await self._as_client(lambda _, control, run=run: self._retry(control, run))  # type: ignore[misc]
            for name in run.signals:  # sent while it had ended, they weren't kept
                await self._as_client(lambda _, control, args=(run, name): self._send(control, *args))  # type: ignore[misc]
            await self._until_ended()
            ended = self.store._runs[run.id]
            wanted = {
                RunStatus.FAILED: (RunStatus.COMPLETED,),
                RunStatus.COMPENSATION_FAILED: (RunStatus.COMPENSATED, RunStatus.CANCELLED),
            }[status]
            self.judge(lambda: need(ended.status in wanted, "I1 retried", run.id, ended.status, ended.error))  # noqa: B023

    async def _stop_all(self) -> None:
        for node in list(self.nodes):
            if not node.leaving:
                await self._leave(node)

    def _check_end(self) -> None:
        for run in self.plan.runs:
            record = self.store._runs[run.id]
            for row in self.store._steps[run.id].values():
                self._check_count(row)
            if not run.cancelled:
                need(record.ending != "cancelled", "I5 cancelled by nobody", run.id)
            if self.plan.faults.calm and run.predictable:
                need(
                    record.status is run.ends(),
                    "I1",
                    run.id,
                    "ended",
                    record.status,
                    "expected",
                    run.ends(),
                    record,
                )
        buried = self.store._letters.get("garbage")
        need(buried is None or buried.body == GARBAGE, "I13 a dead letter's bytes", buried)
        somewhere = buried is not None or "garbage" in self.transport._messages
        need(somewhere or not self.plan.garbage or bool(self.plan.faults.wipe), "I13 garbage was not kept")

    def _check_count(self, row: StepRecord) -> None:
        """I16: executions are at most the claims that were let run; each but the last was failed or taken away."""
        executed = self.executions.get(row.key, 0)
        # A result that stands, and one execution for each time that the step went back to ready.
        most = 1 + self.watch.went_back.get(row.key, 0)
        need(executed <= most, "I16", row.key, "was executed", executed, "times; explained are", most)

    def _check_put_away(self) -> None:
        for node in self.by_id.values():
            if not node.troubled and not node.leaving:
                owed = {message: count for message, count in node.owed.items() if count > 0}
                need(not owed, "I12 delivered, and neither acked nor given back", owed)

    def end(self) -> None:
        """Let everything that is left unravel, without any effect."""
        self.violation = self.violation or None
        for node in [*self.by_id.values()]:
            node.dead = True
        if not self._limbo.done():
            self._limbo.set_result(None)
        for _ in range(5):
            tasks = asyncio.all_tasks(self.loop)
            if not tasks:
                break
            for task in tasks:
                task.cancel()
            self.loop.run_until_complete(asyncio.wait(tasks, timeout=1.0))
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()


def _fail(text: str) -> None:
    raise Violation(text)


def _check_error(who: str, task: asyncio.Future[None]) -> None:
    error = None if task.cancelled() else task.exception()
    fair = error is None or isinstance(error, (StoreUnavailable, TransportUnavailable))
    need(fair, who, "ended by", repr(error))


# -- the activities that all plans use

ACTIVITIES = ActivityRegistry()
DEFAULT = Behaviour("work", 4)
_UNDO = RetryPolicy(attempts=UNDO_ATTEMPTS, base=0.2, cap=0.8)
_playing: list[World] = []


def _define(kind: str, topic: str, **options: Any) -> None:
    async def execute(context: StepContext, **seen: Any) -> Any:
        return await _playing[-1].execute(context, seen, undo=False)

    async def undo(context: StepContext, output: Any) -> None:
        await _playing[-1].execute(context, {}, undo=True, output=output)

    ACTIVITIES.execute(kind, topic=topic, **options)(execute)
    if Behaviour(kind, 1).compensable:
        ACTIVITIES.compensate(kind, retries=_UNDO)(undo)


_define("work", "left")
_define("bare", "right")
_define("flaky", "left")
_define("strict", "right", strict_fencing=True)
_define("bounded", "right", concurrency=1)
_define("reviser", "right")
_define("slow", "left", timeout=0.8)
_define("doomed", "right")
_define("ender", "left")
_define("waiter", "right")
_define("sleeper", "left")
ACTIVITIES.check()


@contextlib.contextmanager
def virtual(world: World) -> Iterator[None]:
    """The engine reads the world's clocks, and chance comes from the seed."""
    clock = SimpleNamespace(monotonic=world.loop.time)
    chance = SimpleNamespace(random=world.rng.random, uniform=world.rng.uniform)
    names = SimpleNamespace(token_hex=lambda _: f"{len(world.by_id):06}")
    logging.disable(logging.CRITICAL)
    _playing.append(world)
    try:
        with (
            mock.patch("paigeant.claim.time", clock),
            mock.patch("paigeant.executor.time", clock),
            mock.patch("paigeant.heartbeat.time", clock),
            mock.patch("paigeant.patience.time", clock),
            mock.patch("paigeant.sweeper.time", clock),
            mock.patch("paigeant.worker.random", chance),
            mock.patch("paigeant.worker.secrets", names),
            mock.patch("paigeant.worker.time", clock),
            mock.patch("paigeant.transports.memory._LOOK_SECONDS", 0.25),
        ):
            yield
    finally:
        _playing.pop()
        logging.disable(logging.NOTSET)


def play(seed: int, *, trace: Callable[[str], None] | None = None) -> BaseException | None:
    """Play the seed; gives the first violation, None when there was none. The same seed does the same each time."""
    world = World(seed, trace=trace)
    with virtual(world):
        try:
            world.loop.run_until_complete(world.run())
        except Stalled as exc:
            return exc
        finally:
            with contextlib.suppress(Stalled):
                world.end()
    return world.violation
