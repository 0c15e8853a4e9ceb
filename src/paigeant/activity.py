"""ActivityRegistry, which a user fills: what workers can do, by name, with which arguments."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar, overload

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from paigeant import codec
from paigeant.annotations import check_models, has_models, typed
from paigeant.clock import is_duration
from paigeant.context import StepContext
from paigeant.errors import (
    ArgumentError,
    DuplicateActivity,
    InputInvalid,
    InvalidDefinition,
    OutputInvalid,
    UnknownActivity,
)
from paigeant.identity import check_scopes
from paigeant.redaction import quoted, secrets_in, without
from paigeant.retry import RetryPolicy
from paigeant.slip import check_name
from paigeant.threads import Threads

if TYPE_CHECKING:
    from pydantic_ai import Agent, UsageLimits

    from paigeant.policy import ItineraryPolicy

__all__ = ["Activity", "ActivityRegistry", "Parameter"]

Function = TypeVar("Function", bound=Callable[..., Any])
Call = Callable[[Mapping[str, Any], StepContext, Threads | None], Coroutine[Any, Any, Any]]

MISSING: Any = inspect.Parameter.empty


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of an activity. `adapter` is None for one that takes anything as JSON gives it.

    `is_bare`: it is a function's that has no annotation.
    """

    name: str
    adapter: TypeAdapter[Any] | None = None
    default: Any = MISSING
    is_context: bool = False
    is_bare: bool = False

    def read(self, activity: str, value: Any) -> Any:
        """`value`, which came from JSON, as the annotation wants it and its own copy. Raises ArgumentError."""
        if self.adapter is None:
            return codec.copied(value)
        try:
            return codec.read_as(self.adapter, value)
        except ValidationError as exc:
            wrong = exc
        first = wrong.errors(include_url=False, include_input=False)[0]
        place = "".join(f".{part}" for part in first["loc"])
        secrets = secrets_in(value, self.name)
        # What pydantic raised quotes the value, so where that is secret it goes no further.
        raise ArgumentError(
            f"'{self.name}{place}' of activity '{activity}' doesn't fit: {without(first['msg'], secrets)}; "
            f"found {quoted(value, self.name)}"
        ) from None if secrets else wrong


@dataclass(frozen=True, slots=True)
class Activity:
    """What workers do under a name, and how. None of a setting leaves it to the worker's defaults.

    `concurrency` bounds how many of it one worker does at once. `strict_fencing` refuses the late result of an attempt
    that lost its lease. `compensation` undoes it. `scopes` are the rights that it needs of the person it acts for.
    `may_add` names the activities that its model may add. `output` writes what it returns, and `models` is the
    annotation of that where there are pydantic's models in it. `is_plain`: it is done in a thread.
    """

    name: str
    call: Call
    parameters: tuple[Parameter, ...] = ()
    takes_rest: bool = False
    output: TypeAdapter[Any] | None = None
    models: Any = None
    topic: str = ""
    retries: int | RetryPolicy | None = None
    timeout: float | None = None
    concurrency: int | None = None
    strict_fencing: bool = False
    description: str = ""
    compensation: Activity | None = None
    scopes: tuple[str, ...] = ()
    may_add: tuple[str, ...] = ()
    is_plain: bool = False

    def takes(self) -> set[str] | None:
        """The names that it and its compensation take from a step's `args`; None where any will do."""
        if self.takes_rest:
            return None
        names = {parameter.name for parameter in self.parameters if not parameter.is_context}
        if self.compensation is None:
            return names
        undo = self.compensation.takes()
        return None if undo is None else names | (undo - {"output"})  # which an undo is given in any case

    def check_done(self, value: Any) -> None:
        """Raise OutputInvalid for a value that has still to be run: then what the activity is for isn't done yet."""
        if inspect.isawaitable(value) or inspect.isgenerator(value) or inspect.isasyncgen(value):
            self.dump(value)

    def dump(self, value: Any) -> bytes:
        """What the activity returned, as JSON in the way its annotation wants. Raises OutputInvalid."""
        if inspect.iscoroutine(value):
            value.close()  # else Python warns of it, at any time and place
            raise OutputInvalid(
                f"activity '{self.name}' returned {quoted(value)}, which can't be written as JSON; await it there"
            )
        try:
            if self.output is None:
                return codec.dump(value)
            if self.models is not None:
                check_models(self.models, value)
            return codec.dump_as(self.output, value)
        except codec.OtherType as exc:
            raise OutputInvalid(
                f"activity '{self.name}' returned {quoted(value)}, which isn't what its annotation says: {exc}"
            ) from exc
        except codec.JsonInvalid as exc:
            raise OutputInvalid(
                f"activity '{self.name}' returned {quoted(value)}, which can't be written as JSON: {exc}"
            ) from exc


