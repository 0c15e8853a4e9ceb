"""PaigeantDurability: what an agent does inside a step is recorded unit by unit, so that no attempt does it again.

Each model request (streamed or not), tool call, MCP call, discovery of tools, handled event and capability operation
is a unit of the step that the agent works for, wherever in the step it runs: as an activity of its own, in the code of
a plain activity, within a tool of another agent, several at once. After a crash, a retry or a takeover the agent runs
through what is recorded without calling anything, and goes on behind it. Outside of steps it does nothing at all.

**Identity.** A unit is known by the unit that it is part of, its name, the run of the agent, the step of that run, the
tool call and, where all that is the same, by how often it has occurred. Neither the order in which parallel tools begin
nor nesting can give one call what another was answered. These names are stored: a test pins them.

**What is data.** What a tool tells the run by raising (ModelRetry, approval, deferral, failure) is recorded like a
result. Any other error is not: the attempt fails, and the next one tries that unit again. There is no next one where
the provider would refuse the same request again. When an attempt ends because an agent gave up on what its model said,
the next one asks for the last answer again, unless a tool call of that answer was done.

**At least once.** A crash after an effect and before its record repeats the unit. `effect_key()` is the same then, for
whoever has the effect; a tool marked `at_most_once` isn't repeated before a person has said so. An answer is recorded
before anything is done for it that may have an effect; hooks and validators may see it a moment earlier.

**Waits.** An agent that waits for an approval, an answer or an event outside leaves its step: nothing of it is kept in
a worker. When that is there, it runs through what is recorded, and goes on behind it.

**Usage.** What agents within a tool use is recorded with the tool's call and added when it is replayed, so that the
usage of a resumed run is that of one which was never interrupted.
"""

from __future__ import annotations

import asyncio
import contextvars
import operator
from collections.abc import AsyncIterable, Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from datetime import datetime
from typing import Any, ClassVar, Literal, cast

from opentelemetry.trace import get_current_span
from pydantic_ai import (
    ApprovalRequired,
    CallDeferred,
    DeferredToolRequests,
    DeferredToolResults,
    ModelMessage,
    RunContext,
    Tool,
    ToolDefinition,
)
from pydantic_ai._run_context import get_current_run_context
from pydantic_ai.agent import AbstractAgent, EventStreamHandler, WrapperAgent
from pydantic_ai.capabilities import AbstractCapability, RequestInput
from pydantic_ai.capabilities.abstract import (
    CapabilityOrdering,
    WrapOutputProcessHandler,
    WrapRunHandler,
    WrapToolExecuteHandler,
)
from pydantic_ai.durable_exec import (
    BaseDurabilityCapability,
    DurabilityEngineSpec,
    DurableOperationBackend,
    DurableOperationId,
    RoleBasedOperationConfig,
    ToolsetValidateToolArgumentsId,
    conversation_id_from_run_id,
    replay_scope,
)
from pydantic_ai.durable_exec._base import construction_toolsets
from pydantic_ai.durable_exec._operation_backend import _IN_DURABLE_UNIT
from pydantic_ai.durable_exec._toolset import DurableMCPToolset
from pydantic_ai.exceptions import (
    FallbackExceptionGroup,
    ModelConnectionError,
    ModelHTTPError,
    ModelQuotaExceededError,
    ModelRateLimitError,
    ModelRequestRejectedError,
    ModelServerError,
    ModelUnavailableError,
    UnexpectedModelBehavior,
    UsageLimitExceeded,
    UserError,
)
from pydantic_ai.external_events import external_event_scope
from pydantic_ai.messages import AgentStreamEvent, ModelResponse, ToolCallPart
from pydantic_ai.models import Model, ModelRequestContext
from pydantic_ai.models.instrumented import InstrumentedModel
from pydantic_ai.output import OutputContext
from pydantic_ai.run import AgentRunResult
from pydantic_ai.tool_manager import ToolManager
from pydantic_ai.tools import AgentDepsT
from pydantic_ai.toolsets import (
    AbstractToolset,
    DynamicToolset,
    ExternalToolset,
    FunctionToolset,
    ToolsetTool,
    WrapperToolset,
)
from pydantic_ai.toolsets._capability_owned import CapabilityOwnedToolset

