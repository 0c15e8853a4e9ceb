"""How values become JSON and back without losing anything: one way for inputs, outputs, arguments and messages.

Floats that JSON can't write (nan, inf) become the texts that pydantic reads back as floats, bytes become base64.
"""

from __future__ import annotations

import contextlib
import json
import marshal
import math
import re
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError, from_json, to_json, to_jsonable_python

from paigeant.errors import MessageInvalid

__all__ = [
    "LARGEST_BYTES",
    "MAX_DEPTH",
    "JsonInvalid",
    "OtherType",
    "copied",
    "depth",
    "dump",
    "dump_as",
    "dump_sorted",
    "parse_strict",
    "plain",
    "read_as",
    "storable",
]

MAX_DEPTH = 64
"""How deep lists and objects may be nested in any value that is stored or travels."""

LARGEST_BYTES = 64 * 1024 * 1024
"""How long a value may be as JSON. Several times as long, a database takes longer to write it than any transaction may:
the step would be done again and again. What is larger belongs elsewhere, and where that is into the run."""

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_ESCAPED = re.compile(rb"\\.")
_QUOTED = re.compile(rb'"[^"]*"')
_SQUARE = bytes.maketrans(b"{}", b"[]")
_NO_MARKS = bytes(set(range(256)).difference(b'"[]{}'))
_UNEXPECTED = re.compile(
    r"\(Expected (?P<expected>`[^`\n]+`) - [^\[\n]*"
    r"\[(?:field_name='(?P<field>[^'\n]*)', )?input_value=.*, input_type=(?P<found>\w+)\]\)"
)
_LONG_NUMBER = re.compile(rb"[0-9]{4301}")


class JsonInvalid(ValueError):
    """A value that can't be written as JSON, with the reason as its message."""


class OtherType(JsonInvalid):
    """A value that is of another type than the one it is to be written as."""


def storable(text: str) -> str:
    """`text` with what not every database can hold written out: halves of surrogate pairs, and null characters."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")


def dump(value: Any) -> bytes:
    """`value` as JSON: anything pydantic knows how to write (models, dataclasses, datetimes, decimals, bytes ...).

    Fields have their own names, not their aliases: an alias for writing may be another than the one for reading.
    Raises JsonInvalid for a value of an unknown type, one that contains itself, one that can be read only once, one
    nested deeper than MAX_DEPTH, or one of more than LARGEST_BYTES.
    """
    _refuse_iterator(value)
    try:
        text = to_json(value, by_alias=False, inf_nan_mode="strings", bytes_mode="base64")
        if b"null" in text and value is not None and not _is_plain(value):
            # A model says itself how it writes nan and infinity: as null, by default. Its fields as plain values don't.
            plain_value = to_jsonable_python(value, by_alias=False, bytes_mode="base64")
            again = to_json(plain_value, inf_nan_mode="strings")
            if len(again) < len(text):  # numbers are longer than null, so what is gone has been read up
                raise JsonInvalid("something in it can be read only once; make a list of it")
            text = again
        return _bounded(text)
    except (PydanticSerializationError, ValueError, RecursionError) as exc:
        raise JsonInvalid(_reason(exc)) from exc


def dump_as(adapter: TypeAdapter[Any], value: Any) -> bytes:
    """`value` as JSON in the way its declared type wants it. Raises JsonInvalid like `dump`, OtherType among it.

    A number that a model would write as null is an error as well.
    """
    _refuse_iterator(value)
    try:
        text = _bounded(adapter.serializer.to_json(value, by_alias=False, warnings="error"))
        if b"null" in text and _loses_number(
            text, adapter.dump_python(value, mode="json", by_alias=False, warnings="none")
        ):
            raise JsonInvalid(
                "a model in it writes nan and infinity as null; "
                "give the model model_config = ConfigDict(ser_json_inf_nan='strings')"
            )
        return text
    except (PydanticSerializationError, ValueError, RecursionError) as exc:
        if unexpected := _UNEXPECTED.search(str(exc)):
            field = f" in the field '{unexpected['field']}'" if unexpected["field"] else ""
            raise OtherType(f"expected {unexpected['expected']}{field}, found {unexpected['found']}") from exc
        raise JsonInvalid(_reason(exc)) from exc


_FORBIDDEN = ("extra_forbidden", "unexpected_keyword_argument")
"""The errors of a field that a model doesn't know, and that a dataclass doesn't."""


def read_as(adapter: TypeAdapter[Any], value: Any) -> Any:
    """A JSON value (see `plain`) as a declared type wants it. Raises pydantic's ValidationError, and JsonInvalid.

    Fields are found by their aliases, as others write them, and by their names, as `dump` and `dump_as` do. What a
    model computes itself may be there as well, even where it forbids fields that it doesn't know.
    """
    text = dump(value)
    try:
        return adapter.validator.validate_json(text, by_alias=True, by_name=True)
    except ValidationError as exc:
        # Recorded, it is there for conditions, and whoever reads a model that forbids more would meet its own.
        wrong = exc.errors(include_url=False, include_input=False)
        extra = [error["loc"] for error in wrong if error["type"] in _FORBIDDEN]
        known = _computed(adapter.core_schema) if extra else set()  # once: anybody may send a flood of fields
        computed = [place for place in extra if place[-1] in known]
        if not computed:
            raise
    found = from_json(text)
    for place in computed:
        _take_out(found, place)
    return adapter.validator.validate_json(dump(found), by_alias=True, by_name=True)


def _computed(schema: object) -> set[str]:
    """The names of the fields that models of this schema compute."""
    found, left = set(), [schema]
    while left:
        match left.pop():
            case {"type": "computed-field", "property_name": str(name)}:
                found.add(name)
            case dict() as part:
                left += part.values()
            case list() | tuple() as parts:
                left += parts
    return found


def _take_out(value: Any, place: tuple[int | str, ...]) -> None:
    """Take what is at a place out of a JSON value. Some parts of an error's place name types, and lead nowhere."""
    for part in place[:-1]:
        with contextlib.suppress(KeyError, IndexError, TypeError):
            value = value[part]
    if isinstance(value, dict):
        value.pop(place[-1], None)


