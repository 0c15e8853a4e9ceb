"""ActivityRegistry: what can be registered, and how values cross the wire."""

from __future__ import annotations

import math
import threading
import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from types import SimpleNamespace
from typing import Annotated, Any, Generic, Literal, Optional, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import AfterValidator, AliasChoices, AliasPath, BaseModel, Field

from paigeant import ActivityRegistry, StepContext
from paigeant.activity import Parameter
from paigeant.annotations import typed
from paigeant.errors import (
    ArgumentError,
    DuplicateActivity,
    InvalidDefinition,
    OutputInvalid,
    UnknownActivity,
)


class Money(BaseModel):
    amount: Decimal
    currency: str = "EUR"


@dataclass
class Reading:
    at: datetime
    raw: bytes
    value: float


class Opaque:
    pass


class Parcel(BaseModel):
    """Known by other names outside: by both, only when it is read, only when it is written."""

    order_id: str = Field(alias="orderId")
    net_weight: int = Field(validation_alias="weight")
    sent_by: str = Field(serialization_alias="from")


class Letter(BaseModel):
    kind: Literal["letter"] = Field("letter", alias="type")
    to_whom: str = Field(alias="toWhom")


class Card(BaseModel):
    kind: Literal["card"] = Field("card", alias="type")
    to_whom: str = Field(alias="toWhom")


Post = Annotated[Letter | Card, Field(discriminator="kind")]
PARCEL = Parcel.model_validate({"orderId": "o-1", "weight": 3, "sent_by": "Ada"})


def registered(function: Any, **options: Any) -> Any:
    """The activity that `function` is registered as."""
    registry = ActivityRegistry()
    registry.execute(**options)(function)
    return registry.get(options.get("name") or function.__name__)


def test_a_function_is_an_activity_by_its_name() -> None:
    """Name and topic default to the function's name; the function stays what it was."""
    registry = ActivityRegistry()

    @registry.execute()
    async def fetch() -> int:
        """Fetch it."""
        return 1

    activity = registry.get("fetch")
    assert (activity.name, activity.topic, activity.description) == ("fetch", "fetch", "Fetch it.")
    assert (list(registry), len(registry), "fetch" in registry, "x" in registry) == (
        ["fetch"],
        1,
        True,
        False,
    )
    assert fetch.__name__ == "fetch"


def test_the_decorator_works_without_brackets() -> None:
    """@activity.execute alone registers as well."""
    registry = ActivityRegistry()

    @registry.execute  # the brackets are not needed
    def fetch() -> None: ...

    assert "fetch" in registry


def test_an_activity_takes_its_options() -> None:
    """All options of the decorator hold for the activity."""
    activity = registered(
        lambda: 1,
        name="a",
        topic="t",
        retries=2,
        timeout=1.5,
        concurrency=3,
        strict_fencing=True,
    )
    assert (activity.topic, activity.retries, activity.timeout) == ("t", 2, 1.5)
    assert (activity.concurrency, activity.strict_fencing) == (3, True)


def test_two_activities_of_one_name_are_refused() -> None:
    """In one registry and in several together, for compensations too."""
    first, second = ActivityRegistry(), ActivityRegistry()
    for registry in (first, second):
        registry.execute(name="a")(lambda: 1)
        registry.compensate("a")(lambda: 1)
    with pytest.raises(DuplicateActivity, match="activity 'a' is defined twice"):
        first.execute(name="a")(lambda: 2)
    with pytest.raises(DuplicateActivity, match="compensation of activity 'a'"):
        first.compensate("a")(lambda: 2)
    with pytest.raises(DuplicateActivity, match="activity 'a'"):
        ActivityRegistry.merged([first, second])
    assert list(ActivityRegistry.merged([first, first])) == ["a"]


def test_an_unknown_activity_is_named_with_the_nearest() -> None:
    """The error helps with a mistyped name."""
    registry = ActivityRegistry()
    registry.execute(name="summarise")(lambda: 1)
    with pytest.raises(UnknownActivity, match=r"'sumarise'.*did you mean 'summarise'"):
        registry.get("sumarise")


