"""Which value each parameter gets."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
from pydantic import BaseModel

from paigeant import ActivityRegistry, RoutingSlip, StepContext
from paigeant.activity import MISSING
from paigeant.arguments import Namespace, resolve
from paigeant.errors import ArgumentError
from paigeant.slip import Executed, StepStatus


class OutputStore:
    """Stands for a store that has recorded outputs."""

    def __init__(self, **outputs: bytes) -> None:
        self.outputs = outputs

    async def load_output(self, workflow_id: str, step: str) -> bytes | None:
        return self.outputs.get(step)


def names(payload: dict[str, Any] | None = None, *executed: Executed, store: Any = None) -> Namespace:
    """What a step can use after `executed`."""
    return Namespace("r", payload or {}, RoutingSlip(executed=executed), store)


async def given(function: Any, namespace: Namespace | None = None, **options: Any) -> dict[str, Any]:
    """The arguments that `function` gets."""
    registry = ActivityRegistry()
    registry.execute(name="work")(function)
    arguments, _ = await resolve(registry.get("work"), namespace or names(), **{"args": {}, **options})
    return arguments


def work(n: int = 7) -> None:
    """Takes a number."""


async def test_the_most_explicit_value_wins() -> None:
    """The step's args go before the payload, and that before the default."""
    assert await given(work, names({"n": 2}), args={"n": 1}) == {"n": 1}
    assert await given(work, names({"n": 2})) == {"n": 2}
    assert await given(work) == {}


async def test_an_undo_s_output_goes_before_all() -> None:
    """What the undone step returned can't be shadowed."""
    assert await given(work, names({"n": 3}), args={"n": 2}, first={"n": 1}) == {"n": 1}


@pytest.mark.parametrize("value", [None, 0, "", False, [], {}])
async def test_nothing_is_a_value(value: Any) -> None:
    """None, 0, "" and False are values, not gaps: the default doesn't replace them, wherever they stand."""

    def untyped(x="default"): ...

    assert await given(untyped, names({"x": value})) == {"x": value}
    assert await given(untyped, names({"x": "payload"}), args={"x": value}) == {"x": value}
    assert await given(untyped, names({}, Executed("x", "x"), store=OutputStore())) == {}


async def test_a_missing_argument_says_what_is_there() -> None:
    """The error names parameter and activity, lists what there is, and says what to do."""

    def needs(sku: str) -> None: ...

    namespace = names({"quantity": 1, "reserve": {}}, Executed("reserve", "reserve_stock"))
    with pytest.raises(ArgumentError) as caught:
        await given(needs, namespace, args={"note": 1})
    assert str(caught.value) == (
        "activity 'work' needs 'sku', which isn't there; there is: note, quantity, reserve, reserve_stock. "
        "Put it into the input, give it in the step's args, or give the parameter a default"
    )
    with pytest.raises(ArgumentError, match="there is: nothing"):
        await given(needs)


async def test_a_parameter_without_annotation_may_be_meant_for_the_context() -> None:
    """A name alone doesn't get the context: the error says what does. One that has an annotation isn't meant so."""

    def needs(ctx): ...

    with pytest.raises(ArgumentError, match=r"a default, or annotate it StepContext to be given that$"):
        await given(needs)

    def takes(anything: Any): ...

    with pytest.raises(ArgumentError, match=r"a default$"):
        await given(takes)


async def test_earlier_outputs_have_the_names_of_their_steps() -> None:
    """Under the step's id, and under the activity's name where nothing else has that; the last one counts."""

    def take(draft: int, write: int) -> None: ...

    namespace = names(
        {"draft": 1, "a": 2, "b": 3}, Executed("draft", "x"), Executed("a", "write"), Executed("b", "write")
    )
    assert await given(take, namespace) == {"draft": 1, "write": 3}


async def test_an_input_goes_before_an_activity_s_name() -> None:
    """A name that is there is never taken for an activity."""

    def take(write: int) -> None: ...

    assert await given(take, names({"write": 1, "a": 2}, Executed("a", "write"))) == {"write": 1}


