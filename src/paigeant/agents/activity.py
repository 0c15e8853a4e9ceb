"""An agent as an activity: its prompt and deps come from the payload, its output is the step's.

**Failures.** What a model or a tool raises is the failure of an attempt, and retried by the step's policy. A usage
limit that was reached, and a wrong use of pydantic-ai, stay what they are however often they are tried:
NonRetryableError. What a provider refuses is final wherever an agent runs, see `durability.py`.

**Usage** of the step is counted by its units; here only what none of them tells of is added.

**Plans.** With `may_add` the agent gets tools that change what is left of the run, see `plans.py`.

**Units.** What the agent does is recorded by `PaigeantDurability`: the one that it carries, or one that is handed to
each of its runs here.
"""

from __future__ import annotations

import copy
import inspect
import types
import typing
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, TypeAdapter, ValidationError
from pydantic_ai import DeferredToolResults, UsageLimits
from pydantic_ai.agent import AbstractAgent
from pydantic_ai.capabilities import AbstractCapability
from pydantic_ai.capabilities.abstract import leaf_capabilities
from pydantic_ai.conversation import Conversation
from pydantic_ai.durable_exec import BaseDurabilityCapability
from pydantic_ai.exceptions import UnexpectedModelBehavior, UsageLimitExceeded, UserError
from pydantic_ai.messages import ToolReturnContent
from pydantic_ai.tools import DeferredToolCallResult

from paigeant import codec
from paigeant.activity import Activity, ActivityRegistry, Parameter, read_parameters
from paigeant.agents.conversation import answers, continued, keep
from paigeant.agents.durability import PaigeantDurability
from paigeant.agents.plans import Handoff, Planner, check_may_add, hands_over
from paigeant.agents.prompt import Prompt
from paigeant.agents.usage import Part, count
from paigeant.annotations import typed
from paigeant.context import StepContext
from paigeant.errors import ArgumentError, InvalidDefinition, NonRetryableError
from paigeant.policy import ItineraryPolicy
from paigeant.redaction import secrets_in, without
from paigeant.threads import Threads
from paigeant.usage import Usage

__all__ = ["agent_activity", "check_agent"]

AnyAgent = AbstractAgent[Any, Any]

_RESULT: TypeAdapter[Any] = TypeAdapter(
    Annotated[DeferredToolCallResult | ToolReturnContent, Field(union_mode="left_to_right")]
)


def _with_files(results: DeferredToolResults) -> DeferredToolResults:
    # The library reads what has a file in it, an image perhaps, as JSON like any other: the model would get its text.
    calls = {
        call: _RESULT.validate_python(result) if isinstance(result, (dict, list)) else result
        for call, result in results.calls.items()
    }
    return replace(results, calls=calls)


_RESULTS = TypeAdapter(Annotated[DeferredToolResults, AfterValidator(_with_files)])
_UNIONS = (typing.Union, types.UnionType)


def check_agent(
    agent: AnyAgent,
    *,
    name: str,
    prompt: str | None,
    message_history: str | None,
    deferred_tool_results: str | None = None,
    may_add: ItineraryPolicy | None = None,
) -> None:
    """Raise InvalidDefinition for what can be seen to be wrong before anything that annotations name is defined."""
    if not isinstance(agent, AbstractAgent):
        raise InvalidDefinition(f"activity.agent takes a pydantic_ai.Agent, found {agent!r}")
    if not name:
        raise InvalidDefinition(
            "the agent has no name; give it one, Agent(..., name='writer'), or pass name="
        )
    if message_history is not None and (not isinstance(message_history, str) or not message_history):
        raise InvalidDefinition(
            f"message_history of activity '{name}' is the name of an earlier agent step, found {message_history!r}"
        )
    if deferred_tool_results is not None:
        if not isinstance(deferred_tool_results, str) or not deferred_tool_results:
            raise InvalidDefinition(
                f"deferred_tool_results of activity '{name}' is the name of a value in the payload, "
                f"found {deferred_tool_results!r}"
            )
        if message_history is None:
            raise InvalidDefinition(
                f"activity '{name}' has deferred_tool_results but no message_history: name the step whose tool calls "
                "they answer"
            )
    try:
        if prompt is None:
            if deferred_tool_results is None:  # which may be all that the model needs
                raise InvalidDefinition("an agent needs a prompt, such as prompt='Write to {customer}.'")
        else:
            Prompt.parse(prompt)
    except InvalidDefinition as exc:
        raise InvalidDefinition(f"activity '{name}': {exc}") from exc
    check_may_add(name, may_add, agent.output_type)


