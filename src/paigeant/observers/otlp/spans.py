"""Spans that cost little, for what is made many times a second."""

from __future__ import annotations

import os
import random
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, Decision, ParentBased, Sampler
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.util.types import AnyValue, Attributes

__all__ = ["Described", "OwnIds", "QuickProvider", "QuickSpan", "Tell"]

Described = tuple[str, SpanKind, dict[str, AnyValue]]
"""The name, kind and attributes of a span."""

Tell = Callable[[Any], Described]
"""Describes the span of something that doesn't change: it may be asked long after the span has ended."""


_RANDOM = random.Random()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_RANDOM.seed)


class OwnIds(RandomIdGenerator):
    """Random ids that don't depend on the seed of `random`.

    An activity may set that, as those that train or sample do, and each time the same. The ids that come then are the
    same each time as well, and of the spans of one run several would have one.
    """

    def generate_span_id(self) -> int:
        """64 bits, not all of them 0."""
        return _RANDOM.getrandbits(64) or self.generate_span_id()

    def generate_trace_id(self) -> int:
        """128 bits, not all of them 0."""
        return _RANDOM.getrandbits(128) or self.generate_trace_id()


class QuickProvider(trace.TracerProvider):
    """Spans for the same end as those of `provider`, at a fraction of what the library's own cost.

    They are for what we make ourselves, many times a second and with attributes that are known to be right: nothing is
    limited, cleaned or measured on the way to `processor`, which is told only when a span has ended. Samplers, ids and
    the resource are those of `provider`. Whoever finds such a span as the current one can do with it what any span can.
    """

    def __init__(self, provider: TracerProvider, processor: SpanProcessor) -> None:
        self.provider = provider
        self.processor = processor

    def get_tracer(
        self,
        instrumenting_module_name: str,
        instrumenting_library_version: str | None = None,
        schema_url: str | None = None,
        attributes: Attributes = None,
    ) -> trace.Tracer:
        """A tracer of that name."""
        scope = InstrumentationScope(instrumenting_module_name, instrumenting_library_version, schema_url)
        return _QuickTracer(self.provider, self.processor, scope)


class _QuickTracer(trace.Tracer):
    def __init__(
        self, provider: TracerProvider, processor: SpanProcessor, scope: InstrumentationScope
    ) -> None:
        self._sampler = provider.sampler
        self._follows = _follows_parents(provider.sampler)
        self._keeps_new = self._follows and provider.sampler.get_description().startswith(_KEEPS_NEW)
        self._ids = provider.id_generator
        self._new_id: Callable[[], int] = (
            partial(_RANDOM.getrandbits, 64) if isinstance(self._ids, OwnIds) else self._ids.generate_span_id
        )
        self._random = TraceFlags.RANDOM_TRACE_ID if self._ids.is_trace_id_random() else 0
        self.resource = provider.resource
        self.processor = processor
        self.scope = scope

    def start_span(
        self,
        name: str,
        context: Context | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Any = None,
        links: Sequence[Link] | None = None,
        start_time: int | None = None,
        record_exception: bool = True,
        set_status_on_exception: bool = True,
    ) -> trace.Span:
        """A span that has begun, and keeps `attributes` as its own; an empty one where its trace isn't sampled."""
        told = (name, kind, {} if attributes is None else attributes)
        return self.start_told(_as_given, told, context, start_time)

    def start_told(
        self, tell: Tell, what: Any, above: Context | None = None, start_time: int | None = None
    ) -> trace.Span:
        """The span of `what`, below that of a context: `tell` says what it is when somebody wants to know.

        Mostly that is when it is written, together with others, which takes half as long as between all else that a
        step does; and until then less of it lies about.
        """
        # A context of `traces.py` has it at hand, and it is valid.
        over: SpanContext | None = getattr(above, "above", None)
        if over is None:
            over = trace.get_current_span(above).get_span_context()
            if not over.is_valid:
                over = None
        if over is not None:
            if self._follows:  # sampled, or not, as what is above; of what isn't, nothing is made
                if not over.trace_flags & TraceFlags.SAMPLED:
                    return trace.NonRecordingSpan(over)
                return QuickSpan(self, tell, what, self._new_id(), over, start_time)
            trace_id, random = over.trace_id, over.trace_flags & TraceFlags.RANDOM_TRACE_ID
        else:
            trace_id, random = self._ids.generate_trace_id(), self._random
            if self._keeps_new:
                own = SpanContext(trace_id, self._new_id(), False, _SAMPLED_RANDOM if random else _SAMPLED)
                return QuickSpan(self, tell, what, own.span_id, None, start_time, own)
        name, kind, _ = tell(what)
        decided = self._sampler.should_sample(above, trace_id, name, kind)
        is_sampled = decided.decision is Decision.RECORD_AND_SAMPLE
        sampled = TraceFlags.SAMPLED if is_sampled else TraceFlags.DEFAULT
        own = SpanContext(
            trace_id, self._ids.generate_span_id(), False, TraceFlags(sampled | random), decided.trace_state
        )
        if not is_sampled:  # what is only to be recorded isn't for the end to which these go
            return trace.NonRecordingSpan(own)
        return QuickSpan(self, tell, what, own.span_id, over, start_time, own)

    @contextmanager
    def _as_current(self, *args: Any, end_on_exit: bool = True, **more: Any) -> Iterator[trace.Span]:
        with trace.use_span(self.start_span(*args, **more), end_on_exit=end_on_exit) as span:
            yield span

    start_as_current_span: Any = _as_current


