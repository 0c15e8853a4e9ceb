"""Metrics: what events count as, how labels are bounded, and that both libraries show the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client.parser import text_string_to_metric_families

from paigeant.observer import Event
from paigeant.observers.metrics import FAMILIES, Backlog, MetricsObserver, TopicBacklog

BACKLOG = Backlog(
    ready=True,
    running=3,
    concurrency=10,
    topics={
        "a": TopicBacklog({"ready": 2}, {"waiting": 1}, 5.0),
        "x": TopicBacklog({"ready": 3}, {}, 7.0),
        "y": TopicBacklog({"ready": 4}, {}, 6.0),
    },
    dead_letters=4,
    expired_lease=0.5,
    up={"store": True, "transport": False},
)
USED = {"requests": 2, "tool_calls": 1, "input_tokens": 100, "output_tokens": 7, "cost": "0.25"}


def observer() -> MetricsObserver:
    """One that knows an activity, a workflow and a topic."""
    found = MetricsObserver(activities=["a"], workflows=["w"], topics=["a"])
    found.backlog = lambda: BACKLOG
    return found


def shown(metrics: MetricsObserver) -> dict[str, dict[tuple[str, ...], float]]:
    """All samples by name and values of labels, as Prometheus reads them."""
    body, _ = metrics.exposition()
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return found


def above_0(samples: dict[tuple[str, ...], float]) -> dict[tuple[str, ...], float]:
    """Those of what has happened."""
    return {labels: value for labels, value in samples.items() if value}


def test_what_an_alert_looks_for_begins_at_0() -> None:
    """Prometheus sees no rise in a series that isn't there before: the first failed undo would raise no alert."""
    before = shown(observer())
    ends = ("completed", "failed", "compensated", "compensation_failed", "cancelled")
    assert before["paigeant_runs_ended_total"] == {(end, of): 0 for end in ends for of in ("w", "other")}
    outcomes = (*ends[:4], "skipped", "retrying", "waiting")
    assert before["paigeant_steps_total"] == {("a", outcome): 0 for outcome in outcomes}
    assert before["paigeant_leases_lost_total"] == {("a",): 0}


def test_only_the_end_of_a_run_is_one() -> None:
    """One that is to be undone, or was taken up again, goes on."""
    metrics = observer()
    for name in ("run.cancelling", "run.retried", "run.expired", "run.cancelled"):
        metrics.observe(Event(name, workflow="w"))
    assert above_0(shown(metrics)["paigeant_runs_ended_total"]) == {("cancelled", "w"): 1}


def test_every_family_is_in_the_reference() -> None:
    """The table there has each metric with its kind, labels and help, and no other."""
    text = (Path(__file__).parents[2] / "docs" / "reference.md").read_text()
    listed = re.findall(r"^\| `(paigeant_\w+)` \| (\w+) \| (.*?) \| (.*?) \|$", text, flags=re.MULTILINE)
    labels = [", ".join(f"`{label}`" for label in family.labels) or "none" for family in FAMILIES]
    assert listed == [
        (each.name, each.kind, own, each.help) for each, own in zip(FAMILIES, labels, strict=True)
    ]


def test_every_family_is_shown() -> None:
    """What the table of metrics names is there from the first scrape on, with its help."""
    body, content_type = observer().exposition()
    for family in FAMILIES:
        assert f"# HELP {family.name} {family.help}\n" in body.decode()
        assert f"# TYPE {family.name} {family.kind}\n" in body.decode()
    assert content_type.startswith("text/plain")


def test_openmetrics_is_spoken_to_those_who_ask_for_it() -> None:
    """Prometheus itself asks for the newer format."""
    body, content_type = observer().exposition("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")


