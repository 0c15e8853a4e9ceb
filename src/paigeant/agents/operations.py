"""Operations of the library as units of a step: what they are called, how they are written and read."""

from __future__ import annotations

import contextvars
import copy
import json
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

from pydantic import TypeAdapter
from pydantic_ai import DeferredToolRequests, RunContext, RunUsage
from pydantic_ai.durable_exec import (
    JSON_CODEC,
    CallableOperationBackend,
    DurabilityCodec,
    DurableOperationId,
    EventStreamHandlerId,
    JournalOperationNamer,
    ModelCancelSuspendedResponseId,
    ModelRequestId,
    RoleBasedOperationConfig,
    ToolsetCallToolId,
    ToolsetValidateToolArgumentsId,
)
from pydantic_ai.messages import ModelResponse, ToolCallPart
from pydantic_core import PydanticSerializationError, from_json, to_json

from paigeant.agents.spans import tell_unit
from paigeant.agents.usage import Part, count, of_request, of_run
from paigeant.errors import OutputInvalid, UnitUnreadable
from paigeant.place import Place, Stages, Unit, current_place
from paigeant.redaction import redacted
from paigeant.usage import Usage

__all__ = [
    "CALL",
    "EVENT_OF",
    "PROGRESS",
    "Codec",
    "Operations",
    "Progress",
    "line",
    "not_json",
    "part_of",
    "place_of_run",
    "recorded_name",
    "run_in_name",
]

_USAGE = TypeAdapter(RunUsage)
_NOTHING, _CALLED = Usage(), Usage(tool_calls=1)


class Payload(NamedTuple):
    """A value as JSON, and what that JSON says: it is loaded of that, as it will be from a record."""

    json: bytes
    value: Any


class Codec(DurabilityCodec):
    """JSON; a record that can't be read is our error, not one that a tool's arguments could have caused.

    What is dumped is a Payload. A value that comes from a record is loaded as it stands there.
    """

    def dump(self, tp: Any, value: Any) -> Payload:
        try:
            found = JSON_CODEC.dump(tp, value)
            # In two steps: only the second can write nan and infinity of any type so that they are read again.
            try:
                written = to_json(found, inf_nan_mode="strings")
            except PydanticSerializationError as exc:
                if "surrogates not allowed" not in str(exc):
                    raise
                written = to_json(_mended(found), inf_nan_mode="strings")
            return Payload(written, from_json(b"[%b]" % written)[0])  # as deep as it will be in its record
        except (PydanticSerializationError, ValueError) as exc:  # or it is nested too deep to be read again
            raise not_json(exc) from exc

    def load(self, tp: Any, payload: Any) -> Any:
        try:
            return JSON_CODEC.load(tp, payload.value if isinstance(payload, Payload) else payload)
        except Exception as exc:  # whatever a type's own validators raise
            said = " ".join(redacted(str(exc)).split())
            raise UnitUnreadable(
                f"a recorded unit can't be read as {tp!r}: {said[:500]}; it was recorded by "
                "other code: go on with that code, or dispatch the work again under another id"
            ) from exc


def _mended(value: Any) -> Any:
    """`value` with U+FFFD for halves of surrogate pairs: a model leaves one where its answer is cut within a character.

    No provider would take such a text back, and what was paid for is worth more than half a letter.
    """
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {key: _mended(item) for key, item in value.items()}
    return [_mended(item) for item in value] if isinstance(value, (list, tuple)) else value


def not_json(error: Exception) -> OutputInvalid:
    """The error for a value that JSON can't hold, whatever it met: no further attempt can record it."""
    said = " ".join(redacted(str(error)).split())
    call = CALL.get()
    what = "what a model or a tool gave" if call is None else f"what tool '{call.tool_name}' gave"
    return OutputInvalid(
        f"{what} can't be recorded as JSON: {said[:500]}; expected what JSON can hold, such as texts, numbers, lists, "
        "dicts, dataclasses and pydantic models"
    )


