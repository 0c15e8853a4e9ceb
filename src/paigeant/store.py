"""Store: what records runs, and what each method promises. RunHistory: what surfaces read. Adapters: `stores/`.

Every method that changes something is one short transaction; which rows it changes is decided in `ledger.py`, the same
for every store. Instants are seconds since 1970 (UTC) by the store's own clock, never by a worker's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from paigeant.counts import LARGEST_COUNT
from paigeant.envelope import HEAD_BYTES, without_token
from paigeant.message import MessageId
from paigeant.secret import masked, masked_body
from paigeant.slip import Phase, RunStatus, StepStatus
from paigeant.transport import BODY_KEPT_BYTES, Posting, Transport
from paigeant.values import value

__all__ = [
    "REQUEST_SIGNAL",
    "ClaimRequest",
    "DeadLetter",
    "Grant",
    "NextStep",
    "OpenTopic",
    "Recorded",
    "Refused",
    "Request",
    "RequestKind",
    "RunDetail",
    "RunHistory",
    "RunRecord",
    "RunValues",
    "Signal",
    "StepKey",
    "StepRecord",
    "StepResult",
    "Store",
    "Swept",
    "WorkerRecord",
]


class StepKey(NamedTuple):
    """Names one thing to do: a step of a run, to be done or undone."""

    workflow_id: str
    step: str
    phase: Phase = Phase.DO


@value
class RunRecord:
    """A row of `workflow_runs`. `input` and `slip` (the plan at dispatch) are JSON; `headers` travel with messages."""

    id: str
    workflow: str
    status: RunStatus
    input: bytes
    input_hash: str
    slip: bytes
    correlation_id: str
    trace_id: str
    headers: Mapping[str, str] = field(default_factory=dict)
    ending: str | None = None
    error: str | None = None
    deadline: float | None = None
    created_at: float = 0.0
    started_at: float | None = None
    completed_at: float | None = None


@value
class StepRecord:
    """A row of `step_executions`: one step, done or undone, from ready to its end.

    `seq` orders the rows of a run. `epoch` rises with each claim, `attempt` counts the tries that may have run. A ready
    row may start from `not_before` on; the sweeper looks at it from `wake_at` on, and wakes a waiting row then, which
    else one of the signals in `waits_for` (JSON) wakes. `input`, `output`, `revision` (the
    itinerary that the step left, with the number of added steps) and `usage` are JSON. `undo_topic`: where its
    compensation runs, None when it has none.
    """

    workflow_id: str
    step: str
    phase: Phase
    seq: int
    activity: str
    topic: str
    status: StepStatus
    epoch: int = 0
    attempt: int = 0
    worker: str | None = None
    not_before: float = 0.0
    wake_at: float = 0.0
    input: bytes | None = None
    output: bytes | None = None
    error: str | None = None
    revision: bytes | None = None
    undo_topic: str | None = None
    usage: bytes | None = None
    created_at: float = 0.0
    started_at: float | None = None
    completed_at: float | None = None
    waits_for: bytes | None = None

    @property
    def key(self) -> StepKey:
        """What names this row."""
        return StepKey(self.workflow_id, self.step, self.phase)

    @property
    def due_at(self) -> float:
        """The instant from which a ready row could be started: since then it waits for a worker."""
        return max(self.created_at, self.not_before)


@value
class ClaimRequest:
    """A worker asks for a step. After `max_attempts` tries it gets it only to record that they are used up.

    `place`: that of the step in its run, where it is taken to be as new as when its message was written: a store may
    save a look by that, and is right also where it is wrong.
    """

    key: StepKey
    worker: str
    max_attempts: int
    place: int | None = None


@value
class Grant:
    """A step is this worker's for as long as its lease holds. `now` is the store's time of the claim.

    `exhausted`: all attempts were used up by workers that died or lost their lease, so that this claim counted none.
    `queued`: the seconds for which the step had been due.
    """

    epoch: int
    attempt: int
    now: float
    exhausted: bool = False
    queued: float = field(default=0.0, compare=False)


@value
class Refused:
    """A change didn't take effect. `reason`: unknown, ended, recorded, taken, not_due, stale or arrived.

    `retry_in`: seconds until it may be asked again, where that is known (not_due).
    """

    reason: str
    retry_in: float | None = None


@value
class NextStep:
    """What becomes ready with a result, or with the start of a run; it may start from `not_before` on.

    `is_sent`: a message for it is. Without one the sweeper sends it once it may start.
    """

    key: StepKey
    activity: str
    topic: str
    not_before: float = 0.0
    is_sent: bool = True


@value
class StepResult:
    """How an attempt ended and what follows: all that one transaction records.

    `status` READY means another attempt in `delay` seconds; WAITING, that the attempt goes on once one of the signals
    `waits_for` is there, or at the instant `until`. `run` is the run's new state, None where it keeps its own.
    `take_next`: the same worker goes on with `next` at once, which is claimed in the same transaction. `place`: as in
    ClaimRequest.
    """

    key: StepKey
    worker: str
    epoch: int
    attempt: int
    status: StepStatus
    strict: bool = False
    run: RunStatus | None = None
    ending: str | None = None
    run_error: str | None = None
    delay: float = 0.0
    error: str | None = None
    input: bytes | None = None
    output: bytes | None = None
    revision: bytes | None = None
    undo_topic: str | None = None
    usage: bytes | None = None
    variables: Mapping[str, bytes] = field(default_factory=dict)
    next: NextStep | None = None
    take_next: bool = False
    waits_for: tuple[str, ...] = ()
    until: float | None = None
    place: int | None = None


@value
class Recorded:
    """The result is durable, `at` this instant. `grant` is the claim of the next step, where it was taken along."""

    grant: Grant | None = None
    at: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """A row of `workers`: one worker process. `host` and `process` identify it to others on the same machine."""

    id: str
    host: str
    process: str
    lease_until: float = 0.0


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that nobody may handle: its reason, at most 64 KiB of its bytes, and the attempts it had."""

    id: str
    topic: str
    reason: str
    detail: str
    body: bytes
    attempts: int = 0
    workflow_id: str | None = None
    step: str | None = None
    created_at: float = 0.0

    @classmethod
    def about(
        cls, message_id: str, topic: str, reason: str, detail: str, body: bytes, attempts: int
    ) -> DeadLetter:
        """The dead letter for a message, with what its id says of its run and the part of its body that is kept.

        `reason` is a word, which `detail` explains; of a sentence such as "word: why" it is the word. What a message
        says may be part of them, and as long as a message, so they are cut; and so is the id, to one that is as much
        this message's alone.
        `attempts`, which a broker may have told wrong, is kept within what every store can hold.
        """
        known = MessageId.read(message_id)
        return cls(
            _kept_id(message_id),
            topic,
            _cut(reason.partition(": ")[0]),
            _cut(masked(detail)),  # half a token is no longer known as one
            masked_body(without_token(body[: BODY_KEPT_BYTES + HEAD_BYTES]))[:BODY_KEPT_BYTES],
            min(max(attempts, 0), LARGEST_COUNT),
            workflow_id=None if known is None else known.workflow_id,
            step=None if known is None else known.step,
        )