def dump_sorted(value: Any) -> bytes:
    """JSON values (see `plain`) as JSON with all keys sorted, so that equal values are equal texts."""
    return dump(_sorted(value))


def plain(value: Any) -> Any:
    """`value` as JSON would give it back: dicts, lists, texts, numbers, booleans, None. Raises JsonInvalid."""
    return from_json(dump(value), allow_inf_nan=False)


def copied(value: Any) -> Any:
    """A JSON value (see `plain`) that is nobody else's, so that whoever gets it may change it."""
    return from_json(to_json(value)) if isinstance(value, (dict, list)) else value


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return [_sorted(item) for item in value] if isinstance(value, list) else value


def _reason(exc: BaseException) -> str:
    if isinstance(exc, JsonInvalid):
        return str(exc)
    if isinstance(exc, RecursionError) or "Circular reference" in str(exc):
        return "it contains itself, or is nested too deeply"
    if "surrogates not allowed" in str(exc):
        return "a text in it holds half of a surrogate pair, which is no Unicode"
    if "invalid utf-8 sequence" in str(exc):
        return (
            "a model in it writes bytes as text, which these are not; "
            "give the model model_config = ConfigDict(ser_json_bytes='base64', val_json_bytes='base64')"
        )
    return " ".join(str(exc).split())


_PLAIN = frozenset({dict, list, tuple, str, bytes, int, float, bool, type(None)})


def _refuse_iterator(value: Any) -> None:
    # It would be read here, by whoever writes it: a generator's code would run in the event loop, and may never end.
    # Most values are plain ones, and these classes take long to say no.
    if type(value) not in _PLAIN and isinstance(value, (Iterator, AsyncIterator)):
        raise JsonInvalid("it can be read only once; make a list of it")


def _is_plain(value: Any) -> bool:
    """Whether no model is anywhere in `value`: it is made of Python's own types alone, exactly of these."""
    # The only walk through values that needs no Python, and takes no longer than to write them as JSON.
    try:
        marshal.dumps(value, 2)
    except ValueError:
        return False
    return True