@dataclass(slots=True)
class Progress:
    """How far one run of an agent has come: the last answer of its model, and what was done of what that asks for.

    `line` is empty as long as each answer is the first to its request. Else it tells which ones are not; it is part of
    the names of all units that come after them, so that none of these is given the record of another answer's unit.
    So it is with a run whose id another one has had there.
    """

    stages: Stages | None = None
    """Where hooks, validators and all else is that belongs to the run and to none of its units, answer by answer."""
    answer: tuple[Place, str] | None = None
    """The unit that asked for the last answer; those that asked after it, as long as it `is_pending`, are others."""
    is_pending: bool = False
    about: str = ""
    """The step of the agent's run that the last answer is of."""
    model: str | None = None
    """The id of the model that is asked now, or was last."""
    error: Exception | None = None
    line: str = ""
    calls: dict[str, str] = field(default_factory=dict)
    """The names of the units of the last answer's tool calls, with the tools; empty for an answer that is new.

    Before the first answer they are those of the calls that the run's history leaves open.
    """
    done: dict[str, str] = field(default_factory=dict)
    """The tools of the last answer that were called and may have had effects, by their units."""
    was: dict[tuple[str, str], str] = field(default_factory=dict)
    """What tools of the last answer were called when it was recorded, by the call and the name that they have now."""
    deferred: DeferredToolRequests | None = None
    """The calls that somebody outside was last wanted for."""

    def answered(self, place: Place, unit: str, number: int, about: str, *, is_pending: bool) -> None:
        """The model has given the answer that is recorded as `unit`, the so manieth to its request.

        `is_pending`: its provider works on it still.
        """
        if not self.is_pending or self.about != about:
            self.answer = (place, unit)
        self.is_pending, self.about = is_pending, about
        self.calls, self.done, self.was = {}, {}, {}
        if self.stages is not None:
            self.stages.move(unit)
        if number > 1:
            self.line = f"{self.line},{about}!{number}"

    def failed(self, error: Exception) -> None:
        """The run gave up because of what its model said: the next attempt asks for the last answer again.

        Otherwise it would read the same answers and give up as well. An error that comes from a unit is none of this:
        that unit isn't recorded. An answer of which a tool call was done isn't asked for again by itself: the new one
        might ask for the same effect, under another key.
        """
        if self.answer is None or error is self.error:
            return
        place, unit = self.answer
        held = ""
        left = (tool for name, tool in self.calls.items() if place.journal.is_left(name))
        if done := dict.fromkeys((*self.done.values(), *left)):
            tools = ", ".join(f"'{tool}'" for tool in done)
            held = (
                f"the answer isn't asked for again, since what it asked of {tools} was done, and might be done for the "
                "second time; see what came of it: retrying the run has the model asked anew"
            )
        place.give_up(unit, error, held=held)

    def check(self, place: Place) -> None:
        """Raise UnitUnreadable when a call that is recorded as done wasn't made by the code that is there now."""
        calls, self.calls = self.calls, {}
        for name, tool in calls.items():
            if place.journal.is_left(name):
                raise UnitUnreadable(
                    f"the call of tool '{tool}' is recorded as done ({name}), and this code would not make it: the "
                    "tool is gone, doesn't take these arguments any more, or a handler doesn't approve of what it has "
                    "approved of; the model isn't told so, for it would call it again: go on with the code that "
                    "recorded it, or dispatch the work again under another id"
                )


PROGRESS: contextvars.ContextVar[Progress | None] = contextvars.ContextVar("paigeant.progress", default=None)
CALL: contextvars.ContextVar[ToolCallPart | None] = contextvars.ContextVar("paigeant.call", default=None)
"""The call of a tool that is being executed, if any is, in the run of an agent."""
EVENT_OF: contextvars.ContextVar[RunContext[Any] | None] = contextvars.ContextVar(
    "paigeant.event_of", default=None
)


class _Namer(JournalOperationNamer):
    """The library's names. Those of MCP calls and validations tell their tool as well, like that of any other call.

    That of a model request tells neither the model nor whether it is streamed: an answer that is there is the answer,
    also where a model that had failed is well again, or new code asks another one.
    """

    def __init__(self, agent_name: str, *, default_model_id: str) -> None:
        super().__init__(agent_name, default_model_id=default_model_id)
        self._request = super().operation_name(ModelRequestId(model_name=""))
        self._calls: dict[ToolsetCallToolId, str] = {}

    def operation_name(self, operation_id: DurableOperationId) -> str:
        if isinstance(operation_id, ModelRequestId):
            return self._request
        if not isinstance(operation_id, ToolsetCallToolId):
            return super().operation_name(operation_id)
        if (name := self._calls.get(operation_id)) is None:
            name = self._calls[operation_id] = super().operation_name(operation_id)
        return name

    def invocation_name(self, operation_id: DurableOperationId, *, label: str | None) -> Any:
        invocation = super().invocation_name(operation_id, label=label)
        name = invocation.operation_name
        if label is not None and name == self.operation_name(operation_id):
            return type(invocation)(f"{name}:{label}")
        return invocation


