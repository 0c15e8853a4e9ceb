"""Conversations: the messages of an agent's step, for the steps that continue them, in any process.

An activity with `message_history="outline"` goes on where the agent of step `outline` stopped. So each agent step that
has steps after it keeps its messages, as a unit of the step in the store: they don't travel, and only the step that
continues them reads them. The unit is named after a digest of the step's output. That is what ties it to the attempt
whose result was recorded: messages of an attempt that failed, lost its lease or died before its result was durable are
under a name that no recorded output leads to. (One and the same name would not do: the first value of a unit stands,
and the first attempt may be one that left no result.) It costs one small commit a step, beside the seconds that a model
takes.

A step that continues a conversation keeps only what it added to it, and where the rest is: what is written grows with
the conversation, not with its square.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_ai import ModelMessage
from pydantic_core import from_json

from paigeant import codec
from paigeant.context import StepContext
from paigeant.errors import ArgumentError, UnitUnreadable
from paigeant.slip import Phase, StepStatus
from paigeant.store import StepKey

__all__ = ["Conversation", "continued", "keep"]

_UNIT = "paigeant.messages:"


@dataclass(frozen=True, slots=True)
class Conversation:
    """The messages up to the end of a step, and the unit of the step that they are kept in."""

    step: str
    unit: str
    messages: list[ModelMessage]


@dataclass(frozen=True, slots=True)
class _Record:
    """What is stored: the messages that a step added to those of the unit of an earlier step, if any."""

    __pydantic_config__ = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    messages: list[ModelMessage]
    step: str | None = None
    unit: str | None = None


_RECORD = TypeAdapter(_Record)


async def keep(
    context: StepContext,
    output: TypeAdapter[Any] | None,
    value: Any,
    messages: Sequence[ModelMessage],
    earlier: Conversation | None,
) -> None:
    """Record the messages that led to this output, before the output itself is recorded."""
    try:
        text = codec.dump(value) if output is None else codec.dump_as(output, value)
    except codec.JsonInvalid:
        return  # the step fails for its output, with a message that says so
    record = _Record(list(messages))
    if earlier is not None and record.messages[: len(earlier.messages)] == earlier.messages:
        record = _Record(record.messages[len(earlier.messages) :], earlier.step, earlier.unit)
    await context._store.save_unit(context._key, _unit_of(text), _RECORD.dump_json(record))


async def continued(name: str, earlier: str, context: StepContext) -> Conversation | None:
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
    messages = await _messages(context, done.step_id, unit)
    if messages is None:
        raise ArgumentError(
            f"activity '{name}' continues the conversation of '{earlier}', but step '{done.step_id}' "
            f"(activity '{done.activity}') was not done by an agent, so that there is none"
        )
    return Conversation(done.step_id, unit, messages)


async def _messages(context: StepContext, step: str | None, unit: str | None) -> list[ModelMessage] | None:
    """All messages up to those of this unit; None when the unit isn't there."""
    parts: list[list[ModelMessage]] = []
    while step is not None and unit is not None:
        stored = await context._store.load_unit(StepKey(context.workflow_id, step, Phase.DO), unit)
        if stored is None:
            return None
        record = _read(stored, step)
        parts.append(record.messages)
        step, unit = record.step, record.unit
    return [message for part in reversed(parts) for message in part]


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