def _loses_number(text: bytes, value: Any) -> bool:
    # Only what may have such a number in it is worth a walk.
    with_numbers = to_json(value, inf_nan_mode="constants")
    if b"NaN" not in with_numbers and b"Infinity" not in with_numbers:
        return False
    written, meant = list(_leaves(from_json(text))), list(_leaves(value))
    return written.count(None) > meant.count(None)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _leaves(inner)
    else:
        yield value


def _bounded(text: bytes) -> bytes:
    if len(text) > LARGEST_BYTES:
        raise JsonInvalid(
            f"it has {len(text):,} bytes as JSON, at most {LARGEST_BYTES:,} are recorded; "
            "keep it elsewhere, and give back where it is"
        )
    if _is_deeper(text, MAX_DEPTH):
        raise JsonInvalid(f"it is nested deeper than {MAX_DEPTH}")
    # So many digits are harmless in a text; a number of them could be written but never read.
    if _may_hold_long_number(text) and _LONG_NUMBER.search(text):
        from_json(text)
    return text


def _may_hold_long_number(text: bytes) -> bool:
    """Whether `text` may have 4,301 digits in a row: one of them would be at one of the places looked at."""
    return len(text) > 4300 and any(
        text[at - 2150 : at + 1].isdigit() or text[at : at + 2151].isdigit()
        for at in range(4300, len(text), 4301)
    )


def _is_deeper(text: bytes, most: int) -> bool:
    """Whether in a text that is JSON more than `most` lists and objects are nested in each other."""
    # A text with few brackets can't be deep; only the others are worth more.
    if text.count(b"[") + text.count(b"{") <= most:
        return False
    if b"\\" in text:
        text = _ESCAPED.sub(b"", text)
    # No values are made for it: only quotes and brackets are left, and those with nothing in between fall away, first
    # those of texts, then with each turn the innermost lists and objects.
    marks = text.translate(_SQUARE, _NO_MARKS).replace(b'""', b"")
    if b'"' in marks:
        marks = _QUOTED.sub(b"", marks)
    for _ in range(most):
        if not marks:
            break
        marks = marks.replace(b"[]", b"")
    return bool(marks)


def depth(value: Any) -> int:
    """How many lists and objects are nested in each other in a JSON value; 0 for one that is neither."""
    deepest, level = 0, [value]
    while level:
        containers = [item for item in level if isinstance(item, (dict, list))]
        if not containers:
            break
        deepest += 1
        level = [
            inner for item in containers for inner in (item.values() if isinstance(item, dict) else item)
        ]
    return deepest


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        # Counted once for all: to count each key anew takes minutes where there are many, and who sends this knows.
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise MessageInvalid("duplicate_key", f"the key {twice[:100]!r} occurs twice in one object")
    return found


def _number(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise MessageInvalid("number_out_of_range", f"{text[:40]} is not a finite number")
    return value


def _constant(text: str) -> float:
    raise MessageInvalid("not_a_number", f"{text} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_number, parse_constant=_constant)


def parse_strict(body: bytes, *, max_depth: int = MAX_DEPTH) -> Any:
    """The JSON value in `body`: UTF-8, no key twice in an object, no NaN or infinity, no lone surrogate, bounded depth.

    Raises MessageInvalid with the reason. Python's and pydantic's own readers let most of these pass, the last of two
    equal keys winning; two readers that disagree about a message are how checks get bypassed.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise MessageInvalid("not_utf8", f"byte {exc.start} is not UTF-8") from exc
    try:
        value = _DECODER.decode(text)
    except RecursionError as exc:
        raise MessageInvalid("too_deep", f"it is nested deeper than {max_depth}") from exc
    except json.JSONDecodeError as exc:
        reason = exc.msg.removesuffix(" at")
        raise MessageInvalid("not_json", f"{reason} at line {exc.lineno}, column {exc.colno}") from exc
    except ValueError as exc:  # Python's limit on the digits of an integer
        raise MessageInvalid("number_out_of_range", str(exc).split(";")[0]) from exc
    if _is_deeper(body, max_depth):
        raise MessageInvalid("too_deep", f"it is nested deeper than {max_depth}")
    if _SURROGATE.search(body):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as exc:
            raise MessageInvalid("lone_surrogate", "a text holds half of a surrogate pair") from exc
    return value
