"""Dispatcher: builds a slip, records the start of its run, publishes the first step; does what operators ask."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from paigeant import codec, ledger
from paigeant.activity import ActivityRegistry, typed
from paigeant.arguments import Namespace, resolve
from paigeant.behalf import Behalf
from paigeant.clock import is_duration
from paigeant.context import check_signal
from paigeant.envelope import split
from paigeant.errors import (
    ConfigurationError,
    InputInvalid,
    InvalidDefinition,
    MessageInvalid,
    MessageTooLarge,
    RequestNotFound,
    TransportUnavailable,
    UnknownActivity,
)
from paigeant.forwarder import LONGEST_DELAY, Forwarder
from paigeant.identity import MANDATE, GrantHandle, Mandate
from paigeant.message import MessageId, PaigeantMessage, decode
from paigeant.observer import NOTHING_AROUND, Around, Event, EventName, Observers, Work
from paigeant.redaction import quoted, secrets_in, without
from paigeant.reporter import about_run
from paigeant.secret import OBO_TOKEN, SecretToken
from paigeant.slip import RUN_ENDED, Phase, RoutingSlip, RunStatus, Step, is_text
from paigeant.store import DeadLetter, Request, RunRecord, StepKey, Store
from paigeant.waits import WAITS
from paigeant.workflow import Workflow

__all__ = ["Dispatcher"]

log = logging.getLogger("paigeant.dispatcher")


class Dispatcher:
    """Starts runs, and turns them round or takes them up again."""

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

        Raises InputInvalid, ArgumentError when the first step can't get its arguments, UnknownActivity when strict,
        RunConflict, MessageTooLarge; TokenRejected, TokenExpired and AuthorityUnavailable for a token.
        """
        now = await self.store.now()
        run_id = _run_id(workflow_id, now)
        _check_texts(correlation_id, headers)
        text, payload = self._input(workflow, input)
        begins = _instant(start_at, now)
        slip = replace(workflow.slip(now=begins), itinerary=_plain_steps(workflow))
        if deadline is not None:
            slip = replace(slip, deadline=begins + _checked_deadline(deadline))
        self._check_known(workflow)
        await self._check_first(run_id, slip.next_step(), payload)
        mandate, token = await self._mandate(on_behalf_of, run_id, slip, waits=begins - now)
        given = _traceparent((headers or {}).get("traceparent", ""))
        correlation_id = correlation_id or run_id
        with self._around(run_id, workflow, slip, correlation_id, given) as own:
            trace_id, parent = _trace(own or given)
            message = PaigeantMessage(
                message_id="",
                workflow_id=run_id,
                routing_slip=slip,
                payload=payload,
                workflow=workflow.name,
                correlation_id=correlation_id,
                trace_id=trace_id,
                headers=_with_token({**(headers or {}), **mandate, "traceparent": parent}, token),
            )
            await self._start(message, text, begins=begins, now=now, is_new=workflow_id is None)
        return run_id

    async def cancel(self, workflow_id: str, reason: str = "cancelled") -> RunStatus:
        """Turn the run round, see `Store.cancel_run`."""
        status = await self.store.cancel_run(workflow_id, reason)
        # Where there is nothing to undo, it has ended with that.
        name: EventName = "run.cancelled" if status in RUN_ENDED else "run.cancelling"
        if self.observers.want(name):
            now, about = await self.store.now(), await about_run(self.store, workflow_id)
            self.observers.observe(Event(name, workflow_id, error=reason, at=now, **about))
        await self.wake(workflow_id)
        return status

    async def retry(self, workflow_id: str) -> RunStatus:
        """Take an ended run up again, see `Store.retry_run`."""
        status = await self.store.retry_run(workflow_id)
        await self._tell("run.retried", workflow_id)
        await self.wake(workflow_id)
        return status

    async def signal(self, workflow_id: str, name: str, value: Any, *, sender: str = "") -> None:
        """Send a named value to the run. Raises RunNotFound, InvalidTransition, InputInvalid."""
        try:
            check_signal(name)
        except InvalidDefinition as exc:
            raise InputInvalid(str(exc)) from exc
        _check_sender(sender)
        try:
            text = codec.dump(value)
        except codec.JsonInvalid as exc:
            raise InputInvalid(f"signal '{name}' can't be written as JSON: {exc}") from exc
        await self.store.record_signal(workflow_id, name, text, sender=sender)
        await self._tell("signal.received", workflow_id, signal=name, by=sender)
        await self.wake(workflow_id)

    async def grant(
        self, workflow_id: str, given: SecretToken | str | GrantHandle, *, sender: str = ""
    ) -> RunStatus:
        """Let a run go on with a fresh grant of the same person; gives the run's state.

        A handle is recorded with the run, for the step that waits and those after it. A token travels with the message
        of the step that waits for one, and is recorded nowhere: should that message get lost, the step waits again.
        Raises RunNotFound, InputInvalid, InvalidTransition, TokenRejected, TokenExpired, AuthorityUnavailable,
        TransportUnavailable when the token can't be sent, ConfigurationError when the key of this process may not.
        """
        _check_sender(sender)
        detail = await self.store.load_run(workflow_id, inline_bytes=0)
        known = Mandate.read(detail.run.headers)
        if known is None:
            raise InputInvalid(f"run '{workflow_id}' acts for nobody, so it takes no grant")
        carries = all(self.forwarder.carries(row.topic) for row in detail.steps if row.status in ledger.OPEN)
        fresh, token = await self.behalf.mandate(given, carries=carries)
        if (fresh.subject, fresh.issuer) != (known.subject, known.issuer):
            raise InputInvalid(
                f"run '{workflow_id}' acts for '{known.subject}' of {known.issuer}; the grant is that of "
                f"'{fresh.subject}' of {fresh.issuer}"
            )
        if token is not None:
            await self._send_token(workflow_id, token, sender)
        else:
            # The scopes stay those of the dispatch: a grant renews what was granted, and widens nothing.
            headers = {**detail.run.headers, MANDATE: replace(known, handle=fresh.handle).dump()}
            await self.store.record_grant(workflow_id, headers=headers, sender=sender)
            await self.wake(workflow_id)
        return await self.store.run_status(workflow_id)

    async def _send_token(self, workflow_id: str, token: SecretToken, sender: str) -> None:
        woken = await self.store.record_grant(workflow_id, sender=sender)
        for key in woken:  # what isn't sent would lose the token without a word
            await self._check_may_wake(key)
        if await self.forwarder.send_again(woken, token=token):
            raise TransportUnavailable(
                f"the token for run '{workflow_id}' can't be sent now; grant again when the broker is back"
            )

    async def answer(self, request_id: str, value: Any, *, sender: str = "") -> Request:
        """Answer a request, once; the same answer again changes nothing.

        `value` is what its kind calls for: for an approval whether it is given, or an object with `approved` and
        perhaps a `reason` or other `arguments`; for a question or an external event any JSON, unless what asks says
        which. Raises RequestNotFound, InputInvalid, InvalidTransition when it has another answer or nobody waits for it
        any more.
        """

        def answered(request: Request) -> dict[str, Any]:
            if request.kind == "approval":
                return _approval(value)
            asked = from_json(request.asked)
            if request.kind == "external" and "answer" in asked:
                from paigeant.agents.people import check_answer

                check_answer(asked, value)
            return {"value": value}

        return await self._settle(request_id, answered, sender)

    async def approve(self, request_id: str, *, sender: str = "") -> Request:
        """Approve of what a request asks for. Raises what `answer` raises, InputInvalid for what is no approval."""

        def approved(request: Request) -> dict[str, Any]:
            if request.kind != "approval":
                what = "a question" if request.kind == "question" else "an event outside"
                raise InputInvalid(
                    f"request '{request_id}' is about {what}, which can't be approved of; answer it: "
                    f"`paigeant requests answer {request_id} VALUE`"
                )
            return {"approved": True}

        return await self._settle(request_id, approved, sender)

    async def deny(self, request_id: str, reason: str = "", *, sender: str = "") -> Request:
        """Say no to a request: not approved of, or never to be answered. Raises what `answer` raises."""
        if not isinstance(reason, str) or not is_text(reason.replace("\n", " ")):
            raise InputInvalid(f"a reason is a text without control characters, found {quoted(reason)}")
        return await self._settle(
            request_id,
            lambda request: (
                {"approved": False, "reason": reason} if request.kind == "approval" else {"denied": reason}
            ),
            sender,
        )

    async def _settle(
        self, request_id: str, answer: Callable[[Request], dict[str, Any]], sender: str
    ) -> Request:
        _check_sender(sender)
        request = await self.store.load_request(request_id)
        if request is None:
            raise RequestNotFound(request_id)
        try:
            text = codec.dump(answer(request))
        except codec.JsonInvalid as exc:
            raise InputInvalid(f"the answer can't be written as JSON: {exc}") from exc
        answered = await self.store.answer_request(request_id, text, sender=sender)
        if request.answer is None:
            told: EventName = "request.denied" if _is_denial(from_json(text)) else "request.answered"
            await self._tell(
                told,
                answered.workflow_id,
                step=answered.step,
                request=request_id,
                name=request.name,
                by=sender,
            )
        await self.wake(answered.workflow_id)
        return answered

    async def wake(self, workflow_id: str) -> None:
        """Send messages for the steps of the run that are ready."""
        keys: list[StepKey] = await self.store.open_steps(workflow_id)
        await self.forwarder.send_again(keys)

    async def requeue(self, letter: DeadLetter) -> str:
        """Wake the step that a dead letter was for, and forget the letter; gives the id of its run.

        What is sent is made from the store's rows, so that a stale or damaged letter does no harm, and however often it
        is done the step is done once. Raises InputInvalid when there is nothing to wake, RunNotFound,
        TransportUnavailable when it can't be sent now, ConfigurationError when that isn't for the key of this process;
        then the letter stays.
        """
        key = _step_of(letter)
        if key not in await self.store.open_steps(key.workflow_id):
            status = await self.store.run_status(key.workflow_id)
            raise InputInvalid(
                f"step '{key.step}' of run '{key.workflow_id}' doesn't wait any more (the run is {status}), so "
                f"there is nothing to send; `paigeant dead-letters delete {letter.id}` forgets the letter"
            )
        await self._check_may_wake(key)
        # Forgotten first: should the message be refused as well, the letter about that has the same id.
        kept = await self.store.load_dead_letter(letter.id)
        await self.store.delete_dead_letter(letter.id)
        is_sent = False
        try:
            is_sent = not await self.forwarder.send_again([key])
        finally:
            if not is_sent and kept is not None:
                await self.store.bury(kept)
        if not is_sent:
            raise TransportUnavailable(
                f"the message for step '{key.step}' of run '{key.workflow_id}' can't be published now; "
                "the letter stays, and a worker's sweep sends the message as well"
            )
        await self._tell("delivery.requeued", key.workflow_id, step=key.step)
        return key.workflow_id

    # -- inside

    async def _check_may_wake(self, key: StepKey) -> None:
        if not await self.forwarder.may_wake(key):
            raise ConfigurationError(
                f"the key of this process may not send a message for step '{key.step}' of run '{key.workflow_id}'; "
                "its roles in the trust file say which: `amend` is for all that an operator sends"
            )

    def _around(
        self, run_id: str, workflow: Workflow, slip: RoutingSlip, correlation_id: str, traceparent: str
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
        self, message: PaigeantMessage, input: bytes, *, begins: float, now: float, is_new: bool
    ) -> None:
        """Record the run that `message` is the first of, unless it is recorded, and send that."""
        slip = message.routing_slip
        recorded = {name: text for name, text in message.headers.items() if name != OBO_TOKEN}
        run = RunRecord(
            id=message.workflow_id,
            workflow=message.workflow,
            status=RunStatus.PENDING,
            input=input,
            input_hash=hashlib.sha256(input + _person(recorded)).hexdigest(),
            slip=ledger.pack_slip(slip),
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
        if await self.store.record_workflow_start(run, first, posting, is_new=is_new):
            self.observers.observe(
                Event(
                    "run.dispatched",
                    run.id,
                    run.workflow,
                    trace_id=run.trace_id,
                    correlation_id=run.correlation_id,
                    at=now,
                    traceparent=message.headers["traceparent"],
                )
            )
            if letter is not None:
                # A crash before this line: the sweeper publishes.
                await self.forwarder.send(letter)

    async def _tell(
        self,
        event: EventName,
        workflow_id: str,
        /,
        *,
        step: str = "",
        error: str | None = None,
        **more: str,
    ) -> None:
        """What somebody outside has asked for is done."""
        if self.observers.want(event):
            now = await self.store.now()
            found = {key: value for key, value in more.items() if value}
            self.observers.observe(Event(event, workflow_id, step=step, error=error, at=now, more=found))

    def _input(self, workflow: Workflow, input: Any) -> tuple[bytes, dict[str, Any]]:
        """The input as JSON text, with its keys sorted so that equal inputs are equal texts, and as JSON values."""
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
        if workflow.input_model is not None:
            payload = _fitted(workflow, payload)
        text = codec.dump_sorted(payload)
        if len(text) > self.forwarder.envelope.limit_bytes:
            raise MessageTooLarge(len(text), self.forwarder.envelope.limit_bytes)
        return text, payload

    def _check_known(self, workflow: Workflow) -> None:
        if not self.registry and not self.strict:
            return  # a dispatcher without code: others know the activities
        for step in workflow.steps:
            if step.activity not in self.registry and step.activity not in WAITS:
                unknown = UnknownActivity(step.activity, self.registry)
                if self.strict:
                    raise unknown
                log.warning("workflow '%s': %s; another service may have it", workflow.name, unknown)

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


def _check_sender(sender: object) -> None:
    if not isinstance(sender, str) or not is_text(sender):
        raise InputInvalid(f"a sender is a text without control characters, found {quoted(sender)}")


def _is_denial(answer: Mapping[str, Any]) -> bool:
    return "denied" in answer or answer.get("approved") is False


def _approval(value: Any) -> dict[str, Any]:
    answer = {"approved": value} if isinstance(value, bool) else value
    if isinstance(answer, Mapping) and set(answer) <= {"approved", "reason", "arguments"}:
        approved, reason = answer.get("approved"), answer.get("reason", "")
        arguments = answer.get("arguments")
        if (
            isinstance(approved, bool)
            and isinstance(reason, str)
            and (arguments is None or isinstance(arguments, Mapping))
        ):
            return dict(answer)
    raise InputInvalid(
        "an approval is answered by true or false, or by an object with `approved` (true or false) and, if need be, "
        f"a `reason` (text) or other `arguments` of the call, found {quoted(value)}"
    )


_NOT_CARRIED = frozenset({OBO_TOKEN, "jws_signature", MANDATE})
"""Headers of messages that a caller of `dispatch` may not set."""


def _step_of(letter: DeadLetter) -> StepKey:
    """The step that a letter's message was for: its body tells, or, where that can't be read, its id."""
    try:
        limit = len(letter.body)
        message = decode(split(letter.body, limit)[1], limit_bytes=limit)
    except MessageInvalid as exc:
        known = MessageId.read(letter.id)
        if known is None or known.phase not in list(Phase):
            raise InputInvalid(
                f"dead letter '{letter.id}' can't be sent again, because its body is no message: {exc}; "
                f"`paigeant dead-letters delete {letter.id}` forgets it"
            ) from exc
        return StepKey(known.workflow_id, known.step, Phase(known.phase))
    return StepKey(message.workflow_id, message.step_id, message.phase)


def _with_token(headers: Mapping[str, str], token: SecretToken | None) -> Mapping[str, str]:
    """`headers` and the token. Its text is nowhere else: a frame from which an error comes may be shown with values."""
    return headers if token is None else {**headers, OBO_TOKEN: token.reveal()}


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
    return workflow_id


def _check_texts(correlation_id: object, headers: object) -> None:
    """They travel in each message of the run: what a reader of messages refuses would never arrive."""
    if correlation_id is not None and not (isinstance(correlation_id, str) and is_text(correlation_id)):
        raise InputInvalid(
            f"a correlation id is a text without control characters, found {quoted(correlation_id)}"
        )
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


def _new_id(now: float) -> str:
    """A UUID of version 7 (RFC 9562): ids of later runs sort behind earlier ones, which keeps indexes compact."""
    value = (int(now * 1000) & (1 << 48) - 1) << 80 | secrets.randbits(80)
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return str(uuid.UUID(int=value))


def _traceparent(given: str) -> str:
    """A traceparent as this version of the standard writes it; empty for what is none, which starts a new trace.

    Callers hand on what a request of theirs had, which may be anything.
    """
    found = _TRACEPARENT.fullmatch(given.strip().lower())
    if found is None or (found["version"] == "00" and found["more"]):
        return ""
    return f"00-{found['trace']}-{found['span']}-{found['flags']}"


_TRACEPARENT = re.compile(
    r"(?P<version>(?!ff)[0-9a-f]{2})-(?P<trace>(?!0{32})[0-9a-f]{32})-(?P<span>(?!0{16})[0-9a-f]{16})"
    r"-(?P<flags>[0-9a-f]{2})(?P<more>-.*)?"
)


def _trace(parent: str) -> tuple[str, str]:
    """The trace id and the W3C traceparent of the run: the given one, or a new one."""
    if parent:
        return parent.split("-")[1], parent
    # Random as the standard asks, and not from `random`: a program that sets the seed of that would have the ids of the
    # runs that it has started before.
    found = os.urandom(24).hex()
    return found[:32], f"00-{found[:32]}-{found[32:]}-01"


_MOST_TOLD = 20
"""What is wrong with an input is told up to this number: a long list may be wrong in each of its items."""


def _fitted(workflow: Workflow, payload: dict[str, Any]) -> dict[str, Any]:
    adapter: TypeAdapter[Any] = typed(workflow.input_model)
    try:
        fitted: dict[str, Any] = codec.plain(adapter.validate_json(codec.dump(payload)))
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