def agent_activity(
    agent: AnyAgent,
    *,
    name: str,
    prompt: str | None = None,
    deps: Any = None,
    message_history: str | None = None,
    deferred_tool_results: str | None = None,
    usage_limits: UsageLimits | None = None,
    may_add: ItineraryPolicy | None = None,
    registry: ActivityRegistry | None = None,
) -> Activity:
    """The activity `name`, which runs `agent`. See `ActivityRegistry.agent` for what the others mean.

    `registry` knows the activities that `may_add` names. Raises InvalidDefinition for a prompt that is no template, and
    deps that can't be made from a payload.
    """
    check_agent(
        agent,
        name=name,
        prompt=prompt,
        message_history=message_history,
        deferred_tool_results=deferred_tool_results,
        may_add=may_add,
    )
    template = Prompt(()) if prompt is None else Prompt.parse(prompt)
    answer = Parameter(deferred_tool_results or "", _RESULTS)
    source = _source_of(name, deps, template.names)
    output = _output_of(agent)
    engines = _engines(agent, name)
    planner = None
    if may_add is not None:
        planner = Planner(name, may_add, registry or ActivityRegistry(), hands_over(agent.output_type))

    async def call(arguments: Mapping[str, Any], context: StepContext, threads: Threads | None) -> Any:
        text = None if prompt is None else template.render(name, arguments)
        earlier = None if message_history is None else await continued(name, message_history, context)
        told = arguments.get(answer.name)
        told = None if told is None else answer.read(name, told)
        results = answers(name, deferred_tool_results, told, earlier)
        given = await source.make(arguments, threads)
        plan = None if planner is None else planner.of(context)
        # The parts of the conversation, not the whole: what a run that fails has used is wanted as well.
        so_far = Conversation() if earlier is None else earlier.conversation
        usage = copy.copy(so_far.usage)
        with Part(usage, so_far.usage) as run:
            try:
                result = await agent.run(
                    text,
                    deps=given,
                    message_history=None if earlier is None else so_far.messages,
                    conversation_id=None if earlier is None else so_far.conversation_id,
                    deferred_tool_results=results,
                    usage=usage,
                    usage_limits=usage_limits,
                    infer_name=False,
                    capabilities=engines if plan is None else [*engines, plan],
                )
            except (UsageLimitExceeded, UserError) as exc:
                raise NonRetryableError(f"{type(exc).__name__}: {exc}") from exc
            except UnexpectedModelBehavior as exc:
                if plan is None or not plan.refused:
                    raise
                raise UnexpectedModelBehavior(f"{exc}; the last output was refused: {plan.refused}") from exc
            finally:
                count("", run.rest(), Usage(), to=None)
        if plan is not None:
            plan.hand_over(result.output)
        elif isinstance(result.output, Handoff):
            check_may_add(name, None, Handoff)  # the types that the agent declares didn't tell
        if context.remaining:
            await keep(context, output, result.output, result.conversation, earlier)
        return result.output

    return Activity(
        name=name,
        call=call,
        parameters=_joined(name, template, source, deferred_tool_results),
        takes_rest=source.takes_rest,
        output=output,
        description=agent.description or f"the agent '{agent.name or name}'",
        may_add=() if may_add is None else tuple(may_add.allowed or ()),
    )


def _engines(agent: AnyAgent, name: str) -> list[AbstractCapability[Any]]:
    """What has to be handed to each run of the agent, so that it is durable. Raises InvalidDefinition.

    An agent that carries an engine keeps it. One without is given ours for a run, not for good: it may be overridden,
    and run in other places.
    """
    if any(isinstance(part, BaseDurabilityCapability) for part in leaf_capabilities(agent.root_capability)):
        return []
    engine: PaigeantDurability[Any] = PaigeantDurability(name=agent.name or name)
    if agent.model is not None:  # without one it can only run where it is overridden
        try:
            engine.for_agent(agent)
        except UserError as exc:
            raise InvalidDefinition(f"activity '{name}': {exc}") from exc
    return [engine]


# -- deps


@dataclass(frozen=True, slots=True)
class _Source:
    """Where deps come from: the parameters that `make` needs, and what it makes of their values."""

    make: Callable[[Mapping[str, Any], Threads | None], Awaitable[Any]]
    parameters: tuple[Parameter, ...] = ()
    takes_rest: bool = False


