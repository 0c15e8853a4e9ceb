"""Dispatcher: builds a slip, records the start of its run, publishes the first step."""

from __future__ import annotations

import functools
import hashlib
import logging
import secrets
import uuid
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from paigeant import codec, folding, trace_context
from paigeant.activity import ActivityRegistry
from paigeant.annotations import typed
from paigeant.arguments import Namespace, resolve
from paigeant.behalf import Behalf
from paigeant.clock import LAST_INSTANT, is_duration
from paigeant.errors import (
    ArgumentError,
    ConfigurationError,
    InputInvalid,
    MessageTooLarge,
    RunConflict,
    UnknownActivity,
    nearest,
)
from paigeant.forwarder import LONGEST_DELAY, Forwarder
from paigeant.identity import MANDATE, GrantHandle, Mandate
from paigeant.message import PaigeantMessage
from paigeant.observer import NOTHING_AROUND, Around, Event, Observers, Work
from paigeant.redaction import quoted, secrets_in, without
from paigeant.secret import OBO_TOKEN, SecretToken, holds_token
from paigeant.slip import RoutingSlip, RunStatus, Step, is_text
from paigeant.store import NextStep, RunRecord, Store
from paigeant.transport import Posting
from paigeant.waits import WAITS
from paigeant.workflow import Workflow

__all__ = ["Dispatcher"]

log = logging.getLogger("paigeant.dispatcher")


