"""Conversations: what an agent's step leaves to the steps that continue it, in any process.

An activity with `message_history="outline"` goes on where the agent of step `outline` stopped: with its messages, with
what the conversation has used so far, so that limits go on counting, and with the tool calls that wait for an answer.
So each agent step that has steps after it keeps its conversation, as a unit of the step in the store: it doesn't
travel, and only the step that continues it reads it. The unit is named after a digest of the step's output. That is
what ties it to the attempt whose result was recorded: a conversation of an attempt that failed, lost its lease or died
before its result was durable is under a name that no recorded output leads to. (One and the same name would not do: the
first value of a unit stands, and the first attempt may be one that left no result.) It costs one small commit a step,
beside the seconds that a model takes.

A step that continues a conversation keeps only the messages that it added, and where the rest is: what is written grows
with the conversation, not with its square.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_ai import DeferredToolRequests, DeferredToolResults
from pydantic_ai.conversation import Conversation
from pydantic_core import PydanticSerializationError, from_json

from paigeant import codec
from paigeant.agents.operations import not_json
from paigeant.context import StepContext
from paigeant.errors import ArgumentError, UnitUnreadable
from paigeant.secret import refuse_tokens
from paigeant.slip import Phase, StepStatus
from paigeant.store import StepKey

__all__ = ["Earlier", "answers", "continued", "keep"]

_UNIT = "paigeant.messages:"


@dataclass(frozen=True, slots=True)
class Earlier:
    """The conversation up to the end of a step, and the unit of the step that it is kept in."""

    step: str
    unit: str
    conversation: Conversation


@dataclass(frozen=True, slots=True)
class _Record:
    """What is stored: a conversation without the messages that the unit of an earlier step has, if any."""

    __pydantic_config__ = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    conversation: Conversation
    step: str | None = None
    unit: str | None = None


_RECORD = TypeAdapter(_Record)


async def keep(
    context: StepContext,
    output: TypeAdapter[Any] | None,
    value: Any,
    conversation: Conversation,
    earlier: Earlier | None,
) -> None:
    """Record the conversation that led to this output, before the output itself is recorded. Raises OutputInvalid."""
    try:
        text = codec.dump(value) if output is None else codec.dump_as(output, value)
    except codec.JsonInvalid:
        return  # the step fails for its output, with a message that says so
    record = _Record(conversation)
    if earlier is not None:
        before, messages = earlier.conversation.messages, conversation.messages
        if messages[: len(before)] == before:
            rest = replace(conversation, messages=messages[len(before) :])
            record = _Record(rest, earlier.step, earlier.unit)
    try:
        written = _RECORD.dump_json(record)
    except PydanticSerializationError as exc:  # of a tool whose calls aren't recorded
        raise not_json(exc) from exc
    refuse_tokens("the conversation", written, context._place.journal.secrets)
    await context._store.save_unit(context._key, _unit_of(text), written)


async def continued(name: str, earlier: str, context: StepContext) -> Earlier | None:
    """The conversation of the recorded step `earlier`, which activity `name` continues.

    None when its `when` skipped the step: a new conversation begins. Raises ArgumentError where there is none.
    """
    slip = context._slip
    done = slip.find(earlier)
    if done is None:
        skipped = [entry for entry in slip.executed if entry.status is StepStatus.SKIPPED]
        if any(earlier in (entry.step_id, entry.activity) for entry in skipped):
            return None
        there = ", ".join(entry.step_id for entry in slip.executed) or "none"
        raise ArgumentError(
            f"activity '{name}' continues the conversation of '{earlier}', but no such step was done before it; "
            f"done: {there}"
        )
    recorded = await context._store.load_output(context.workflow_id, done.step_id)
    unit = "" if recorded is None else _unit_of(recorded)
    conversation = await _conversation(context, done.step_id, unit)
    if conversation is None:
        raise ArgumentError(
            f"activity '{name}' continues the conversation of '{earlier}', but step '{done.step_id}' "
            f"(activity '{done.activity}') was not done by an agent, so that there is none"
        )
    return Earlier(done.step_id, unit, conversation)


def answers(name: str, source: str | None, value: Any, earlier: Earlier | None) -> DeferredToolResults | None:
    """What answers the tool calls that the conversation waits for: `value`, which has the name `source`.

    None where it waits for nothing. Raises ArgumentError unless each call has its answer, of its kind, and none else.
    """
    pending = None if earlier is None else earlier.conversation.deferred_tool_requests
    results: DeferredToolResults | None = value
    given = {} if results is None else {**results.approvals, **results.calls}
    if pending is None or earlier is None:
        if given:
            raise ArgumentError(
                f"'{source}' answers tool calls of activity '{name}' ({_listed(given)}), but the conversation that it "
                "continues waits for none"
            )
        return None
    if results is None:
        where = (
            "name what answers them: activity.agent(..., deferred_tool_results='decide')"
            if source is None
            else f"'{source}', which is to answer them, isn't there"
        )
        raise ArgumentError(f"{_waiting(name, earlier, pending)}; {where}")
    for kind, wanted, found in (
        ("approvals", pending.approvals, results.approvals),
        ("calls", pending.calls, results.calls),
    ):
        ids = [call.tool_call_id for call in wanted]
        if set(ids) != set(found):
            raise ArgumentError(
                f"{_waiting(name, earlier, pending)}; '{source}' has in its {kind} {_listed(found)}, and should have "
                f"{_listed(ids)}"
            )
    return results


def _waiting(name: str, earlier: Earlier, pending: DeferredToolRequests) -> str:
    calls = ", ".join(f"{call.tool_call_id} ({call.tool_name})" for call in pending.approvals + pending.calls)
    return (
        f"activity '{name}' continues the conversation of step '{earlier.step}', whose tool calls wait for an answer: "
        f"{calls}"
    )


def _listed(ids: Iterable[str]) -> str:
    return ", ".join(ids) or "none"


async def _conversation(context: StepContext, step: str, unit: str) -> Conversation | None:
    """The whole conversation of this unit; None when the unit isn't there."""
    parts: list[Conversation] = []
    before: tuple[str | None, str | None] = (step, unit)
    while before[0] is not None and before[1] is not None:
        stored = await context._store.load_unit(StepKey(context.workflow_id, before[0], Phase.DO), before[1])
        if stored is None:
            return None
        record = _read(stored, before[0])
        parts.append(record.conversation)
        before = (record.step, record.unit)
    messages = [message for part in reversed(parts) for message in part.messages]
    return replace(parts[0], messages=messages)


def _read(stored: bytes, step: str) -> _Record:
    try:
        return _RECORD.validate_json(stored)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        raise UnitUnreadable(f"the conversation of step '{step}' can't be read: {first['msg']}") from exc


def _unit_of(output: bytes) -> str:
    """The unit that holds the messages which led to `output`, however a store may have laid out its JSON."""
    canonical = json.dumps(from_json(output), sort_keys=True, separators=(",", ":"))
    return _UNIT + hashlib.sha256(canonical.encode()).hexdigest()
