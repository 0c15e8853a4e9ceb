"""Whole runs as they are dispatched: the same one again, inputs and their models, and what is refused."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import pytest
from pydantic import BaseModel, ConfigDict, Field
from tests.integration.runs import working
from tests.patience import PATIENCE

from paigeant import ActivityRegistry, NonRetryableError, Paigeant, Settings, Step, Workflow
from paigeant.errors import ArgumentError, InputInvalid, RunConflict, UnknownActivity, UnknownWorkflow


async def test_the_same_id_is_the_same_run(settings: Settings) -> None:
    """With the same input in any order of keys; with another it is a conflict."""
    activity = ActivityRegistry()
    done: list[int] = []

    @activity.execute()
    async def work(n: int) -> None:
        done.append(n)

    workflow = Workflow("w", ["work"])
    async with working(settings, activity) as app:
        run = await app.dispatch(workflow, {"n": 1, "m": 2}, workflow_id="r")
        await run.wait(PATIENCE)
        again = await app.dispatch(workflow, {"m": 2, "n": 1}, workflow_id="r")
        assert (await again.wait(PATIENCE)).status == "completed"
        with pytest.raises(RunConflict, match="another input"):
            await app.dispatch(workflow, {"n": 2, "m": 2}, workflow_id="r")
        with pytest.raises(RunConflict, match="workflow 'w'"):
            await app.dispatch(Workflow("v", ["work"]), {"n": 1, "m": 2}, workflow_id="r")
    assert done == [1]


# -- inputs


class Noted(BaseModel):
    n: int
    note: UUID = Field(default_factory=uuid4)


async def test_what_a_model_adds_makes_no_other_input(settings: Settings) -> None:
    """A dispatch that is repeated finds its run, though the model of the input would add something else this time."""
    activity = ActivityRegistry()

    @activity.execute()
    async def show(note: UUID) -> UUID:
        return note

    workflow = Workflow("w", ["show"], input_model=Noted)
    async with working(settings, activity) as app:
        run = await app.dispatch(workflow, {"n": 1}, workflow_id="r")
        note = (await run.wait(PATIENCE)).output
        again = await app.dispatch(workflow, {"n": 1}, workflow_id="r")
        assert (await again.wait(PATIENCE)).output == note
        written_out = await app.dispatch(workflow, Noted(n=1, note=UUID(note)), workflow_id="r")
        assert (await written_out.wait(PATIENCE)).output == note
        for other in ({"n": 2}, Noted(n=1)):
            with pytest.raises(RunConflict, match="another input"):
                await app.dispatch(workflow, other, workflow_id="r")


class Wanted(BaseModel):
    sku: str
    quantity: int = 1


async def test_an_input_is_checked_against_its_model(settings: Settings) -> None:
    """What doesn't fit is refused at dispatch with the field's name; what fits arrives with its defaults."""
    activity = ActivityRegistry()

    @activity.execute()
    async def show(sku: str, quantity: int) -> str:
        return f"{quantity} {sku}"

    workflow = Workflow("w", ["show"], input_model=Wanted)
    async with working(settings, activity) as app:
        for given in ({"sku": "A"}, Wanted(sku="A")):
            assert (await (await app.dispatch(workflow, given)).wait(PATIENCE)).output == "1 A"
        with pytest.raises(InputInvalid, match=r"'w' doesn't fit: quantity"):
            await app.dispatch(workflow, {"sku": "A", "quantity": "many"})
        assert len(await app.store.list_runs()) == 2


class Parcel(BaseModel):
    model_config = ConfigDict(extra="forbid")

    parcel_id: int = Field(alias="parcelId")
    net_weight: float = Field(validation_alias="net", serialization_alias="netWeight")


async def test_a_model_with_aliases_arrives_as_it_was(settings: Settings) -> None:
    """An input may have either names of a model's fields, or be one; outputs come back, to undos too."""
    activity = ActivityRegistry()
    arrived: list[Parcel] = []

    @activity.execute()
    async def pack(parcel_id: int, net_weight: float) -> Parcel:
        return Parcel(parcelId=parcel_id, net=net_weight)

    @activity.compensate("pack")
    async def unpack(output: Parcel) -> None:
        arrived.append(output)

    @activity.execute()
    async def weigh(pack: Parcel) -> None:
        arrived.append(pack)
        raise NonRetryableError("too heavy")

    parcel = Parcel(parcelId=7, net=0.5)
    workflow = Workflow("w", ["pack", "weigh"], input_model=Parcel)
    async with working(settings, activity) as app:
        for given in ({"parcelId": 7, "net": 0.5}, {"parcel_id": 7, "net_weight": 0.5}, parcel):
            run = await app.dispatch(workflow, given)
            assert (await run.wait(PATIENCE)).status == "compensated"
    assert arrived == [parcel] * 6