async def test_a_skipped_step_has_no_output() -> None:
    """Its name is a gap, which a default may fill."""
    assert await given(work, names({}, Executed("n", "n", StepStatus.SKIPPED))) == {}


async def test_a_large_output_is_read_from_the_store() -> None:
    """Under the step's id and under its activity's name."""

    def take(a: int, write: int) -> None: ...

    namespace = names({}, Executed("a", "write", stored=True), store=OutputStore(a=b"5"))
    assert await given(take, namespace) == {"a": 5, "write": 5}


async def test_a_large_output_goes_before_an_input_of_its_name() -> None:
    """Where an output is kept makes no difference to which value is taken."""
    namespace = names({"n": 1}, Executed("n", "n", stored=True), store=OutputStore(n=b"2"))
    assert await given(work, namespace) == {"n": 2}
    assert await namespace.output("n") == 2
    assert await namespace.view(["n", "none"]) == {"n": 2}


async def test_the_rest_is_the_rest_of_the_payload() -> None:
    """A parameter of two stars gets all that no other parameter took: inputs, outputs large and small, and args."""

    def take(n: int, **rest: Any) -> None: ...

    namespace = names(
        {"n": 1, "x": 2, "a": 3},
        Executed("a", "w"),
        Executed("b", "w", stored=True),
        store=OutputStore(b=b"4"),
    )
    assert await given(take, namespace, args={"y": 5}) == {"n": 1, "x": 2, "a": 3, "b": 4, "y": 5}


async def test_a_context_parameter_gets_the_context() -> None:
    """And takes nothing from the payload, even where that has its name."""

    def take(ctx: StepContext) -> None: ...

    context: Any = object()
    assert await given(take, names({"ctx": 1}), context=context) == {"ctx": context}


class Item(BaseModel):
    sku: str
    quantity: int = 1


@dataclass
class Place:
    city: str


async def test_arguments_are_made_as_annotated() -> None:
    """Models, dataclasses, optional and unannotated parameters."""

    def take(item: Item, place: Place, items: list[Item], note: str | None, raw) -> None: ...

    arguments = await given(
        take,
        names(
            {
                "item": {"sku": "a"},
                "place": {"city": "x"},
                "items": [{"sku": "b"}],
                "note": None,
                "raw": {"any": 1},
            }
        ),
    )
    assert arguments == {
        "item": Item(sku="a"),
        "place": Place("x"),
        "items": [Item(sku="b")],
        "note": None,
        "raw": {"any": 1},
    }


async def test_each_attempt_gets_values_of_its_own() -> None:
    """What a function does to its arguments, annotated or not, reaches neither the payload nor the step's args."""

    def take(raw, loose: Any, typed: list[int], fixed, **rest: Any) -> None: ...

    payload = {"raw": {"of": [1]}, "loose": [1], "typed": [1], "other": {"of": [1]}, "output": [1]}
    args = {"fixed": {"of": [1]}, "further": [1]}
    before = json.dumps([payload, args])
    arguments = await given(take, names(payload), args=args)
    assert arguments.keys() == payload.keys() | args.keys()
    for value in arguments.values():
        (value if isinstance(value, list) else value["of"]).append(2)
        value.clear()
    assert json.dumps([payload, args]) == before


async def test_what_was_given_is_shown_as_json() -> None:
    """The record of a step's input has plain values, without context and defaults."""
    registry = ActivityRegistry()

    @registry.execute()
    def take(item: Item, ctx: StepContext, n: int = 1) -> None: ...

    _, shown = await resolve(registry.get("take"), names({"item": {"sku": "a"}}), args={})
    assert shown == {"item": {"sku": "a"}}


async def test_an_output_that_is_nowhere_is_missing() -> None:
    """Without a store, and for steps that aren't there."""
    assert await names().output("a") is MISSING
    assert await names().find("a") is MISSING
    assert await names({}, Executed("a", "a", stored=True), store=OutputStore()).output("a") is MISSING
