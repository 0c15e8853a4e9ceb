"""The one way in which values become JSON and back."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum
from functools import partial
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, computed_field, create_model
from pydantic.dataclasses import dataclass as pydantic_dataclass

from paigeant import codec
from paigeant.codec import LARGEST_BYTES, MAX_DEPTH, JsonInvalid, dump, dump_as, parse_strict, plain, read_as
from paigeant.errors import MessageInvalid

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**40), 10**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


class Colour(Enum):
    RED = "red"


class Share(BaseModel):
    of: float
    about: str | None = None


class Model(BaseModel):
    n: int
    at: datetime


@dataclass
class Point:
    x: float


class Node:
    pass


@given(JSON)
def test_json_values_come_back(value: Any) -> None:
    """Whatever JSON can hold comes back equal and of the same type, numbers of any size and precision too."""
    text = dump(value)
    back = parse_strict(text)
    assert back == value == plain(value)
    assert repr(back) == repr(value) or _has_negative_zero(value)


def _has_negative_zero(value: Any) -> bool:
    return "-0.0" in repr(value)


@given(
    st.binary(max_size=60) | st.text(max_size=40).map(str.encode) | JSON.map(lambda v: json.dumps(v).encode())
)
def test_parsing_anything_gives_a_value_or_one_error(body: bytes) -> None:
    """No body makes the parser fail in any other way than MessageInvalid, and what it takes Python agrees with."""
    try:
        value = parse_strict(body)
    except MessageInvalid:
        return
    assert value == json.loads(body)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2**100, str(2**100)),
        (-(2**63) - 1, str(-(2**63) - 1)),
        (0.1, "0.1"),
        (1e300, "1e+300"),
        (math.nan, '"NaN"'),
        (math.inf, '"Infinity"'),
        (-math.inf, '"-Infinity"'),
        (Decimal("1.10"), '"1.10"'),
        (Decimal("123456789012345678901234567890.12"), '"123456789012345678901234567890.12"'),
        (b"\x00\xff", '"AP8="'),
        (datetime(2026, 1, 1, tzinfo=UTC), '"2026-01-01T00:00:00Z"'),
        (datetime(2026, 1, 1, tzinfo=timezone(timedelta(hours=2))), '"2026-01-01T00:00:00+02:00"'),
        (timedelta(seconds=90), '"PT1M30S"'),
        (UUID(int=1), '"00000000-0000-0000-0000-000000000001"'),
        (Colour.RED, '"red"'),
        ({1: "int", None: "none"}, '{"1":"int","None":"none"}'),
        ({"": 1, " ": 2, "ä": 3, "a.b": 4}, '{"":1," ":2,"ä":3,"a.b":4}'),
        ((1, 2), "[1,2]"),
        ({3}, "[3]"),
        (Model(n=1, at=datetime(2026, 1, 1, tzinfo=UTC)), '{"n":1,"at":"2026-01-01T00:00:00Z"}'),
        (Point(0.5), '{"x":0.5}'),
        (Point(math.inf), '{"x":"Infinity"}'),
        (Share(of=math.nan), '{"of":"NaN","about":null}'),
        ([None, Share(of=-math.inf)], '[null,{"of":"-Infinity","about":null}]'),
        (None, "null"),
    ],
)
def test_values_have_one_text(value: Any, text: str) -> None:
    """Each kind of value is written in one way that loses nothing of it."""
    assert dump(value).decode() == text


def _cycle() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def _deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        Node(),
        {"a": [Node()]},
        lambda: 1,
        _cycle(),
        _deep(MAX_DEPTH + 1),
        _deep(5000),
        "\ud800",
        {"\udfff": 1},
    ],
    ids=["object", "inside", "function", "cycle", "deep", "very deep", "surrogate", "surrogate key"],
)
def test_what_json_can_t_hold_is_refused(value: Any) -> None:
    """Unknown types, cycles, endless depth and broken texts are one error with a one-line reason."""
    with pytest.raises(JsonInvalid) as caught:
        dump(value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("write", [dump, partial(dump_as, TypeAdapter(Iterable[Any]))], ids=["any", "typed"])
@pytest.mark.parametrize("make", [iter, reversed, partial(map, str), lambda items: (n for n in items)])
def test_what_can_be_read_only_once_is_refused(
    make: Callable[[list[Any]], Iterator[Any]], write: Callable[[Any], bytes]
) -> None:
    """Unread: it may never end, and whoever writes it would be the one who waits for that."""
    value = make([None, 1])
    with pytest.raises(JsonInvalid, match=r"^it can be read only once; make a list of it$"):
        write(value)
    assert len(list(value)) == 2


def test_what_can_be_read_only_once_is_never_lost() -> None:
    """Within a value it is written whole, or refused: a None in it has the value read for a second time."""
    assert dump({"rows": (n for n in [1, 2])}) == b'{"rows":[1,2]}'
    with pytest.raises(JsonInvalid, match="something in it can be read only once; make a list of it"):
        dump({"rows": (n for n in [None, 1])})


@pytest.mark.parametrize("value", ["\ud800", {"\udfff": 1}, ["fine", {"a": "b\udc00"}]])
def test_half_a_surrogate_pair_is_called_that(value: Any) -> None:
    """What is wrong is said, not which encoder met it."""
    with pytest.raises(
        JsonInvalid, match=r"^a text in it holds half of a surrogate pair, which is no Unicode$"
    ):
        dump(value)


class Picture(BaseModel):
    content: bytes


class Binary(BaseModel):
    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")

    content: bytes


@pytest.mark.parametrize("write", [dump, partial(dump_as, TypeAdapter(Picture))], ids=["any", "typed"])
def test_a_model_with_bytes_is_told_what_it_needs(write: Callable[[Any], bytes]) -> None:
    """A model writes bytes as text unless it says otherwise; for what is none there is an error that says how."""
    with pytest.raises(JsonInvalid, match=r"ConfigDict\(ser_json_bytes='base64', val_json_bytes='base64'\)"):
        write(Picture(content=b"\x89PNG\xff"))


def test_a_model_that_says_so_has_any_bytes() -> None:
    """Written with or without its type, or as a mapping that was never a model, they come back as they were."""
    adapter, made = TypeAdapter(Binary), Binary(content=b"\x89PNG\xff")
    for written in (dump(made), dump_as(adapter, made), dump({"content": made.content})):
        assert read_as(adapter, json.loads(written)) == made


class Line(BaseModel):
    model_config = ConfigDict(extra="forbid")

    price: int
    pieces: int = 1

    @computed_field  # type: ignore[prop-decorator]  # as pydantic documents it
    @property
    def total(self) -> int:
        return self.price * self.pieces


class Basket(BaseModel):
    lines: list[Line]
    gift: str | Line = ""
    others: dict[str, Line] = {}


def test_a_model_that_forbids_more_is_given_what_it_computes_itself() -> None:
    """It is in the record, for conditions. Wherever the model is, it reads that, and nothing else that it forbids."""
    adapter = TypeAdapter(Basket)
    made = Basket(
        lines=[Line(price=2), Line(price=3, pieces=2)], gift=Line(price=1), others={"a": Line(price=7)}
    )
    written = json.loads(dump_as(adapter, made))
    assert [line["total"] for line in written["lines"]] == [2, 6]
    assert read_as(adapter, written) == read_as(adapter, made) == made
    written["lines"][1]["piece"] = 3
    with pytest.raises(ValidationError, match=r"1 validation error[^$]*lines\.1\.piece"):
        read_as(adapter, written)


@pydantic_dataclass(config=ConfigDict(extra="forbid"))
class Parcel:
    grams: int

    @computed_field  # type: ignore[prop-decorator]  # as pydantic documents it
    @property
    def is_heavy(self) -> bool:
        return self.grams > 1000


def test_a_dataclass_that_forbids_more_is_given_what_it_computes_itself() -> None:
    """It says otherwise than a model what it doesn't know."""
    adapter = TypeAdapter(list[Parcel])
    made = [Parcel(grams=5), Parcel(grams=5000)]
    assert read_as(adapter, json.loads(dump_as(adapter, made))) == made
    with pytest.raises(ValidationError, match=r"1 validation error[^$]*0\.is_light"):
        read_as(adapter, [{"grams": 5, "is_light": True}])


