"""Two stores, side by side, in whatever order things happen: they give the same answers and hold the invariants.

The rules are what can happen to a store: dispatches, messages that come late, twice and out of order, results fresh and
stale, crashes, leases that run out, sweeps, operators, a clock that jumps. What a worker believes of a run when it
records a result is what it knew when it claimed, as in a message.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.integration.postgres_tables import database_with_tables, empty
from tests.property.attempts import ATTEMPTS, INLINE, WAITS, Held, attempted
from tests.simulation.watch import Watch

from paigeant import folding
from paigeant.errors import PaigeantError
from paigeant.slip import RoutingSlip, RunStatus, Step, StepStatus
from paigeant.store import (
    REQUEST_SIGNAL,
    ClaimRequest,
    DeadLetter,
    Grant,
    NextStep,
    Recorded,
    Request,
    RunRecord,
    StepKey,
    StepRecord,
    StepResult,
    Store,
    WorkerRecord,
)
from paigeant.stores import open_store

LEASE, GRACE = 30.0, 10.0
WORKERS = tuple(WorkerRecord(f"w{n}", "host", f"{n}@1") for n in range(3))
RUNS = ("r0", "r1", "r2")
GOES_ON = (StepStatus.READY, StepStatus.WAITING)
"""How an attempt ends that isn't the step's last."""
EXAMPLES = int(os.environ.get("PAIGEANT_TEST_EXAMPLES", "40"))

numbers = st.integers(min_value=0, max_value=7)
"""Chooses one of what there is at that moment, of the newest."""


class Hand:
    """A clock that is set by hand, the same for both stores."""

    def __init__(self) -> None:
        self.instant = 1_800_000_000.0

    def now(self) -> float:
        return self.instant


class StoresAgree(RuleBasedStateMachine):
    """Does the same to both stores."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.folder = tempfile.TemporaryDirectory()
        self.clock = Hand()
        self.stores: tuple[Store, Store] = (self.store("memory://"), self.store(self.place()))
        self.done(self.stores[1].connect())
        self.held: list[Held] = []
        self.letters: list[StepKey] = []
        self.known: list[str] = []
        self.settled: set[tuple[StepKey, int]] = set()
        self.watch = Watch(
            now=self.clock.now, grace=GRACE, attempts=lambda key: ATTEMPTS, inline_bytes=INLINE
        )

    def place(self) -> str:
        """The url of the second store, which is empty."""
        return f"sqlite:///{Path(self.folder.name) / 'runs.db'}"

    def store(self, url: str) -> Store:
        """A store whose time is set by hand."""
        return open_store(url, clock=self.clock, grace=GRACE, inline_bytes=INLINE)

    def teardown(self) -> None:
        self.done(self.stores[1].close())
        self.runner.close()
        self.folder.cleanup()

    # -- asking both

    def done(self, what: Coroutine[Any, Any, Any]) -> Any:
        """What it gives. A runner would set and take back the handler of Ctrl-C for each."""
        return self.runner.get_loop().run_until_complete(what)

    def both(self, operation: str, ask: Callable[[Any], Awaitable[Any]]) -> Any:
        """The answer that both give, or the error that both raise."""
        answers = [self.done(_answer(ask(store))) for store in self.stores]
        self.watch.look(self.stores[0], operation)
        self.watch.freed.clear()
        assert answers[0] == answers[1], operation
        return answers[0]

    def _any(self, choices: Sequence[Any], number: int) -> Any:
        return choices[-1 - number % len(choices)]

    # -- what can happen

    @initialize(steps=st.tuples(st.integers(1, 3), st.integers(1, 3)), late=st.booleans(), stop=st.booleans())
    def begin(self, steps: tuple[int, int], late: bool, stop: bool) -> None:
        """Two workers are there from the start, and two runs."""
        for worker in (0, 1):
            self.beat(worker, True)
        self.dispatch("r0", steps[0], None, stop)
        self.dispatch("r1", steps[1], 60.0 if late else None, False)

    @rule(
        run=st.sampled_from(RUNS),
        steps=st.integers(0, 3),
        deadline=st.sampled_from((None, None, 60.0)),
        stop=st.booleans(),
    )
    def dispatch(self, run: str, steps: int, deadline: float | None, stop: bool) -> None:
        """A run is started, or started again, or another one under its id."""
        itinerary = tuple(Step(f"a{n}", id=f"s{n}") for n in range(steps))
        slip = RoutingSlip(
            itinerary=itinerary,
            on_compensation_failure="stop" if stop else "continue",
            deadline=None if deadline is None else self.clock.now() + deadline,
        )
        text = f'{{"steps":{steps}}}'.encode()
        record = RunRecord(
            run,
            "w",
            RunStatus.PENDING,
            text,
            text.hex(),
            folding.pack_slip(slip),
            run,
            "trace",
            deadline=slip.deadline,
        )
        first = NextStep(StepKey(run, "s0"), "a0", "a0") if steps else None
        if (
            self.both("record_workflow_start", lambda store: store.record_workflow_start(record, first))
            is True
        ):
            self.known.append(run)
            if first is not None:
                self.letters.append(first.key)

    @precondition(lambda self: self.letters)
    @rule(number=numbers, worker=st.integers(0, 2))
    def deliver(self, number: int, worker: int) -> None:
        """A message comes, be it new, late, or for the second time."""
        key = self._letter(number)
        self._claimed(key, WORKERS[worker].id, self.both("claim_step", _claim(key, WORKERS[worker].id)))

    @precondition(lambda self: self.letters)
    @rule(
        number=numbers,
        worker=st.integers(0, 2),
        ends=st.lists(
            st.sampled_from(("done", "done", "done", "failed", "hopeless", *WAITS)), min_size=1, max_size=4
        ),
        on=st.booleans(),
    )
    def work(self, number: int, worker: int, ends: list[str], on: bool) -> None:
        """A worker gets a message, does the step, and goes on with those after it as far as it can."""
        self.deliver(number, worker)
        for end in ends:
            if self.held and self.held[-1].worker == WORKERS[worker].id:
                self.record(0, end, undo=True, edit=None, strict=False, on=on, forget=True)

    @precondition(lambda self: self.letters)
    @rule(chosen=st.lists(st.tuples(numbers, st.integers(0, 2)), min_size=2, max_size=4))
    def deliver_together(self, chosen: list[tuple[int, int]]) -> None:
        """Messages come at the same moment, some of them twice; the SQL store claims them in one transaction."""
        asked = [(self._letter(number), WORKERS[worker].id) for number, worker in chosen]

        async def ask(store: Store) -> list[Any]:
            return await asyncio.gather(*(_claim(key, worker)(store) for key, worker in asked))

        for (key, worker), answer in zip(asked, self.both("claim_step", ask), strict=True):
            self._claimed(key, worker, answer)

    def _letter(self, number: int) -> StepKey:
        waiting = [row.key for row in self.rows() if row.status in (StepStatus.READY, StepStatus.WAITING)]
        return self._any(self.letters + waiting, number) if waiting else self._any(self.letters, number)

    def rows(self) -> list[StepRecord]:
        """The rows of all runs."""
        details = [self.done(self.stores[0].load_run(run)) for run in self.known]
        return [row for detail in details for row in detail.steps]

    def row(self, key: StepKey) -> StepRecord | None:
        """The row of a step."""
        return next((row for row in self.rows() if row.key == key), None)

    def _claimed(self, key: StepKey, worker: str, answer: Any) -> None:
        if isinstance(answer, Grant):
            row = self.row(key)
            assert row is not None
            found = (row.status, row.worker, row.epoch, row.attempt)
            assert found == (StepStatus.RUNNING, worker, answer.epoch, answer.attempt)
            again = sum(key == held.key and answer.epoch == held.grant.epoch for held in self.held)
            assert not again, "a claim that somebody has already was given again"
            detail = self.done(self.stores[0].load_run(key.workflow_id, inline_bytes=INLINE))
            slip, _ = folding.fold(detail, inline_bytes=INLINE)
            self.held.append(Held(worker, key, answer, slip))

    @precondition(lambda self: self.held)
    @rule(
        number=numbers,
        end=st.sampled_from(("done", "done", "done", "large", "skipped", "failed", "hopeless", *WAITS)),
        undo=st.booleans(),
        edit=st.sampled_from((None, None, "insert", "terminate")),
        strict=st.booleans(),
        on=st.booleans(),
        forget=st.booleans(),
    )
    def record(
        self, number: int, end: str, undo: bool, edit: str | None, strict: bool, on: bool, forget: bool
    ) -> None:
        """An attempt ends and says so, perhaps long after it lost its step, perhaps for the second time."""
        held = self._any(self.held, number)
        result = attempted(held, end, self.clock.now(), undo=undo, edit=edit, strict=strict, on=on)
        before = self.row(held.key)
        answer = self.both("record_step_result", lambda store: store.record_step_result(result))
        if forget:
            self.held.remove(held)
        again = (held.key, held.grant.epoch) in self.settled
        if not isinstance(answer, Recorded):
            assert self.row(held.key) == before
        elif again:
            assert self.row(held.key) == before, "asking again has changed what was recorded"
        else:
            assert self.row(held.key) != before, "said to be recorded, but wasn't"
            mine = before is not None and (before.epoch, before.worker) == (held.grant.epoch, held.worker)
            assert mine or not (strict or result.status in (*GOES_ON, StepStatus.FAILED))
            self._went_on(held, result, answer)

    @precondition(lambda self: len({held.key for held in self.held}) > 1)
    @rule(numbers=st.lists(numbers, min_size=2, max_size=3), end=st.sampled_from(("done", "failed", "waits")))
    def record_together(self, numbers: list[int], end: str) -> None:
        """Attempts at several steps end at the same moment; the SQL store records them in one transaction."""
        chosen = {held.key: held for held in (self._any(self.held, number) for number in numbers)}
        results = [attempted(held, end, self.clock.now()) for held in chosen.values()]

        async def ask(store: Store) -> list[Any]:
            return await asyncio.gather(*(store.record_step_result(result) for result in results))

        answers = self.both("record_step_result", ask)
        for held, result, answer in zip(chosen.values(), results, answers, strict=True):
            if isinstance(answer, Recorded):
                self._went_on(held, result, answer)

    def _went_on(self, held: Held, result: StepResult, answer: Recorded) -> None:
        if result.status not in GOES_ON:
            self.settled.add((held.key, held.grant.epoch))
        if result.next is None:
            return
        self.letters.append(result.next.key)
        if answer.grant is not None:
            self._claimed(result.next.key, held.worker, answer.grant)

    @precondition(lambda self: self.held)
    @rule(number=numbers)
    def crash(self, number: int) -> None:
        """A worker dies: whatever it held it has forgotten."""
        worker = self._any(self.held, number).worker
        self.held = [held for held in self.held if held.worker != worker]

    @rule(worker=st.integers(0, 2), forgetful=st.booleans())
    def beat(self, worker: int, forgetful: bool) -> None:
        """A worker renews its lease, and lists what it does, or has forgotten some of it."""
        record = WORKERS[worker]
        mine = {(held.key, held.grant.epoch) for held in self.held if held.worker == record.id}

        async def ask(store: Store) -> Any:
            running = set() if forgetful else mine
            return await asyncio.to_thread(
                store.beat, record, lease=LEASE, running=running, forgotten=mine if forgetful else ()
            )

        lost, _ = self.both("beat", ask)
        assert lost <= mine

    @rule(gone=st.sets(st.sampled_from([worker.id for worker in WORKERS]), max_size=1))
    def sweep(self, gone: set[str]) -> None:
        """What nobody works on is found; a process may be known to be gone."""

        async def ask(store: Store) -> Any:
            swept = await store.sweep(gone=gone)
            return [sorted(getattr(swept, name)) for name in ("due", "lost", "freed", "expired")]

        freed = self.both("sweep", ask)[2]
        assert not [row for row in self.rows() if row.key in freed and row.status is StepStatus.RUNNING]

    @rule(worker=st.integers(0, 2))
    def sign_off(self, worker: int) -> None:
        """A worker leaves; what it held is anybody's."""
        self.both("sign_off", lambda store: store.sign_off(WORKERS[worker].id))

    @precondition(lambda self: self.held)
    @rule(number=numbers)
    def release(self, number: int) -> None:
        """A worker gives back what it has."""
        worker = self._any(self.held, number).worker
        mine = [(held.key, held.grant.epoch) for held in self.held if held.worker == worker]
        self.both("release_steps", lambda store: store.release_steps(worker, mine))

    @rule(run=st.sampled_from((*RUNS, "r0", "r1")))
    def cancel(self, run: str) -> None:
        """Somebody cancels a run."""
        self.both("cancel_run", lambda store: store.cancel_run(run, "cancelled"))
        self._resent(run)

    @rule(run=st.sampled_from((*RUNS, "r0", "r1")), number=numbers, worker=st.integers(0, 2))
    def retry_run(self, run: str, number: int, worker: int) -> None:
        """An operator takes a run up again, and the first message that a worker gets may be an old one."""
        self.both("retry_run", lambda store: store.retry_run(run))
        self._resent(run)
        if self.letters:
            self.deliver(number, worker)

    @rule(limit=st.integers(1, 3))
    def prune(self, limit: int) -> None:
        """Runs that have ended are deleted. Workers and messages still know of them, also when an id is used again."""
        self.both("prune_runs", lambda store: store.prune_runs(before=self.clock.now() + 1000.0, limit=limit))
        there = {run.id for run in self.done(self.stores[0].list_runs())}
        self.known = [run for run in self.known if run in there]
        self.settled = {claim for claim in self.settled if claim[0].workflow_id in self.known}

    def _resent(self, run: str) -> None:
        self.letters.extend(self.both("open_steps", lambda store: store.open_steps(run)))

    @rule(seconds=st.sampled_from((0.5, 3.0, 8.0, LEASE, 61.0, -20.0)))
    def jump(self, seconds: float) -> None:
        """Time passes, or the clock is set back."""
        self.clock.instant += seconds

    @rule(
        run=st.sampled_from(RUNS),
        value=st.sampled_from((None, 0, "", [1.5])),
        sender=st.sampled_from(("", "ü")),
    )
    def signal(self, run: str, value: Any, sender: str) -> None:
        """A signal is sent to a run, whether somebody waits for it or not."""
        text = json.dumps(value).encode()
        self.both("record_signal", lambda store: store.record_signal(run, "go", text, sender=sender))

    @rule(run=st.sampled_from(RUNS), headers=st.sampled_from((None, {"traceparent": "p", "x": "ü"})))
    def grant(self, run: str, headers: dict[str, str] | None) -> None:
        """Somebody grants a run something, whether a step waits for it or not: a handle, or a token."""
        woken = self.both("record_grant", lambda store: store.record_grant(run, headers=headers))
        self.letters.extend(woken if isinstance(woken, list) else ())

    @precondition(lambda self: self.held)
    @rule(number=numbers, unit=st.integers(0, 3), request=st.sampled_from((None, "q0", "q1")))
    def take(self, number: int, unit: int, request: str | None) -> None:
        """A step takes a signal or the answer to a request, perhaps for the second time."""
        key = self._any(self.held, number).key
        name = "go" if request is None else f"{REQUEST_SIGNAL}{request}"
        taken = self.both("take_signal", lambda store: store.take_signal(key, f"take{unit}", name))
        assert self.both("load_unit", lambda store: store.load_unit(key, f"take{unit}")) == taken

    @precondition(lambda self: self.held)
    @rule(number=numbers, request=st.sampled_from(("q0", "q1")), seconds=st.sampled_from((None, 12.0)))
    def ask(self, number: int, request: str, seconds: float | None) -> None:
        """A step asks somebody, perhaps what was asked already."""
        key = self._any(self.held, number).key
        until = None if seconds is None else self.clock.now() + seconds
        asked = Request(request, key.workflow_id, key.step, "question", "Which?", b"{}", expires_at=until)
        self.both("open_request", lambda store: store.open_request(asked))

    @rule(request=st.sampled_from(("q0", "q1", "nobody's")), value=st.sampled_from((b"1", b"2")))
    def answer(self, request: str, value: bytes) -> None:
        """Somebody answers, perhaps what nobody asked or what was answered already."""
        self.both("answer_request", lambda store: store.answer_request(request, value, sender="ada"))

    @precondition(lambda self: self.held)
    @rule(number=numbers, value=st.sampled_from((b"1", b"2")))
    def unit(self, number: int, value: bytes) -> None:
        """A unit of work inside a step is recorded; the first record stands."""
        key = self._any(self.held, number).key
        kept = self.both("save_unit", lambda store: store.save_unit(key, "unit", value))
        assert self.both("load_unit", lambda store: store.load_unit(key, "unit")) == kept

    @rule(number=st.integers(0, 2), delete=st.booleans())
    def letter(self, number: int, delete: bool) -> None:
        """A dead letter is kept, or forgotten."""
        name = f"letter{number}"
        if delete:
            self.both("delete_dead_letter", lambda store: store.delete_dead_letter(name))
        else:
            made = DeadLetter(name, "t", "not_json", "found {", b"{", created_at=float(number + 1))
            self.both("bury", lambda store: store.bury(made))
        self.both("list_dead_letters", lambda store: store.list_dead_letters())

    # -- what holds at any time

    @invariant()
    def same_rows(self) -> None:
        """Both hold the same, in every field."""

        async def workers(store: Store) -> Any:
            return sorted(await store.list_workers(), key=lambda worker: worker.id)

        async def all_of(store: Store) -> Any:
            # One after the other each would wait for a transaction of its own, and there are a dozen at each step.
            asked: dict[str, Awaitable[Any]] = {
                "list_runs": store.list_runs(),
                "list_requests": store.list_requests(),
                "list_requests, all": store.list_requests(only_open=False),
                "list_workers": workers(store),
                "has_open": store.has_open(["a0", "a1", "undo"]),
            }
            for run in self.known:
                asked[f"load_run {run}"] = store.load_run(run)
                asked[f"load_run {run}, small"] = store.load_run(run, inline_bytes=INLINE)
            answers = await asyncio.gather(*map(_answer, asked.values()))
            return dict(zip(asked, answers, strict=True))

        self.both("all that is held", all_of)