from paigeant import place as places
from paigeant.agents.mcp import Reconnecting
from paigeant.agents.operations import (
    CALL,
    EVENT_OF,
    PROGRESS,
    Codec,
    Operations,
    Progress,
    not_json,
    part_of,
    place_of_run,
    recorded_name,
    run_in_name,
)
from paigeant.agents.options import METADATA, InlineToolset, ToolOptions, renamed
from paigeant.agents.people import Outside, asks_itself, decisions, outcome
from paigeant.agents.spans import LateSpans, may_replay
from paigeant.agents.usage import put_price
from paigeant.clock import as_datetime
from paigeant.errors import InvalidDefinition, NonRetryableError
from paigeant.failure import is_among
from paigeant.parking import Parked
from paigeant.place import Stages, Unit, current_place
from paigeant.retry import RetryPolicy
from paigeant.values import evolved

__all__ = ["PaigeantDurability", "effect_key", "replay_scope"]


def effect_key() -> str:
    """A key for the effects of the call that asks for it, the same each time that call is repeated.

    Hand it to whatever a tool changes: with it a repeated call is told from a new one. In a tool it is the tool call's,
    in what `ctx.once` does that unit's, in an activity the step's own `idempotency_key`, in hooks and validators of an
    agent one for each answer of its model. Outside of steps, where nothing is repeated, a tool gets one of its own run.
    Raises OutsideStep where there is neither step nor run.
    """
    ctx = get_current_run_context() if current_place() is None else None
    return places.effect_key() if ctx is None else f"{ctx.run_id}:{ctx.run_step}:{ctx.tool_call_id}"


_PLAIN = Unit("a unit of an agent")
_TRANSIENT = (ModelRateLimitError, ModelUnavailableError, ModelServerError, ModelConnectionError)
_REFUSAL = "the provider would refuse the same request again: mend what is wrong first"
_REFUSED = (ModelQuotaExceededError, ModelRequestRejectedError)
_FINAL = (NonRetryableError, InvalidDefinition, UsageLimitExceeded, UserError)

_MODELS = 100
"""How many models' operations are kept: of those that are made for each tenant there is no end."""


