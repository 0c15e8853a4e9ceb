"""What agents ask of people and of the world outside, as requests of their run: it leaves its step until the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

from pydantic import JsonValue, TypeAdapter, ValidationError
from pydantic_ai import (
    CallDeferred,
    DeferredToolRequests,
    DeferredToolResults,
    RunContext,
    ToolApproved,
    ToolDenied,
)
from pydantic_ai._output import types_from_output_spec
from pydantic_ai._run_context import get_current_run_context
from pydantic_ai.agent import AbstractAgent
from pydantic_ai.capabilities import RequestInput
from pydantic_ai.capabilities.abstract import leaf_capabilities
from pydantic_ai.exceptions import ToolFailed
from pydantic_ai.external_events import ExternalEventError, ExternalEventWaiter
from pydantic_ai.messages import ToolCallPart
from pydantic_core import PydanticSerializationError, from_json, to_json

from paigeant.agents.operations import (
    CALL,
    PROGRESS,
    line,
    not_json,
    place_of_run,
    recorded_name,
    run_in_name,
)
from paigeant.agents.spans import tell_unit
from paigeant.codec import storable
from paigeant.errors import InputInvalid, OutsideStep, RequestDenied, WaitTimeout
from paigeant.place import Place, Unit
from paigeant.store import RequestKind

__all__ = ["Outside", "asks_itself", "check_answer", "decisions", "outcome"]

_RESULTS = TypeAdapter(DeferredToolResults)
_RESULTS_NAME = DeferredToolResults.__name__


def _json(value: object) -> bytes:
    # A model may put numbers into arguments that JSON lacks, and not every database takes them.
    try:
        return to_json(value, inf_nan_mode="strings")
    except PydanticSerializationError as exc:  # metadata of a tool whose calls aren't recorded
        raise not_json(exc) from exc


def asks_itself(agent: AbstractAgent[Any, Any] | None, ctx: RunContext[Any]) -> bool:
    """Whether a run has its own way with calls that need somebody outside: to end with them, or to ask by itself.

    Of an output type that is given to the run alone an engine hears nothing.
    """
    asks = ctx.root_capability is not None and any(
        isinstance(part, RequestInput) for part in leaf_capabilities(ctx.root_capability)
    )
    return asks or (agent is not None and DeferredToolRequests in types_from_output_spec(agent.output_type))


async def decisions(
    place: Place,
    agent: str,
    ctx: RunContext[Any],
    requests: DeferredToolRequests,
    timeout: float | None,
) -> DeferredToolResults:
    """What people have decided about the calls that wait for them: all asked at once, each by a request of its own."""
    about = f"{run_in_name(place, ctx.run_id or '')},{ctx.run_step}{line()}"
    calls = [*requests.approvals, *requests.calls]
    found = await asyncio.gather(
        *(
            _decision(place, agent, about, requests.kind(key), call, requests.metadata.get(key), timeout)
            for key, call in ((call.tool_call_id, call) for call in calls)
        )
    )
    results = DeferredToolResults()
    for call, (decision, by) in zip(calls, found, strict=True):
        shelf = results.approvals if requests.kind(call.tool_call_id) == "approval" else results.calls
        shelf[call.tool_call_id] = decision
        if by:
            results.answered_by[call.tool_call_id] = by
    return results


async def outcome(
    place: Place,
    agent: str,
    ctx: RunContext[Any],
    call: ToolCallPart,
    deferred: CallDeferred,
    timeout: float | None,
) -> Any:
    """What has come of a call that was approved, and then left to somebody outside: a request of its own as well.

    The library asks for each call once, and has no answer to one that is deferred after that. Raises ToolFailed.
    """
    about = f"{run_in_name(place, ctx.run_id or '')},{ctx.run_step}{line()}"
    found, _ = await _decision(place, agent, about, deferred.kind, call, deferred.metadata, timeout)
    if isinstance(found, ToolFailed):
        raise found
    return found


async def _decision(
    place: Place,
    agent: str,
    about: str,
    kind: RequestKind,
    call: ToolCallPart,
    metadata: Mapping[str, Any] | None,
    timeout: float | None,
) -> tuple[Any, str]:
    asked = {"agent": agent, "tool": call.tool_name, "arguments": call.args_as_dict()}
    if metadata:
        asked["about"] = metadata
    unit = place.name(storable(f"{agent}__{kind}:{recorded_name(call)}({about},{call.tool_call_id})"))
    try:
        answer = await place.ask(kind, call.tool_name, _json(asked), timeout=timeout, unit=unit)
    except (WaitTimeout, RequestDenied) as exc:
        await place.told(unit)
        said = str(exc)
        return (ToolDenied(said) if kind == "approval" else ToolFailed(said)), ""
    value, by = answer["value"], str(answer["by"])
    if kind != "approval":
        return value["value"], by
    if value["approved"]:
        arguments = value.get("arguments")
        return (ToolApproved() if arguments is None else ToolApproved(override_args=arguments)), by
    reason = value.get("reason")
    return (ToolDenied(reason) if reason else ToolDenied()), by


def _wanted_for(name: str, ctx: RunContext[Any] | None) -> dict[str, Any]:
    """The calls that a wait for something outside is about: that of the tool which waits, or the deferred ones."""
    if (call := CALL.get()) is not None:
        return {"tool": call.tool_name, "arguments": call.args_as_dict()}
    progress = PROGRESS.get()
    if progress is None or progress.deferred is None:
        return {}
    deferred = progress.deferred
    return {
        **_answered_with(name, ctx),
        "calls": [
            {
                "id": one.tool_call_id,
                "kind": deferred.kind(one.tool_call_id),
                "tool": one.tool_name,
                "arguments": one.args_as_dict(),
            }
            for one in (*deferred.approvals, *deferred.calls)
        ],
    }


def _answered_with(name: str, ctx: RunContext[Any] | None) -> dict[str, str]:
    """What the answer to a wait for deferred calls has to be, if it is the RequestInput of this name that waits."""
    parts = () if ctx is None or ctx.root_capability is None else leaf_capabilities(ctx.root_capability)
    asks = any(isinstance(part, RequestInput) and part.name == name for part in parts)
    return {"answer": _RESULTS_NAME} if asks else {}


def check_answer(asked: Mapping[str, Any], value: object) -> None:
    """Raise InputInvalid for an answer that whoever `asked` couldn't go on with: it would be recorded, and stay."""
    if asked.get("answer") != _RESULTS_NAME:
        return
    wanted: dict[str, list[str]] = {"approvals": [], "calls": []}
    for call in asked["calls"]:
        wanted["approvals" if call["kind"] == "approval" else "calls"].append(call["id"])
    expected = f"expected an object with an answer for each call: {_json(wanted).decode()}"
    try:
        results = _RESULTS.validate_python(value)
    except ValidationError as exc:
        wrong = exc.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in wrong["loc"])
        raise InputInvalid(f"{place + ': ' if place else ''}{wrong['msg']}; {expected}") from exc
    given = {"approvals": sorted(results.approvals), "calls": sorted(results.calls)}
    if given != {shelf: sorted({*ids}) for shelf, ids in wanted.items()}:
        raise InputInvalid(f"these calls are answered: {_json(given).decode()}; {expected}")
    others = {*results.metadata, *results.answered_by}.difference(*wanted.values())
    if others:
        raise InputInvalid(
            f"metadata and answered_by tell of calls that nobody asked about: {sorted(others)}"
        )