def _source_of(name: str, deps: Any, prompted: Collection[str]) -> _Source:
    if isinstance(deps, type) or typing.get_origin(deps) is not None:
        return _from_payload(name, deps)
    if callable(deps):
        return _from_factory(name, deps, prompted)

    async def same(_: Mapping[str, Any], __: Threads | None) -> Any:
        return deps

    return _Source(same)


def _from_factory(name: str, factory: Callable[..., Any], prompted: Collection[str]) -> _Source:
    parameters, takes_rest = read_parameters(f"{name} (its deps)", factory)
    own = {parameter.name: parameter for parameter in parameters}
    shared = [own[field] for field in prompted if field in own and not own[field].is_context]

    async def make(arguments: Mapping[str, Any], threads: Threads | None) -> Any:
        taken = {key: value for key, value in arguments.items() if takes_rest or key in own}
        taken.update({parameter.name: parameter.read(name, taken[parameter.name]) for parameter in shared})
        if inspect.iscoroutinefunction(factory):
            return await factory(**taken)
        # Like an activity that is a plain function: in a thread, since it may open files or connections.
        value = await (threads or Threads(1)).do(factory, **taken)
        return await value if inspect.isawaitable(value) else value

    return _Source(make, parameters, takes_rest)


def _from_payload(name: str, kind: Any) -> _Source:
    try:
        adapter = typed(kind)
    except InvalidDefinition as exc:
        raise InvalidDefinition(
            f"deps of activity '{name}': {exc}; for an object that isn't data give a function that makes it"
        ) from exc
    names = _field_names(kind)
    whole = Parameter("deps", adapter)

    async def make(arguments: Mapping[str, Any], _: Threads | None) -> Any:
        if "deps" in arguments:
            return whole.read(name, arguments["deps"])
        found = {field: arguments[field] for field in names if field in arguments}
        try:
            return codec.read_as(adapter, found)
        except ValidationError as exc:
            wrong = exc
        first = wrong.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        secrets = secrets_in(found)
        raise ArgumentError(
            f"deps of activity '{name}' are a {_called(kind)}, which can't be made from the payload: "
            f"{place + ': ' if place else ''}{without(first['msg'], secrets)}; "
            "give the field 'deps', or its fields by name"
        ) from None if secrets else wrong

    # All of them may be missing: what the type itself insists on is found out when it is made.
    optional = [Parameter(field, default=None) for field in dict.fromkeys(("deps", *names))]
    return _Source(make, tuple(optional))


def _field_names(kind: Any) -> tuple[str, ...]:
    origin = typing.get_origin(kind) or kind
    if isinstance(origin, type) and issubclass(origin, BaseModel):
        aliases = (field.validation_alias or field.alias for field in origin.model_fields.values())
        return (*origin.model_fields, *(alias for alias in aliases if isinstance(alias, str)))
    if is_dataclass(origin):
        return tuple(field.name for field in fields(origin) if field.init)
    return tuple(typing.get_type_hints(origin)) if typing.is_typeddict(origin) else ()


def _called(kind: Any) -> str:
    return getattr(kind, "__name__", None) or str(kind)


def _joined(
    name: str, template: Prompt, source: _Source, deferred_tool_results: str | None
) -> tuple[Parameter, ...]:
    """What the prompt and the deps name and what answers tool calls, each once."""
    own = {parameter.name: parameter for parameter in source.parameters}
    for field in template.names:
        if field in own and own[field].is_context:
            raise InvalidDefinition(
                f"the prompt of activity '{name}' has the field {{{field}}}, which is the context in its deps "
                "function; rename one of them"
            )
        own[field] = Parameter(field)  # as JSON gives it; deps that want it as a type read it themselves
    if deferred_tool_results is not None:
        own.setdefault(deferred_tool_results, Parameter(deferred_tool_results, default=None))
    return tuple(own.values())


# -- outputs


def _output_of(agent: AnyAgent) -> TypeAdapter[Any] | None:
    """Writes the agent's output by its declared type; None for what is no single type (several, functions, markers)."""
    declared = agent.output_type
    origin = typing.get_origin(declared)
    if declared is str or not (isinstance(declared, type) or origin is not None) or origin in _UNIONS:
        return None
    try:
        return typed(declared)
    except InvalidDefinition:
        return None
