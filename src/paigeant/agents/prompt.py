"""Prompt: a template over JSON values. It looks values up by name, and can do nothing else."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paigeant import codec
from paigeant.errors import ArgumentError, InvalidDefinition
from paigeant.redaction import quoted

__all__ = ["Prompt"]

Path = tuple[str, ...]

_HINT = "a field is {name} or {name.part.0}, a brace that is meant as one is doubled: {{ or }}"


@dataclass(frozen=True, slots=True)
class Prompt:
    """Literal texts, each with the path of the value that follows it; None where none does.

    `{quantity}` stands for a value, `{order.items.0.name}` for a part of one: keys of objects and positions in lists,
    never attributes of Python objects. Texts are put in as they are, other values as JSON. What is put in is not read
    as a template again, so a document that holds braces is harmless.
    """

    pieces: tuple[tuple[str, Path | None], ...]

    @classmethod
    def parse(cls, template: str) -> Prompt:
        """The prompt that `template` describes. Raises InvalidDefinition."""
        if not isinstance(template, str) or not template.strip():
            raise InvalidDefinition(
                f"a prompt is a text with fields such as {{quantity}}, found {template!r}"
            )
        try:
            parsed = list(string.Formatter().parse(template))
        except ValueError as exc:
            raise InvalidDefinition(f"the prompt {quoted(template)} is no template: {exc}; {_HINT}") from exc
        pieces: list[tuple[str, Path | None]] = []
        for literal, field, spec, conversion in parsed:
            if field is None:
                pieces.append((literal, None))
                continue
            if conversion or spec:
                end = f"!{conversion}" if conversion else f":{spec}"
                raise InvalidDefinition(
                    f"the prompt {quoted(template)} has the field {{{field}{end}}}, but values are put in as they are, "
                    f"without '{end}'; {_HINT}"
                )
            pieces.append((literal, _path(template, field)))
        return cls(tuple(pieces))

    @property
    def names(self) -> tuple[str, ...]:
        """The names whose values `render` needs, each once, in the order of the text."""
        return tuple(dict.fromkeys(path[0] for _, path in self.pieces if path is not None))

    def render(self, activity: str, values: Mapping[str, Any]) -> str:
        """The text with `values` put in. Raises ArgumentError, naming `activity`, for a part that isn't there."""
        texts: list[str] = []
        for literal, path in self.pieces:
            texts.append(literal)
            if path is not None:
                value = _look_up(activity, path, values)
                texts.append(value if isinstance(value, str) else codec.dump(value).decode())
        return "".join(texts)


def _path(template: str, field: str) -> Path:
    path = tuple(field.split("."))
    if not all(path) or any(part != part.strip() or any(mark in part for mark in "[]{}\"'") for part in path):
        raise InvalidDefinition(f"the prompt {quoted(template)} has the field {{{field}}}; {_HINT}")
    return path


def _look_up(activity: str, path: Path, values: Mapping[str, Any]) -> Any:
    value: Any = values[path[0]]
    for depth, part in enumerate(path[1:], 1):
        match value:
            case dict() if part in value:
                value = value[part]
            case list() if part.isascii() and part.isdigit() and int(part) < len(value):
                value = value[int(part)]
            case _:
                whole, found = ".".join(path), ".".join(path[:depth])
                raise ArgumentError(
                    f"the prompt of activity '{activity}' asks for {{{whole}}}, but '{found}' has no '{part}': "
                    f"it is {_described(value, path[:depth])}"
                )
    return value


def _described(value: Any, path: Path) -> str:
    match value:
        case dict():
            return f"an object with {', '.join(map(str, value)) or 'nothing in it'}"
        case list():
            return f"a list of {len(value)}"
        case _:
            return quoted(value, *path)