class Dispatcher:
    """Starts runs."""

    def __init__(
        self,
        store: Store,
        forwarder: Forwarder,
        registry: ActivityRegistry,
        *,
        observers: Observers | None = None,
        strict: bool = False,
        behalf: Behalf | None = None,
    ) -> None:
        self.store = store
        self.forwarder = forwarder
        self.registry = registry
        self.observers = observers or Observers()
        self.strict = strict
        self.behalf = behalf or Behalf()

    async def dispatch(
        self,
        workflow: Workflow,
        input: Any,
        *,
        workflow_id: str | None = None,
        correlation_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        start_at: datetime | None = None,
        deadline: float | None = None,
        on_behalf_of: SecretToken | str | GrantHandle | None = None,
    ) -> str:
        """Start a run; gives its id once the start is durable. The same id with the same input is the same run.

        Its first step is done at `start_at` (an aware datetime) at the earliest, else at once. `deadline` is the time
        in seconds that it may take from then on, instead of the workflow's own. `input` is a mapping, or
        a model or dataclass that is written as one. `on_behalf_of` is an access token of a person, which travels with
        the messages and is recorded nowhere, or the handle of a grant that is kept elsewhere.

        Raises InputInvalid, ArgumentError when the first step can't get its arguments or any has args that its activity
        doesn't take, UnknownActivity when strict, RunConflict, MessageTooLarge; TokenRejected, TokenExpired and
        AuthorityUnavailable for a token.
        """
        now = await self.store.now()
        run_id = _run_id(workflow_id, now)
        _check_texts(correlation_id, headers)
        taken = self._input(workflow, input)
        begins = _instant(start_at, now)
        slip = replace(workflow.slip(now=begins), itinerary=_plain_steps(workflow))
        if deadline is not None:
            slip = replace(slip, deadline=begins + _checked_deadline(deadline))
        if slip.deadline is not None and slip.deadline > LAST_INSTANT:
            # A run that is to start at no date in sight is one of a workflow with a deadline all the same.
            slip = replace(slip, deadline=LAST_INSTANT)
        self._check_known(workflow)
        self._check_args(workflow)
        await self._check_first(run_id, slip.next_step(), taken.payload)
        mandate, token = await self._mandate(on_behalf_of, run_id, slip, waits=begins - now)
        parent, state = trace_context.taken(headers) if headers else ("", "")
        correlation_id = correlation_id or run_id
        with self._around(run_id, workflow, slip, correlation_id, parent, state) as own:
            if own:
                parent, _, state = own.partition(" ")
            parent = parent or trace_context.begun()
            message = PaigeantMessage(
                message_id="",
                workflow_id=run_id,
                routing_slip=slip,
                payload=taken.payload,
                workflow=workflow.name,
                correlation_id=correlation_id,
                trace_id=trace_context.trace_id(parent),
                headers=_with_token(trace_context.put({**(headers or {}), **mandate}, parent, state), token),
            )
            await self._start(message, taken, begins=begins, now=now, is_new=workflow_id is None)
        return run_id

    # -- inside

    def _around(
        self,
        run_id: str,
        workflow: Workflow,
        slip: RoutingSlip,
        correlation_id: str,
        traceparent: str,
        tracestate: str,
    ) -> Around:
        if not self.observers.surrounds:
            return NOTHING_AROUND
        first = self.forwarder.next_step(run_id, slip)
        topic = "" if first is None else first.topic
        return self.observers.around(
            Work(
                "dispatch",
                run_id,
                workflow.name,
                topic=topic,
                correlation_id=correlation_id,
                traceparent=traceparent,
                tracestate=tracestate,
            )
        )

    async def _mandate(
        self,
        on_behalf_of: SecretToken | str | GrantHandle | None,
        run_id: str,
        slip: RoutingSlip,
        *,
        waits: float,
    ) -> tuple[dict[str, str], SecretToken | None]:
        """The header that says for whom the run acts, and the token, where they are told."""
        if on_behalf_of is None:
            return {}, None
        first = self.forwarder.next_step(run_id, slip)
        carries = first is None or self.forwarder.carries(first.topic)
        mandate, token = await self.behalf.mandate(on_behalf_of, carries=carries)
        if token is not None and waits > LONGEST_DELAY:
            raise InputInvalid(
                "a token doesn't travel before its run is due: no message does; hand over a GrantHandle"
            )
        return {MANDATE: mandate.dump()}, token

    async def _start(
        self, message: PaigeantMessage, input: _Input, *, begins: float, now: float, is_new: bool
    ) -> None:
        """Record the run that `message` is the first of, unless it is recorded, and send that."""
        slip = message.routing_slip
        recorded = {name: text for name, text in message.headers.items() if name != OBO_TOKEN}
        run = RunRecord(
            id=message.workflow_id,
            workflow=message.workflow,
            status=RunStatus.PENDING,
            input=input.text,
            input_hash=hashlib.sha256(input.given + _person(recorded)).hexdigest(),
            slip=folding.pack_slip(slip),
            correlation_id=message.correlation_id,
            trace_id=message.trace_id,
            headers=recorded,
            deadline=slip.deadline,
        )
        first = self.forwarder.next_step(run.id, slip)
        if first is not None and begins > now:
            first = replace(first, not_before=begins, is_sent=begins - now <= LONGEST_DELAY)
        letter = None
        if first is not None and first.is_sent:
            letter = self.forwarder.letter(message, first.topic, epoch=0, delay=begins - now)
        if first is not None and not self.forwarder.envelope.may_send(message, first.topic):
            raise ConfigurationError(
                f"the key of this process may not start runs of workflow '{run.workflow}'; "
                "its roles in the trust file say which: `dispatch`"
            )
        posting = None if letter is None else self.forwarder.posting(letter)
        self.forwarder.check(message, posting)
        if await self._record(run, first, posting, is_new=is_new):
            self.observers.observe(
                Event(
                    "run.dispatched",
                    run.id,
                    run.workflow,
                    trace_id=run.trace_id,
                    correlation_id=run.correlation_id,
                    at=now,
                    traceparent=message.headers["traceparent"],
                    tracestate=message.headers.get("tracestate", ""),
                )
            )
            if letter is not None:
                # A crash before this line: the sweeper publishes.
                await self.forwarder.send(letter)

    async def _record(
        self, run: RunRecord, first: NextStep | None, posting: Posting | None, *, is_new: bool
    ) -> bool:
        """Record the run; gives whether it is a new one. Raises RunConflict where another one has its id."""
        try:
            return await self.store.record_workflow_start(run, first, posting, is_new=is_new)
        except RunConflict:
            # What was given in another form may come to the same: a model, and the mapping that it can be made of.
            there = (await self.store.load_run(run.id, inline_bytes=0)).run
            if (there.workflow, there.input, _person(there.headers)) != (
                run.workflow,
                run.input,
                _person(run.headers),
            ):
                raise
            return False

    def _input(self, workflow: Workflow, input: Any) -> _Input:
        try:
            payload = codec.plain({} if input is None else input)
        except codec.JsonInvalid as exc:
            raise InputInvalid(
                f"the input of workflow '{workflow.name}' can't be written as JSON: {exc}"
            ) from exc
        if not isinstance(payload, dict):
            raise InputInvalid(
                f"the input of workflow '{workflow.name}' is {type(payload).__name__} {quoted(payload)}; "
                'expected an object with a field for each value: {"name": ...}'
            )
        text = given = codec.dump_sorted(payload)
        if workflow.input_model is not None:
            payload = _fitted(workflow, payload)
            text = codec.dump_sorted(payload)
        if len(text) > self.forwarder.envelope.limit_bytes:
            raise MessageTooLarge(len(text), self.forwarder.envelope.limit_bytes)
        return _Input(given, text, payload)

    def _check_known(self, workflow: Workflow) -> None:
        if not self.registry and not self.strict:
            return  # a dispatcher without code: others know the activities
        for step in workflow.steps:
            if step.activity not in self.registry and step.activity not in WAITS:
                unknown = UnknownActivity(step.activity, self.registry)
                if self.strict:
                    raise unknown
                log.warning("workflow '%s': %s; another service may have it", workflow.name, unknown)

    def _check_args(self, workflow: Workflow) -> None:
        """A mistyped name would be passed over, and its step done with what payload or default have instead."""
        for step in workflow.steps:
            activity = self.registry.find(step.activity) if step.args else None
            taken = None if activity is None else activity.takes()
            if activity is None or taken is None:
                continue
            for name in step.args:
                if name not in taken:
                    raise ArgumentError(
                        f"step '{step.id}' of workflow '{workflow.name}' has args with {name!r}, "
                        f"which activity '{activity.name}' doesn't take; {nearest(name, taken)}"
                    )

    async def _check_first(self, run_id: str, step: Step | None, payload: dict[str, Any]) -> None:
        """Nothing can come before the first step, so what it lacks now it will always lack."""
        activity = None if step is None or step.when is not None else self.registry.find(step.activity)
        if step is None or activity is None:
            return
        namespace = Namespace(run_id, payload, RoutingSlip(itinerary=(step,)))
        await resolve(activity, namespace, args=step.args)


