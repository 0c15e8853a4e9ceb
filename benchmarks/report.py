"""Figures: what a benchmark gives back, how they are printed, and on which machine they were taken."""

from __future__ import annotations

import os
import platform
import sqlite3
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

__all__ = ["Figure", "as_json", "lines", "machine", "of"]


@dataclass(frozen=True, slots=True)
class Figure:
    """A measured value with the lowest and the highest of its rounds, and the bounds that it has to keep."""

    name: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    least: float | None = None
    most: float | None = None

    @property
    def holds(self) -> bool:
        """Whether it keeps its bounds."""
        return (self.least is None or self.value >= self.least) and (
            self.most is None or self.value <= self.most
        )


def of(
    name: str, values: Sequence[float], unit: str, *, least: float | None = None, most: float | None = None
) -> Figure:
    """The median of the rounds as a figure."""
    return Figure(name, statistics.median(values), unit, min(values), max(values), least, most)


def lines(figures: Sequence[Figure]) -> list[str]:
    """The figures as the lines of a table."""
    width = max((len(figure.name) for figure in figures), default=0)
    return [f"  {figure.name:<{width}}  {_shown(figure)}" for figure in figures]


def as_json(figures: Sequence[Figure]) -> list[dict[str, Any]]:
    """The figures as objects, without the fields that say nothing."""
    return [
        {key: value for key, value in asdict(figure).items() if value is not None} | {"holds": figure.holds}
        for figure in figures
    ]


def machine() -> dict[str, Any]:
    """Where and when this was measured. `load`: the processes that wanted a processor in the last minute."""
    names = ("paigeant", "sqlalchemy", "pydantic")
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "system": f"{platform.system()} {platform.release()}",
        "processors": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        **{name: version(name) for name in names},
    }


def _shown(figure: Figure) -> str:
    text = f"{_number(figure.value):>9} {figure.unit:<8}"
    if figure.low is not None and figure.high is not None and figure.low != figure.high:
        text += f"  {_number(figure.low)} to {_number(figure.high)}"
    bounds = [
        f"{word} {_number(bound)}"
        for word, bound in (("at least", figure.least), ("at most", figure.most))
        if bound is not None
    ]
    return (
        f"{text}  [{', '.join(bounds)}: {'holds' if figure.holds else 'MISSED'}]" if bounds else text.rstrip()
    )


def _number(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"
