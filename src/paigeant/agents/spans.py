"""Spans of what an agent may only replay: each begins once it is known that something is done in it.

The library makes a span for whatever an agent does, and doesn't end that of what was replayed, so that nobody exports
it. But Logfire tells of spans as they begin, too: there it would go on for ever.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from opentelemetry.context import attach, detach, get_current
from opentelemetry.trace import Span, SpanContext, SpanKind, Status, StatusCode, Tracer, get_current_span
from opentelemetry.util.types import Attributes
from pydantic_ai import RunContext
from pydantic_ai.capabilities import AbstractCapability, Instrumentation, WrapperCapability
from pydantic_ai.durable_exec import record_durable_unit
from pydantic_ai.toolsets import AbstractToolset, WrapperToolset

from paigeant.place import current_place

__all__ = ["LateSpan", "LateSpans", "LateTracer", "may_replay", "tell_unit"]


def may_replay() -> bool:
    """Whether what an agent does here may be there from an earlier attempt."""
    place = current_place()
    return place is not None and place.journal.may_replay()


class LateSpans(WrapperToolset[Any]):
    """A toolset whose run makes late spans.

    Toolsets are the last to be told of a run before its own span is made, and the first who can see which capabilities
    it has: with the one that makes spans, wherever that comes from.
    """

    async def for_run(self, ctx: RunContext[Any]) -> AbstractToolset[Any]:
        if ctx.root_capability is not None:
            ctx.root_capability.apply(_tell_late)
        return await super().for_run(ctx)


def _tell_late(part: AbstractCapability[Any]) -> None:
    while isinstance(part, WrapperCapability):
        part = part.wrapped
    if isinstance(part, Instrumentation) and not isinstance(part.settings.tracer, LateTracer):
        part.settings = copy.copy(part.settings)  # which all runs of the agent share
        part.settings.tracer = LateTracer(part.settings.tracer, may_replay)


def tell_unit(*, executed: bool) -> None:
    """Tell the spans around that a unit is done: it was `executed`, or else replayed."""
    record_durable_unit(executed=executed)
    around = get_current_span()
    if executed:
        _begin(around)
    else:
        while type(around) is LateSpan:
            around = around.replayed()


class LateTracer(Tracer):
    """Makes the spans of `tracer`, late ones while there `may_replay` be something."""

    def __init__(self, tracer: Tracer, may_replay: Callable[[], bool]) -> None:
        self._tracer = tracer
        self._may_replay = may_replay

    def start_span(
        self,
        name: str,
        context: Any = None,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Attributes = None,
        links: Any = None,
        start_time: int | None = None,
        record_exception: bool = True,
        set_status_on_exception: bool = True,
    ) -> Span:
        """A span that has begun, or will have begun now."""
        late = LateSpan(
            self._tracer,
            name=name,
            context=get_current() if context is None else context,
            kind=kind,
            attributes=dict(attributes or {}),
            links=links,
            start_time=time.time_ns() if start_time is None else start_time,
            record_exception=record_exception,
            set_status_on_exception=set_status_on_exception,
        )
        return late if self._may_replay() else late.get_begun()

    def start_as_current_span(self, *args: Any, **more: Any) -> Any:
        """As it is: nobody asks for it in what may be replayed."""
        return self._tracer.start_as_current_span(*args, **more)


def _begin(span: Span) -> None:
    if type(span) is LateSpan:
        span.get_begun()


class LateSpan(Span):
    """A span that begins when it ends, a unit was executed or another span begins in it, or somebody asks which it is.

    Until then it keeps what is said of it; from then on it is that span, also to those who ask for its class. As long
    as all that was done in it was replayed, so that it may never begin, whoever asks is told of the one above.
    """

    _begun: Span | None = None
    _is_replayed = False

    def __init__(self, tracer: Tracer, **asked: Any) -> None:
        self._tracer = tracer
        self._asked = asked
        self._later: list[Callable[[Span], None]] = []
        self._lock = threading.Lock()

    @property  # type: ignore[misc]  # nobody sets it
    def __class__(self) -> type:
        # Logfire adds what its meters count to the current span if that is one of its own.
        return LateSpan if self._begun is None else type(self._begun)

    def __getattr__(self, name: str) -> Any:
        if self._begun is None and name == "attributes":
            return self._asked["attributes"]
        return getattr(self._begun, name)

    @property
    def above(self) -> Span:
        """The span that it was made in."""
        return get_current_span(self._asked["context"])

    def replayed(self) -> Span:
        """Something was replayed in it, and so in the one above, which it gives."""
        self._is_replayed = True
        return self.above

    def get_begun(self) -> Span:
        """The span itself."""
        with self._lock:  # two threads may begin one under it at once
            if self._begun is None:
                # Whoever hears of it mustn't find it as the current one, and ask for what isn't there yet.
                token = attach(self._asked["context"])
                try:
                    _begin(self.above)
                    span = self._tracer.start_span(**self._asked)
                finally:
                    detach(token)
                for say in self._later:
                    say(span)
                self._later.clear()
                self._begun = span
            return self._begun

    def get_span_context(self) -> SpanContext:
        """What others are told of it."""
        told = self.above if self._begun is None and self._is_replayed else self.get_begun()
        return told.get_span_context()

    def end(self, end_time: int | None = None) -> None:
        """End it."""
        self.get_begun().end(end_time)

    def is_recording(self) -> bool:
        """Whether there is a point in saying more of it."""
        return self._begun is None or self._begun.is_recording()

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Set these attributes."""
        if self._begun is None:
            self._asked["attributes"].update(attributes)
        else:
            self._begun.set_attributes(attributes)

    def set_attribute(self, key: str, value: Any) -> None:
        """Set an attribute."""
        self.set_attributes({key: value})

    def update_name(self, name: str) -> None:
        """Give it another name."""
        self._say(lambda span: span.update_name(name))

    def add_event(self, name: str, attributes: Attributes = None, timestamp: int | None = None) -> None:
        """Add a moment within it."""
        moment = time.time_ns() if timestamp is None else timestamp
        self._say(lambda span: span.add_event(name, attributes, moment))

    def add_link(self, context: SpanContext, attributes: Attributes = None) -> None:
        """Add a link to another span."""
        self._say(lambda span: span.add_link(context, attributes))

    def set_status(self, status: Status | StatusCode, description: str | None = None) -> None:
        """Say how it went."""
        self._say(lambda span: span.set_status(status, description))

    def record_exception(
        self,
        exception: BaseException,
        attributes: Attributes = None,
        timestamp: int | None = None,
        escaped: bool = False,
    ) -> None:
        """Add the moment at which `exception` was raised."""
        moment = time.time_ns() if timestamp is None else timestamp
        self._say(lambda span: span.record_exception(exception, attributes, moment, escaped))

    def _say(self, say: Callable[[Span], None]) -> None:
        if self._begun is None:
            self._later.append(say)
        else:
            say(self._begun)
