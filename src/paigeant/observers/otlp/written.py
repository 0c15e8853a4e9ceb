"""Spans as OpenTelemetry's protocol has them, written as they end, and the exporter that sends them.

The library writes a span when it is sent, which takes seven times as long (20.4 instead of 2.8 µs) and is done in
another thread: that has to fetch all that a span is made of from the processor where the work is done, and keeps the
work from Python meanwhile.
The messages are those of opentelemetry/proto/trace/v1/trace.proto, in which no number changes its meaning.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, StatusCode, TraceState
from opentelemetry.util.types import AnyValue

from paigeant.observers.otlp.spans import QuickSpan

__all__ = ["OF_ONE", "Sender", "Written", "together", "written"]


class Written(NamedTuple):
    """`many` spans that have ended and hang under none of this process, as fields of the `ScopeSpans` of their scope.

    `above` has the ids of those of which somebody has asked: under no other can a span of this process hang.
    """

    many: int
    above: tuple[int, ...]
    scope: InstrumentationScope
    data: bytes


def together(spans: Sequence[QuickSpan], is_left: Callable[[str], bool]) -> list[Written | QuickSpan]:
    """These spans, with what can be written in one; those whose name `is_left`, or of another scope, are not."""
    data, above, left = [], [], []
    scope = spans[0]._instrumentation_scope
    for span in spans:
        own = span._instrumentation_scope
        is_one = (own is scope or own == scope) and not is_left(span.told[0])
        found = written(span) if is_one else None
        if found is None:
            left.append(span)
        else:
            data.append(found)
            if span._own is not None:
                above.append(span.id)
    if not data:
        return [*left]
    return [Written(len(data), tuple(above), scope, b"".join(data)), *left]


def written(span: QuickSpan) -> bytes | None:
    """The span; None where it isn't one of a run or a step as they mostly are, and is left to the library."""
    above = span._parent
    if not span.is_as_made or not (above is None or above.is_remote):
        return None
    own = span.get_span_context() if above is None else above
    # Not by its properties: each is a call.
    (called, kind, attributes), status = span.told, span._status
    try:
        parts = (
            _new(own.trace_id) if above is None else _under(own.trace_id, own.span_id),
            span.id.to_bytes(8),
            _name(called),
            _KINDS[kind._value_],
            _TIMES(b"\x39", span._start_time, b"\x41", span._end_time),
            _UNSET if status.is_unset else _STATUS[status.status_code],
            _state(own.trace_state) if own.trace_state else b"",
            *[
                _of_one(name, value) if name in OF_ONE else _attribute(name, value)
                for name, value in attributes.items()
            ],
        )
        return _field(b"\x12", b"".join(parts))
    # Half of a surrogate pair, a value of another kind; or an activity gave its span a name or an end that is none.
    except Exception:
        span.is_as_made = False  # it is looked at closely on its way
        return None


class Sender(OTLPSpanExporter):
    """The library's exporter, which sends spans that are written already as well, for the process of this resource."""

    def __init__(self, resource: Resource, *, timeout: float | None = None) -> None:
        super().__init__(timeout=timeout)
        self._resource = resource

    @property
    def takes_written(self) -> bool:
        """Whether the library is one that can be given what others have written."""
        return callable(getattr(getattr(self, "_client", None), "export", None))

    def export(self, spans: Sequence[ReadableSpan | Written]) -> SpanExportResult:
        """Send them: what is written first, for the others may hang under it."""
        scopes: dict[InstrumentationScope, list[bytes]] = {}
        others: list[ReadableSpan] = []
        for span in spans:
            if isinstance(span, Written):
                scopes.setdefault(span.scope, []).append(span.data)
            else:
                others.append(span)
        request = b"".join([self._request(scope, data) for scope, data in scopes.items()])
        if request and (self._shutdown or not self._client.export(request).success):
            return SpanExportResult.FAILURE
        return super().export(others) if others else SpanExportResult.SUCCESS

    def _request(self, scope: InstrumentationScope, spans: list[bytes]) -> bytes:
        of_resource, of_scope = _heads(self._resource, scope)
        return _field(b"\x0a", of_resource + _field(b"\x12", of_scope + b"".join(spans)))