async def _answer(asked: Awaitable[Any]) -> Any:
    try:
        return await asked
    except PaigeantError as exc:
        return type(exc), str(exc)


def _claim(key: StepKey, worker: str) -> Callable[[Store], Awaitable[Any]]:
    # Right or wrong, what is foreseen of the step changes no answer.
    place = key.step.removeprefix("s")
    request = ClaimRequest(key, worker, ATTEMPTS, int(place) if place.isdecimal() else None)
    return lambda store: store.claim_step(request)


class PostgresAgrees(StoresAgree):
    """The same with Postgres, on a database that is emptied before."""

    url: ClassVar[str]

    def place(self) -> str:
        empty(self.url)
        return self.url


def _settings(examples: int) -> settings:
    return settings(
        max_examples=examples,
        stateful_step_count=50,
        deadline=None,
        derandomize="PAIGEANT_TEST_EXAMPLES" not in os.environ,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )


TestStoresAgree = pytest.mark.timeout(1800)(
    StoresAgree.TestCase
)  # a minute or two where nothing else is done
TestStoresAgree.__doc__ = (
    "Whatever happens in whatever order, both stores say and hold the same, and I1 to I19 hold."
)
TestStoresAgree.settings = _settings(EXAMPLES)


@pytest.mark.timeout(1800)
class TestPostgresAgrees(PostgresAgrees.TestCase):  # type: ignore[valid-type,misc]  # made by Hypothesis
    """Whatever happens in whatever order, Postgres says and holds the same as the memory store."""

    # To make a failure small takes thousands of examples more, and hundreds of them are a minute here.
    settings = settings(_settings(max(EXAMPLES // 8, 1)), phases=(Phase.reuse, Phase.generate))

    @pytest.fixture(autouse=True)
    def _tables(self, postgres_server_url: str) -> Iterator[None]:
        with database_with_tables(postgres_server_url) as url:
            PostgresAgrees.url = f"{url}?options=-csynchronous_commit%3Doff"
            yield