def test_a_flood_of_forbidden_fields_is_refused_soon() -> None:
    """Whoever sends such a value, and anybody may, would otherwise hold up a worker for a minute."""
    known: dict[str, Any] = {f"known{number}": (int, 0) for number in range(100)}
    adapter = TypeAdapter(create_model("Long", __base__=Line, **known))
    flood = dict.fromkeys((f"{number:x}" for number in range(50_000)), 0)
    began = time.process_time()
    with pytest.raises(ValidationError, match="50000 validation errors"):
        read_as(adapter, {"price": 1, **flood})
    assert time.process_time() - began < 5.0


def test_the_deepest_value_is_allowed() -> None:
    """MAX_DEPTH levels are fine on both ways, with many brackets side by side too."""
    assert parse_strict(dump(_deep(MAX_DEPTH))) == _deep(MAX_DEPTH)
    wide = [[n] for n in range(MAX_DEPTH * 3)]
    assert parse_strict(dump(wide)) == wide


BRACKETS = st.recursive(
    st.none() | st.text(alphabet='[]{}"\\,: aé', max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(alphabet='[]{}"\\', max_size=3), inner, max_size=3)
    ),
    max_leaves=30,
)


@given(BRACKETS, st.integers(0, 6), st.sampled_from([None, 2]))
def test_depth_is_counted_of_the_text(value: Any, most: int, indent: int | None) -> None:
    """Brackets and quotes in texts and keys, escaped or not, and blanks in between, make nothing deeper."""
    for ascii in (True, False):
        text = json.dumps(value, indent=indent, ensure_ascii=ascii).encode()
        assert codec._is_deeper(text, most) is (codec.depth(value) > most)