def test_a_compensation_belongs_to_an_activity() -> None:
    """One for an activity that isn't there is found out; one that is there has settings of its own."""
    registry = ActivityRegistry()
    registry.compensate("reserve", retries=7, timeout=2.0)(lambda output: None)
    with pytest.raises(UnknownActivity, match="'reserve'"):
        registry.check()
    registry.execute(name="reserve", retries=1)(lambda: 1)
    registry.check()
    undo = registry.get("reserve").compensation
    assert undo is not None
    assert (undo.retries, undo.timeout) == (7, 2.0)


def test_registries_can_be_adopted() -> None:
    """adopt() learns what the other knows and keeps what it has."""
    first, second = ActivityRegistry(), ActivityRegistry()
    first.execute(name="a", topic="mine")(lambda: 1)
    second.execute(name="a", topic="other")(lambda: 1)
    second.execute(name="b")(lambda: 1)
    first.adopt(second)
    assert (sorted(first), first.get("a").topic) == (["a", "b"], "mine")


def positional(a: int, /) -> None:
    """Can't be called by name."""


def starred(*args: int) -> None:
    """Can't be called by name."""


def unreadable(a: Nowhere) -> None:  # type: ignore[name-defined]  # noqa: F821  # on purpose
    """Has an annotation that nothing defines."""


def opaque(a: Opaque) -> None:
    """Takes what JSON can't give."""


def by_field(a: int = Field(default=3, ge=1)) -> None:
    """Has a default as a model's field has one."""


def opaque_output() -> Opaque:
    """Gives what JSON can't hold."""
    return Opaque()


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (positional, "positional"),
        (starred, r"\*args"),
        (unreadable, "'unreadable' can't be read.*Nowhere"),
        (int, "no signature found.*write a function that calls it"),
        (opaque, "parameter 'a' of activity 'opaque'"),
        (by_field, r"parameter 'a' of activity 'by_field' has a Field\(...\) as its default.*Annotated"),
        (opaque_output, "return annotation of activity 'opaque_output'"),
    ],
)
def test_a_signature_that_can_t_work_is_refused(function: Any, said: str) -> None:
    """When the worker starts, with the name of the activity and what is wrong."""
    registry = ActivityRegistry()
    registry.execute()(function)
    with pytest.raises(InvalidDefinition, match=said):
        registry.check()


@pytest.mark.parametrize(
    ("register", "said"),
    [
        (lambda registry: registry.execute()(5), "function"),
        (lambda registry: registry.execute()(lambda: 1), "needs one"),
        (lambda registry: registry.execute(name="a", timeout=0)(positional), "timeout"),
        (lambda registry: registry.execute(name="a", timeout="1")(positional), "timeout"),
        (lambda registry: registry.execute(name="a", timeout=math.inf)(positional), "timeout"),
        (lambda registry: registry.execute(name="a", retries=-1)(positional), "retries"),
        (lambda registry: registry.execute(name="a", concurrency=0)(positional), "concurrency"),
        (lambda registry: registry.execute(name="a", concurrency="2")(positional), "concurrency"),
        (lambda registry: registry.execute(name="a", concurrency=True)(positional), "concurrency"),
        (lambda registry: registry.execute(name="")(positional), "name"),
        (lambda registry: registry.execute(name="a\nb")(positional), "name"),
        (lambda registry: registry.execute(name="a", topic="")(positional), "topic"),
        (lambda registry: registry.execute(name="a", topic=5)(positional), "topic"),
        (lambda registry: registry.compensate(positional), "compensate"),
        (lambda registry: registry.compensate(""), "compensate"),
    ],
)
def test_a_registration_that_can_t_work_is_refused(register: Any, said: str) -> None:
    """At once, where the decorator stands."""
    with pytest.raises(InvalidDefinition, match=said):
        register(ActivityRegistry())


