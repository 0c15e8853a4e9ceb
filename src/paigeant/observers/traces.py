"""What happens to runs as OpenTelemetry spans: one trace a run, whichever processes and brokers it goes through.

Needs nothing but the API, and writes to the global tracer provider, whoever has set that up (`otlp.py`, Logfire, an
application of your own). Without one, or where a trace isn't sampled, its spans are empty and cost little.

The dispatch is the root of a run's trace. Its context travels in the headers `traceparent` and `tracestate`, and every
other span of the run is its child, so that none hangs under one that died with its process. An attempt has two:
`receive`, for the time its step had been due, which ends as the attempt begins, and `step` or `undo`, which is the
current span while the activity runs: what that makes, an agent's own spans above all, is below it.

Attributes are ids and names, from a fixed list: neither input nor output, nor the text of an error, is among them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from opentelemetry import context, trace
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    Tracer,
    TracerProvider,
    TraceState,
)

from paigeant.observer import Harmless
from paigeant.trace_context import MOST_STATE

if TYPE_CHECKING:
    from opentelemetry.context import Context

    from paigeant.observer import Around, Event, EventName, Work

__all__ = ["TraceObserver"]

log = logging.getLogger("paigeant.traces")

_ENDS: Mapping[EventName, Status] = {
    "run.completed": Status(StatusCode.OK),
    "run.failed": Status(StatusCode.ERROR),
    "run.compensated": Status(StatusCode.ERROR),
    "run.compensation_failed": Status(StatusCode.ERROR),
    "run.cancelled": Status(StatusCode.UNSET),
}
_LONGEST = 256
"""Characters of an id that was chosen outside. More of it helps nobody who looks for it."""


class TraceObserver:
    """Makes the spans of runs. `tracer_provider` is the global one by default, also if that is set later."""

    def __init__(self, tracer_provider: TracerProvider | None = None) -> None:
        self.wants = frozenset(_ENDS)
        self.tracer: Tracer = trace.get_tracer("paigeant", tracer_provider=tracer_provider)
        self._start: Start = getattr(self.tracer, "start_told", self._start_described)

    def around(self, work: Work) -> Around:
        """The span of `work` as the current one; gives the traceparent of that for a run which is dispatched."""
        above = _above(work)
        if work.kind == "dispatch":
            return _NewRun(self._start(_dispatched, work, above))
        if not work.message_id:
            return _Current(self._start(_continued, work, above))
        now = time.time_ns()
        due = now - int(work.queued * 1e9)
        self._start(_received, work, above, due).end(now)
        return _Current(self._start(_processed, work, above, now))

    def observe(self, event: Event) -> None:
        """The end of a run as a moment in its trace; all else is told by the spans."""
        status = _ENDS.get(event.name)
        if status is None or not event.traceparent:
            return
        span = self._start(_ended, event, _above(event))
        span.set_status(status)
        span.end()

    def _start_described(
        self,
        tell: Callable[[Any], Described],
        what: Any,
        above: Context | None = None,
        start_time: int | None = None,
    ) -> Span:
        name, kind, attributes = tell(what)
        return self.tracer.start_span(name, above, kind, attributes, start_time=start_time)


class _Current(Harmless):
    """Makes a span the current one on entry, and ends it on exit."""

    __slots__ = ("_keeper", "_span", "_token")

    def __init__(self, span: Span) -> None:
        self._span = span

    def __enter__(self) -> str | None:
        # Whom the library's functions ask, in a call more each. Another library may put its own there at any time.
        keeper = self._keeper = getattr(context, "_RUNTIME_CONTEXT", context)
        # As `trace.set_span_in_context` does it, with one copy instead of three.
        within = context.Context(keeper.get_current())
        dict.__setitem__(within, _CURRENT_SPAN, self._span)
        self._token = keeper.attach(within)
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._keeper.detach(self._token)
        except Exception as exc:
            # Ended in another context, as by the garbage collector. There it isn't the current one.
            log.debug("a span has ended in another context: %s", exc)
        span = self._span
        try:
            if isinstance(error, Exception):  # what isn't one is a wait or a shutdown, and no failure
                span.set_attribute("error.type", type(error).__qualname__)
                span.set_status(Status(StatusCode.ERROR, type(error).__qualname__))
            span.end()
        except Exception:  # whatever a processor of spans does wrong is not the step's
            log.exception("a span can't be ended")


class _NewRun(_Current):
    """Gives the context of the span as well, for the run that is dispatched in it."""

    __slots__ = ()

    def __enter__(self) -> str | None:
        super().__enter__()
        found = self._span.get_span_context()
        if not found.is_valid:
            return None
        state = found.trace_state
        return f"{written(found)} {state.to_header()}" if state else written(found)


Described = tuple[str, SpanKind, dict[str, Any]]
"""The name, kind and attributes of a span."""


class Start(Protocol):
    """Begins the span of `what`, as `tell` describes it: at once, or when somebody wants to know.

    What it is of doesn't change: `tell` may be asked long after the span has ended.
    """

    def __call__(
        self,
        tell: Callable[[Any], Described],
        what: Any,
        above: Context | None = None,
        start_time: int | None = None,
        /,
    ) -> Span:
        """It has begun at `start_time`, nanoseconds since 1970, by default now."""
        ...


_OPERATION = "messaging.operation.name"
_TYPE = "messaging.operation.type"


def _dispatched(work: Work) -> Described:
    attributes = {
        "paigeant.workflow_id": work.workflow_id[:_LONGEST],
        "gen_ai.operation.name": "invoke_workflow",
        "gen_ai.workflow.name": work.workflow,
        "messaging.system": "paigeant",
        _OPERATION: "dispatch",
        _TYPE: "send",
        "messaging.destination.name": work.topic,
        "messaging.message.conversation_id": work.correlation_id[:_LONGEST],
    }
    return f"dispatch {work.workflow}", SpanKind.PRODUCER, attributes


def _continued(work: Work) -> Described:
    # What the dispatch tells of the run isn't told again.
    attributes: dict[str, Any] = {
        "paigeant.workflow_id": work.workflow_id[:_LONGEST],
        "paigeant.step": work.step,
        "paigeant.attempt": work.attempt,
        "paigeant.worker": work.worker,
    }
    name = f"step {work.activity}" if work.kind == "do" else f"undo {work.activity}"
    return name, SpanKind.INTERNAL, attributes


def _processed(work: Work) -> Described:
    name, _, attributes = _continued(work)
    attributes["messaging.system"] = "paigeant"
    attributes["messaging.destination.name"] = work.topic
    attributes["messaging.message.id"] = work.message_id[:_LONGEST]
    attributes[_OPERATION] = attributes[_TYPE] = "process"
    return name, SpanKind.CONSUMER, attributes


def _received(work: Work) -> Described:
    _, kind, attributes = _processed(work)
    attributes[_OPERATION] = attributes[_TYPE] = "receive"
    return f"receive {work.topic}", kind, attributes


def _ended(event: Event) -> Described:
    attributes = {
        "paigeant.workflow_id": event.workflow_id[:_LONGEST],
        "paigeant.run.status": event.name.removeprefix("run."),
    }
    return event.name, SpanKind.INTERNAL, attributes


(_CURRENT_SPAN,) = trace.set_span_in_context(trace.INVALID_SPAN, context.Context())


_PARENT = 55
"""Characters of a traceparent of the version that travels."""


class Remote(context.Context):
    """The context of a span of another process, or of another time, with `above` at hand, what that is known by."""

    above: SpanContext


def _above(told: Work | Event) -> Remote | None:
    # One argument is found faster than two, and most runs have no more. Who writes a message chooses how much that is,
    # and what it came to is kept for a while.
    if len(told.traceparent) != _PARENT:
        return None
    if told.tracestate and len(told.tracestate) <= MOST_STATE:
        return remote(told.traceparent, told.tracestate)
    return remote(told.traceparent)


@lru_cache(maxsize=1024)
def remote(traceparent: str, tracestate: str = "") -> Remote | None:
    """The context that a W3C traceparent names; None, which is the current one, where it names none."""
    try:
        version, trace_id, span_id, flags = traceparent.split("-")
        if len(trace_id) != 32 or len(span_id) != 16 or version != "00":
            return None
        state = TraceState.from_header([tracestate]) if tracestate else None
        found = SpanContext(int(trace_id, 16), int(span_id, 16), True, TraceFlags(int(flags, 16)), state)
    except ValueError:
        return None
    if not found.is_valid:
        return None
    made = Remote({_CURRENT_SPAN: NonRecordingSpan(found)})
    made.above = found
    return made


def written(found: SpanContext) -> str:
    """A span's context as a W3C traceparent."""
    return f"00-{found.trace_id.to_bytes(16).hex()}-{found.span_id.to_bytes(8).hex()}-{found.trace_flags:02x}"
