"""What happens to runs as numbers, for Prometheus and for OpenTelemetry. Counting costs a few additions a step.

The numbers are kept here; a library is only needed to show them: the extra `metrics` for Prometheus' formats, a meter
provider for OpenTelemetry. What the store and the broker must be asked for is asked when somebody looks.

Labels are bounded: activities, workflows and topics that this process knows, and `other` for all else. Whoever writes
to a broker chooses the names in messages. Of reasons and models the first few that come are told apart.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from paigeant.observer import Event, EventName
from paigeant.slip import RUN_ENDED

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, Meter, Observation


__all__ = ["FAMILIES", "Backlog", "Family", "MetricsObserver", "TopicBacklog"]

OTHER = "other"
_REASON = re.compile(r"[a-z][a-z0-9_]{0,39}")
_MOST_REASONS = 50
_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,99}")
_MOST_MODELS = 20
BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 3600.0),
)
"""Upper bounds in seconds: from a step that only passes something on to one in which an agent works for an hour."""


class Family(NamedTuple):
    """A metric by its Prometheus name, what it counts, and by what it is told apart."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    help: str


FAMILIES = (
    Family("paigeant_deliveries_total", "counter", ("outcome",), "messages delivered to this worker"),
    Family("paigeant_rejections_total", "counter", ("reason",), "messages that became dead letters"),
    Family("paigeant_steps_total", "counter", ("activity", "outcome"), "attempts that ended"),
    Family("paigeant_step_seconds", "histogram", ("activity",), "from the claim of a step to its record"),
    Family(
        "paigeant_queue_seconds", "histogram", ("activity",), "from the instant a step was due to its claim"
    ),
    Family("paigeant_leases_lost_total", "counter", ("activity",), "steps taken from this worker at work"),
    Family("paigeant_steps_released_total", "counter", (), "steps given back at a shutdown"),
    Family("paigeant_steps_swept_total", "counter", (), "steps freed from workers that were gone"),
    Family("paigeant_workers_lost_total", "counter", (), "workers found gone"),
    Family("paigeant_runs_dispatched_total", "counter", ("workflow",), "runs started by this process"),
    Family("paigeant_runs_adopted_total", "counter", ("workflow",), "runs taken over from their messages"),
    Family("paigeant_runs_ended_total", "counter", ("workflow", "status"), "runs whose end came here"),
    Family("paigeant_runs_expired_total", "counter", (), "runs turned round at their deadline"),
    Family(
        "paigeant_agent_requests_total", "counter", ("activity", "model"), "model requests of recorded steps"
    ),
    Family("paigeant_agent_tool_calls_total", "counter", ("activity",), "tool calls of recorded steps"),
    Family(
        "paigeant_agent_tokens_total", "counter", ("activity", "model", "type"), "tokens of recorded steps"
    ),
    Family(
        "paigeant_agent_cost_dollars_total", "counter", ("activity", "model"), "known cost of recorded steps"
    ),
    Family("paigeant_log_lines_lost_total", "counter", ("log",), "log lines that could not be written"),
    Family("paigeant_spans_lost_total", "counter", (), "spans that could not be sent"),
    Family("paigeant_worker_ready", "gauge", (), "1 while this worker takes messages"),
    Family("paigeant_steps_running", "gauge", (), "steps this worker does now"),
    Family("paigeant_concurrency", "gauge", (), "steps this worker does at once at most"),
    Family("paigeant_topic_steps", "gauge", ("topic", "state"), "open steps of the store"),
    Family("paigeant_topic_oldest_seconds", "gauge", ("topic",), "how long the first ready step has waited"),
    Family("paigeant_topic_messages", "gauge", ("topic", "state"), "messages of the transport"),
    Family("paigeant_dead_letters", "gauge", (), "dead letters that are kept"),
    Family("paigeant_expired_lease_seconds", "gauge", (), "how long ago the oldest expired lease ended"),
    Family("paigeant_backlog_up", "gauge", ("of",), "1 when the store, or the transport, could be asked"),
)
"""All metrics, in the order in which they are shown."""


@dataclass(frozen=True, slots=True)
class TopicBacklog:
    """What is open in a topic: steps of the store by their state, and messages of the transport by theirs."""

    steps: Mapping[str, int] = field(default_factory=dict)
    messages: Mapping[str, int] = field(default_factory=dict)
    oldest: float | None = None