ZONE = timezone(timedelta(hours=5, minutes=30))
VALUES: list[tuple[Any, Any]] = [
    (int, 2**80),
    (int, 0),
    (bool, False),
    (str, ""),
    (float, 0.1 + 0.2),
    (float, math.inf),
    (float, -math.inf),
    (bytes, b"\x00\xff\xfe"),
    (bytes, b""),
    (Decimal, Decimal("0.10")),
    (Decimal, Decimal("123456789012345678901234567890.123456789")),
    (datetime, datetime(2026, 3, 29, 2, 30, 0, 123456, tzinfo=ZONE)),
    (datetime, datetime(1, 1, 1, tzinfo=UTC)),
    (date, date(2026, 2, 28)),
    (timedelta, timedelta(days=-1, microseconds=1)),
    (dict[int, str], {1: "a", -(2**70): "b"}),
    (dict[str, int], {"": 1, " ": 2, "a.b": 3, "ä": 4, "1": 5}),
    (dict[date, int], {date(2026, 1, 1): 1}),
    (dict[bool, int], {True: 1, False: 2}),
    (tuple[int, str], (1, "a")),
    (set[int], {1, 2}),
    (frozenset[str], frozenset({"a"})),
    (list[Decimal], [Decimal("1.0"), Decimal("1.00")]),
    (Literal["a", 1], 1),
    (int | str, "1"),
    (int | None, None),
    (Money, Money(amount=Decimal("1.10"))),
    (Iterable[int], [1, 2]),
    (Iterable, [1, "a"]),
    (list[Money], [Money(amount=Decimal("0.00"))]),
    (Reading, Reading(datetime(2026, 1, 1, tzinfo=UTC), b"\xff\x00", math.inf)),
    (list[Reading], [Reading(datetime(2026, 1, 1, tzinfo=UTC), b"\xff\x00", -math.inf)]),
    (Parcel, PARCEL),
    (dict[str, list[Parcel]], {"a": [PARCEL]}),
    (list[Post], [Card(type="card", toWhom="Ada"), Letter(type="letter", toWhom="Ada")]),
]


def across(annotation: Any, value: Any) -> Any:
    """`value` as one activity returns it and the next gets it."""
    from pydantic_core import from_json

    def give() -> Any: ...

    give.__annotations__["return"] = annotation
    text = registered(give).dump(value)
    return Parameter("x", typed(annotation)).read("take", from_json(text))


@pytest.mark.parametrize(("annotation", "value"), VALUES, ids=[f"{a}-{n}" for n, (a, _) in enumerate(VALUES)])
def test_values_cross_the_wire(annotation: Any, value: Any) -> None:
    """What an annotated activity returns arrives equal and of its type at the next one."""
    arrived = across(annotation, value)
    assert (arrived, type(arrived)) == (value, type(value))
    if isinstance(value, datetime):
        assert arrived.utcoffset() == value.utcoffset()
    elif not isinstance(value, list | Reading):
        assert repr(arrived) == repr(value)


def test_not_a_number_crosses_the_wire() -> None:
    """nan, which equals nothing, arrives as nan: bare, and in a dataclass."""
    assert math.isnan(across(float, math.nan))
    assert math.isnan(across(Reading, Reading(datetime(2026, 1, 1, tzinfo=UTC), b"", math.nan)).value)


@given(st.floats(allow_nan=False), st.integers(), st.decimals(allow_nan=False, allow_infinity=False))
def test_numbers_cross_the_wire_exactly(number: float, whole: int, exact: Decimal) -> None:
    """No digit of any number is lost."""
    assert across(float, number) == number
    assert across(int, whole) == whole
    assert str(across(Decimal, exact)) == str(exact)


def test_an_output_that_can_t_be_written_is_an_error() -> None:
    """It names the activity and shows the value: whether annotated or not."""

    def bare(): ...

    def counted() -> int: ...  # type: ignore[empty-body]

    with pytest.raises(OutputInvalid, match=r"'bare' returned .*Opaque"):
        registered(bare).dump(Opaque())
    with pytest.raises(OutputInvalid, match="'counted' returned 'many'"):
        registered(counted).dump("many")


Item = TypeVar("Item")


class Page(BaseModel, Generic[Item]):
    items: list[Item]