class PaigeantDurability(BaseDurabilityCapability[AgentDepsT]):
    """Records what an agent does inside a step. `activity.agent()` attaches one by itself where the agent has none.

    `models` are further models by id, which runs may ask for by that id. `event_stream_handler` sees the events of a
    model's stream while it is read, and those of tools, each once; nothing of it on replay. `name` stands for the
    agent's own. `model_retries` (a number of further tries, or a RetryPolicy) and `model_timeout` (seconds for each
    try) hold for model requests that aren't streamed; only errors that may pass are tried again, not before the time
    that the provider asks for; if that is longer than the policy's `cap`, the step's next attempt waits. `sequential`:
    tools of one response are called one after the other. Tools that need approval, or an answer from outside, ask by
    requests of the run, for `ask_timeout` seconds or for as long as it takes, unless the agent has a way of its own for
    that.
    """

    engine_spec: ClassVar[DurabilityEngineSpec] = DurabilityEngineSpec(
        engine_name="Paigeant",
        durable_unit_noun="unit",
        durable_container_noun="step",
        codec=Codec(),
        serialization_failure=not_json,
        wrapped_toolset_kinds=frozenset({"function", "mcp", "dynamic"}),
        toolset_lifecycles={
            "function": "enter-always",
            "mcp": "enter-in-durable-unit",
            "dynamic": "enter-never",
        },
        tool_call_result_upgrade_lenient=False,
        journal_discovery=True,
        sequential_tools_in_durable_context=False,
        unsupported_runtime_toolset_kinds=frozenset({"function", "mcp", "dynamic"}),
        tool_config_key=METADATA,
        accepts_cancellation_token=False,
        cancellation_error_types=(Parked,),
    )

    def __init__(
        self,
        *,
        models: Mapping[str, Model] | None = None,
        event_stream_handler: EventStreamHandler[AgentDepsT] | None = None,
        name: str | None = None,
        model_retries: int | RetryPolicy = 2,
        model_timeout: float | None = None,
        sequential: bool = False,
        ask_timeout: float | None = None,
    ) -> None:
        super().__init__(models=models, event_stream_handler=event_stream_handler, name=name)
        self._operations: Operations | None = None
        self._guards: dict[str, Any] | None = None
        self._overriding: contextvars.ContextVar[Any] | None = None
        self._requests: dict[tuple[str | None, str], Any] = {}
        self._binding: tuple[tuple[object, ...], AbstractCapability[AgentDepsT]] | None = None
        # It has nothing but deferred calls to handle. They come here first, so that its request tells which they are.
        self._ordering = replace(super().get_ordering(), wraps=(RequestInput,))
        self._model_policy = RetryPolicy.of(model_retries)
        self._model_timeout = ToolOptions(timeout=model_timeout).timeout
        self._ask_timeout = ToolOptions(timeout=ask_timeout).timeout
        self._mode: Literal["sequential", "parallel_ordered_events"] = (
            "sequential" if sequential else "parallel_ordered_events"
        )

    # -- what pydantic-ai asks for

    def for_agent(self, agent: AbstractAgent[AgentDepsT, Any]) -> AbstractCapability[AgentDepsT]:
        # One that is handed to each run of an agent is bound for each run: to the same again, mostly.
        parts = (agent, agent.name, agent.model, agent.root_capability, *agent.toolsets)
        binding = self._binding  # another thread may put that of another agent in its place at any time
        if binding is None or not _are_same(binding[0], parts):
            binding = self._binding = (parts, super().for_agent(agent))
        return binding[1]

    def get_ordering(self) -> CapabilityOrdering:
        return self._ordering

    @property
    def in_durable_context(self) -> bool:
        """Whether the code that asks is part of a step."""
        return current_place() is not None

    def get_durable_operation_backend(self) -> Operations:
        if self._operations is None:
            self._operations = Operations(
                self.name, self.default_model_id, self._config(), self._toolset_names, self._renamed
            )
        return self._operations

    def get_default_run_id(self) -> str | None:
        place = current_place()
        if place is None:
            return None
        # Drawn at its place: nothing that happens elsewhere in the step changes it.
        return f"{place.effect_key}:{self.name}:{place.count(f'{self.name}:run')}"

    def get_default_conversation_id(self, run_id: str) -> str | None:
        return conversation_id_from_run_id(run_id) if self.in_durable_context else None

    async def get_run_start_time(self, run_id: str) -> datetime | None:
        place = current_place()
        if place is None:
            return None
        began = await place.instant(place.name(f"{self.name}__run_start_time({run_in_name(place, run_id)})"))
        return as_datetime(began)

    async def wrap_run(self, ctx: RunContext[AgentDepsT], *, handler: WrapRunHandler) -> AgentRunResult[Any]:
        if not self.in_durable_context:
            return await handler()
        agent = self.agent
        assert agent is not None, "a capability is bound before its agent runs"
        # 'parallel' tells of tools in the order in which they happen to end. Who wants them in sequence gets that.
        mode = (
            agent.parallel_tool_call_execution_mode(self._mode)
            if _told_mode() == "parallel"
            else nullcontext()
        )

        async def sleep(seconds: float) -> None:
            await self._sleep(ctx.run_id or "", seconds)

        place = current_place()
        assert place is not None, "this is part of a step"
        run = run_in_name(place, ctx.run_id or "")
        number = place.count(f"{self.name}__run({run})")
        own = "" if number == 1 else f",run {number}"
        stages = Stages(place, f"{self.name}__run({run}{own})")
        progress = Progress(stages, line=own)
        self.get_durable_operation_backend().begin(place, ctx, progress)
        token, call = PROGRESS.set(progress), CALL.set(None)
        # An agent within a tool is as durable as any other, and may wait for somebody. The library has no other way to
        # say so; it says the contrary around each unit.
        unit = _IN_DURABLE_UNIT.set(False)
        try:
            with (
                mode,
                agent.using_sleep(sleep),
                external_event_scope(Outside(self.name)),
                stages.entered(),
            ):
                result = await super().wrap_run(ctx, handler=handler)
            # Whoever has run the agent may do anything with the answer.
            await place.settled()
            return result
        except Exception as exc:
            if isinstance(exc, UnexpectedModelBehavior):
                progress.failed(exc)
            elif _stays(exc):
                place.give_up(None, exc, held=_REFUSAL)
            with suppress(Exception):  # the error that there is says more
                await place.settled()
            raise
        except _EXITS as exc:
            # Of a model, a hook, an output function. Whoever has run the agent gets it from the library as it was.
            raise _no_exit(f"agent '{self.name}'", exc) from exc
        finally:
            PROGRESS.reset(token)
            CALL.reset(call)
            _IN_DURABLE_UNIT.reset(unit)
            progress.error = None  # this frame is part of its traceback: a circle with all that a tool had

    async def wrap_tool_execute(
        self,
        ctx: RunContext[AgentDepsT],
        *,
        call: ToolCallPart,
        tool_def: ToolDefinition,
        args: dict[str, Any],
        handler: WrapToolExecuteHandler,
    ) -> Any:
        place = place_of_run()
        if place is None:
            return await handler(args)
        # Of what a call may do nothing must come before the record of the answer that asks for it.
        await place.settled(beside=True)
        # Calls that aren't recorded have this place for their effects and units, so that none is taken for another's.
        token = CALL.set(call)
        try:
            with part_of(
                place, f"{self.name}__inline:{recorded_name(call)}", ctx, call.tool_call_id
            ).entered():
                return await handler(args)
        except _EXITS as exc:
            raise _no_exit(f"tool '{call.tool_name}'", exc) from exc
        except UserError as exc:
            if "wait_for_external_event" not in str(exc) or ToolOptions.of(call.tool_name, tool_def).inline:
                raise
            # The library's own words name other ways out, which aren't there, and another engine.
            raise InvalidDefinition(
                f"tool '{call.tool_name}' calls wait_for_external_event(), and its calls are recorded, within which "
                'nothing can wait so; mark it with metadata={"paigeant": {"inline": True}}'
            ) from exc
        except (CallDeferred, ApprovalRequired) as exc:
            if not ctx.tool_call_approved or asks_itself(self.agent, ctx):
                raise
            deferred = exc
        finally:
            CALL.reset(token)
        if isinstance(deferred, ApprovalRequired):
            raise InvalidDefinition(
                f"tool '{call.tool_name}' asks for approval of a call that has been approved; "
                "let it ask only when ctx.tool_call_approved is false"
            )
        return await outcome(place, self.name, ctx, call, deferred, self._ask_timeout)

    async def wrap_output_process(
        self,
        ctx: RunContext[AgentDepsT],
        *,
        output_context: OutputContext,
        output: Any,
        handler: WrapOutputProcessHandler,
    ) -> Any:
        place = place_of_run()
        if place is None or not output_context.has_function:
            return await handler(output)
        await place.settled()
        # It may see a stream's outputs before their end as well: all are of one output, whose number is 1.
        call = None if output_context.tool_call is None else output_context.tool_call.tool_call_id
        with part_of(place, f"{self.name}__output", ctx, call, number=1).entered():
            return await handler(output)

    async def handle_deferred_tool_calls(
        self, ctx: RunContext[AgentDepsT], *, requests: DeferredToolRequests
    ) -> DeferredToolResults | None:
        place = place_of_run()
        if place is not None and (progress := PROGRESS.get()) is not None:
            progress.deferred = requests
        if place is None or asks_itself(self.agent, ctx):
            return None
        return await decisions(place, self.name, ctx, requests, self._ask_timeout)

    def wrap_run_event_stream(
        self, ctx: RunContext[AgentDepsT], *, stream: AsyncIterable[AgentStreamEvent]
    ) -> AsyncIterable[AgentStreamEvent]:
        # Without a handler nothing is done with events: they needn't come through here.
        return super().wrap_run_event_stream(ctx, stream=stream) if self.has_wrap_run_event_stream else stream

    @property
    def _has_prepare_model_request(self) -> bool:
        # The library copies all tools for each request when somebody may change them. The base's hook doesn't.
        return type(self).prepare_model_request is not BaseDurabilityCapability.prepare_model_request

    # -- units of its own

    async def _sleep(self, run_id: str, seconds: float) -> None:
        place = place_of_run()
        if place is None:
            await asyncio.sleep(seconds)
            return
        await place.sleep(place.name(f"{self.name}__sleep({run_in_name(place, run_id)})"), seconds)

    # -- how units are done

    def _config(self) -> RoleBasedOperationConfig[Unit]:
        def of_tool(operation: DurableOperationId, tool: object | None, name: str) -> Unit | Literal[False]:
            if not isinstance(tool, ToolsetTool):
                return _PLAIN
            options = ToolOptions.of(name, tool.tool_def)
            if options.inline:
                return False
            if isinstance(operation, ToolsetValidateToolArgumentsId):
                return _PLAIN
            label = f"tool '{name}' of agent '{self.name}'"
            delay = _retrying(RetryPolicy.of(options.retries)) if options.retries else _never
            alone = options.at_most_once or tool.tool_def.sequential or _told_mode() == "sequential"
            return Unit(label, delay, options.timeout, options.at_most_once, beside=not alone)

        model = Unit(f"the model request of agent '{self.name}'", self._delay_of_model, self._model_timeout)
        return RoleBasedOperationConfig(
            model=model, event=_PLAIN, capability=_PLAIN, tool=_PLAIN, resolve_tool=of_tool
        )

    def _build_mcp_toolset(self, toolset: Any) -> DurableMCPToolset[AgentDepsT]:
        built = super()._build_mcp_toolset(toolset)
        built.__class__ = Reconnecting  # the library makes one of a fixed class
        return built

    def _wrap_other_leaf_toolset(self, ts: AbstractToolset[AgentDepsT]) -> WrapperToolset[AgentDepsT] | None:
        if isinstance(ts, (ExternalToolset, InlineToolset)):
            return None
        # The library records none of a kind that it doesn't know, and says nothing. Of one that a function gives it
        # knows as little: what it offers and what its tools give are records, and it is entered where one needs it.
        built = self._build_dynamic_toolset(DynamicToolset(ts.for_run, per_run_step=False, id=ts.id))
        built.wrapped = ts
        return built

    def get_wrapper_toolset(self, toolset: AbstractToolset[AgentDepsT]) -> AbstractToolset[AgentDepsT] | None:
        if self.in_durable_context and self.agent is not None:
            # Where a run brings a capability along, as this is one mostly, the library asks those of the agent once
            # more for their toolsets, and one may make its own anew each time.
            made = _owned(construction_toolsets(self.agent))
            own = {id(leaf): made[owner] for owner, leaf in _owned([toolset]).items() if owner in made}
            if any(id(leaf) != known for known, leaf in own.items()):
                toolset = toolset.visit_and_replace(lambda leaf: own.get(id(leaf), leaf))
        wrapper = super().get_wrapper_toolset(toolset)
        return LateSpans(wrapper or toolset) if may_replay() else wrapper

    def _reject_runtime_toolsets(self, toolset: AbstractToolset[AgentDepsT]) -> None:
        if self.in_durable_context:
            toolset.apply(self._reject_unknown)

    def _reject_unknown(self, leaf: AbstractToolset[AgentDepsT]) -> None:
        """Raise UserError for a toolset that comes with a run: it was not there when this was bound to the agent."""
        known = self._toolsets_by_id.get(leaf.id or "")
        if known is not None and known.wrapped is leaf:
            return  # the library asks what its agent was made with: `@agent.toolset` would never do
        super()._reject_runtime_toolsets(leaf)
        if not isinstance(leaf, (FunctionToolset, WrapperToolset, ExternalToolset, InlineToolset)):
            raise UserError(
                f"{leaf.label} comes with a run of agent '{self.name}', or with an override, and so its calls would "
                "not be recorded; give it to the agent where that is made: Agent(..., toolsets=[...])"
            )

    def _toolset_names(self) -> list[str]:
        return [
            f"{kind}__{name}"
            for name in self._toolsets_by_id
            for kind in ("function_toolset", "mcp_server", "dynamic_toolset")
        ]

    def _delay_of_model(self, number: int, error: Exception) -> float | None:
        policy = self._model_policy
        # Of several models that were asked in turn each has failed in a way of its own: one that may answer is enough.
        passing = [each for each in _failures(error) if _may_pass(each)]
        if number >= policy.attempts or not passing:
            return None
        asked = min(getattr(each, "retry_after", None) or 0.0 for each in passing)
        return None if asked > policy.cap else max(asked, policy.next_delay(number, chance=0.0))

    def _bind_to_agent(self, agent: AbstractAgent[AgentDepsT, Any]) -> None:
        # This is a copy, whose operations are its own.
        self._operations, self._requests = None, {}
        super()._bind_to_agent(agent)
        self._renamed()

    def _renamed(self) -> dict[str, str]:
        """What function tools are called now, by the names that they had. Raises InvalidDefinition."""
        return renamed(
            {
                name: ToolOptions.of(name, _defined(name, tool, wrapper.wrapped))
                for wrapper in self._toolsets_by_id.values()
                if isinstance(wrapper.wrapped, FunctionToolset)
                for name, tool in wrapper.wrapped.tools.items()
            }
        )

    def _durable_run_context(self, ctx: RunContext[AgentDepsT]) -> RunContext[AgentDepsT]:
        # What guards a unit's context is the same for all, and the library's way of putting it in takes long.
        if type(ctx) is not RunContext:
            return super()._durable_run_context(ctx)
        if self._guards is None:
            guarded = super()._durable_run_context(ctx)
            self._guards = {name: vars(guarded)[name] for name in ("pending_messages", "_cancellation")}
        return evolved(ctx, **self._guards)

    def _request_policy_scope(  # type: ignore[override]  # the library's own is a generator
        self, ctx: RunContext[AgentDepsT]
    ) -> AbstractContextManager[None]:
        # The policy of a request is made for its span. Without one the library looks for it all the same.
        return super()._request_policy_scope(ctx) if get_current_span().is_recording() else nullcontext()

    # -- models

    def _bind_models(self, agent: AbstractAgent[AgentDepsT, Any]) -> None:
        self._overriding = _overriding(agent)
        if agent.model is None and self._override() is not None:
            self._models_by_id = dict(self._extra_models)
            return
        super()._bind_models(agent)

    def _bind_model_operations(
        self, backend: DurableOperationBackend[Any], *, model_id: str | None, model_name: str
    ) -> Any:
        # The library does it for each request anew.
        known = self._requests.get((model_id, model_name))
        if known is None:
            if len(self._requests) >= _MODELS:
                self._requests.clear()
            known = super()._bind_model_operations(backend, model_id=model_id, model_name=model_name)
            self._requests[model_id, model_name] = known
        return known

    def _registered_model_id(self, model: Model) -> tuple[bool, str | None]:
        override = self._override()
        first = [] if override is None else [("default", override)]
        for model_id, registered in (*first, *self._models_by_id.items()):
            if model is registered or model is _plain(registered):
                return True, None if model_id == "default" else model_id
        return False, None

    async def _resolve_model_for_request(
        self, model_id: str | None, run_context: RunContext[AgentDepsT]
    ) -> Model:
        override = self._override() if model_id is None else None
        return _plain(override or await super()._resolve_model_for_request(model_id, run_context))

    def _model_id_for_request(
        self, ctx: RunContext[AgentDepsT], request_context: ModelRequestContext
    ) -> str | None:
        if (progress := PROGRESS.get()) is not None:
            progress.model = request_context.model_id or request_context.model.model_id
        try:
            return super()._model_id_for_request(ctx, request_context)
        except UserError:
            # The library looks at the id of the run's own model only, not at that of one which takes over.
            if request_context.attempt > 1 and request_context.model_id is not None:
                return request_context.model_id
            raise

    def _override(self) -> Model | None:
        """The model that `agent.override(model=...)` puts in place of the agent's own, as tests do."""
        some = None if self._overriding is None else self._overriding.get()
        return some.value if some is not None and isinstance(some.value, Model) else None

    def _stamp_response(self, response: ModelResponse, messages: list[ModelMessage]) -> None:
        put_price(response)
        # What is recorded says which run and which model it is of. The agent fills these in only after that, and where
        # an answer of another model is replayed it would name the one that it meant to ask.
        if (progress := PROGRESS.get()) is not None:
            response.model_id = response.model_id or progress.model
        if messages:
            response.run_id = response.run_id or messages[-1].run_id
            response.conversation_id = response.conversation_id or messages[-1].conversation_id

    async def _dispatch_event_stream_event(
        self, ctx: RunContext[AgentDepsT], event: AgentStreamEvent
    ) -> None:
        # All that the unit of an event is given is the event; its run has to come along in another way.
        token = EVENT_OF.set(ctx)
        try:
            await super()._dispatch_event_stream_event(ctx, event)
        finally:
            EVENT_OF.reset(token)