@given(st.integers(0, 9000), st.integers(0, 9000))
def test_a_number_of_too_many_digits_is_found_wherever_it_stands(before: int, after: int) -> None:
    """Python wouldn't read it again. Many short numbers are none."""
    assert codec._may_hold_long_number(b"x" * before + b"9" * 4301 + b"y" * after)
    assert not codec._may_hold_long_number(b"x" * before + b"9," * after)


def test_only_numbers_in_models_are_looked_for() -> None:
    """A null that isn't a lost number stays one, whatever stands beside it, in models or not."""
    value = {"a": [None, {"b": None}], "share": Share(of=math.inf), "of": math.nan, "word": "null"}
    text = '{"a":[null,{"b":null}],"share":{"of":"Infinity","about":null},"of":"NaN","word":"null"}'
    assert dump(value).decode() == text
    del value["share"]
    assert dump(value).decode() == '{"a":[null,{"b":null}],"of":"NaN","word":"null"}'


def test_what_no_database_takes_in_time_is_no_value() -> None:
    """A value may be as long as LARGEST_BYTES, with its quotes; of one byte more it says both, and what to do."""
    text = "x" * (LARGEST_BYTES - 2)
    assert len(dump(text)) == LARGEST_BYTES
    with pytest.raises(
        JsonInvalid, match=r"67,108,865 bytes as JSON, at most 67,108,864 .* keep it elsewhere"
    ):
        dump(text + "x")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "not_json"),
        (b" ", "not_json"),
        (b"{", "not_json"),
        (b"{}{}", "not_json"),
        (b"{'a':1}", "not_json"),
        (b'{"a":1,}', "not_json"),
        (b"[1,]", "not_json"),
        (b"// c\n1", "not_json"),
        (b"01", "not_json"),
        (b"1.", "not_json"),
        (b".5", "not_json"),
        (b"+1", "not_json"),
        (b"0x10", "not_json"),
        (b"True", "not_json"),
        (b"undefined", "not_json"),
        (b'"a\nb"', "not_json"),
        (b'"\\x41"', "not_json"),
        (b'"\\u12"', "not_json"),
        (b'"open', "not_json"),
        (b"\xef\xbb\xbf{}", "not_json"),
        (b"\xff", "not_utf8"),
        (b'"\xc3\x28"', "not_utf8"),
        (b'"\xed\xa0\x80"', "not_utf8"),
        ('"a"'.encode("utf-16"), "not_utf8"),
        (b'{"a":1,"a":1}', "duplicate_key"),
        (b'{"a":1,"\\u0061":2}', "duplicate_key"),
        (b'[{"x":{"k":1,"k":2}}]', "duplicate_key"),
        (b"NaN", "not_a_number"),
        (b"[Infinity]", "not_a_number"),
        (b"-Infinity", "not_a_number"),
        (b"1e400", "number_out_of_range"),
        (b"-1e999", "number_out_of_range"),
        (b"1" * 5000, "number_out_of_range"),
        (b'"\\ud800"', "lone_surrogate"),
        (b'{"\\udc00":1}', "lone_surrogate"),
        (b'"\\ud800\\ud800"', "lone_surrogate"),
        (b"[" * 65 + b"]" * 65, "too_deep"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "too_deep"),
        (b"[" * 100_000, "too_deep"),
    ],
)
def test_what_is_not_strict_json_is_refused(body: bytes, reason: str) -> None:
    """Each way of not being JSON, or of being read differently by two readers, has its reason."""
    with pytest.raises(MessageInvalid) as caught:
        parse_strict(body)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (b" {} ", {}),
        (b'"\\ud83d\\ude00"', "\U0001f600"),
        (b'"[[[[{{{{"', "[[[[{{{{"),
        (b"1e308", 1e308),
        (b"-0", 0),
        (b"123456789012345678901234567890", 123456789012345678901234567890),
        (b'{"a":{"k":1},"b":{"k":1}}', {"a": {"k": 1}, "b": {"k": 1}}),
        (b'"\\u0000"', "\x00"),
    ],
)
def test_unusual_json_is_taken(body: bytes, value: Any) -> None:
    """What the standard allows is read."""
    assert parse_strict(body) == value