def test_names_from_outside_make_no_labels() -> None:
    """However many activities, workflows, topics and reasons come, those that nobody here knows are one."""
    metrics = observer()
    for number in range(200):
        metrics.observe(Event("step.completed", activity=f"x{number}", seconds=0.1))
        metrics.observe(Event("run.completed", workflow=f"x{number}"))
        metrics.observe(Event("delivery.claimed", activity=f"x{number}", seconds=0.1))
        reason = "reason_" + "abcdefghij"[number % 10] + "abcdefghijklmnopqrst"[number // 10]
        metrics.observe(Event("delivery.rejected", more={"reason": reason}))
        metrics.observe(Event("delivery.rejected", more={"reason": f"it was {number}"}))
    found = shown(metrics)
    assert above_0(found["paigeant_steps_total"]) == {("other", "completed"): 200}
    assert above_0(found["paigeant_runs_ended_total"]) == {("completed", "other"): 200}
    assert found["paigeant_queue_seconds_count"] == {("other",): 200}
    assert len(found["paigeant_rejections_total"]) <= 51
    assert sum(found["paigeant_rejections_total"].values()) == 400
    assert found["paigeant_topic_steps"] == {("ready", "a"): 2, ("ready", "other"): 7}
    assert found["paigeant_topic_oldest_seconds"] == {("a",): 5, ("other",): 7}


def test_a_time_is_in_its_bucket_and_all_above() -> None:
    """Buckets are cumulative, and a time that is a bound belongs to it."""
    metrics = observer()
    for seconds in (0.001, 0.3, 9999.0):
        metrics.observe(Event("step.completed", activity="a", seconds=seconds))
    found = shown(metrics)
    buckets = found["paigeant_step_seconds_bucket"]
    assert [buckets["a", bound] for bound in ("0.001", "0.25", "0.5", "3600.0", "+Inf")] == [1, 1, 2, 2, 3]
    assert found["paigeant_step_seconds_count"] == {("a",): 3}
    assert found["paigeant_step_seconds_sum"] == {("a",): 9999.301}


def test_usage_is_counted_with_the_step_that_is_recorded() -> None:
    """Tokens by direction, and the cost that is known."""
    metrics = observer()
    metrics.observe(Event("step.completed", activity="a", more={"usage": USED}))
    metrics.observe(Event("step.completed", activity="a", more={"usage": {**USED, "cost": None}}))
    found = shown(metrics)
    assert found["paigeant_agent_tokens_total"] == {
        ("a", "other", "input"): 200,
        ("a", "other", "output"): 14,
    }
    assert found["paigeant_agent_requests_total"] == {("a", "other"): 4}
    assert found["paigeant_agent_cost_dollars_total"] == {("a", "other"): 0.25}


def test_usage_is_counted_by_model() -> None:
    """What each model took, and under `other` what isn't known to be anybody's; no cost is lost to rounding."""
    metrics = observer()
    models = {
        "gpt-5": {**USED, "requests": 1, "input_tokens": 60, "output_tokens": 5, "cost": "0.1"},
        "org/small:1": {**USED, "requests": 1, "input_tokens": 30, "output_tokens": 2, "cost": None},
    }
    metrics.observe(Event("step.completed", activity="a", more={"usage": {**USED, "models": models}}))
    found = shown(metrics)
    tokens = found["paigeant_agent_tokens_total"]
    assert {key[1:]: count for key, count in tokens.items() if key[2] == "input"} == {
        ("gpt-5", "input"): 60,
        ("org/small:1", "input"): 30,
        ("other", "input"): 10,
    }
    assert found["paigeant_agent_requests_total"] == {
        ("a", "gpt-5"): 1,
        ("a", "org/small:1"): 1,
        ("a", "other"): 0,
    }
    assert found["paigeant_agent_cost_dollars_total"] == {("a", "gpt-5"): 0.1, ("a", "other"): 0.15}


def test_models_are_a_bounded_set() -> None:
    """Whoever answers says what its model is called: a thousand names, or one that is no name, make no series."""
    metrics = observer()
    for name in (*(f"model-{number}" for number in range(1000)), "", "a" * 200, "two words", "x\ny"):
        usage = {**USED, "models": {name: USED}}
        metrics.observe(Event("step.completed", activity="a", more={"usage": usage}))
    found = shown(metrics)["paigeant_agent_requests_total"]
    assert len(found) == 21
    assert found["a", "model-19"] == USED["requests"]
    assert found["a", "other"] == 984 * USED["requests"]


def test_what_could_not_be_asked_is_left_out() -> None:
    """A gauge of a store that is away says nothing, instead of 0."""
    metrics = observer()
    metrics.backlog = lambda: Backlog(False, 0, 10, up={"store": False})
    found = shown(metrics)
    assert "paigeant_dead_letters" not in found
    assert found["paigeant_backlog_up"] == {("store",): 0}
    assert found["paigeant_worker_ready"] == {(): 0}


def test_what_others_count_is_shown() -> None:
    """Whatever it is whenever somebody looks, beside what is counted here."""
    metrics, lost = observer(), [0, 0]
    metrics.show("paigeant_spans_lost_total", count=lambda: lost[0])
    metrics.show("paigeant_log_lines_lost_total", "file", count=lambda: lost[1])
    for number in (0, 3):
        lost[:] = number, 2 * number
        found = shown(metrics)
        assert found["paigeant_spans_lost_total"] == {(): number}
        assert found["paigeant_log_lines_lost_total"] == {("file",): 2 * number}


def test_opentelemetry_shows_the_same() -> None:
    """Every family is an instrument with the same values and labels."""
    metrics = observer()
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    metrics.meter(provider.get_meter("paigeant"))
    metrics.observe(Event("step.completed", activity="a", seconds=0.2))
    metrics.observe(Event("delivery.claimed", activity="a", seconds=0.1))
    data: Any = reader.get_metrics_data()
    [resource] = data.resource_metrics
    [scope] = resource.scope_metrics
    points = {
        metric.name: {
            tuple(point.attributes.values()): getattr(point, "value", None) or getattr(point, "count", 0)
            for point in metric.data.data_points
        }
        for metric in scope.metrics
    }
    provider.shutdown()
    assert points["paigeant.steps"]["a", "completed"] == 1
    assert [value for value in points["paigeant.steps"].values() if value] == [1]
    assert points["paigeant.step.duration"] == points["paigeant.queue.duration"] == {("a",): 1}
    assert points["paigeant.topic_messages"] == {("a", "waiting"): 1}
    assert points["paigeant.dead_letters"] == {(): 4}