def _instant(start_at: object, now: float) -> float:
    if start_at is None:
        return now
    if not isinstance(start_at, datetime) or start_at.tzinfo is None:
        raise InputInvalid(f"start_at is a datetime with a time zone, found {quoted(start_at)}")
    return max(start_at.timestamp(), now)


def _checked_deadline(deadline: object) -> float:
    if not is_duration(deadline):
        raise InputInvalid(f"a deadline is in seconds, above 0 and below 100 years, found {quoted(deadline)}")
    assert isinstance(deadline, (int, float)), "a duration is a number"
    return float(deadline)


_NOT_CARRIED = frozenset({OBO_TOKEN, "jws_signature", MANDATE})
"""Headers of messages that a caller of `dispatch` may not set."""


def _with_token(headers: Mapping[str, str], token: SecretToken | None) -> Mapping[str, str]:
    """`headers` and the token. Its text is nowhere else: a frame from which an error comes may be shown with values."""
    return headers if token is None else {**headers, OBO_TOKEN: token.reveal()}


class _Input(NamedTuple):
    """An input as JSON, with its keys sorted so that equal ones are equal texts.

    By what was `given` the same dispatch is told from another first: the workflow's model may add other values each
    time, such as the present instant. `text` and `payload`, as JSON values, are what the model made of it.
    """

    given: bytes
    text: bytes
    payload: dict[str, Any]