# -- what is refused


def _cycle() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["again"] = value
    return value


@pytest.mark.parametrize(
    ("given", "options", "error", "said"),
    [
        ([1], {}, InputInvalid, "expected an object"),
        ("text", {}, InputInvalid, "expected an object"),
        ({"x": object()}, {}, InputInvalid, "can't be written as JSON"),
        (_cycle(), {}, InputInvalid, "contains itself"),
        ({"n": 1}, {"workflow_id": ""}, InputInvalid, "1 to 200 characters"),
        ({"n": 1}, {"workflow_id": "a b"}, InputInvalid, "no blanks"),
        ({"n": 1}, {"workflow_id": 5}, InputInvalid, "1 to 200 characters"),
        ({}, {}, ArgumentError, "needs 'n'"),
        ({"n": "many"}, {}, ArgumentError, "'n' of activity 'work' doesn't fit"),
    ],
)
async def test_a_dispatch_that_can_t_work_is_refused(
    settings: Settings, given: Any, options: dict[str, Any], error: type[Exception], said: str
) -> None:
    """With a clear error, and no run."""
    activity = ActivityRegistry()

    @activity.execute()
    async def work(n: int) -> None: ...

    async with Paigeant(settings, activities=activity) as app:
        with pytest.raises(error, match=said):
            await app.dispatch(Workflow("w", ["work"]), given, **options)
        assert await app.store.list_runs() == []


async def test_args_that_nobody_takes_are_refused(settings: Settings) -> None:
    """A mistyped name in a step's args is an error, not the default instead; `**rest` takes all, others may be known
    elsewhere."""
    activity = ActivityRegistry()

    @activity.execute()
    async def charge(amount: int = 1) -> int:
        return amount

    @activity.execute()
    async def show(**rest: Any) -> dict[str, Any]:
        return rest

    wrong = Workflow("w", ["charge", Step("charge", args={"amuont": 5})])
    right = Workflow("w", [Step("charge", args={"amount": 5}), Step("show", args={"any": 1})])
    elsewhere = Workflow("w", ["charge", Step("theirs", args={"any": 1})])
    async with working(settings, activity) as app:
        with pytest.raises(
            ArgumentError, match=r"'charge_2' .* 'amuont', which .* doesn't take; did you mean 'amount'"
        ):
            await app.dispatch(wrong)
        assert await app.store.list_runs() == []
        result = await (await app.dispatch(right)).wait(PATIENCE)
        assert result.outputs == {"charge": 5, "show": {"charge": 5, "any": 1}}
        await app.dispatch(elsewhere)


async def test_unknown_names_are_answered_with_the_nearest(settings: Settings) -> None:
    """A workflow that isn't there, and, when strict, an activity that isn't."""
    activity = ActivityRegistry()
    activity.execute(name="work")(lambda: 1)
    strict = settings.model_copy(update={"strict": True})
    async with Paigeant(strict, activities=activity, workflows=[Workflow("fulfil", ["wrok"])]) as app:
        with pytest.raises(UnknownWorkflow, match="did you mean 'fulfil'"):
            await app.dispatch("fulfill")
        with pytest.raises(UnknownActivity, match="did you mean 'work'"):
            await app.dispatch("fulfil")


async def test_a_name_where_no_workflow_is_known_is_told_how_to_be_one(settings: Settings) -> None:
    """Whoever has one and dispatches it by its name forgot to say so, or needs no name."""
    async with Paigeant(settings) as app:
        with pytest.raises(UnknownWorkflow, match=r"dispatch the Workflow itself, or .*workflows="):
            await app.dispatch("fulfil", {})
