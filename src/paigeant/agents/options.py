"""How calls of a tool are recorded, as its metadata says."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from pydantic_ai import ToolDefinition
from pydantic_ai.toolsets import AbstractToolset

from paigeant.clock import is_duration
from paigeant.errors import InvalidDefinition, nearest
from paigeant.retry import RetryPolicy

__all__ = ["METADATA", "InlineToolset", "ToolOptions", "renamed"]

METADATA = "paigeant"
"""The key of a tool's metadata whose value says how calls of it are recorded."""


@dataclass(frozen=True, slots=True)
class ToolOptions:
    """How calls of one tool are recorded, as its metadata says: {"paigeant": {"retries": 2, "timeout": 30.0}}.

    `retries` is a number of further tries or a RetryPolicy, within one attempt of the step; `timeout` is in seconds,
    for each try. `inline`: the call isn't recorded. `at_most_once`: what began and left no record is not begun again.
    `was`: a name that the tool had, or several: a recorded answer that calls it so means this tool.
    """

    retries: int | RetryPolicy = 0
    timeout: float | None = None
    inline: bool = False
    at_most_once: bool = False
    was: str | Collection[str] = ()

    def __post_init__(self) -> None:
        RetryPolicy.of(self.retries)
        if self.timeout is not None and not is_duration(self.timeout):
            raise InvalidDefinition(
                f"timeout is in seconds, above 0 and below 100 years, found {self.timeout!r}"
            )
        for name in ("inline", "at_most_once"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidDefinition(f"{name} is True or False, found {getattr(self, name)!r}")
        if self.at_most_once and (self.inline or RetryPolicy.of(self.retries).attempts > 1):
            raise InvalidDefinition(
                "what is done at most once is recorded and not tried again: leave out inline and retries"
            )

        if not isinstance(self.was, Collection) or not all(
            isinstance(name, str) and name for name in self.earlier_names
        ):
            raise InvalidDefinition(
                f"was is a name that the tool had, or a list of names, found {self.was!r}"
            )

    @property
    def earlier_names(self) -> tuple[str, ...]:
        """The names that the tool had."""
        return (self.was,) if isinstance(self.was, str) else tuple(self.was)

    @classmethod
    def of(cls, tool: str, definition: ToolDefinition) -> ToolOptions:
        """What the metadata of a tool says. Raises InvalidDefinition."""
        told = (definition.metadata or {}).get(METADATA)
        if told is None:
            return _DEFAULT
        if told is False:
            return cls(inline=True)
        try:
            if not isinstance(told, Mapping):
                raise InvalidDefinition(f"it is a dict or False, found {told!r}")
            known = [field.name for field in fields(cls)]
            for name in told:
                if name not in known:
                    raise InvalidDefinition(f"there is no {name!r}; {nearest(str(name), known)}")
            options = cls(**told)
            if options.at_most_once and definition.timeout is not None:
                raise InvalidDefinition(
                    "what is done at most once has its timeout here, "
                    f"{{'at_most_once': True, 'timeout': {definition.timeout!r}}}, and not in the tool, its toolset or "
                    "the agent: of those the model is told, and may ask for the same again"
                )
            return options
        except InvalidDefinition as exc:
            raise InvalidDefinition(f"metadata '{METADATA}' of tool '{tool}': {exc}") from exc


_DEFAULT = ToolOptions()


class InlineToolset(AbstractToolset[Any]):
    """A toolset of ours that a run brings along, whose calls are done again by each attempt and aren't recorded."""


def renamed(tools: Mapping[str, ToolOptions]) -> dict[str, str]:
    """What tools are called now, by the names that they had. Raises InvalidDefinition for one that isn't clear."""
    found: dict[str, str] = {}
    for name, options in tools.items():
        for earlier in options.earlier_names:
            if earlier in tools or found.get(earlier, name) != name:
                other = earlier if earlier in tools else found[earlier]
                raise InvalidDefinition(
                    f"tool '{name}' says that it was '{earlier}', and so is tool '{other}'"
                )
            found[earlier] = name
    return found