class Operations(CallableOperationBackend[Unit]):
    """Does the library's operations as units at the current place of the step."""

    def __init__(
        self,
        agent: str,
        model: str | None,
        config: RoleBasedOperationConfig[Unit],
        toolsets: Callable[[], Iterable[str]],
        renamed: Callable[[], Mapping[str, str]],
    ) -> None:
        super().__init__(namer=_Namer(agent, default_model_id=model or "default"), config=config)
        self.agent = agent
        self.toolsets = toolsets
        """What names the toolsets of the agent in the names of units."""
        self.renamed = renamed
        """What tools are called now, by the names that they had."""

    async def execute(
        self,
        *,
        operation_id: DurableOperationId,
        name: str,
        body: Callable[[], Awaitable[object]],
        cache_key: tuple[object, ...],
        config: Unit,
    ) -> object:
        """The recorded result of the operation; `body` is called where there is none."""
        place = place_of_run()
        if place is None:  # the step has ended, or this is a thread that knows nothing of it
            return await body()
        if isinstance(operation_id, ModelCancelSuspendedResponseId):
            # The library has a provider give up what nobody waits for any more, also where an attempt is ended from
            # outside or has failed. The record says that it is being worked on: the next attempt asks after it.
            return None
        ctx = _context_in(cache_key) or (
            EVENT_OF.get() if isinstance(operation_id, EventStreamHandlerId) else None
        )
        progress = PROGRESS.get() or Progress()
        is_answer, is_call = (
            isinstance(operation_id, ModelRequestId),
            isinstance(operation_id, ToolsetCallToolId),
        )
        if isinstance(operation_id, ModelRequestId) and operation_id.streaming:
            # Whoever watches the stream has seen a part of it: the step's next attempt is told apart, a try isn't.
            config = Unit(config.label)
        calls_tool = is_call or isinstance(operation_id, ToolsetValidateToolArgumentsId)
        caller = ctx if calls_tool else None
        usage = None if caller is None else caller.usage
        if is_call and not place.is_unit and place.outer is not None:
            place = place.outer  # a call that is recorded is a unit itself: it needs no place for its effects
        if caller is not None and (recorded := _called(caller, progress)) is not None:
            name = f"{name.removesuffix(caller.tool_name or '')}{recorded}"
        identity = _identity(place, name, ctx, cache_key, progress.line)
        about = "" if ctx is None else str(ctx.run_step)
        turn = place.take(identity) if is_answer else place.count(identity)
        unit, number = place.spelled(identity, turn), 1
        if is_answer:
            unit, number = await place.standing(unit)
            # The records are read by now, whatever else was asked for. Of an answer that was rejected, so that another
            # one was asked for in its place and is there, no call was made.
            if progress.about != about or not place.journal.is_left(unit):
                progress.check(place)
        if config.beside and (progress.answer is None or progress.answer[0] is not place or turn > 1):
            # Code has called it, which may rely on what it called before.
            config = replace(config, beside=False)
        tool = ctx.tool_name or "" if ctx is not None and is_call else None
        if tool is not None:
            progress.done[unit] = tool
            if config.at_most_once:
                config = replace(config, about=self._call(tool))
        made = None

        async def produce() -> bytes:
            nonlocal made
            made = await _made(operation_id, body, caller)
            return made.record

        try:
            done = await place.do(unit, config, produce, soon=is_answer)
        except BaseException as exc:
            if is_answer:
                # Another model may take over: its answer is the one that was wanted, for all attempts.
                place.give_back(identity, turn)
            if isinstance(exc, Exception):
                progress.error = exc
            raise
        tell_unit(executed=done.executed)
        # Another worker may have been the first to record it.
        told = made if made is not None and made.record == done.value else _read(unit, done.value)
        if is_answer:
            progress.answered(place, unit, number, about, is_pending=_is_pending(told.value))
        if tool is not None and not _is_return(told.value):
            progress.done.pop(unit, None)
        if is_answer and not done.executed and ctx is not None:
            for part in _tool_calls(told.value):
                asked, call = str(part.get("tool_name")), part.get("tool_call_id")
                progress.calls.update(self._calls(place, ctx, asked, call, progress.line))
            progress.was = self._rename(told.value)
        # That is by the library, once it has the value.
        added = told.used if is_answer else _used(operation_id, told.value)
        if usage is not None and told.usage is not None:
            usage.incr(told.usage)
            added += of_run(told.usage)
        count(unit, told.used, added, to=None if ctx is None else ctx.usage)
        return told.value

    def _call(self, tool: str) -> dict[str, Any]:
        """What tells a person which call of a tool it is: as the model asked, for a hook may have put a secret in."""
        call = CALL.get()
        return {"agent": self.agent, "tool": tool, "arguments": {} if call is None else call.args_as_dict()}

    def begin(self, place: Place, ctx: RunContext[Any], progress: Progress) -> None:
        """Have the calls that a run's history leaves open go on like those of a recorded answer.

        An earlier run has been given them, maybe days ago: code that called a tool otherwise may have done them here.
        """
        messages = ctx.messages
        answers = (at for at in reversed(range(len(messages))) if isinstance(messages[at], ModelResponse))
        if (last := next(answers, None)) is None:
            return
        results = [part for message in messages[last + 1 :] for part in message.parts]
        given = {getattr(part, "tool_call_id", None) for part in results}
        names = self.renamed()

        def today(part: Any) -> Any:
            if not isinstance(part, ToolCallPart) or part.tool_call_id in given:
                return part
            progress.calls.update(self._calls(place, ctx, part.tool_name, part.tool_call_id, progress.line))
            if (now := names.get(part.tool_name)) is None:
                return part
            progress.was[part.tool_call_id, now] = part.tool_name
            return replace(part, tool_name=now)

        parts = [today(part) for part in messages[last].parts]
        if progress.was:  # the list is the run's own, the messages are the caller's
            messages[last] = replace(cast(ModelResponse, messages[last]), parts=parts)

    def _calls(
        self, place: Place, ctx: RunContext[Any], tool: str, call: str | None, line: str
    ) -> Iterator[tuple[str, str]]:
        """What the unit of a tool call is called, whichever toolset has the tool, with the tool."""
        about = _about(place, ctx, line, call)
        for toolset in self.toolsets():
            yield place.spelled(f"{self.agent}__{toolset}.call_tool:{tool}({about})"), tool

    def _rename(self, answer: object) -> dict[tuple[str, str], str]:
        """Have a recorded answer call tools by the names that they have now; gives `Progress.was`."""
        was: dict[tuple[str, str], str] = {}
        names = self.renamed()
        for part in _tool_calls(answer) if names else ():
            tool = str(part.get("tool_name"))
            if (now := names.get(tool)) is not None:
                part["tool_name"] = now
                was[str(part.get("tool_call_id")), now] = tool
        return was


