"""The dashboard and the alert rules in `deploy/` against the metrics that there are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from paigeant.observers.metrics import FAMILIES, MetricsObserver

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
RULES = yaml.safe_load((DEPLOY / "prometheus-rules.yml").read_text())

SAMPLES = {
    f"{family.name}{ending}": family.labels
    for family in FAMILIES
    for ending in (("_bucket", "_sum", "_count") if family.kind == "histogram" else ("",))
}
SCRAPED = {"job", "instance", "le"}
"""Labels that Prometheus adds."""


def expressions() -> Iterator[Any]:
    """Every query of the dashboard and of the rules, with what it is for."""
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            yield pytest.param(target["expr"], id=panel["title"])
    for group in RULES["groups"]:
        for rule in group["rules"]:
            yield pytest.param(rule["expr"], id=rule["alert"])


@pytest.mark.parametrize("expression", list(expressions()))
def test_a_query_names_metrics_and_labels_that_exist(expression: str) -> None:
    """Each metric is one that a worker serves, each label one that it has, and what is opened is closed."""
    names = re.findall(r"\bpaigeant_\w+", expression)
    assert names
    assert set(names) <= set(SAMPLES)
    labels = {label for name in names for label in SAMPLES[name]} | SCRAPED
    asked = re.findall(r"(\w+)\s*(?:=~|!=|!~|=)\s*\"", expression)
    for listed in re.findall(r"\bby \(([^)]*)\)", expression):
        asked += [label.strip() for label in listed.split(",")]
    assert set(asked) <= labels
    for opened, closed in ("()", "{}", "[]"):
        assert expression.count(opened) == expression.count(closed)


def test_what_is_added_up_is_there_from_the_first_look_on() -> None:
    """A sum of what nobody has counted yet is nothing, and nothing added to anything is nothing: no alert, ever."""
    shown = MetricsObserver(activities=["a"]).exposition()[0].decode()
    added = [rule["expr"] for group in RULES["groups"] for rule in group["rules"] if "+ sum" in rule["expr"]]
    assert added
    for name in re.findall(r"\bpaigeant_\w+", " ".join(added)):
        assert re.search(rf"^{name}(\{{.*\}})? 0\.0$", shown, flags=re.MULTILINE)


def test_rules_have_what_prometheus_and_people_need() -> None:
    """Each alert has a name of its own, how bad it is, and texts whose labels are those of its query."""
    assert set(RULES) == {"groups"}
    rules = [rule for group in RULES["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert re.fullmatch(r"Paigeant[A-Za-z]+", rule["alert"])
        assert re.fullmatch(r"\d+[smh]", rule.get("for", "0s"))
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}
        for label in re.findall(r"\$labels\.(\w+)", str(rule["annotations"])):
            assert label in rule["expr"]


def test_the_dashboard_can_be_imported() -> None:
    """Its panels have ids of their own and don't overlap, and ask the data source that is chosen at import."""
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert {target["datasource"]["uid"] for panel in panels for target in panel["targets"]} == {
        "${datasource}"
    }
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == ["datasource", "job"]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (place["x"] + right, place["y"] + down)
            for right in range(place["w"])
            for down in range(place["h"])
        }
        assert not cells & taken
        taken |= cells