def _person(headers: Mapping[str, str]) -> bytes:
    """For whom a run acts. For somebody else it is another run: an id mustn't lead to what was granted by others."""
    mandate = Mandate.read(headers)
    return b"" if mandate is None else f"\0{mandate.issuer}\0{mandate.subject}".encode()


def _run_id(workflow_id: str | None, now: float) -> str:
    if workflow_id is None:
        return _new_id(now)
    if not isinstance(workflow_id, str) or not workflow_id.strip() or len(workflow_id) > 200:
        raise InputInvalid(f"a run's id is a text of 1 to 200 characters, found {quoted(workflow_id)}")
    if " " in workflow_id or not is_text(workflow_id):
        raise InputInvalid(f"a run's id has no blanks and no control characters, found {workflow_id!r}")
    _refuse_token("a run's id", workflow_id)
    return workflow_id


def _check_texts(correlation_id: object, headers: object) -> None:
    """They travel in each message of the run: what a reader of messages refuses would never arrive."""
    if correlation_id is not None and not (isinstance(correlation_id, str) and is_text(correlation_id)):
        raise InputInvalid(
            f"a correlation id is a text without control characters, found {quoted(correlation_id)}"
        )
    _refuse_token("a correlation id", correlation_id or "")
    if headers is None:
        return
    if not isinstance(headers, Mapping):
        raise InputInvalid(f"headers are a mapping of texts, found {quoted(headers)}")
    for name, value in headers.items():
        if name in _NOT_CARRIED:
            raise InputInvalid(
                f"headers can't hold {name}: they are recorded with the run, where no token may be; "
                "on_behalf_of= says for whom it acts"
            )
        if not all(isinstance(text, str) and is_text(text) for text in (name, value)):
            raise InputInvalid(
                f"headers are texts without control characters, found {quoted(name)}: {quoted(type(value).__name__)}"
            )
        for text in (name, value):
            _refuse_token("a header", text)


def _refuse_token(what: str, text: str) -> None:
    """Raise InputInvalid for a token: what names a run or tells of it is in its row, its messages and its lines."""
    if holds_token(text):
        raise InputInvalid(
            f"{what} holds a token, which would be recorded; on_behalf_of= says for whom it acts"
        )


def _new_id(now: float) -> str:
    """A UUID of version 7 (RFC 9562): ids of later runs sort behind earlier ones, which keeps indexes compact."""
    value = (int(now * 1000) & (1 << 48) - 1) << 80 | secrets.randbits(80)
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return str(uuid.UUID(int=value))


_MOST_TOLD = 20
"""What is wrong with an input is told up to this number: a long list may be wrong in each of its items."""


@functools.lru_cache(maxsize=256)
def _reader(model: type) -> TypeAdapter[Any]:
    return typed(model)


def _fitted(workflow: Workflow, payload: dict[str, Any]) -> dict[str, Any]:
    model = workflow.input_model
    adapter = _reader(model) if isinstance(model, type) else typed(model)
    try:
        fitted: dict[str, Any] = codec.plain(codec.read_as(adapter, payload))
        return fitted
    except ValidationError as exc:
        cause = exc
    wrong = [
        f"{'.'.join(str(part) for part in error['loc']) or 'input'}: {error['msg']}"
        for error in cause.errors(include_url=False, include_input=False)
    ]
    more = f"; and {len(wrong) - _MOST_TOLD} more" if len(wrong) > _MOST_TOLD else ""
    secrets = secrets_in(payload)
    # What pydantic raised quotes the values, so where some are secret it goes no further.
    raise InputInvalid(
        f"the input of workflow '{workflow.name}' doesn't fit: "
        f"{without('; '.join(wrong[:_MOST_TOLD]), secrets)}{more}"
    ) from None if secrets else cause


def _plain_steps(workflow: Workflow) -> tuple[Step, ...]:
    try:
        return tuple(
            replace(step, args=codec.plain(dict(step.args))) if step.args else step for step in workflow.steps
        )
    except codec.JsonInvalid as exc:
        raise InputInvalid(f"args in workflow '{workflow.name}' can't be written as JSON: {exc}") from exc