class Outside(ExternalEventWaiter):
    """Waits of an agent's run for what happens outside: the token that it hands out is the id of a request."""

    def __init__(self, agent: str) -> None:
        self.agent = agent

    async def wait(
        self, name: str, *, ask: Callable[[str], Awaitable[JsonValue]], timeout: timedelta | None
    ) -> JsonValue:
        place = place_of_run()
        if place is None:
            raise OutsideStep(f"the wait for '{name}' is outside of a step, where nothing could be recorded")
        ctx = get_current_run_context()
        about = "" if ctx is None else f"{run_in_name(place, ctx.run_id or '')},{ctx.run_step}{line()}"
        unit = place.name(storable(f"{self.agent}__external_event:{name}({about})"))
        asked = _json({"agent": self.agent, "event": name, **_wanted_for(name, ctx)})
        request = await place.requested(unit, "external", storable(name), asked)

        seconds = None if timeout is None else timeout.total_seconds()

        async def produce() -> bytes:
            # Kept first: whoever is told of the token may answer at once. The instant is that of the wait behind it.
            until = None if seconds is None else await place.instant(f"{unit}!until", offset=seconds)
            await place.journal.request(replace(request, expires_at=until))
            return _json(await ask(request.id))

        done = await place.do(f"{unit}!ask", Unit(f"the question '{name}' of agent '{self.agent}'"), produce)
        tell_unit(executed=done.executed)
        answered: JsonValue = from_json(done.value)
        if answered is not None:
            return answered
        try:
            answer = await place.answer(unit, request, timeout=seconds)
        except (WaitTimeout, RequestDenied) as exc:
            await place.told(unit)
            raise ExternalEventError(str(exc)) from exc
        value: JsonValue = answer["value"]["value"]
        return value