def _as_given(told: Described) -> Described:
    return told


_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_SAMPLED_RANDOM = TraceFlags(TraceFlags.SAMPLED | TraceFlags.RANDOM_TRACE_ID)
_KEEPS_NEW = "ParentBased{root:AlwaysOnSampler,"


def _follows_parents(sampler: Sampler) -> bool:
    """Whether a span with a parent is sampled exactly if that is. Asking each time costs as much as all else of it."""
    return type(sampler) is ParentBased and _of_parents(sampler) == _of_parents(ParentBased(ALWAYS_OFF))


def _of_parents(sampler: Sampler) -> str:
    """What a sampler says of itself, without what it does where there is no parent."""
    said: str = sampler.get_description()
    return said[said.index("remoteParentSampled") :]


class QuickSpan(trace.Span, ReadableSpan):
    """A span of QuickProvider. `is_as_made`, but for its name and how it went, until somebody says more of it."""

    is_as_made = True
    # What most spans have in common is here and not in each of them. All of this is what ReadableSpan() would set.
    _instrumentation_info = None
    _told: Described | None = None
    _end_time: int | None = None
    _status = Status(StatusCode.UNSET)
    _events: Sequence[Event] = ()
    _links: Sequence[Link] = ()

    def __init__(
        self,
        tracer: _QuickTracer,
        tell: Tell,
        what: Any,
        id: int,
        above: SpanContext | None,
        start_time: int | None,
        context: SpanContext | None = None,
    ) -> None:
        self.id = id
        self._tracer = tracer
        self._tell = tell
        self._what = what
        self._parent = above
        self._start_time = time.time_ns() if start_time is None else start_time
        self._own = context

    @property
    def told(self) -> Described:
        """Its name, kind and attributes."""
        if self._told is None:
            self._told = self._tell(self._what)
        return self._told

    @property
    def _name(self) -> str:  # type: ignore[override]  # nobody sets these: each asks for them
        return self.told[0]

    @property
    def _kind(self) -> SpanKind:  # type: ignore[override]
        return self.told[1]

    @property
    def _attributes(self) -> dict[str, AnyValue]:  # type: ignore[override]
        return self.told[2]

    @property
    def _resource(self) -> Resource:  # type: ignore[override]
        return self._tracer.resource

    @property
    def _instrumentation_scope(self) -> InstrumentationScope:  # type: ignore[override]
        return self._tracer.scope

    @property
    def _context(self) -> SpanContext:  # type: ignore[override]  # nobody sets it: each asks for it
        """What others are told of it; that of the one above but for the id, and made when it is asked for."""
        if self._own is None:
            assert self._parent is not None
            trace_id, _, _, flags, state, _ = self._parent
            kept = _SAMPLED_RANDOM if flags & TraceFlags.RANDOM_TRACE_ID else _SAMPLED
            # What hangs under it from now on, where it has ended, needn't wait for it.
            self._own = SpanContext(trace_id, self.id, self._end_time is not None, kept, state)
        return self._own

    def get_span_context(self) -> SpanContext:
        """What others are told of it."""
        return self._context

    def is_recording(self) -> bool:
        """Whether it hasn't ended."""
        return self._end_time is None

    def set_attributes(self, attributes: Mapping[str, AnyValue]) -> None:
        """Set these attributes."""
        for key, value in attributes.items():
            self.set_attribute(key, value)

    def set_attribute(self, key: str, value: AnyValue) -> None:
        """Set an attribute; what no exporter could write becomes a text."""
        if self.is_recording():
            plain = isinstance(value, (bool, str, bytes, int, float))
            if not plain and isinstance(value, Sequence):
                value = tuple(
                    each if isinstance(each, (bool, str, int, float)) else str(each) for each in value
                )
            self.is_as_made = False
            self._attributes[key] = value if plain or isinstance(value, tuple) else str(value)

    def add_event(self, name: str, attributes: Attributes = None, timestamp: int | None = None) -> None:
        """Add a moment within it."""
        if self.is_recording():
            self.is_as_made = False
            self._events = [*self._events, Event(name, attributes, timestamp)]

    def add_link(self, context: SpanContext, attributes: Attributes = None) -> None:
        """Add a link to another span."""
        if self.is_recording():
            self.is_as_made = False
            self._links = [*self._links, Link(context, attributes)]

    def update_name(self, name: str) -> None:
        """Give it another name."""
        if self.is_recording():
            self._told = (str(name), *self.told[1:])

    def set_status(self, status: Status | StatusCode, description: str | None = None) -> None:
        """Say how it went; once it is said to have gone well, that stands."""
        if self.is_recording() and self._status.status_code is not StatusCode.OK:
            self._status = status if isinstance(status, Status) else Status(status, description)
            if self._status.description:
                self.is_as_made = False

    def record_exception(
        self,
        exception: BaseException,
        attributes: Attributes = None,
        timestamp: int | None = None,
        escaped: bool = False,
    ) -> None:
        """Add the moment at which `exception` was raised."""
        told = {
            "exception.type": type(exception).__qualname__,
            "exception.message": str(exception),
            "exception.stacktrace": "".join(traceback.format_exception(exception)),
            "exception.escaped": str(escaped),
        }
        self.add_event("exception", {**told, **(attributes or {})}, timestamp)

    def end(self, end_time: int | None = None) -> None:
        """End it and hand it on, once."""
        if self._end_time is None:
            self._end_time = time.time_ns() if end_time is None else end_time
            self._tracer.processor.on_end(self)
