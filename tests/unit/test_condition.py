"""Conditions of steps."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable
from typing import Any

import pytest

from paigeant import condition
from paigeant.errors import InvalidCondition


@pytest.mark.parametrize(
    ("expression", "payload", "holds"),
    [
        ("quantity > 1", {"quantity": 2}, True),
        ("quantity > 1", {"quantity": 1}, False),
        ("price >= 1.5", {"price": 1.5}, True),
        ("order.total > 10 && order.country == 'DE'", {"order": {"total": 11, "country": "DE"}}, True),
        ("'x' in tags", {"tags": ["x"]}, True),
        ("items.all(i, i.n > 0)", {"items": [{"n": 1}, {"n": 2}]}, True),
        ("items.exists(i, i > 1)", {"items": [1]}, False),
        ("has(order.note)", {"order": {}}, False),
        ("size(name) == 0", {"name": ""}, True),
        ("value == null", {"value": None}, True),
        ("!done", {"done": False}, True),
        ("name.startsWith('ä')", {"name": "äh"}, True),
        ("true", {}, True),
    ],
)
def test_a_condition_is_computed(expression: str, payload: dict[str, Any], holds: bool) -> None:
    """CEL over the payload gives true or false."""
    condition.check(expression)
    assert condition.evaluate(expression, payload) is holds


def test_a_condition_knows_its_names() -> None:
    """The names that a condition refers to are what has to be fetched for it."""
    assert condition.names("a > 1 && b.c == 'x' || !a") == ["a", "b"]


@pytest.mark.parametrize("expression", ["a >", "a >> b", "import os", "a = 1", "", "  ", "(", None, 5])
def test_what_is_no_condition_is_refused(expression: Any) -> None:
    """An expression that doesn't compile is an error where it is written, in one line that shows it."""
    with pytest.raises(InvalidCondition) as caught:
        condition.check(expression)
    assert repr(expression) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "many",
    [
        lambda n: "a" + ".a" * n,
        lambda n: "a" + "[0]" * n,
        lambda n: "a" + ".f()" * n,
        lambda n: "1+" * n + "1",
        lambda n: "!" * n + "a",
        lambda n: "(" * n + "a" + ")" * n,
        lambda n: "[" * n + "]" * n,
        lambda n: "a?b:" * n + "c",
    ],
)
def test_a_condition_is_bounded(many: Callable[[int], str]) -> None:
    """What is short enough is read, well or ill; what isn't would end the process, and is refused unread."""
    longest = max(n for n in range(2001) if len(many(n)) <= 2000)
    with contextlib.suppress(InvalidCondition):
        condition.evaluate(many(longest), {"a": True})
    with pytest.raises(InvalidCondition, match="characters, at most 2,000 are allowed"):
        condition.check(many(50_000))


@pytest.mark.parametrize(
    ("expression", "payload", "said"),
    [
        ("a > 1", {}, "names 'a'; there is nothing"),
        ("a > 1", {"b": 1, "c": 2}, "names 'a'; there is b, c"),
        ("a.b > 1", {"a": {}}, "b"),
        ("a > 1", {"a": "text"}, "can't be computed"),
        ("1 / a > 0", {"a": 0}, "can't be computed"),
        ("a", {"a": 1}, "gives 1, expected true or false"),
        ("a", {"a": None}, "gives None"),
        ("'true'", {}, "expected true or false"),
        ("items.all(i, i.price > 10)", {"items": [{"price": "12"}]}, "can't be computed: No such overload"),
        ("items.all(i, i > least)", {"items": [1]}, "names 'least'; there is items"),
        ("name.matches('(')", {"name": "x"}, "unclosed group"),
    ],
)
def test_a_condition_that_can_t_be_computed_says_why(
    expression: str, payload: dict[str, Any], said: str
) -> None:
    """What isn't there, has the wrong type, or gives no truth value is an error that says so."""
    with pytest.raises(InvalidCondition) as caught:
        condition.evaluate(expression, payload)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_large_numbers_in_the_payload_do_no_harm() -> None:
    """A value that CEL can't hold is no trouble for a condition that doesn't use it."""
    assert condition.evaluate("a == 1", {"a": 1, "big": 2**70})


@pytest.mark.parametrize(
    "expression",
    ["password", "login.password + '!'", "duration(password) > duration('1s')", "login[password]"],
)
def test_a_condition_that_fails_quotes_no_secret(expression: str) -> None:
    """A value with the name of a secret is neither what it gives nor why it can't be computed."""
    payload = {"password": "canary-4111", "login": {"password": "canary-4111"}}
    with pytest.raises(InvalidCondition) as caught:
        condition.evaluate(expression, payload)
    assert "canary-4111" not in "".join(traceback.format_exception(caught.value))