def _tool_calls(answer: object) -> Iterator[dict[str, Any]]:
    parts = answer.get("parts") if isinstance(answer, dict) else None
    for part in parts or ():
        if part.get("part_kind") == "tool-call":
            yield part


class _Told(NamedTuple):
    """The record of an operation, and what it tells: the value, the unit's own usage, what its caller is to count."""

    record: bytes
    value: Any
    used: Usage
    usage: RunUsage | None = None


async def _made(
    operation_id: DurableOperationId, body: Callable[[], Awaitable[object]], caller: RunContext[Any] | None
) -> _Told:
    """The record of what `body` gives, with the usage that it caused in its `caller`. Raises OutputInvalid.

    Before that stands what the unit used itself: all of it that no other unit tells of.
    """
    if caller is None:
        payload = cast(Payload, await body())
        used = _used(operation_id, payload.value)
        return _Told(used.stamp(b'{"value":%b}' % payload.json), payload.value, used)
    # The library gives each call of a tool a context of its own, and the parallel ones a usage in common.
    common = caller.usage
    before, caller.usage = copy.copy(common), copy.copy(common)
    try:
        with Part(caller.usage, before) as within:
            payload = cast(Payload, await body())
        after = caller.usage
    finally:
        caller.usage = common
    used = _used(operation_id, payload.value)
    if vars(after) == vars(before):
        return _Told(used.stamp(b'{"value":%b}' % payload.json), payload.value, used)
    used += within.rest()
    caused = _USAGE.dump_json(after - before, exclude_defaults=True)
    record = used.stamp(b'{"value":%b,"usage":%b}' % (payload.json, caused))
    return _Told(record, payload.value, used, _USAGE.validate_python(from_json(caused)))