def test_a_value_is_told_by_its_json() -> None:
    """plain() gives what JSON would give back: models become dicts, tuples lists."""
    assert plain(Model(n=1, at=datetime(2026, 1, 1, tzinfo=UTC))) == {"n": 1, "at": "2026-01-01T00:00:00Z"}
    assert plain({"a": (1, Point(2.0))}) == {"a": [1, {"x": 2.0}]}
    with pytest.raises(JsonInvalid):
        codec.plain(Node())


def test_a_key_twice_among_many_is_found_soon() -> None:
    """Whoever sends such a message, and anybody may, would otherwise hold up a worker for minutes."""
    keys = [f"{number:x}" for number in range(100_000)]
    body = "{" + ",".join(f'"{key}":0' for key in [*keys, keys[-1]]) + "}"
    began = time.process_time()
    with pytest.raises(MessageInvalid, match="'1869f' occurs twice"):
        parse_strict(body.encode())
    assert time.process_time() - began < 10.0


def test_a_long_key_is_not_quoted_whole() -> None:
    """What is said of a message is short, however long its keys are."""
    key = "k" * 100_000
    with pytest.raises(MessageInvalid) as found:
        parse_strict(f'{{"{key}": 1, "{key}": 2}}'.encode())
    assert len(str(found.value)) < 1000
