"""Which value each parameter of an activity gets: the step's args, then the payload, then the default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic_core import from_json

from paigeant import codec
from paigeant.activity import MISSING, Activity
from paigeant.context import StepContext
from paigeant.errors import ArgumentError
from paigeant.slip import RoutingSlip
from paigeant.store import RunValues
from paigeant.values import value

__all__ = ["Namespace", "resolve"]


@value
class Namespace:
    """The names that a step can use: inputs, variables, outputs of earlier steps under their ids.

    The output of a step goes before a variable, and that before an input of the same name; where nothing has the name,
    the last output of an activity of that name stands for it. Outputs too large to travel are read from the store.
    """

    workflow_id: str
    payload: Mapping[str, Any]
    slip: RoutingSlip
    store: RunValues | None = None

    def names(self) -> list[str]:
        """All names that `find` knows, sorted."""
        done = [entry for entry in self.slip.executed if entry.stored or entry.step_id in self.payload]
        return sorted(
            {*self.payload, *(entry.step_id for entry in done), *(entry.activity for entry in done)}
        )

    async def find(self, name: str) -> Any:
        """The value of `name`, or MISSING."""
        done = self.slip.find(name)
        if done is not None and done.step_id == name and done.stored:
            return await self.output(name)
        if name in self.payload:
            return self.payload[name]
        if done is None:
            return MISSING
        return await self.output(done.step_id) if done.stored else self.payload.get(done.step_id, MISSING)

    async def output(self, step_id: str) -> Any:
        """The output of a recorded step, from the payload or the store; MISSING when there is none."""
        done = self.slip.find(step_id)
        # What is in the payload under the name of a step whose output is stored is an input or a variable.
        stored = done is not None and done.step_id == step_id and done.stored
        if step_id in self.payload and not stored:
            return self.payload[step_id]
        text = None if self.store is None else await self.store.load_output(self.workflow_id, step_id)
        return MISSING if text is None else from_json(text)

    async def everything(self) -> dict[str, Any]:
        """All values by name; outputs under their step ids only."""
        stored = [entry.step_id for entry in self.slip.executed if entry.stored]
        return {**self.payload, **await self.view(stored)}

    async def view(self, names: list[str]) -> dict[str, Any]:
        """The values of those of `names` that there are."""
        found = {name: await self.find(name) for name in names}
        return {name: value for name, value in found.items() if value is not MISSING}


async def resolve(
    activity: Activity,
    namespace: Namespace,
    *,
    args: Mapping[str, Any],
    context: StepContext | None = None,
    first: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments for `activity`, validated, and the same as JSON values for the record.

    What the activity does to its arguments changes neither the payload nor `args`, which further attempts and later
    steps are given.
    `first` goes before all others: an undo gets `output` there. Without a `context` its parameter is left out, and
    what is missing is found out before anything runs. Raises ArgumentError.
    """
    arguments: dict[str, Any] = {}
    shown: dict[str, Any] = {}
    explicit = {**args, **(first or {})}
    for parameter in activity.parameters:
        if parameter.is_context:
            arguments[parameter.name] = context
            continue
        value = explicit.get(parameter.name, MISSING)
        if value is MISSING:
            value = await namespace.find(parameter.name)
        if value is not MISSING:
            shown[parameter.name] = value
            arguments[parameter.name] = parameter.read(activity.name, value)
        elif parameter.default is MISSING:
            context_too = ", or annotate it StepContext to be given that" if parameter.is_bare else ""
            raise ArgumentError(
                f"activity '{activity.name}' needs '{parameter.name}', which isn't there; "
                f"there is: {', '.join(sorted({*namespace.names(), *explicit})) or 'nothing'}. "
                f"Put it into the input, give it in the step's args, or give the parameter a default{context_too}"
            )
    if activity.takes_rest:
        known = {parameter.name for parameter in activity.parameters}
        rest = {**await namespace.everything(), **explicit}
        arguments.update((name, codec.copied(value)) for name, value in rest.items() if name not in known)
    return arguments, shown
