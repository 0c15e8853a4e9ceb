"""Ended spans on their way to an exporter: gathered, whole, and without what is secret.

What is `Written` is all of that from the beginning.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from typing import Any, cast

from opentelemetry.context import _SUPPRESS_INSTRUMENTATION_KEY, attach, detach, set_value
from opentelemetry.sdk.trace import Event, ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import Link, Status
from opentelemetry.util.types import AnyValue, Attributes

from paigeant.codec import storable
from paigeant.host import at_fork
from paigeant.observers.otlp.spans import QuickSpan
from paigeant.observers.otlp.written import Written, together
from paigeant.redaction import Redactor, is_secret

__all__ = ["RedactedSpans", "SpanQueue", "WholeTraces"]

log = logging.getLogger("paigeant.traces")

_MOST_HELD = 10_000

Ended = ReadableSpan | Written


class WholeTraces(SpanExporter):
    """Hands spans on to another exporter, each behind the one it hangs under.

    Spans end from the inside out: what an agent has done goes out long before the span of its step. Were the process
    killed in between, they would hang in the air for good. So a span waits here for its parent of this process; the
    parent in another one, such as the dispatch, has ended before. At most 10,000 wait: beyond, the oldest go. This is
    the exporter's thread, not that of the work.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter: Any = exporter
        self._held: dict[int, list[ReadableSpan]] = {}
        self._waiting = 0
        self._gone: dict[int, None] = {}
        self._last = SpanExportResult.SUCCESS
        at_fork(self._forget)

    def _forget(self) -> None:
        """What waits here in a process that was forked off is its parent's, who hands it on."""
        self._held.clear()
        self._waiting = 0

    def export(self, spans: Sequence[Ended]) -> SpanExportResult:
        """Hand on what is whole."""
        ready: list[Ended] = []
        gone = self._gone
        for span in spans:
            if isinstance(span, Written):
                ready.append(span)
                for each in span.above:
                    self._go(each, ready)
                continue
            above = span.parent
            if above is None or above.is_remote or above.span_id in gone:
                self._release(span, ready)
            else:
                self._held.setdefault(above.span_id, []).append(span)
                self._waiting += 1
        while self._waiting > _MOST_HELD:
            oldest = self._held.pop(next(iter(self._held)))
            self._waiting -= len(oldest)
            for span in oldest:
                self._release(span, ready)
        if len(gone) > 2 * _MOST_HELD:
            for known in list(islice(gone, len(gone) - _MOST_HELD)):
                del gone[known]
        if ready:
            self._last = self._exporter.export(ready)
        return self._last if ready else SpanExportResult.SUCCESS

    def _release(self, span: ReadableSpan, ready: list[Ended]) -> None:
        ready.append(span)
        self._go(_id_of(span), ready)

    def _go(self, id: int, ready: list[Ended]) -> None:
        """The span of this id goes out: what has waited for it follows."""
        self._gone[id] = None
        if id in self._held:
            below = self._held.pop(id)
            self._waiting -= len(below)
            for each in below:
                self._release(each, ready)

    def shutdown(self) -> None:
        """Hand on what is left: the process ends in good order, and nothing else will come.

        Not to a collector that is away: the end would be held up for as long as another try takes.
        """
        left = [span for spans in self._held.values() for span in spans]
        self._held.clear()
        self._waiting = 0
        if left and self._last is not SpanExportResult.FAILURE:
            self._exporter.export(left)
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Hand on what the exporter itself keeps; what waits for its parent goes on waiting."""
        return bool(self._exporter.force_flush(timeout_millis))


def _id_of(span: ReadableSpan) -> int:
    if isinstance(span, QuickSpan):
        return span.id
    return span.context.span_id if span.context is not None else 0


class RedactedSpans(SpanExporter):
    """Hands spans on to another exporter, with stars for what is secret in what they say, and all of it writable.

    A span that an activity makes itself has the texts of its exceptions, and what its libraries say. Spans in which
    nothing looks like a secret are handed on as they are. This, too, is the exporter's thread.
    """

    def __init__(self, exporter: SpanExporter, redactor: Redactor | None = None) -> None:
        self._exporter: Any = exporter
        self._redactor = redactor or Redactor()
        self._changes_name = lru_cache(maxsize=1024)(self._changes)

    def export(self, spans: Sequence[Ended]) -> SpanExportResult:
        """Hand them on."""
        result: SpanExportResult = self._exporter.export([self._looked_at(span) for span in spans])
        return result

    def write(self, spans: Sequence[QuickSpan]) -> Sequence[Ended]:
        """The spans as they are handed on: what needn't be looked at is written already."""
        return together(spans, self._changes_name)

    def shutdown(self) -> None:
        """Nothing is kept here."""
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Hand on what the exporter itself keeps."""
        return bool(self._exporter.force_flush(timeout_millis))

    def _looked_at(self, span: Ended) -> Ended:
        return span if isinstance(span, Written) or not self._is_changed(span) else self._shown(span)

    def _shown(self, span: ReadableSpan) -> ReadableSpan:
        text, status = self._text, span.status
        return ReadableSpan(
            text(span.name),
            span.context,
            span.parent,
            span.resource,
            self._attributes(span.attributes),
            [
                Event(text(event.name), self._attributes(event.attributes), event.timestamp)
                for event in span.events
            ],
            [Link(link.context, self._attributes(link.attributes)) for link in span.links],
            span.kind,
            status=Status(status.status_code, text(status.description)) if status.description else status,
            start_time=span.start_time,
            end_time=span.end_time,
            instrumentation_scope=span.instrumentation_scope,
        )

    def _text(self, text: str) -> str:
        return storable(self._redactor.text(text))

    def _is_changed(self, span: ReadableSpan) -> bool:
        # As most are: of a run, or a step. As in log lines, its ids and names hold no secrets.
        if isinstance(span, QuickSpan) and span.is_as_made:
            return self._changes_name(span.name)
        said = [span.name]
        if span.status.description:
            said.append(span.status.description)
        told = [span.attributes]
        for event in span.events:
            said.append(event.name)
            told.append(event.attributes)
        told += [link.attributes for link in span.links]
        for attributes in told:
            for name, value in (attributes or {}).items():
                if _is_secret(name):
                    return True
                if not isinstance(value, (int, float)):
                    said.append(str(value))
        return self._changes("\n".join(said))

    def _changes(self, text: str) -> bool:
        """Whether `text` is shown as another one."""
        return self._redactor.may_hide(text) or not _is_whole(text)

    def _attributes(self, attributes: Attributes) -> dict[str, AnyValue]:
        return {name: self._value(name, value) for name, value in (attributes or {}).items()}

    def _value(self, name: str, value: AnyValue) -> AnyValue:
        shown: AnyValue = self._redactor.value(name, value)
        if shown == repr(value):  # what is no text, and hides nothing, stays what it is
            return value
        return storable(shown) if isinstance(shown, str) else shown


def _is_whole(text: str) -> bool:
    """Whether there is no half of a surrogate pair in it, as in the name of a file that isn't in UTF-8.

    A name or status with one can't be written, and the exporter then fails with the whole batch.
    """
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_is_secret = lru_cache(maxsize=1024)(is_secret)
"""As `is_secret`, of the names of attributes, of which there are few."""


class SpanQueue(SpanProcessor):
    """Ended spans on their way to `exporter`, in batches, by a thread of its own.

    What the library's BatchSpanProcessor is, under the same `OTEL_BSP_*` variables, for a sixth of what that costs the
    one who ends a span. While the exporter can't keep up, spans beyond the bound are lost, and a warning says how many.
    `write` gives what spans of ours are exported as, which is asked when so many of them have ended.
    """

    def __init__(
        self, exporter: SpanExporter, write: Callable[[Sequence[QuickSpan]], Sequence[Ended]] | None = None
    ) -> None:
        self._exporter: Any = exporter
        self._write = write
        self._most = _setting("OTEL_BSP_MAX_QUEUE_SIZE", 8192)
        self._batch = min(_setting("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 512), self._most)
        self._together = min(_TOGETHER, self._batch)
        # Each time it is woken this thread may drive the one that works from its processor, and so from what that has
        # at hand: seldom, then, and to several batches; but before the next piece of written ones finds no room.
        self._many = min(max(self._batch, self._most // 2), self._most - self._together + 1)
        self._delay = _setting("OTEL_BSP_SCHEDULE_DELAY", 5000) / 1000
        self._written: deque[Written] = deque()
        self._spans: deque[ReadableSpan] = deque()
        self._unwritten: deque[QuickSpan] = deque()
        self.lost = self._told = 0
        """Spans that were lost in all, and how many of them were told of."""
        self._begin()
        at_fork(self._begin)

    def _begin(self) -> None:
        """Start anew, in this process: one that was forked off has no thread, and its parent's spans aren't its own."""
        for waiting in (self._written, self._spans, self._unwritten):
            waiting.clear()
        self._exporting = threading.Lock()
        self._enough = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="paigeant-spans", daemon=True)
        self._thread.start()

    def on_end(self, span: ReadableSpan) -> None:
        """Take a span; never waits."""
        if self._closed:
            self.lost += 1
        elif not isinstance(span, QuickSpan):
            if span.context and span.context.trace_flags.sampled:
                self._keep(span, 1)
        elif self._write is None:
            self._keep(span, 1)
        else:
            self._unwritten.append(span)
            if len(self._unwritten) >= self._together:
                self._write_all(self._write)

    def _write_all(self, write: Callable[[Sequence[QuickSpan]], Sequence[Ended]]) -> None:
        while self._unwritten:
            spans: list[QuickSpan] = []
            with suppress(IndexError):  # another thread writes the last one
                while len(spans) < self._together:
                    spans.append(self._unwritten.popleft())
            for each in write(spans) if spans else ():
                self._keep(each, each.many if isinstance(each, Written) else 1)

    def _keep(self, ended: Ended, many: int) -> None:
        waiting = self._waiting() + many
        if waiting > self._most:
            self.lost += many
        elif isinstance(ended, Written):
            self._written.append(ended)
        else:
            self._spans.append(ended)
        if waiting >= self._many and not self._enough.is_set():
            self._enough.set()

    def _waiting(self) -> int:
        return len(self._spans) + sum(each.many for each in tuple(self._written))

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Export all that has ended; whether the exporter has handed on what it keeps."""
        self._export(least=1)
        return bool(self._exporter.force_flush(timeout_millis))

    def shutdown(self) -> None:
        """Export all that has ended, and take no more."""
        if not self._closed:
            self._closed = True
            self._enough.set()
            self._thread.join(_LAST_SECONDS)
            self._exporter.shutdown()

    def _run(self) -> None:
        while not self._closed:
            is_enough = self._enough.wait(self._delay)
            self._enough.clear()
            try:
                self._export(least=min(self._batch, self._many) if is_enough and not self._closed else 1)
            except Exception:  # whatever a span is, others come
                log.exception("spans can't be written")
        self._export(least=1)

    def _export(self, *, least: int) -> None:
        """Export for as long as so many are there."""
        with self._exporting:
            if self._write is not None:
                self._write_all(self._write)
            while True:
                count, batch = self._taken(least)
                if not batch:
                    break
                if self._exported(batch):
                    continue
                self.lost += count
                if self._closed:
                    # The process is to end, and each try may take as long as the exporter is patient.
                    while batch:
                        count, batch = self._taken(1)
                        self.lost += count
            if lost := self.lost - self._told:
                self._told += lost
                log.warning("%d spans were lost; expected an exporter that keeps up", lost)

    def _taken(self, least: int) -> tuple[int, list[Ended]]:
        """A batch, and how many spans that is; an empty one where there are fewer than `least`."""
        count, batch = 0, list[Ended]()
        if self._waiting() >= least:
            while self._written and count + self._written[0].many <= self._batch:
                batch.append(self._written.popleft())
                count += cast(Written, batch[-1]).many
            while self._spans and count < self._batch:
                batch.append(self._spans.popleft())
                count += 1
        return count, batch

    def _exported(self, batch: list[Ended]) -> bool:
        token = attach(set_value(_SUPPRESS_INSTRUMENTATION_KEY, True))  # no spans of the sending
        try:
            return self._exporter.export(batch) is not SpanExportResult.FAILURE
        except Exception:  # whatever it is, the spans to come are worth another try
            log.exception("spans can't be exported")
            return False
        finally:
            detach(token)


_TOGETHER = 64
"""Spans that are written one after the other: each by itself takes four times as long, between all that a step does."""

_LAST_SECONDS = 30.0
"""How long the end waits for an exporter that takes what there is."""


def _setting(name: str, default: int) -> int:
    """A whole number above 0 from the environment. Nobody waits longer than 2^31 ms; Python couldn't for ever."""
    text = os.environ.get(name, "").strip()
    if text.isascii() and text.isdigit() and len(text) <= 10 and 0 < int(text) < 2**31:
        return int(text)
    if text:
        log.warning(
            "%s is %r; expected a whole number above 0 and below 2^31, so %d holds", name, text[:40], default
        )
    return default
