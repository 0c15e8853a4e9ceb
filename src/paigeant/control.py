"""Control: what is done to runs from outside: they are cancelled, taken up again, signalled, granted to, answered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from pydantic_core import from_json

from paigeant import codec, ledger
from paigeant.behalf import Behalf
from paigeant.context import check_signal
from paigeant.envelope import split
from paigeant.errors import (
    ConfigurationError,
    InputInvalid,
    InvalidDefinition,
    MessageInvalid,
    RequestNotFound,
    TransportUnavailable,
)
from paigeant.forwarder import Forwarder
from paigeant.identity import MANDATE, GrantHandle, Mandate
from paigeant.message import MessageId, decode
from paigeant.observer import Event, EventName, Observers
from paigeant.redaction import quoted, redacted
from paigeant.reporter import about_run
from paigeant.secret import SecretToken
from paigeant.slip import RUN_ENDED, Phase, RunStatus, is_text
from paigeant.store import DeadLetter, Request, StepKey, Store

__all__ = ["Control"]


class Control:
    """Turns runs round, takes them up again and hands them what they wait for. Each act wakes what may go on then."""

    def __init__(
        self,
        store: Store,
        forwarder: Forwarder,
        *,
        observers: Observers | None = None,
        behalf: Behalf | None = None,
    ) -> None:
        self.store = store
        self.forwarder = forwarder
        self.observers = observers or Observers()
        self.behalf = behalf or Behalf()

    async def cancel(self, workflow_id: str, reason: str = "cancelled") -> RunStatus:
        """Turn the run round, see `Store.cancel_run`. The reason becomes its error, so it is kept as errors are."""
        reason = codec.storable(redacted(reason))
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