@lru_cache(maxsize=8)
def _heads(resource: Resource, scope: InstrumentationScope) -> tuple[bytes, bytes]:
    """`ResourceSpans` without any `ScopeSpans`, and `ScopeSpans` without any spans, as the library writes them."""
    nobody = SpanContext(1, 1, False)
    [made] = encode_spans(
        [ReadableSpan("", nobody, resource=resource, instrumentation_scope=scope)]
    ).resource_spans
    [within] = made.scope_spans
    within.ClearField("spans")
    of_scope = within.SerializeToString()
    made.ClearField("scope_spans")
    return made.SerializeToString(), of_scope


_TIMES = struct.Struct("<cQcQ").pack
_KINDS = [bytes((0x30, number)) for number in range(1, 6)]
"""By the API's numbers, which are one less."""

_UNSET = b"\x7a\x00"
_STATUS = {code: bytes((0x7A, 2, 0x18, code.value)) for code in StatusCode}

# Of the flags 0x100 says that it is known whether the one above is another process's, and 0x200 that it is.
_FLAGS = struct.Struct("<2sI").pack
_OF_NONE, _OF_ANOTHER = _FLAGS(b"\x85\x01", 0x100), _FLAGS(b"\x85\x01", 0x300)


# Each ends with the beginning of the span's own id.
def _new(trace: int) -> bytes:
    return b"%b\x0a\x10%b\x12\x08" % (_OF_NONE, trace.to_bytes(16))


def _under(trace: int, above: int) -> bytes:
    return b"%b\x0a\x10%b\x22\x08%b\x12\x08" % (_OF_ANOTHER, trace.to_bytes(16), above.to_bytes(8))


@lru_cache(maxsize=1024)
def _name(name: str) -> bytes:
    return _field(b"\x2a", name.encode())


OF_ONE = frozenset({"paigeant.workflow_id", "messaging.message.id", "messaging.message.conversation_id"})
"""Attributes of one run, or of one message. Of the others there are few values, which come again and again."""


def _of_one(name: str, text: Any) -> bytes:
    """An attribute that has another text in each run: kept, it would only push others out.

    Raises AttributeError for what is no text.
    """
    data: bytes = text.encode()
    return _before(name, len(data)) + data


@lru_cache(maxsize=1024)
def _before(name: str, size: int) -> bytes:
    """An attribute up to the text of this size that it has."""
    told = b"\x0a" + _number(size)
    key = _field(b"\x0a", name.encode()) + b"\x12" + _number(len(told) + size) + told
    return b"\x4a" + _number(len(key) + size) + key


@lru_cache(maxsize=1024, typed=True)
def _attribute(name: str, value: AnyValue) -> bytes:
    """Raises TypeError for a value that is neither text nor a number of an attempt, a lone surrogate ValueError."""
    if type(value) is str:
        told = _field(b"\x0a", value.encode())
    elif type(value) is int and 0 <= value < 1 << 63:
        told = b"\x18" + _number(value)
    else:
        raise TypeError
    return _field(b"\x4a", _field(b"\x0a", name.encode()) + _field(b"\x12", told))


def _state(state: TraceState) -> bytes:
    return _field(b"\x1a", ",".join([f"{key}={value}" for key, value in state.items()]).encode())


def _field(tag: bytes, data: bytes) -> bytes:
    return b"%b%b%b" % (tag, _number(len(data)), data)


def _number(number: int) -> bytes:
    if number < 0x80:
        return bytes((number,))
    if number < 0x4000:
        return bytes((number & 0x7F | 0x80, number >> 7))
    more = bytearray()
    while number >= 0x80:
        more.append(number & 0x7F | 0x80)
        number >>= 7
    more.append(number)
    return bytes(more)
