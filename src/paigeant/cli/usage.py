"""What agents used, and the units that steps have recorded, as commands show them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from paigeant.cli import console
from paigeant.place import readable
from paigeant.run import usage_of
from paigeant.slip import Phase
from paigeant.store import RunDetail, StepKey, StepRecord
from paigeant.usage import Usage

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

__all__ = ["Units", "step_as_json", "tables_of", "units_as_json"]

Units = Mapping[StepKey, Mapping[str, bytes]]
"""The records of what steps have done so far, by step and by the name of the unit."""

_NUMBERS = ["requests", "tool calls", "tokens in", "tokens out", "cost"]


def step_as_json(row: StepRecord) -> dict[str, Any] | None:
    """What the agents of a step used; None when there were none."""
    used = Usage.read(row.usage)
    return None if used is None else used.as_json()


def units_as_json(row: StepRecord, units: Units | None) -> dict[str, Any]:
    """The member `units` of a step, with name, size and usage of each, by name; nothing where they aren't asked for."""
    if units is None:
        return {}
    found = []
    for name, record in sorted(units.get(row.key, {}).items()):
        used = Usage.stamped(record)
        found.append({"name": name, "bytes": len(record), "usage": None if used is None else used.as_json()})
    return {"units": found}


def tables_of(detail: RunDetail, units: Units | None) -> list[RenderableType]:
    """A table of what each step and the run used, if they did; with `units` one of these as well."""
    tables: list[RenderableType] = []
    used = [(row, usage) for row in detail.steps if (usage := Usage.read(row.usage)) is not None]
    if used:
        rows = [[console.plain(_called(row.key)), *_numbers(usage)] for row, usage in used]
        rows.append([console.plain("run", "bold"), *_numbers(usage_of(detail))])
        tables.append(console.table(["usage", *_NUMBERS], rows, cut=["usage"], right=_NUMBERS))
    if units is not None:
        rows = [
            _unit(key, shown[name], record)
            for key, of in units.items()
            for shown in [readable(of)]
            for name, record in sorted(of.items(), key=lambda unit: shown[unit[0]])
        ]
        columns = ["step", "unit", "size", "tokens", "cost"]
        table = console.table(columns, rows, cut=["unit"], right=["size", "tokens", "cost"])
        tables.append(table if rows else console.plain("no units", "dim"))
    return tables


def _numbers(used: Usage) -> list[Text | str]:
    counts = (used.requests, used.tool_calls, used.input_tokens, used.output_tokens)
    return [*(f"{count:,}" for count in counts), console.dollars(used.cost)]


def _unit(key: StepKey, name: str, record: bytes) -> list[Text | str]:
    used = Usage.stamped(record) or Usage()
    tokens = f"{used.input_tokens + used.output_tokens:,}" if used.requests else ""
    size = console.size(len(record))
    return [console.plain(_called(key)), console.plain(name), size, tokens, console.dollars(used.cost)]


def _called(key: StepKey) -> str:
    return f"undo {key.step}" if key.phase is Phase.UNDO else key.step