@dataclass(frozen=True, slots=True)
class Backlog:
    """What is true now of a worker, its store and its transport. None where it couldn't be asked for."""

    ready: bool
    running: int
    concurrency: int
    topics: Mapping[str, TopicBacklog] = field(default_factory=dict)
    dead_letters: int | None = None
    expired_lease: float | None = None
    up: Mapping[str, bool] = field(default_factory=dict)


class _Histogram:
    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.total += seconds


class _Taken(NamedTuple):
    """What was taken of models, in the numbers that are told apart by model."""

    requests: int
    input_tokens: int
    output_tokens: int
    cost: Decimal

    @classmethod
    def of(cls, usage: Mapping[str, Any]) -> _Taken:
        """Those of a recorded usage, in which nothing is left out but a cost that isn't known."""
        requests, read, written = (usage.get(name, 0) for name in cls._fields[:3])
        return cls(requests, read, written, Decimal(usage.get("cost") or 0))

    def without(self, other: _Taken) -> _Taken:
        """What is left when a part is taken out."""
        return _Taken(
            self.requests - other.requests,
            self.input_tokens - other.input_tokens,
            self.output_tokens - other.output_tokens,
            self.cost - other.cost,
        )


Labels = tuple[str, ...]

_OUTCOMES = ("completed", "skipped", "retrying", "waiting", "failed", "compensated", "compensation_failed")
_STEP_OUTCOMES = {f"step.{outcome}": outcome for outcome in _OUTCOMES}
_ENDS = frozenset(status.value for status in RUN_ENDED)
_NOT_COUNTED = frozenset({"step.started", "run.cancelling", "run.retried"})
_WANTED = frozenset(
    name
    for name in get_args(EventName)
    if name == "worker.lost" or (name.startswith(("run.", "delivery.", "step.")) and name not in _NOT_COUNTED)
)


