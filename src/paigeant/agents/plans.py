"""Plans by agents: an agent that runs as a step asks for further steps, ends the run, or hands its work over.

**Requests.** What a model asks for is decided here: by the activities and limits of `may_add`, by the policy of the
run, which `may_add` narrows and never widens, and by the parameters of the activity. What is refused changes nothing.
The model is told why, in the result of its call, and so is the log of the step.

**Replay.** The tools are done inline, one at a time and in the order of the response. What they do follows from the
slip, the registry and what the model said, which is recorded: a further attempt that gets the recorded responses makes
the same plan again, once.

**Nothing to choose but what is listed.** Steps are an activity and its arguments. A model can't give a step an id, a
condition or a topic: an output named by it could take the place of an input.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.errors import PydanticInvalidForJsonSchema
from pydantic_ai import ModelRetry, RunContext, ToolDefinition
from pydantic_ai._output import types_from_output_spec
from pydantic_ai.capabilities import AbstractCapability
from pydantic_ai.toolsets import AbstractToolset, ToolsetTool
from pydantic_core import SchemaValidator, core_schema

from paigeant import codec
from paigeant.activity import MISSING, Activity, ActivityRegistry
from paigeant.agents.options import METADATA, InlineToolset
from paigeant.context import StepContext
from paigeant.errors import ArgumentError, InvalidDefinition, PaigeantError, PolicyViolation, nearest
from paigeant.policy import ItineraryPolicy
from paigeant.slip import Step

__all__ = ["Handoff", "Planner", "check_may_add", "hands_over"]

MAX_ARGUMENT_BYTES = 256 * 1024
"""How much the arguments of all steps that are left may take together, as JSON, once a model has added some."""

MAX_ARGUMENT_DEPTH = 32
"""How deep what a model gives as an argument may be nested: it travels inside of other things."""

_MESSAGE = "message"
_ADD, _FINISH = "add_steps", "finish_run"
_ANYTHING = SchemaValidator(
    core_schema.no_info_after_validator_function(
        lambda sent: sent if isinstance(sent, dict) else {"found": sent}, core_schema.any_schema()
    )
)
_REFS = "#/$defs/{model}"
_SHOWN = 12
_REASON = 500


@dataclass(frozen=True)
class Handoff:
    """Hand the work over: your part ends here, and another activity goes on with it.

    `activity` is the name of the one that goes on, `message` all that it has to know: it doesn't see this conversation.
    """

    activity: str
    message: str


def check_may_add(name: str, may_add: ItineraryPolicy | None, output_type: Any) -> None:
    """Raise InvalidDefinition for a `may_add` that names no activities, and for a Handoff without one."""
    if may_add is None:
        if hands_over(output_type):
            raise InvalidDefinition(
                f"the agent of activity '{name}' may end with a Handoff; say to whom: "
                "may_add=ItineraryPolicy(allowed=['billing'])"
            )
    elif not isinstance(may_add, ItineraryPolicy) or may_add.allowed is None:
        raise InvalidDefinition(
            f"may_add of activity '{name}' is an ItineraryPolicy that names the activities which the model may add, "
            f"ItineraryPolicy(allowed=['summarise'], max_added=3), found {may_add!r}"
        )


def hands_over(output_type: Any) -> bool:
    """Whether an agent with this output type can end with a Handoff, as far as the type says so."""
    return any(
        isinstance(output, type) and issubclass(output, Handoff)
        for output in types_from_output_spec(output_type)
    )


@dataclass(slots=True)
class Planner:
    """What the agent of activity `name` may plan. `known` describes the activities that `may_add` names."""

    name: str
    may_add: ItineraryPolicy
    known: ActivityRegistry
    hands_over: bool
    _schemas: dict[tuple[tuple[str, bool], ...], dict[str, Any]] = field(default_factory=dict)

    def of(self, context: StepContext) -> Plan:
        """The plan of one attempt of a step. Raises InvalidDefinition when the agent has nobody to hand over to."""
        plan = Plan(self, context)
        if self.hands_over and plan.offered and not plan.targets:
            raise InvalidDefinition(
                f"the agent of activity '{self.name}' may end with a Handoff, but none of {', '.join(plan.offered)} "
                f"takes it: give one a parameter '{_MESSAGE}', or its prompt the field {{{_MESSAGE}}}"
            )
        return plan

    def find(self, activity: str) -> Activity | None:
        """The activity, if a registry at hand has it."""
        return self.known.get(activity) if activity in self.known else None

    def schema(self, offered: tuple[str, ...]) -> dict[str, Any]:
        """The JSON schema of the arguments of `add_steps`: one kind of step for each of the activities `offered`."""
        key = tuple((name, name in self.known) for name in offered)
        if key not in self._schemas:
            self._schemas[key] = _schema_of([(name, self.find(name)) for name in offered])
        return self._schemas[key]

    def check_arguments(self, activity: str, arguments: Mapping[str, Any]) -> None:
        """Raise ArgumentError unless `activity` takes these; anything goes for one that is not known here."""
        for name, value in arguments.items():
            if codec.depth(value) > MAX_ARGUMENT_DEPTH:
                raise ArgumentError(
                    f"{_short(name)} of activity '{activity}' is nested deeper than {MAX_ARGUMENT_DEPTH}"
                )
        found = self.find(activity)
        if found is None:
            return
        own = {parameter.name: parameter for parameter in found.parameters if not parameter.is_context}
        taken = found.takes()
        for name, value in arguments.items():
            if name in own:
                own[name].read(activity, value)
            elif taken is not None and name not in taken:
                raise ArgumentError(
                    f"activity '{activity}' has no parameter {_short(name)}; it has: {', '.join(own) or 'none'}"
                )

    def takes_message(self, activity: str) -> bool:
        """Whether something can be handed over to `activity`; yes for one that is not known here."""
        found = self.find(activity)
        return found is None or found.takes_rest or any(p.name == _MESSAGE for p in found.parameters)


class Plan(AbstractCapability[Any]):
    """What one attempt of a step may plan: the tools for its agent, and what becomes of its Handoff."""

    def __init__(self, planner: Planner, context: StepContext) -> None:
        self.planner = planner
        self.context = context
        self.policy = context._slip.policy.narrowed(planner.may_add)
        self.offered = tuple(dict.fromkeys(self.policy.allowed or ()))
        self.targets = tuple(name for name in self.offered if planner.takes_message(name))
        self.refused = ""
        """Why the last Handoff was refused."""
        self.next: dict[int, Step] = {}
        """The step of a Handoff, by the step of the agent's run: what else that answer asks for leaves it its room."""

    def get_toolset(self) -> AbstractToolset[Any]:
        return _Tools(self)

    async def after_output_process(self, ctx: RunContext[Any], *, output_context: Any, output: Any) -> Any:
        if isinstance(output, Handoff) and not ctx.partial_output:
            try:
                self.next = {ctx.run_step: self._handing_over(output)}
            except (PaigeantError, codec.JsonInvalid) as exc:
                reason = self._log(exc)
                self.refused = f"not handed over: {reason}"
                raise ModelRetry(f"Not handed over: {reason}. {self._possible(self.targets)}") from exc
        return output

    def hand_over(self, output: Any) -> None:
        """Put what `output` hands over to right after this step, before all else. Raises PaigeantError."""
        if isinstance(output, Handoff):
            step = self._handing_over(output)
            with self.context._within(self.planner.may_add):
                self.context._revise((step,), _first)
            self.context.log.info("the agent hands over to '%s'", step.activity)

    def add(self, asked: Any, *, run_step: int) -> str:
        """Add the steps that a model asks for, all or none; gives what to tell it."""
        try:
            request = _read(_Steps, asked)
            steps = [Step(wanted.activity, args=wanted.arguments) for wanted in request.steps]
            handoff = self.next.get(run_step)
            self._check(steps if handoff is None else [handoff, *steps])
            with self.context._within(self.planner.may_add):
                revise = self.context.insert if request.place == "next" else self.context.append
                before = {step.id for step in self.context.remaining}
                revise(*steps)
        except (PaigeantError, codec.JsonInvalid) as exc:
            return self._refused(exc)
        new = [step for step in self.context.remaining if step.id not in before]
        self.context.log.info("the agent added to the plan: %s", _listed(new))
        return f"Added: {_listed(new)}. {self._outlook()}"

    def finish(self, asked: Any) -> str:
        """End the run with this step, if that is allowed; gives what to tell the model."""
        try:
            request = _read(_Finish, asked)
            with self.context._within(self.planner.may_add):
                self.context.terminate()
        except PaigeantError as exc:
            return self._refused(exc)
        self.context.log.info("the agent ends the run with this step: %s", _short(request.reason))
        return f"The run ends with this step. {self._outlook()}"

    def instructions(self) -> str:
        """What the model has to know before it plans. It is the same at each request of a run."""
        to_come = [step.activity for step in self.context._slip.itinerary[1:]]
        lines = [
            "Your work is one step of a longer run. "
            f"Steps that follow it: {', '.join(to_come[:_SHOWN]) or 'none'}{', ...' if to_come[_SHOWN:] else ''}."
        ]
        if self.planner.hands_over and self.targets:
            lines.append("You may hand your work over to one of these activities:")
            lines += [f"- {_described(name, self.planner.find(name))}" for name in self.targets]
        return "\n".join(lines)

    def _check(self, steps: Sequence[Step]) -> None:
        """Raise PaigeantError for steps that can't be added. Names and numbers come first: they are quick to check."""
        for step in steps:
            if step.activity not in self.offered:
                raise PolicyViolation(
                    f"activity '{step.activity}' may not be added; {nearest(step.activity, self.offered)}"
                )
        with self.context._within(self.planner.may_add):
            self.context._revised(tuple(steps), _first)
        for step in steps:
            self.planner.check_arguments(step.activity, step.args)
        size = sum(len(codec.dump(step.args)) for step in (*self.context.remaining, *steps) if step.args)
        if size > MAX_ARGUMENT_BYTES:
            raise ArgumentError(
                f"the arguments of all steps would have {size:,} bytes, the limit is {MAX_ARGUMENT_BYTES:,}"
            )

    def _handing_over(self, handoff: Handoff) -> Step:
        """The step that goes on, if it may be next. Raises PaigeantError."""
        step = Step(handoff.activity, args={_MESSAGE: handoff.message})
        if step.activity in self.offered and step.activity not in self.targets:
            raise ArgumentError(
                f"activity '{step.activity}' has no parameter '{_MESSAGE}' to take it over with"
            )
        self._check([step])
        return step

    def _refused(self, error: Exception) -> str:
        return f"Refused: {self._log(error)}. Nothing was changed. {self._possible(self.offered)} {self._outlook()}"

    def _log(self, error: Exception) -> str:
        """Why something is refused, in so many words as a log and a model can take."""
        reason = codec.storable(str(error))
        reason = reason if len(reason) <= _REASON else f"{reason[: _REASON - 3]}..."
        self.context.log.warning("what the agent planned was refused: %s", reason)
        self.context._tell("plan.refused", error=reason, more={})
        return reason

    def _possible(self, names: tuple[str, ...]) -> str:
        return f"Allowed activities: {', '.join(names) or 'none'}; room for more steps: {self._room()}."

    def _room(self) -> int:
        context = self.context
        return self.policy.room(context._slip, context.remaining, before=context._added)

    def _outlook(self) -> str:
        return f"After this step: {_listed(self.context.remaining)}."


