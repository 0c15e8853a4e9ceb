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

from opentelemetry.context import get_current
from opentelemetry.trace import Span, SpanContext, SpanKind, Status, StatusCode, Tracer, get_current_span
from opentelemetry.util.types import Attributes
from pydantic_ai._durable_replay import snapshot
from pydantic_ai.capabilities import AbstractCapability, Instrumentation, WrapperCapability
from pydantic_ai.capabilities.abstract import leaf_capabilities

__all__ = ["LateSpan", "LateTracer", "tell_late"]


def tell_late(run: AbstractCapability[Any], may_replay: Callable[[], bool]) -> None:
    """Have the run of an agent with these capabilities, which are its own, make late spans while it `may_replay`."""
    for part in leaf_capabilities(run):
        while isinstance(part, WrapperCapability):
            part = part.wrapped
        if isinstance(part, Instrumentation):
            part.settings = copy.copy(part.settings)  # which all runs of the agent share
            part.settings.tracer = LateTracer(part.settings.tracer, may_replay)


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
        if not self._may_replay():
            _begin_above(context)
            return self._tracer.start_span(
                name, context, kind, attributes, links, start_time, record_exception, set_status_on_exception
            )
        return LateSpan(
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

    def _as_current(self, *args: Any, **more: Any) -> Any:
        return self._tracer.start_as_current_span(*args, **more)  # nobody asks for it in what may be replayed

    start_as_current_span: Any = _as_current


def _begin_above(context: Any) -> None:
    above = get_current_span(context)
    if type(above) is LateSpan:
        _ = above.begun


class LateSpan(Span):
    """A span that begins when it ends, or one under it begins, or somebody wants to know which it is.

    Until then it keeps what is said of it; from then on it is that span, also to those who ask for its class. As long
    as all that was done in it was replayed, so that it may never begin, whoever asks is told of the one above.
    """

    def __init__(self, tracer: Tracer, **asked: Any) -> None:
        self._tracer = tracer
        self._asked = asked
        self._later: list[Callable[[Span], None]] = []
        self._begun: Span | None = None
        self._replay = snapshot()
        self._lock = threading.Lock()

    @property  # type: ignore[misc]  # nobody sets it
    def __class__(self) -> type:
        # Logfire adds what its meters count to the current span if that is one of its own.
        return LateSpan if self._begun is None else type(self._begun)

    def __getattr__(self, name: str) -> Any:
        if self._begun is None:
            if name == "attributes":
                return self._asked["attributes"]
            raise AttributeError(name)
        return getattr(self._begun, name)

    @property
    def begun(self) -> Span:
        """The span itself."""
        with self._lock:  # two threads may begin one under it at once
            if self._begun is None:
                _begin_above(self._asked["context"])
                span = self._tracer.start_span(**self._asked)
                for say in self._later:
                    say(span)
                self._later.clear()
                self._begun = span
            return self._begun

    def get_span_context(self) -> SpanContext:
        """What others are told of it."""
        if self._begun is None and self._replay is not None and self._replay.replayed():
            return get_current_span(self._asked["context"]).get_span_context()
        return self.begun.get_span_context()

    def end(self, end_time: int | None = None) -> None:
        """End it."""
        self.begun.end(end_time)

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
        if self._begun is None:
            self._asked["name"] = name
        else:
            self._begun.update_name(name)

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
