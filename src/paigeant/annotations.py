"""How values of the types that a function's signature names are read from JSON, and written as JSON."""

from __future__ import annotations

import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    PydanticSchemaGenerationError,
    PydanticUserError,
    TypeAdapter,
)
from typing_extensions import TypeAliasType

from paigeant import codec
from paigeant.errors import InvalidDefinition

__all__ = ["check_models", "has_models", "typed"]

_WIRE = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64", ser_json_inf_nan="strings")


def typed(annotation: Any) -> TypeAdapter[Any]:
    """Reads and writes values of `annotation` as JSON. Raises InvalidDefinition for what can't be."""
    adapter = _adapter(annotation)
    if crossed := _crossed(adapter.core_schema):
        alias, own = crossed
        raise InvalidDefinition(
            f"{annotation!r} has a field '{alias}', and '{alias}' is an alias of its field '{own}' as well: "
            "what is recorded has the fields' names, and would be read as another field; rename one of them"
        )
    return adapter


def _crossed(schema: Any) -> tuple[str, str] | None:
    """A field's name that is the alias of another field beside it, and which; None where all is clear."""
    for fields in _fields_in(schema):
        for name, schema_of_it in fields.items():
            for alias in _aliases(schema_of_it):
                if alias != name and alias in fields:
                    return alias, name
    return None


def _fields_in(schema: Any) -> Iterator[Mapping[str, Any]]:
    """The fields of each model, dataclass and TypedDict in a schema of pydantic's, by their names."""
    ahead = [schema]
    while ahead:
        found = ahead.pop()
        if isinstance(found, Mapping):
            ahead.extend(found.values())
            fields = found.get("fields")
            if isinstance(fields, list):  # of a dataclass, or their names alone
                fields = {each["name"]: each for each in fields if isinstance(each, Mapping)}
            if isinstance(fields, Mapping):
                yield fields
        elif isinstance(found, list):
            ahead.extend(found)


def _aliases(schema: Any) -> list[str]:
    """By what a field is read besides its name; of a path the first part."""
    alias = schema.get("validation_alias") if isinstance(schema, Mapping) else None
    paths = alias if isinstance(alias, list) else [alias]
    return [path[0] if isinstance(path, list) else path for path in paths if path is not None]


def _adapter(annotation: Any) -> TypeAdapter[Any]:
    if annotation is Iterable or typing.get_origin(annotation) is Iterable:
        # pydantic takes it for a generator, which can't be recorded: it is read only once, and nobody knows when.
        annotation = Sequence[typing.get_args(annotation) or (Any,)]  # type: ignore[misc]
    try:
        try:
            return TypeAdapter(annotation, config=_WIRE)
        except PydanticUserError as exc:
            if exc.code != "type-adapter-config-unused":
                raise
            if isinstance(annotation, type) and not issubclass(annotation, BaseModel):
                # A dataclass or TypedDict takes the configuration of what it stands in, and so of an alias.
                alias: Any = TypeAliasType("_Alias", annotation)
                return TypeAdapter(alias, config=_WIRE)
            return TypeAdapter(annotation)  # a model has a configuration of its own
    except (PydanticSchemaGenerationError, PydanticUserError, NameError) as exc:
        raise InvalidDefinition(
            f"{annotation!r} can't be read from JSON: {str(exc).splitlines()[0]}"
        ) from exc


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def has_models(annotation: Any) -> bool:
    """Whether a model of pydantic's is what `annotation` names, or part of it."""
    return _is_model(annotation) or any(map(has_models, typing.get_args(annotation)))


def check_models(annotation: Any, value: Any) -> None:
    """Raise OtherType where `value` has something else in the place of a model that `annotation` names.

    Pydantic would write any object there, by those of its attributes that the model has, too: `{}` for the result of
    an agent whose `.output` was forgotten.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if _is_model(annotation):
        # Made without its parameters, a generic model is none of the class that has them.
        model = annotation.__pydantic_generic_metadata__["origin"] or annotation
        if not isinstance(value, model):
            raise codec.OtherType(f"expected `{annotation.__name__}`, found {type(value).__name__}")
    elif origin in (typing.Union, types.UnionType):
        kinds = [kind for kind in arguments if kind is not type(None)]
        if len(kinds) == 1 and value is not None:  # of several, pydantic itself finds the one that fits
            check_models(kinds[0], value)
    elif not isinstance(origin, type) or not isinstance(value, Collection):
        return
    elif issubclass(origin, tuple) and ... not in arguments:
        for kind, item in zip(arguments, value, strict=False):
            check_models(kind, item)
    elif issubclass(origin, Mapping):
        if isinstance(value, Mapping) and len(arguments) == 2:  # a Counter says nothing of its values
            for item in value.values():
                check_models(arguments[1], item)
    elif issubclass(origin, Collection):
        for item in value:
            check_models(arguments[0], item)
