"""What the command line's processes are watched by beside their log, as the settings want it: traces and metrics."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from paigeant.errors import ConfigurationError
from paigeant.extras import how_to_install

if TYPE_CHECKING:
    from paigeant.loading import Handlers
    from paigeant.monitor import Monitor
    from paigeant.observer import Observer
    from paigeant.observers.logs.lines import Destination
    from paigeant.observers.metrics import MetricsObserver
    from paigeant.settings import Settings
    from paigeant.worker import ActivityWorker

__all__ = ["NEEDS", "Sight", "need", "observing"]

NEEDS = {
    "traces": ("opentelemetry.sdk", "otel"),
    "otel_metrics": ("opentelemetry.sdk", "otel"),
    "metrics_port": ("prometheus_client", "metrics"),
}
"""Settings with the module that each needs once it is on, and the extra that brings it."""


@dataclass(slots=True)
class Sight:
    """The observers of a process, and what shows the metrics of its worker."""

    settings: Settings
    observers: list[Observer] = field(default_factory=list)
    metrics: MetricsObserver | None = None
    _monitor: Monitor | None = None

    @contextlib.asynccontextmanager
    async def of(self, worker: ActivityWorker) -> AsyncIterator[None]:
        """Tell how `worker` is, for as long as it works. Raises ConfigurationError when the port can't be had."""
        if self.metrics is None:
            yield
            return
        from paigeant.monitor import Monitor

        host, port = self.settings.metrics_host, self.settings.metrics_port
        async with Monitor(worker, self.metrics, host=host, port=port) as self._monitor:
            yield

    def tell_lost(self, destinations: Iterable[Destination]) -> None:
        """Have the metrics tell how many lines these could not write."""
        metrics = self.metrics
        if metrics is None:
            return
        for each in destinations:
            metrics.show("paigeant_log_lines_lost_total", each.place, count=partial(getattr, each, "lost"))

    def waits(self, why: str | None) -> None:
        """Tell that the worker waits for its store or transport before it begins; None: not any more."""
        if self._monitor is not None:
            self._monitor.waits_for = why


@contextlib.contextmanager
def observing(settings: Settings, handlers: Handlers | None, *, works: bool = True) -> Iterator[Sight]:
    """What the settings want this process to be watched by; all is sent at the end. `works`: it has a worker.

    Raises ConfigurationError when an extra is missing.
    """
    sight = Sight(settings)
    ends: list[Callable[[], None]] = []
    spans = None
    try:
        if settings.traces:
            need("traces")
            from paigeant.observers.traces import TraceObserver
            from paigeant.redaction import Redactor

            with _set_up("traces"):
                from paigeant.observers.otlp import send_traces

                # Whoever calls a command waits for its end; a worker has the time.
                provider, end = send_traces(patience=None if works else 2.0, redactor=Redactor(settings.urls))
            ends.append(end)
            spans = getattr(provider, "processor", None)  # none of ours where handlers have set up a provider
            sight.observers.append(TraceObserver(provider))
            _watch_agents()
        if works and (settings.metrics_port is not None or settings.otel_metrics):
            sight.metrics = _metrics(settings, handlers)
            sight.observers.append(sight.metrics)
            if spans is not None:
                sight.metrics.show("paigeant_spans_lost_total", count=partial(getattr, spans, "lost"))
        if works and settings.metrics_port is not None:
            need("metrics_port")
        if works and settings.otel_metrics and sight.metrics is not None:
            need("otel_metrics")
            from opentelemetry.metrics import get_meter

            with _set_up("otel_metrics"):
                from paigeant.observers.otlp import send_metrics

                ends.append(send_metrics())
            sight.metrics.meter(get_meter("paigeant"))
        yield sight
    finally:
        # At once: each may wait for a collector that is away.
        ending = [threading.Thread(target=end, name="paigeant-sight") for end in ends]
        for thread in ending:
            thread.start()
        for thread in ending:
            thread.join()


def _metrics(settings: Settings, handlers: Handlers | None) -> MetricsObserver:
    from paigeant.activity import ActivityRegistry
    from paigeant.observers.metrics import MetricsObserver
    from paigeant.waits import WAITS

    registries = [WAITS] if handlers is None else [handlers.activities, WAITS]
    known = ActivityRegistry.merged(registries)
    workflows = [
        *settings.defined_workflows(),
        *(each.name for each in (handlers.workflows if handlers else ())),
    ]
    topics = {known.get(name).topic for name in known} | set(known)
    return MetricsObserver(activities=set(known), workflows=workflows, topics=topics)


def _watch_agents() -> None:
    """Have agents make spans of their own, without what is said in them, unless the handlers have decided on that."""
    if "pydantic_ai" not in sys.modules:
        return
    from pydantic_ai import Agent, InstrumentationSettings

    if not Agent._instrument_default:
        Agent.instrument_all(InstrumentationSettings(include_content=False))


@contextlib.contextmanager
def _set_up(setting: str) -> Iterator[None]:
    """What the library says of an `OTEL_*` variable that it can't use, some of which it reads when it is imported."""
    try:
        yield
    except ValueError as exc:
        said = " ".join(str(exc).split()).rstrip(".")
        raise ConfigurationError(
            f"the setting `{setting}` can't be followed: {said}; see the OTEL_* variables of the environment"
        ) from exc


def need(setting: str) -> None:
    """Raise ConfigurationError, with what installs it, unless the module is there that `setting` needs."""
    module, extra = NEEDS[setting]
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # not even the package that it is in
        found = None
    if found is None:
        raise ConfigurationError(
            f"the setting `{setting}` needs {module}, which isn't installed: {how_to_install(extra)}"
        )