def _read(unit: str, record: bytes) -> _Told:
    """What a record tells. Raises UnitUnreadable."""
    try:
        found = from_json(record)
        usage = _USAGE.validate_python(found["usage"]) if "usage" in found else None
        return _Told(record, found["value"], Usage.told(found) or _NOTHING, usage)
    except (ValueError, KeyError, TypeError) as exc:
        raise UnitUnreadable(f"the record of unit '{unit}' is no record of an operation: {exc}") from exc


def _used(operation_id: DurableOperationId, value: object) -> Usage:
    """What an operation used by itself, as its value tells."""
    if isinstance(operation_id, ModelRequestId):
        return of_request(value)
    # A refusal, a deferral or a request to try again is no call.
    called = isinstance(operation_id, ToolsetCallToolId) and _is_return(value)
    return _CALLED if called else _NOTHING


def _is_pending(value: object) -> bool:
    """Whether a recorded answer says that the provider works on it still."""
    return isinstance(value, dict) and value.get("state") == "suspended"


def _is_return(value: object) -> bool:
    """Whether a tool's recorded result is that of a call that was done."""
    return isinstance(value, dict) and value.get("kind") in ("tool_return", "tool_content_result")


def _context_in(cache_key: tuple[object, ...]) -> RunContext[Any] | None:
    """The context of the operation, which stands among the inputs that the library gives for hashing."""
    for part in reversed(cache_key):
        if isinstance(part, RunContext):
            return part
    return None


def _identity(
    place: Place, name: str, ctx: RunContext[Any] | None, cache_key: tuple[object, ...], line: str
) -> str:
    """What tells an operation from all others at this place, but for its repetitions."""
    if ctx is None:
        # Of a call of a workspace all that is known of its run is the id.
        run = cache_key[-1] if cache_key else None
        return f"{name}({run_in_name(place, run)}{line})" if isinstance(run, str) else f"{name}()"
    return f"{name}({_about(place, ctx, line, ctx.tool_call_id or _call_of(cache_key))})"


def _about(place: Place, ctx: RunContext[Any], line: str, call: str | None) -> str:
    about = f"{run_in_name(place, ctx.run_id or '')},{ctx.run_step}{line}"
    return about if call is None else f"{about},{json.dumps(call)}"


def part_of(
    place: Place, what: str, ctx: RunContext[Any], call: str | None, *, number: int | None = None
) -> Place:
    """The place of what an agent does that isn't recorded: `what`, for a tool call if it is one."""
    return place.part(f"{what}({_about(place, ctx, line(), call)})", number=number)


def recorded_name(call: ToolCallPart) -> str:
    """What the tool of a call is called in the names of units: as it was when the call was recorded."""
    progress, tool = PROGRESS.get(), call.tool_name
    return tool if progress is None else progress.was.get((call.tool_call_id, tool), tool)


def _called(ctx: RunContext[Any], progress: Progress) -> str | None:
    """What a tool is called in the name of a unit of its; None where that is what its own toolset calls it.

    It is the name that the model has said: its answer is what tells, later, which units there must be. A toolset around
    the tool's own may give it another one.
    """
    call = CALL.get()
    if call is not None and call.tool_call_id == ctx.tool_call_id:
        return recorded_name(call)
    return progress.was.get((ctx.tool_call_id or "", ctx.tool_name or ""))


def place_of_run() -> Place | None:
    """The place of the units of an agent's run, for code that is at a stage of it; else the current place."""
    place, progress = current_place(), PROGRESS.get()
    stages = None if progress is None else progress.stages
    return stages.outer if stages is not None and place is stages.now else place


def line() -> str:
    """The `line` of the run of an agent that the code which calls this belongs to."""
    progress = PROGRESS.get()
    return "" if progress is None else progress.line


def _call_of(cache_key: tuple[object, ...]) -> str | None:
    """The tool call that an event tells of; None for anything else."""
    if len(cache_key) != 1:
        return None
    event = cache_key[0]
    call = getattr(event, "tool_call_id", None)
    return call if isinstance(call, str) else None


def run_in_name(place: Place, run_id: str) -> str:
    """A run id in the name of a unit: without what all of the default ones at this place begin with."""
    own = f"{place.effect_key}:"
    return run_id.removeprefix(own) if run_id.startswith(own) else json.dumps(run_id)