class Lookalike:
    """What has an attribute of `Money`, like the result of an agent's run whose `.output` was forgotten."""

    def __init__(self) -> None:
        self.currency = "EUR"


@pytest.mark.parametrize(
    ("annotation", "value", "says"),
    [
        (str, 1, "expected `str`, found int"),
        (Money, {"amount": 1}, "expected `Money`, found dict"),
        (
            Money,
            Money(amount=Decimal(1)).model_copy(update={"currency": 1}),
            "expected `str` in the field 'currency', found int",
        ),
        (Money, Lookalike(), "expected `Money`, found Lookalike"),
        (Money | None, Lookalike(), "expected `Money`, found Lookalike"),
        (list[Money], [Money(amount=Decimal(1)), Lookalike()], "expected `Money`, found Lookalike"),
        (dict[str, list[Money]], {"a": [Lookalike()]}, "expected `Money`, found Lookalike"),
        (tuple[int, Money], (1, Lookalike()), "expected `Money`, found Lookalike"),
        (tuple[Money, ...], (Lookalike(),), "expected `Money`, found Lookalike"),
        (Page[Money], Lookalike(), r"expected `Page\[Money\]`, found Lookalike"),
    ],
)
def test_an_output_of_another_type_is_an_error(annotation: Any, value: Any, says: str) -> None:
    """It isn't recorded by what it has in common with the type that was said: the rest would be lost unseen."""

    def give(): ...

    give.__annotations__["return"] = annotation
    with pytest.raises(OutputInvalid, match=f"'give' returned .* isn't what its annotation says: {says}"):
        registered(give).dump(value)


@pytest.mark.parametrize(
    ("annotation", "value", "text"),
    [
        (Money | None, None, b"null"),
        (Money | Reading, Money(amount=Decimal(1)), b'{"amount":"1","currency":"EUR"}'),
        (tuple[Money, ...], (), b"[]"),
        (Page[Money], Page(items=[Money(amount=Decimal(1))]), b'{"items":[{"amount":"1","currency":"EUR"}]}'),
        (Page[int], Page[int](items=[1]), b'{"items":[1]}'),
        (dict[str, Money], {"a": Money(amount=Decimal(1))}, b'{"a":{"amount":"1","currency":"EUR"}}'),
    ],
)
def test_models_may_be_anywhere_in_an_output(annotation: Any, value: Any, text: bytes) -> None:
    """Also as parameters of others, and a generic one that was made without its parameters."""

    def give(): ...

    give.__annotations__["return"] = annotation
    assert registered(give).dump(value) == text


class Loose(BaseModel):
    value: float


def test_a_model_that_would_lose_a_number_is_refused() -> None:
    """A pydantic model writes nan as null unless it is told otherwise: an error says how to tell it."""
    with pytest.raises(OutputInvalid, match="ser_json_inf_nan"):
        across(Loose, Loose(value=math.nan))


def test_an_argument_that_doesn_t_fit_names_its_place() -> None:
    """The error has the parameter, the path within it, the activity and what was found."""
    with pytest.raises(
        ArgumentError, match=r"'price\.amount' of activity 'pay' doesn't fit.*found \{'amount': 'x'"
    ):
        Parameter("price", typed(Money)).read("pay", {"amount": "x"})


def _not_a_word(value: str) -> str:
    raise ValueError(f"{value} is no word")


@pytest.mark.parametrize(
    ("name", "annotation", "value", "said"),
    [
        (
            "password",
            int,
            "canary-4111",
            "'password' of activity 'pay' doesn't fit: Input should be a valid integer",
        ),
        (
            "password",
            Annotated[str, AfterValidator(_not_a_word)],
            "canary-4111",
            "Value error, *** is no word",
        ),
        (
            "price",
            Money,
            {"amount": "x", "api_key": "canary-4111"},
            "found {'amount': 'x', 'api_key': '***'}",
        ),
        ("secret", str, {"canary-4111": 1}, "found ***"),
    ],
)
def test_an_argument_with_the_name_of_a_secret_is_not_quoted(
    name: str, annotation: Any, value: Any, said: str
) -> None:
    """Neither what was found nor what a validator says of it, nor in a traceback by pydantic's own error."""
    with pytest.raises(ArgumentError) as caught:
        Parameter(name, typed(annotation)).read("pay", value)
    assert said in str(caught.value)
    assert "canary-4111" not in "".join(traceback.format_exception(caught.value))
    assert caught.value.__context__ is None