_MOST_DETAIL = 4000
"""Characters."""


_MOST_ID_BYTES = 2000
"""Postgres refuses longer keys, from 2,704 bytes on. Whoever may write to a broker chooses the ids of messages."""


def _kept_id(message_id: str) -> str:
    encoded = message_id.encode(errors="replace")
    if len(encoded) <= _MOST_ID_BYTES:
        return message_id
    begin = encoded[: _MOST_ID_BYTES // 2].decode(errors="ignore")
    return f"{begin}~{hashlib.sha256(encoded).hexdigest()}"


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_DETAIL else f"{text[:_MOST_DETAIL]}..."


@dataclass(frozen=True, slots=True)
class Signal:
    """A named value that was sent to a run from outside. `sender` says who it was; `taken_by` which step took it."""

    name: str
    value: bytes
    created_at: float
    sender: str = ""
    taken_by: str | None = None

    @property
    def envelope(self) -> bytes:
        """The record of the unit that takes it: its `value`, `by` whom it was sent, and `at` which instant."""
        by, at = json.dumps(self.sender).encode(), json.dumps(self.created_at).encode()
        return b'{"by":%s,"at":%s,"value":%s}' % (by, at, self.value)


RequestKind = Literal["approval", "question", "external"]


@dataclass(frozen=True, slots=True)
class Request:
    """What a step asks of somebody outside: to approve (or deny), to answer, or to report what has happened there.

    `asked` (JSON) is what whoever answers is told. `answer` (JSON) is None until somebody has answered: `answered_by`
    says who. `is_open`: its step still waits for it.
    """

    id: str
    workflow_id: str
    step: str
    kind: RequestKind
    name: str
    asked: bytes
    created_at: float = 0.0
    expires_at: float | None = None
    answer: bytes | None = None
    answered_by: str = ""
    answered_at: float | None = None
    is_open: bool = True

    @property
    def signal(self) -> str:
        """The name of the signal that its answer is."""
        return f"{REQUEST_SIGNAL}{self.id}"

    def with_answer(self, answer: Signal | None, now: float, *, waits: bool) -> Request:
        """The request as it stands now, with its answer if there is one; whether its step still `waits` for one."""
        if answer is not None:
            return replace(
                self,
                answer=answer.value,
                answered_by=answer.sender,
                answered_at=answer.created_at,
                is_open=False,
            )
        past = self.expires_at is not None and self.expires_at <= now
        return replace(self, is_open=waits and not past)


REQUEST_SIGNAL = "paigeant.request/"
"""What the names of signals begin with that are answers."""


@dataclass(frozen=True, slots=True)
class Swept:
    """What one sweep found: steps that need a message, workers whose lease was over, runs that were over time.

    Of the runs in `expired` those in `failed` have ended with that: there was nothing to undo. `at`: when it was.
    """

    due: tuple[StepKey, ...] = ()
    lost: tuple[str, ...] = ()
    freed: tuple[StepKey, ...] = ()
    expired: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    at: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class OpenTopic:
    """What is open in a topic: steps that are ready, ready `later` (at their `not_before`), and running.

    `oldest`: the seconds for which the first ready one has waited since it became due; None when none is ready.
    """

    topic: str
    ready: int
    later: int
    running: int
    oldest: float | None


@value
class RunDetail:
    """A run with its rows. Outputs above the limit that the reader gave are left out (`output` None, in `stored`)."""

    run: RunRecord
    steps: tuple[StepRecord, ...]
    variables: Mapping[str, bytes] = field(default_factory=dict)
    signals: tuple[Signal, ...] = ()
    stored: frozenset[str] = frozenset()


class RunHistory(Protocol):
    """What surfaces read. Nothing here changes anything."""

    async def list_runs(
        self,
        *,
        status: RunStatus | None = None,
        workflow: str | None = None,
        limit: int = 50,
        before: tuple[float, str] | None = None,
    ) -> list[RunRecord]:
        """Runs, the newest first, without input and slip. `before`: (created_at, id) where the last page ended."""
        ...

    async def load_run(self, workflow_id: str, *, inline_bytes: int | None = None) -> RunDetail:
        """The run with all of its rows, steps by `seq`. Raises RunNotFound. Outputs above `inline_bytes` stay out."""
        ...

    async def run_status(self, workflow_id: str) -> RunStatus:
        """Where the run is. Raises RunNotFound."""
        ...

    async def count_ended(self, *, before: float, statuses: Collection[RunStatus] | None = None) -> int:
        """How many runs ended before the instant `before`, in one of `statuses` or any: what `prune_runs` deletes."""
        ...

    async def list_requests(
        self, *, workflow_id: str | None = None, only_open: bool = True, limit: int = 100
    ) -> list[Request]:
        """What is asked of people, the oldest first. `only_open`: that which is neither answered nor past."""
        ...

    async def load_request(self, request_id: str) -> Request | None:
        """The request, or None."""
        ...

    async def list_variables(self, workflow_id: str) -> dict[str, Any]:
        """All variables of the run, by name. Raises RunNotFound."""
        ...

    async def list_workers(self) -> list[WorkerRecord]:
        """The workers that have signed on and not off."""
        ...

    async def open_topics(self) -> list[OpenTopic]:
        """The topics that have open steps, by name. It tells of the backlog whatever the transport can count."""
        ...

    async def list_dead_letters(self, *, limit: int = 100) -> list[DeadLetter]:
        """Dead letters, the newest first, without their bodies."""
        ...

    async def count_dead_letters(self) -> int:
        """How many dead letters are kept."""
        ...

    async def count_stray_letters(self, *, before: float) -> int:
        """How many dead letters of before that instant belong to no run here: what `prune_stray_letters` deletes."""
        ...

    async def load_dead_letter(self, letter_id: str) -> DeadLetter | None:
        """The dead letter, or None."""
        ...


class RunValues(Protocol):
    """The values of runs that steps ask for."""

    async def load_output(self, workflow_id: str, step: str) -> bytes | None:
        """The recorded output of a step as JSON; None when there is none."""
        ...

    async def load_variable(self, workflow_id: str, key: str, default: Any = None) -> Any:
        """The variable's value as JSON gives it back; `default` when there is none."""
        ...

    async def save_unit(self, key: StepKey, name: str, value: bytes) -> bytes:
        """Record the value of a unit of work inside a step. The first one stands; gives the one that stands."""
        ...

    async def load_unit(self, key: StepKey, name: str) -> bytes | None:
        """The recorded value of a unit; None when there is none."""
        ...

    async def load_units(self, key: StepKey) -> dict[str, bytes]:
        """The recorded values of all units of a step, by name."""
        ...

    async def take_signal(
        self, key: StepKey, unit: str, name: str, *, otherwise: bytes | None = None
    ) -> bytes | None:
        """Take the oldest signal of this name that nobody has taken, and record it as the value of `unit`.

        Gives what is recorded of the unit then, or was before: an object with `value`, `by` and `at`. When there is no
        such signal, `otherwise` is recorded and given; without it nothing is, and None given.
        """
        ...

    async def open_request(self, request: Request) -> bool:
        """Keep a request; gives whether it is new. One of the same id stays as it is."""
        ...


@runtime_checkable
class Store(RunHistory, RunValues, Protocol):
    """Records what happens to runs. Each method is idempotent: doing it again, uncertain whether it was done, is safe.

    Raises StoreUnavailable when the database can't be reached or can't write; then nothing has changed, or all of it.
    """

    @property
    def publishes(self) -> bool:
        """Whether its own transactions send the postings given to it. Otherwise the caller does, after the commit."""
        ...

    grace: float
    """Seconds that a published message has before the sweeper sends it again."""

    async def connect(self) -> None:
        """Open it. Raises StoreUnavailable, SchemaMismatch; connecting twice is harmless."""
        ...

    async def close(self) -> None:
        """Close it after what was begun has been committed. Closing twice is harmless."""
        ...

    async def now(self) -> float:
        """The store's time."""
        ...

    async def record_workflow_start(
        self, run: RunRecord, first: NextStep | None, posting: Posting | None = None, *, is_new: bool = False
    ) -> bool:
        """Record a run with its first step, which is ready. True when it is new, False when this same run exists.

        `is_new`: its id was just made, so a store need not look for it first. Without a first step the run is completed
        at once. Raises RunConflict when the id belongs to another input.
        """
        ...

    async def adopt_run(
        self, run: RunRecord, steps: Collection[StepRecord], variables: Mapping[str, bytes]
    ) -> bool:
        """Record a run that began in another store: what was done of it, and the step that is ready now.

        False, and nothing is changed, when there is a run of this id. Instants are this store's: all is of now.
        """
        ...

    async def claim_step(self, request: ClaimRequest) -> Grant | Refused:
        """Give a ready step to a worker: epoch + 1, attempt + 1, counted before the code runs."""
        ...

    async def record_step_result(
        self, result: StepResult, posting: Posting | None = None
    ) -> Recorded | Refused:
        """Record how an attempt ended, its variables, and what follows, all or nothing.

        A stale failure never takes effect. A stale first success does, unless `strict`. Nothing is recorded for a run
        that has left the state which the step belongs to.
        """
        ...

    async def release_steps(self, worker: str, steps: Collection[tuple[StepKey, int]]) -> list[StepKey]:
        """Give back claimed steps (key, epoch) that weren't done, uncounted. Returns those that were given back."""
        ...

    def beat(
        self,
        worker: WorkerRecord,
        *,
        lease: float,
        running: Collection[tuple[StepKey, int]],
        forgotten: Collection[tuple[StepKey, int]] = (),
    ) -> tuple[set[tuple[StepKey, int]], set[tuple[StepKey, int]]]:
        """Hold the worker's lease for `lease` seconds from now and free what it has `forgotten`.

        Gives (lost, unlisted): of `running` what isn't the worker's any more, and what is the worker's but isn't in
        `running`. Blocks, and is called from a thread of its own, so that no activity can hold it up.
        """
        ...

    async def sign_off(self, worker_id: str) -> None:
        """The worker goes by its own will; what it still held is given back, uncounted, and sent at the next sweep."""
        ...

    async def sweep(
        self,
        *,
        gone: Collection[str] = (),
        spare: Collection[str] = (),
        empty: Collection[str] = (),
        topics: Collection[str] | None = None,
        limit: int = 500,
    ) -> Swept:
        """Free what belongs to workers whose lease is over, or that are `gone`; find ready steps that wait too long.

        Workers to `spare` keep their steps, though their lease be over.
        In `empty` topics, for which the transport has no message, these are all that wait for longer than the grace
        time and weren't sent within it. With `topics`, only steps of these are `due`: others are left to other sweeps.

        Each step in `due` is looked at again only after the grace time: its message is to be sent now. Runs over
        their deadline are ended like failed ones. All workers may sweep at once.
        """
        ...

    async def cancel_run(self, workflow_id: str, reason: str) -> RunStatus:
        """Turn the run round: nothing more is done, what was recorded is undone. Returns its state from then on.

        Cancelling a run that is being cancelled changes nothing. Raises RunNotFound, InvalidTransition when it ended.
        """
        ...

    async def retry_run(self, workflow_id: str) -> RunStatus:
        """Take up a run that ended failed or compensation_failed where it stopped, with fresh attempts.

        Raises RunNotFound, and InvalidTransition for a run in any other state.
        """
        ...

    async def prune_runs(
        self, *, before: float, statuses: Collection[RunStatus] | None = None, limit: int = 500
    ) -> int:
        """Delete runs that ended before the instant `before`, in one of `statuses` or any, with all that is theirs.

        At most `limit`, the oldest first, in one transaction: gives how many, and is called again until that is 0.
        A run that hasn't ended is never deleted, whatever `statuses` holds.
        """
        ...

    async def prune_stray_letters(self, *, before: float, limit: int = 500) -> int:
        """Delete dead letters that were kept before that instant and belong to no run here, also to none any more.

        At most `limit` in one transaction: gives how many, and is called again until that is 0.
        """
        ...

    async def open_steps(self, workflow_id: str) -> list[StepKey]:
        """The steps of the run that are ready now, for whom a message may be due."""
        ...

    async def has_open(self, topics: Collection[str]) -> bool:
        """Whether a step waits or is being done in one of `topics`."""
        ...

    def on_turn(self, heard: Callable[[], None]) -> Callable[[], None]:
        """Call `heard` in the event loop when a run was cancelled or retried. Gives what ends that."""
        ...

    def publish_with(self, transport: Transport) -> None:
        """Send postings inside its own transactions, with a transport that `joins` it."""
        ...

    async def save_variable(self, workflow_id: str, key: str, value: Any) -> None:
        """Set a variable of the run to a value that JSON can hold. Raises RunNotFound, InputInvalid."""
        ...

    async def record_signal(self, workflow_id: str, name: str, value: bytes, *, sender: str = "") -> None:
        """Keep a value for the run, and make its step ready that waits for it.

        Raises RunNotFound, InvalidTransition when the run has ended.
        """
        ...

    async def record_grant(
        self, workflow_id: str, *, headers: Mapping[str, str] | None = None, sender: str = ""
    ) -> list[StepKey]:
        """Wake the step of the run that waits for a fresh grant; gives the steps that are ready for it now.

        `headers` become the run's own: they name the grant, which is kept as the signal `paigeant.grant` for a step
        that needs it later, too. Without them the grant is a token, of which nothing is recorded: the caller sends it
        with the step's message, for which there is the grace time.

        Raises RunNotFound, InvalidTransition when the run has ended, or no step is there to take a token.
        """
        ...

    async def answer_request(self, request_id: str, answer: bytes, *, sender: str = "") -> Request:
        """Answer a request, once: doing it again with the same answer changes nothing.

        Raises RequestNotFound, and InvalidTransition when it has another answer or nobody waits for it any more.
        """
        ...

    async def wait_ended(self, workflow_id: str) -> RunStatus:
        """The final state of the run, once it has ended. Raises RunNotFound."""
        ...

    async def bury(self, letter: DeadLetter) -> None:
        """Keep a dead letter. One of the same id stays as it is."""
        ...

    async def delete_dead_letter(self, letter_id: str) -> bool:
        """Forget a dead letter. False when there was none."""
        ...