def _overriding(agent: AbstractAgent[Any, Any]) -> contextvars.ContextVar[Any] | None:
    """What holds the model that `agent.override` puts in place of the agent's own. The library has no other way."""
    while isinstance(agent, WrapperAgent):
        agent = agent.wrapped
    return getattr(agent, "_override_model", None)


def _plain(model: Model) -> Model:
    """The model that the library asks: of one that tells spans itself, as Logfire makes it, that within.

    What tells the spans then is a capability that the library adds to the run.
    """
    return model.wrapped if isinstance(model, InstrumentedModel) else model


_EXITS = (SystemExit, KeyboardInterrupt)


def _no_exit(what: str, error: BaseException) -> RuntimeError:
    """The error that stands for one of `_EXITS`, which would end the event loop, and the worker with all its steps.

    So it is in the tasks that the library begins for tools and for what goes around a run.
    """
    code = repr(error.code) if isinstance(error, SystemExit) else ""
    return RuntimeError(f"{what} ended with {type(error).__name__}({code})")


def _defined(name: str, tool: Tool[Any], toolset: FunctionToolset[Any]) -> ToolDefinition:
    """As much of a tool's definition as its options depend on."""
    timeout = toolset.timeout if tool.timeout is None else tool.timeout
    return ToolDefinition(name=name, metadata=tool.metadata, timeout=timeout)