@dataclass(eq=False)
class _Tools(InlineToolset):
    """`add_steps` and `finish_run`, as far as there is anything to add, or the run may be ended."""

    plan: Plan

    @property
    def id(self) -> str | None:
        return None

    @property
    def label(self) -> str:
        return "the toolset of may_add"

    async def get_instructions(self, ctx: RunContext[Any]) -> str:
        return self.plan.instructions()

    async def get_tools(self, ctx: RunContext[Any]) -> dict[str, ToolsetTool[Any]]:
        plan = self.plan
        tools: dict[str, ToolsetTool[Any]] = {}
        if plan.offered:
            about = (
                "Ask for steps to be added to the run, right after your own or at its end. All of them are added or "
                "none, and the result says which. Arguments that you leave out are taken from what the run knows "
                "under their names: its input, and what earlier steps gave."
            )
            tools[_ADD] = self._tool(_ADD, about, plan.planner.schema(plan.offered), ctx)
        if plan.policy.may_remove:
            about = "Ask for the run to end with your own step: nothing that was planned after it is done."
            tools[_FINISH] = self._tool(_FINISH, about, _Finish.model_json_schema(), ctx)
        return tools

    async def call_tool(
        self, name: str, tool_args: dict[str, Any], ctx: RunContext[Any], tool: ToolsetTool[Any]
    ) -> str:
        return (
            self.plan.add(tool_args, run_step=ctx.run_step) if name == _ADD else self.plan.finish(tool_args)
        )

    def _tool(self, name: str, about: str, schema: dict[str, Any], ctx: RunContext[Any]) -> ToolsetTool[Any]:
        definition = ToolDefinition(
            name=name,
            parameters_json_schema=schema,
            description=about,
            sequential=True,  # the ids of steps follow from the order of the calls
            metadata={METADATA: {"inline": True}},
        )
        # Whatever the model sends is read when the tool is called: a refusal is an answer, not one of few retries.
        return ToolsetTool(
            toolset=self, tool_def=definition, max_retries=ctx.max_retries, args_validator=_ANYTHING
        )