@dataclass
class ActivityRegistry:
    """The activities that a module defines. Nothing is registered anywhere else; a worker is given its registries."""

    _activities: dict[str, _Lazy] = field(default_factory=dict)
    _compensations: dict[str, _Lazy] = field(default_factory=dict)

    @overload
    def execute(self, name: Function, /) -> Function: ...

    @overload
    def execute(
        self,
        name: str | None = None,
        *,
        topic: str | None = None,
        retries: int | RetryPolicy | None = None,
        timeout: float | None = None,
        concurrency: int | None = None,
        strict_fencing: bool = False,
        scopes: Collection[str] = (),
    ) -> Callable[[Function], Function]: ...

    def execute(
        self,
        name: str | Function | None = None,
        *,
        topic: str | None = None,
        retries: int | RetryPolicy | None = None,
        timeout: float | None = None,
        concurrency: int | None = None,
        strict_fencing: bool = False,
        scopes: Collection[str] = (),
    ) -> Function | Callable[[Function], Function]:
        """Register a function, async or plain (done in a thread), as an activity; gives it back unchanged.

        `name` and `topic` default to the function's name. `timeout` is in seconds, for each attempt. `scopes` are the
        rights that it needs: it is called only on behalf of somebody who has granted all of them, with a token that is
        valid then. Raises DuplicateActivity, InvalidDefinition.
        """
        if callable(name):  # written without brackets
            return self.execute()(name)
        if name is not None:  # what is neither, such as a classmethod, would be lost without a word
            check_name("the name of an activity", name)
        called = name

        def register(function: Function) -> Function:
            options = _Options(topic, retries, timeout, concurrency, strict_fencing, _scopes(scopes))
            self._add(self._activities, _Lazy(_name(called, function), function, options), "activity")
            return function

        return register

    def compensate(
        self,
        activity: str,
        *,
        retries: int | RetryPolicy | None = None,
        timeout: float | None = None,
        scopes: Collection[str] = (),
    ) -> Callable[[Function], Function]:
        """Register what undoes `activity`. Its parameter `output` gets what the undone step returned, the others
        are resolved like those of an activity. Retries and timeout are its own.

        It is done by the service itself and needs nobody's token: `scopes` are what the service's own may have there.
        """

        def register(function: Function) -> Function:
            options = _Options(None, retries, timeout, None, False, _scopes(scopes))
            lazy = _Lazy(activity, function, options)
            self._add(self._compensations, lazy, "compensation of activity")
            return function

        if not isinstance(activity, str) or not activity:
            raise InvalidDefinition(
                f"compensate takes the name of the activity that it undoes, found {activity!r}: "
                "@activity.compensate('reserve_stock')"
            )
        return register

    def agent(
        self,
        agent: Agent[Any, Any],
        *,
        prompt: str | None = None,
        name: str | None = None,
        deps: Any = None,
        message_history: str | None = None,
        deferred_tool_results: str | None = None,
        usage_limits: UsageLimits | None = None,
        may_add: ItineraryPolicy | None = None,
        topic: str | None = None,
        retries: int | RetryPolicy | None = None,
        timeout: float | None = None,
        concurrency: int | None = None,
        scopes: Collection[str] = (),
    ) -> None:
        """Register a pydantic-ai agent as an activity called `name`, or like the agent.

        `prompt` is a template over the payload: `{quantity}` and `{reserve_stock.id}` stand for values. `deps` is the
        agent's deps: a value, a function that makes one (its parameters are resolved like an activity's), or a type,
        which is read from the payload's field `deps` or from its fields. What the agent does is recorded as it goes, so
        that a further attempt doesn't do it again; requests, tokens and cost are recorded with the step.

        `message_history` names an earlier agent step whose conversation this one continues. `usage_limits` hold for all
        of the conversation. Where it ended with tool calls that wait for an answer (`DeferredToolRequests`),
        `deferred_tool_results` names the value that answers them, like the output of a step in between; then `prompt`
        may be left out.

        `may_add` lets the model add steps, end the run and hand its work over, as far as this policy and that of the
        run allow; it names the activities.
        """
        from paigeant.agents.activity import agent_activity, check_agent  # here, because it loads pydantic-ai

        options = _Options(topic, retries, timeout, concurrency, False, _scopes(scopes))
        called = name or getattr(agent, "name", None) or ""
        check_agent(
            agent,
            name=called,
            prompt=prompt,
            message_history=message_history,
            deferred_tool_results=deferred_tool_results,
            may_add=may_add,
        )
        build = functools.partial(
            agent_activity,
            agent,
            name=called,
            prompt=prompt,
            deps=deps,
            message_history=message_history,
            deferred_tool_results=deferred_tool_results,
            usage_limits=usage_limits,
            may_add=may_add,
        )
        self._add(self._activities, _Lazy(called, build, options, home=self), "activity")

    def _add(self, shelf: dict[str, _Lazy], lazy: _Lazy, what: str) -> None:
        if lazy.name in shelf:
            raise DuplicateActivity(
                f"{what} '{lazy.name}' is defined twice; rename one, or give it another name="
            )
        shelf[lazy.name] = lazy

    # -- what workers ask

    def __contains__(self, name: object) -> bool:
        return name in self._activities

    def __iter__(self) -> Iterator[str]:
        return iter(self._activities)

    def __len__(self) -> int:
        return len(self._activities)

    def get(self, name: str) -> Activity:
        """The activity. Raises UnknownActivity, and InvalidDefinition for one whose signature can't work."""
        found = self.find(name)
        if found is None:
            raise UnknownActivity(name, self._activities)
        return found

    def find(self, name: str) -> Activity | None:
        """Like `get`; None for one that isn't here."""
        lazy = self._activities.get(name)
        return None if lazy is None else lazy.build(self._compensations.get(name))

    def check(self) -> None:
        """Raise for the first activity or compensation that can't work."""
        for name in self._compensations:
            if name not in self._activities:
                raise UnknownActivity(name, self._activities)
        for name in self._activities:
            self.get(name)

    def adopt(self, other: ActivityRegistry) -> None:
        """Know what `other` knows as well; what both know stays as it is."""
        self._activities.update({**other._activities, **self._activities})
        self._compensations.update({**other._compensations, **self._compensations})

    @classmethod
    def merged(cls, registries: Iterable[ActivityRegistry]) -> ActivityRegistry:
        """One registry with all activities of several. Raises DuplicateActivity, InvalidDefinition for what is none."""
        together = cls()
        seen: set[int] = set()
        for registry in registries:
            if not isinstance(registry, ActivityRegistry):
                raise InvalidDefinition(f"activities are ActivityRegistry objects, found {registry!r}")
            if id(registry) in seen:
                continue
            seen.add(id(registry))
            for lazy in registry._activities.values():
                together._add(together._activities, lazy.at(together), "activity")
            for lazy in registry._compensations.values():
                together._add(together._compensations, lazy, "compensation of activity")
        return together