def _owned(toolsets: Iterable[AbstractToolset[Any]]) -> dict[tuple[int, str | None], AbstractToolset[Any]]:
    """The toolsets that capabilities give, by the identity of the capability and their own id."""
    given: list[CapabilityOwnedToolset[Any]] = []
    found: dict[tuple[int, str | None], AbstractToolset[Any]] = {}
    for toolset in toolsets:
        toolset.apply(lambda part: given.append(part) if isinstance(part, CapabilityOwnedToolset) else None)
    for one in given:
        leaves: list[AbstractToolset[Any]] = []
        one.wrapped.apply(leaves.append)
        found.update({(id(one.capability), leaf.id): leaf for leaf in leaves})
    return found


def _told_mode() -> str:
    """How tools of one answer are called in the run that asks: 'sequential', or at the same time."""
    return ToolManager.get_parallel_execution_mode(cast(Any, None))


def _are_same(these: tuple[object, ...], those: tuple[object, ...]) -> bool:
    return len(these) == len(those) and all(map(operator.is_, these, those))


def _failures(error: Exception) -> Iterator[Exception]:
    """The errors of the models that were asked: of each of them where one stood in for the other."""
    if isinstance(error, FallbackExceptionGroup):
        for each in error.exceptions:
            yield from _failures(each)
    else:
        yield error


def _stays(error: Exception) -> bool:
    """Whether each model that was asked would refuse the same request again, and none of them says until when."""
    return all(
        isinstance(each, _REFUSED) and getattr(each, "retry_after", None) is None for each in _failures(error)
    )


def _may_pass(error: Exception) -> bool:
    """Whether a model that failed so may answer when it is asked again."""
    if isinstance(error, _REFUSED):
        return False
    if isinstance(error, ModelHTTPError) and (
        error.status_code in (408, 425, 429) or error.status_code >= 500
    ):
        return True
    # A run that is over its own time is a TimeoutError as well, of another kind.
    return isinstance(error, _TRANSIENT) or type(error) is TimeoutError


def _never(*_: object) -> None:
    return None


def _retrying(policy: RetryPolicy) -> Callable[[int, Exception], float | None]:
    def delay(number: int, error: Exception) -> float | None:
        if number >= policy.attempts or is_among(error, _FINAL):
            return None
        return policy.next_delay(number, chance=0.0)

    return delay