class MetricsObserver:
    """Counts what happens in this process. `activities`, `workflows` and `topics` are the names that may be labels.

    `backlog` is asked for what is true now whenever the metrics are shown; None leaves the gauges out.
    """

    def __init__(
        self,
        *,
        activities: Collection[str] = (),
        workflows: Collection[str] = (),
        topics: Collection[str] = (),
    ) -> None:
        self.activities = frozenset(activities)
        self.workflows = frozenset(workflows)
        self.topics = frozenset(topics)
        self.wants = _WANTED
        self.backlog: Callable[[], Backlog | None] = lambda: None
        self._counts: dict[str, defaultdict[Labels, float]] = {
            family.name: defaultdict(float) for family in FAMILIES if family.kind == "counter"
        }
        self._others: dict[str, dict[Labels, Callable[[], int]]] = {}
        self._times: dict[str, defaultdict[str, _Histogram]] = {
            family.name: defaultdict(_Histogram) for family in FAMILIES if family.kind == "histogram"
        }
        self._steps = self._counts["paigeant_steps_total"]
        self._deliveries = self._counts["paigeant_deliveries_total"]
        # What has begun at 0 can be seen to rise: to Prometheus a series that begins with 1 hasn't, so the one failed
        # undo of a worker's life would raise no alert.
        for outcome in ("claimed", "duplicate", "rejected", "returned"):
            self._deliveries[(outcome,)] = 0
        for activity in self.activities:
            self._counts["paigeant_leases_lost_total"][(activity,)] = 0
            for outcome in _OUTCOMES:
                self._steps[activity, outcome] = 0
        for workflow in (*self.workflows, OTHER):
            for status in _ENDS:
                self._counts["paigeant_runs_ended_total"][workflow, status] = 0
        self._step_times = self._times["paigeant_step_seconds"]
        self._queue_times = self._times["paigeant_queue_seconds"]
        self._models: set[str] = set()
        self._record: Callable[[str, float, str], None] | None = None

    def observe(self, event: Event) -> None:
        """Count `event`."""
        name = event.name
        if name in _STEP_OUTCOMES:  # first, for it is each step's
            self._ended(event, _STEP_OUTCOMES[name])
            return
        what, _, how = name.partition(".")
        if what == "step":
            self._step(event, how)
        elif what == "delivery":
            self._delivery(event, how)
        elif what == "run":
            self._run(event, how)
        elif name == "worker.lost":
            self._add("paigeant_workers_lost_total")

    def _ended(self, event: Event, outcome: str) -> None:
        activity, seconds, more = event.activity, event.seconds, event.more
        if activity not in self.activities:
            activity = OTHER
        self._steps[activity, outcome] += 1
        if seconds is not None:
            self._step_times[activity].add(seconds)
            if self._record is not None:
                self._record("paigeant_step_seconds", seconds, activity)
        if "usage" in more:
            self._used(activity, more["usage"])

    def _step(self, event: Event, how: str) -> None:
        if how == "swept":
            self._add("paigeant_steps_swept_total")
        elif how == "released":
            self._add("paigeant_steps_released_total")
        elif how == "lost":
            activity = event.activity if event.activity in self.activities else OTHER
            self._add("paigeant_leases_lost_total", activity)

    def _delivery(self, event: Event, how: str) -> None:
        self._deliveries[(how,)] += 1
        if how == "claimed":
            activity = event.activity if event.activity in self.activities else OTHER
            self._queue_times[activity].add(event.seconds or 0.0)
            if self._record is not None:
                self._record("paigeant_queue_seconds", event.seconds or 0.0, activity)
        elif how == "rejected":
            self._add("paigeant_rejections_total", self._reason(event.more.get("reason")))

    def _run(self, event: Event, how: str) -> None:
        workflow = event.workflow if event.workflow in self.workflows else OTHER
        if how in ("dispatched", "adopted"):
            self._add(f"paigeant_runs_{how}_total", workflow)
        elif how == "expired":
            self._add("paigeant_runs_expired_total")
        elif how in _ENDS:
            self._add("paigeant_runs_ended_total", workflow, how)

    def _used(self, activity: str, usage: Mapping[str, Any]) -> None:
        """The usage is that of all attempts of a step together, and comes with its last one alone."""
        self._add("paigeant_agent_tool_calls_total", activity, by=usage.get("tool_calls", 0))
        rest = _Taken.of(usage)
        for name, one in usage.get("models", {}).items():
            taken = _Taken.of(one)
            self._took(activity, self._model(name), taken)
            rest = rest.without(taken)
        if any(rest):
            self._took(activity, OTHER, rest)

    def _took(self, activity: str, model: str, taken: _Taken) -> None:
        self._add("paigeant_agent_requests_total", activity, model, by=taken.requests)
        self._add("paigeant_agent_tokens_total", activity, model, "input", by=taken.input_tokens)
        self._add("paigeant_agent_tokens_total", activity, model, "output", by=taken.output_tokens)
        if taken.cost:
            self._add("paigeant_agent_cost_dollars_total", activity, model, by=float(taken.cost))

    def _model(self, name: str) -> str:
        """The model as a label. Whoever answers says what it is called, so only the first few names are told apart."""
        if name not in self._models and len(self._models) < _MOST_MODELS and _MODEL.fullmatch(name):
            self._models.add(name)
        return name if name in self._models else OTHER

    def _add(self, name: str, *labels: str, by: float = 1) -> None:
        self._counts[name][labels] += by

    def _reason(self, reason: object) -> str:
        known = self._counts["paigeant_rejections_total"]
        if not isinstance(reason, str) or not _REASON.fullmatch(reason):
            return OTHER
        return reason if (reason,) in known or len(known) < _MOST_REASONS else OTHER

    # -- showing

    def show(self, name: str, *labels: str, count: Callable[[], int]) -> None:
        """Show what `count` gives, which never falls, as the counter `name` with these labels: others count it."""
        self._others.setdefault(name, {})[labels] = count

    def values(self, name: str, backlog: Backlog | None) -> list[tuple[Labels, float]]:
        """The values of a counter or gauge, with their labels."""
        if name in self._counts:
            found = dict(self._counts[name])  # a copy: another thread shows what this one counts
            found.update((labels, count()) for labels, count in self._others.get(name, {}).items())
            is_single = not next(family.labels for family in FAMILIES if family.name == name)
            return [((), found.get((), 0.0))] if is_single else list(found.items())
        return [] if backlog is None else list(self._gauge(name, backlog))

    def _gauge(self, name: str, backlog: Backlog) -> Iterator[tuple[Labels, float]]:
        match name:
            case "paigeant_worker_ready":
                yield (), float(backlog.ready)
            case "paigeant_steps_running":
                yield (), backlog.running
            case "paigeant_concurrency":
                yield (), backlog.concurrency
            case "paigeant_dead_letters" if backlog.dead_letters is not None:
                yield (), backlog.dead_letters
            case "paigeant_expired_lease_seconds" if backlog.expired_lease is not None:
                yield (), backlog.expired_lease
            case "paigeant_backlog_up":
                yield from (((of,), float(is_up)) for of, is_up in backlog.up.items())
            case "paigeant_topic_steps":
                yield from self._by_topic(backlog, lambda topic: topic.steps)
            case "paigeant_topic_messages":
                yield from self._by_topic(backlog, lambda topic: topic.messages)
            case "paigeant_topic_oldest_seconds":
                oldest: dict[Labels, float] = {}
                for place, topic in backlog.topics.items():
                    if topic.oldest is not None:
                        key = (self._topic(place),)
                        oldest[key] = max(oldest.get(key, 0.0), topic.oldest)
                yield from oldest.items()

    def _by_topic(
        self, backlog: Backlog, part: Callable[[TopicBacklog], Mapping[str, int]]
    ) -> Iterable[tuple[Labels, float]]:
        found: defaultdict[Labels, float] = defaultdict(float)
        for name, topic in backlog.topics.items():
            for state, count in part(topic).items():
                found[self._topic(name), state] += count
        return found.items()

    def _topic(self, name: str) -> str:
        return name if name in self.topics else OTHER

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """All metrics in the newest of Prometheus' formats that `accept` names, and its content type."""
        from prometheus_client import CollectorRegistry
        from prometheus_client.exposition import choose_encoder

        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        encode, content_type = choose_encoder(accept)
        return encode(registry), content_type

    def collect(self) -> Iterator[Any]:
        """All metrics as the Prometheus library has them."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        backlog = self.backlog()
        for family in FAMILIES:
            if family.kind == "histogram":
                times = HistogramMetricFamily(family.name, family.help, labels=family.labels)
                for label, histogram in dict(self._times[family.name]).items():
                    times.add_metric((label,), *_cumulative(histogram))
                yield times
                continue
            made = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
            metric = made(family.name, family.help, labels=family.labels)
            for labels, value in self.values(family.name, backlog):
                metric.add_metric(labels, value)
            yield metric

    def meter(self, meter: Meter) -> None:
        """Show the same numbers through OpenTelemetry's metrics from now on, with dots in their names."""
        times = {}
        for family in FAMILIES:
            name = family.name.removesuffix("_total").replace("paigeant_", "paigeant.", 1)
            if family.kind == "histogram":
                name = name.removesuffix("_seconds") + ".duration"
                times[family.name] = meter.create_histogram(
                    name, "s", family.help, explicit_bucket_boundaries_advisory=list(BUCKETS)
                )
                continue
            make = (
                meter.create_observable_counter if family.kind == "counter" else meter.create_observable_gauge
            )
            make(name, [self._observed(family)], description=family.help)

        def record(name: str, seconds: float, activity: str) -> None:
            times[name].record(seconds, {"activity": activity})

        self._record = record

    def _observed(self, family: Family) -> Callable[[CallbackOptions], Iterable[Observation]]:
        from opentelemetry.metrics import Observation

        def observed(_: CallbackOptions) -> Iterable[Observation]:
            backlog = self.backlog() if family.kind == "gauge" else None
            return [
                Observation(value, dict(zip(family.labels, labels, strict=True)))
                for labels, value in self.values(family.name, backlog)
            ]

        return observed


def _cumulative(histogram: _Histogram) -> tuple[list[tuple[str, float]], float]:
    """The buckets as Prometheus wants them, each with all below it, and the sum."""
    counts, total = list(histogram.counts), histogram.total
    buckets, so_far = [], 0
    for bound, count in zip((*map(str, BUCKETS), "+Inf"), counts, strict=True):
        so_far += count
        buckets.append((bound, float(so_far)))
    return buckets, total