@dataclass(frozen=True, slots=True)
class _Options:
    topic: str | None
    retries: int | RetryPolicy | None
    timeout: float | None
    concurrency: int | None
    strict_fencing: bool
    scopes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.retries is not None:
            RetryPolicy.of(self.retries)
        if self.topic is not None:
            check_name("the topic of an activity", self.topic)
        if self.timeout is not None and not is_duration(self.timeout):
            raise InvalidDefinition(
                f"timeout is in seconds, above 0 and below 100 years, found {self.timeout!r}"
            )
        bound = self.concurrency
        if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int) or bound < 1):
            raise InvalidDefinition(f"concurrency is a number of 1 or more, found {bound!r}")


@dataclass(slots=True)
class _Lazy:
    """A registration. Its signature is read at first use, when all that its annotations name is defined.

    An agent is built for a `home`: the registry with the activities that it may add to a run.
    """

    name: str
    function: Callable[..., Any]
    options: _Options
    home: ActivityRegistry | None = None
    built: Activity | None = None

    def at(self, home: ActivityRegistry) -> _Lazy:
        """The same in another registry."""
        return self if self.home is None else replace(self, home=home, built=None)

    def build(self, compensation: _Lazy | None = None) -> Activity:
        if self.built is None:
            home = self.home
            activity = (
                _from_function(self.name, self.function) if home is None else self.function(registry=home)
            )
            options = self.options
            self.built = replace(
                activity,
                topic=options.topic or self.name,
                retries=options.retries,
                timeout=options.timeout,
                concurrency=options.concurrency,
                strict_fencing=options.strict_fencing,
                scopes=options.scopes,
            )
        if compensation is not None and self.built.compensation is None:
            self.built = replace(self.built, compensation=compensation.build())
        return self.built


def _name(name: str | None, function: Callable[..., Any]) -> str:
    if not callable(function):
        raise InvalidDefinition(f"an activity is a function, found {function!r}")
    called = getattr(function, "__name__", "<lambda>") if name is None else name
    if called == "<lambda>":
        raise InvalidDefinition("a function without a name needs one: @activity.execute(name='...')")
    check_name("the name of an activity", called)
    return called


