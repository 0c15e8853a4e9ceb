"""Usage: what agents took of their models, as numbers that can be added up: of a unit, a step, a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any

from pydantic_core import from_json, to_json

__all__ = ["Usage", "money", "tokens"]

_KEY = "paigeant.used"
_STAMP = f'{{"{_KEY}":'.encode()


@dataclass(frozen=True, slots=True)
class Usage:
    """Answers of models, successful calls of tools, tokens, and the `cost` in US dollars.

    `cost` is that of the requests whose price is known: None where it is known of none. `models` has what each model
    took, by its name, as far as that is known; it tells the same in parts, and isn't compared.
    """

    requests: int = 0
    tool_calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost: Decimal | None = None
    models: Mapping[str, Usage] = field(default_factory=dict, compare=False, repr=False)

    def __bool__(self) -> bool:
        return bool(
            self.requests
            or self.tool_calls
            or self.input_tokens
            or self.output_tokens
            or self.cost is not None
        )

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.requests + other.requests,
            self.tool_calls + other.tool_calls,
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            other.cost if self.cost is None else self.cost + (other.cost or 0),
            _together(self.models, other.models),
        )

    def beyond(self, other: Usage) -> Usage:
        """What this is more than `other`, in each number; nothing is below 0. Of which models isn't told."""
        cost = (self.cost or Decimal()) - (other.cost or Decimal())
        return Usage(
            max(self.requests - other.requests, 0),
            max(self.tool_calls - other.tool_calls, 0),
            max(self.input_tokens - other.input_tokens, 0),
            max(self.output_tokens - other.output_tokens, 0),
            cost if cost > 0 else None,
        )

    @classmethod
    def total(cls, parts: Iterable[Usage]) -> Usage:
        """All parts together."""
        return sum(parts, _NOTHING)

    def by(self, model: str) -> Usage:
        """The same, all of it taken by this model."""
        return Usage(
            self.requests, self.tool_calls, self.input_tokens, self.output_tokens, self.cost, {model: self}
        )

    # -- as JSON

    def as_json(self) -> dict[str, Any]:
        """The numbers by name; the cost is a text, so that nothing of it is lost."""
        return {
            "requests": self.requests,
            "tool_calls": self.tool_calls,
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "cost": None if self.cost is None else f"{self.cost:f}",
        }

    def dump(self) -> bytes:
        """The usage as it is recorded with a step."""
        models = {name: used.as_json() for name, used in self.models.items()}
        return to_json({**self.as_json(), "models": models} if models else self.as_json())

    @classmethod
    def read(cls, recorded: bytes | None) -> Usage | None:
        """What was recorded with a step; None where nothing was."""
        return None if recorded is None else cls._of(from_json(recorded))

    @classmethod
    def _of(cls, found: Any) -> Usage | None:
        if not isinstance(found, dict):
            return None
        try:
            models = found.get("models", {})
            return cls(
                int(found.get("requests", 0)),
                int(found.get("tool_calls", 0)),
                int(found.get("input_tokens", 0)),
                int(found.get("output_tokens", 0)),
                money(found.get("cost")),
                {name: used for name, one in models.items() if (used := cls._of(one)) is not None},
            )
        except (ValueError, TypeError, AttributeError, InvalidOperation):
            return None

    # -- in the record of a unit

    def stamp(self, record: bytes) -> bytes:
        """The record of a unit (an object) that tells what the unit itself used, first of all: it is found at once."""
        return b"%b%b,%b" % (_STAMP, self.dump(), record[1:]) if self else record

    @classmethod
    def stamped(cls, record: bytes) -> Usage | None:
        """What a unit itself used, as its record tells; None where it tells nothing."""
        return cls.told(from_json(record)) if record.startswith(_STAMP) else None

    @classmethod
    def told(cls, record: dict[str, Any]) -> Usage | None:
        """The same, of a record that has been read."""
        return cls._of(record.get(_KEY))

    @classmethod
    def of_units(cls, records: Iterable[bytes]) -> Usage:
        """What units used together."""
        return cls.total(used for record in records if (used := cls.stamped(record)) is not None)


def tokens(count: object) -> int:
    """A count as a model or its server tells it, within what any database holds; 0 for what is none."""
    if not isinstance(count, int) or count < 0:
        return 0
    return count if count < _MOST_TOKENS else _MOST_TOKENS


def money(cost: object) -> Decimal | None:
    """A cost as a model or its server tells it; None for what is none, or can't be added to others."""
    if cost is None:
        return None
    try:
        found = Decimal(str(cost))
    except InvalidOperation:
        return None
    return found if found.is_finite() and -_DIGITS < found.adjusted() < _DIGITS else None


_MOST_TOKENS = 2**53
_DIGITS = 18


def _together(some: Mapping[str, Usage], more: Mapping[str, Usage]) -> Mapping[str, Usage]:
    if not some or not more:
        return some or more
    return {name: some.get(name, _NOTHING) + more.get(name, _NOTHING) for name in {**some, **more}}


_NOTHING = Usage()