async def test_a_plain_function_runs_in_a_thread() -> None:
    """It doesn't hold up the event loop; an async one runs in it."""
    here = threading.get_ident()

    def plain() -> int:
        return threading.get_ident()

    async def native() -> int:
        return threading.get_ident()

    context: Any = SimpleNamespace(_begins=None)
    assert await registered(plain).call({}, context, None) != here
    assert await registered(native).call({}, context, None) == here


async def test_callables_of_other_kinds_can_be_activities() -> None:
    """Objects with an async __call__, and plain functions that return an awaitable, are awaited."""

    class Caller:
        async def __call__(self, n: int) -> int:
            return n + 1

    async def later(n: int) -> int:
        return n + 2

    def returns_awaitable(n: int) -> Any:
        return later(n)

    context: Any = SimpleNamespace(_begins=None)
    assert await registered(Caller(), name="caller").call({"n": 1}, context, None) == 2
    assert await registered(returns_awaitable).call({"n": 1}, context, None) == 3


def test_a_context_parameter_is_known_by_its_annotation() -> None:
    """Whatever its name and place."""

    def work(n: int, step: StepContext) -> None: ...

    n, step = registered(work).parameters
    assert (n.is_context, step.is_context) == (False, True)


def test_a_context_parameter_may_do_without() -> None:
    """As in a function that other code calls, too, without a context."""

    def older(step: Optional[StepContext] = None) -> None: ...  # noqa: UP045

    def newer(step: StepContext | None = None) -> None: ...

    def annotated(step: Annotated[StepContext | None, "of the step"] = None) -> None: ...

    for function in (older, newer, annotated):
        [step] = registered(function).parameters
        assert step.is_context


class _Crossed(BaseModel):
    id: str = Field(alias="name")
    name: str = Field(alias="title")


class _Behind(BaseModel):
    first: int = Field(0, validation_alias=AliasChoices("f", AliasPath("second", 0)))  # type: ignore[pydantic-alias]
    second: list[int]


class _Clear(BaseModel):
    id: str = Field("", validation_alias=AliasChoices("id", "name"))  # type: ignore[pydantic-alias]
    title: str = Field(alias="heading")


@pytest.mark.parametrize("annotation", [_Crossed, list[_Crossed], dict[str, _Behind], _Behind | None])
def test_a_field_that_has_the_name_of_anothers_alias_is_refused(annotation: Any) -> None:
    """What is recorded has the names of the fields: one of the two would be read as the other."""
    with pytest.raises(InvalidDefinition, match=r"is an alias of its field '(id|first)' as well.*rename one"):
        typed(annotation)
    assert typed(_Clear).validate_python({"name": "I-1", "heading": "Lamp"}).id == "I-1"


def test_what_an_undo_is_given_anyway_is_no_argument_of_a_step() -> None:
    """A step may have `args` for its compensation as well, but its `output` comes from what was done."""
    registry = ActivityRegistry()

    @registry.execute()
    async def reserve(sku: str, ctx: StepContext) -> None: ...

    @registry.compensate("reserve")
    async def release(output: str, why: str = "") -> None: ...

    @registry.execute()
    async def show(**rest: Any) -> None: ...

    assert registry.get("reserve").takes() == {"sku", "why"}
    assert registry.get("show").takes() is None


class _Key(BaseModel, frozen=True):
    name: str


def test_a_counter_of_models_is_written() -> None:
    """It is a mapping that has one parameter only, of its keys."""

    def count() -> Counter[_Key]:
        return Counter([_Key(name="a")])

    assert registered(count).dump(count()) == b"""{"name='a'":1}"""