def _scopes(scopes: Collection[str]) -> tuple[str, ...]:
    try:
        return check_scopes(scopes)
    except InputInvalid as exc:
        raise InvalidDefinition(f"the scopes of an activity: {exc}") from exc


def _from_function(name: str, function: Callable[..., Any]) -> Activity:
    parameters, takes_rest = read_parameters(name, function)
    output, models = _read_return(name, function)
    return Activity(
        name=name,
        call=_caller(function),
        parameters=parameters,
        takes_rest=takes_rest,
        output=output,
        models=models,
        description=inspect.getdoc(function) or "",
        is_plain=not _is_async(function),
    )


def _read_return(name: str, function: Callable[..., Any]) -> tuple[TypeAdapter[Any] | None, Any]:
    """`output` and `models` of an `Activity`, from what its function says that it returns."""
    returned = _hints(name, function).get("return", Any)
    try:
        output = None if returned is Any or returned is None or returned is type(None) else typed(returned)
    except InvalidDefinition as exc:
        raise InvalidDefinition(f"the return annotation of activity '{name}': {exc}") from exc
    return output, returned if has_models(returned) else None


def read_parameters(name: str, function: Callable[..., Any]) -> tuple[tuple[Parameter, ...], bool]:
    """The parameters of a function that is called by name, and whether it takes the rest of the payload.

    Raises InvalidDefinition for what can't be called by name and for annotations that can't be read.
    """
    hints = _hints(name, function)
    try:
        signature = inspect.signature(function)
    except ValueError as exc:  # of something that is built in
        raise InvalidDefinition(f"activity '{name}': {exc}; write a function that calls it") from exc
    parameters: list[Parameter] = []
    takes_rest = False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            takes_rest = True
            continue
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
            raise InvalidDefinition(
                f"activity '{name}' has the parameter {parameter}; arguments are given by name, "
                "so * and positional-only parameters can't be"
            )
        if isinstance(parameter.default, FieldInfo):
            raise InvalidDefinition(
                f"parameter '{parameter.name}' of activity '{name}' has a Field(...) as its default, which checks "
                "nothing here and would be given to the function; put it into the annotation, and the default itself "
                f"behind that: {parameter.name}: Annotated[int, Field(ge=1)] = 3"
            )
        annotation = hints.get(parameter.name, Any)
        is_context = _is_context(annotation)
        try:
            adapter = None if annotation is Any or is_context else typed(annotation)
        except InvalidDefinition as exc:
            raise InvalidDefinition(f"parameter '{parameter.name}' of activity '{name}': {exc}") from exc
        is_bare = parameter.name not in hints
        parameters.append(Parameter(parameter.name, adapter, parameter.default, is_context, is_bare))
    return tuple(parameters), takes_rest


def _is_context(annotation: Any) -> bool:
    """Whether it is StepContext, or that or None: a function that other code calls as well may do without."""
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [kind for kind in typing.get_args(annotation) if kind is not type(None)] == [StepContext]
    return annotation is StepContext


def _hints(name: str, function: Callable[..., Any]) -> dict[str, Any]:
    try:
        # Annotations stand at the function itself, not at an object that is called like one.
        inner = function.func if isinstance(function, functools.partial) else function
        callee = inner if inspect.isroutine(inner) or inspect.isclass(inner) else type(inner).__call__
        return typing.get_type_hints(callee, include_extras=True)
    except Exception as exc:  # annotations are the user's code and may raise anything
        raise InvalidDefinition(
            f"the annotations of activity '{name}' can't be read: {exc}; import what they name"
        ) from exc


def _is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004  # not whether, but how it can be called
    )


def _caller(function: Callable[..., Any]) -> Call:
    if _is_async(function):

        async def call(arguments: Mapping[str, Any], context: StepContext, threads: Threads | None) -> Any:
            return await function(**arguments)

    else:

        async def call(arguments: Mapping[str, Any], context: StepContext, threads: Threads | None) -> Any:
            value = await (threads or Threads(1)).do(function, context._begins, **arguments)
            return await value if inspect.isawaitable(value) else value

    return call


if not TYPE_CHECKING:  # which would take any name for one that is here

    def __getattr__(name: str) -> Any:
        """Nothing; `from paigeant import activity` gives this module, and whoever decorates with it is told of that."""
        is_of_registries = name in ("execute", "compensate", "agent")
        hint = "; `activity` is a registry of yours: activity = paigeant.ActivityRegistry()"
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}{hint if is_of_registries else ''}"
        )