class _Wanted(BaseModel):
    model_config = ConfigDict(extra="forbid")

    activity: str
    arguments: dict[str, Any] = {}


class _Steps(BaseModel):
    model_config = ConfigDict(extra="forbid")

    steps: list[_Wanted]
    place: Literal["next", "end"] = "next"


class _Finish(BaseModel):
    model_config = ConfigDict(extra="forbid", title="Finish")

    reason: str = Field("", description="why nothing more is to be done")


_Asked = typing.TypeVar("_Asked", bound=BaseModel)


def _read(kind: type[_Asked], asked: Any) -> _Asked:
    try:
        return kind.model_validate(asked, strict=True)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        fields = " and ".join(f"'{name}'" for name in kind.model_fields)
        raise ArgumentError(
            f"the request can't be read: {f'{_short(place)}: ' if place else ''}{first['msg']}; it has {fields}"
            f"{', and a step' + _STEP_FIELDS if kind is _Steps else ''}"
        ) from exc


_STEP_FIELDS = " has 'activity' and 'arguments'"


def _first(rest: list[Step], new: list[Step]) -> list[Step]:
    return [*new, *rest]


def _schema_of(activities: Sequence[tuple[str, Activity | None]]) -> dict[str, Any]:
    adapters: list[tuple[tuple[str, str], Literal["validation"], TypeAdapter[Any]]] = []
    for name, activity in activities:
        for parameter in () if activity is None else activity.parameters:
            if parameter.adapter is not None and _has_schema(parameter.adapter):
                adapters.append(((name, parameter.name), "validation", parameter.adapter))
    schemas, shared = TypeAdapter.json_schemas(adapters, ref_template=_REFS)
    found = {key: schema for (key, _), schema in schemas.items()}
    kinds: list[dict[str, Any]] = []
    for name, activity in activities:
        arguments: dict[str, Any] = {"type": "object"}
        if activity is not None:
            own = [parameter for parameter in activity.parameters if not parameter.is_context]
            arguments["properties"] = {p.name: found.get((name, p.name), {}) for p in own}
            arguments["additionalProperties"] = activity.takes_rest
            needed = [parameter.name for parameter in own if parameter.default is MISSING]
            if needed:
                arguments["description"] = f"without a default: {', '.join(needed)}"
        step = {"activity": {"type": "string", "const": name}, "arguments": arguments}
        kinds.append(_object(step, required=["activity"], description=_described(name, activity)))
    place = {
        "type": "string",
        "enum": ["next", "end"],
        "default": "next",
        "description": "right after your own step, or behind all others",
    }
    steps = {"type": "array", "items": kinds[0] if len(kinds) == 1 else {"anyOf": kinds}}
    return {**_object({"steps": steps, "place": place}, required=["steps"]), **shared}


def _has_schema(adapter: TypeAdapter[Any]) -> bool:
    try:
        adapter.json_schema()
    except PydanticInvalidForJsonSchema:
        return False  # it can be read from JSON all the same
    return True


def _object(properties: dict[str, Any], *, required: list[str], **more: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
        **more,
    }


def _described(name: str, activity: Activity | None) -> str:
    return f"{name}: {activity.description}" if activity is not None and activity.description else name


def _listed(steps: Sequence[Step]) -> str:
    shown = ", ".join(
        step.id if step.id == step.activity else f"{step.id} ({step.activity})" for step in steps[:_SHOWN]
    )
    more = f" and {len(steps) - _SHOWN} more" if len(steps) > _SHOWN else ""
    return f"{shown}{more}" if shown else "nothing"


def _short(text: str) -> str:
    shown = json.dumps(text)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
