"""Run: a run as its users see it, by its id; and what its rows amount to."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic_core import from_json

from paigeant.control import Control
from paigeant.errors import RunTimeout
from paigeant.identity import GrantHandle, Mandate, SecurityContext
from paigeant.secret import SecretToken
from paigeant.slip import RUN_ENDED, Phase, RunStatus, StepStatus
from paigeant.store import Request, RunDetail, StepRecord
from paigeant.usage import Usage

__all__ = ["Run", "RunResult", "result_of", "usage_of"]

_WITH_RESULT = frozenset(
    {StepStatus.COMPLETED, StepStatus.SKIPPED, StepStatus.COMPENSATED, StepStatus.COMPENSATION_FAILED}
)


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended. `output` is that of its last step, `outputs` are all by step id, as JSON gives them back.

    `usage` is what agents used in all of its steps, tried in vain or not, and in their compensations.
    """

    id: str
    status: RunStatus
    output: Any = None
    outputs: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    usage: Usage = field(default_factory=Usage)


class Run:
    """A run, by its id. It may be dispatched, worked on and asked about in different processes."""

    def __init__(self, control: Control, workflow_id: str) -> None:
        self._control = control
        self._store = control.store
        self.id = workflow_id

    def __repr__(self) -> str:
        return f"Run({self.id!r})"

    async def status(self) -> RunStatus:
        """Where the run is. Raises RunNotFound."""
        return await self._store.run_status(self.id)

    async def wait(self, timeout: float | None = None) -> RunResult:
        """The result, once the run has ended. Raises RunTimeout after `timeout` seconds, RunNotFound."""
        try:
            async with asyncio.timeout(timeout):
                while True:
                    await self._store.wait_ended(self.id)
                    detail = await self.detail()
                    if detail.run.status in RUN_ENDED:
                        return result_of(detail)
                    # It was taken up again, and only now was its end from before that heard of.
        except TimeoutError as exc:
            if await self.status() not in RUN_ENDED:
                raise RunTimeout(
                    f"run '{self.id}' has not ended within {timeout:g} s; it goes on: "
                    f"`paigeant runs show {self.id}` tells where it is"
                ) from exc
        return result_of(await self.detail())

    async def detail(self) -> RunDetail:
        """The run with all its steps and variables as they are recorded now. Raises RunNotFound.

        The usage of a step that has no result is that of what it has recorded so far.
        """
        detail = await self._store.load_run(self.id)
        if all(map(_is_counted, detail.steps)):
            return detail
        return replace(detail, steps=tuple([await self._counted(row) for row in detail.steps]))

    async def _counted(self, row: StepRecord) -> StepRecord:
        if _is_counted(row):
            return row
        units = await self._store.load_units(row.key)
        used = Usage.of_units(units.values())
        return replace(row, usage=used.dump() if used else None)

    async def cancel(self, reason: str = "cancelled") -> RunStatus:
        """Do nothing more and undo what was done; gives the run's state. Raises InvalidTransition, RunNotFound."""
        return await self._control.cancel(self.id, reason)

    async def retry(self) -> RunStatus:
        """Take up a failed or compensation_failed run where it stopped. Raises InvalidTransition, RunNotFound."""
        return await self._control.retry(self.id)

    async def signal(self, name: str, value: Any = None, *, sender: str = "") -> None:
        """Send a named value to the run, by `sender`. Raises RunNotFound, InvalidTransition, InputInvalid.

        It is kept until a step waits for it: `WaitFor` or `StepContext.wait_for`.
        """
        await self._control.signal(self.id, name, value, sender=sender)

    async def grant(self, given: SecretToken | str | GrantHandle, *, sender: str = "") -> RunStatus:
        """Let the run go on with a fresh grant of the person for whom it acts; gives the run's state.

        A handle is recorded with the run. A token (a text is one) travels with the message of the step that waits for
        one, and is recorded nowhere. See `Control.grant` for what it raises.
        """
        return await self._control.grant(self.id, given, sender=sender)

    async def identity(self) -> SecurityContext | None:
        """For whom the run acts, as its dispatch said; None for nobody. Raises RunNotFound."""
        detail = await self._store.load_run(self.id, inline_bytes=0)
        mandate = Mandate.read(detail.run.headers)
        return None if mandate is None else mandate.identity

    async def requests(self, *, only_open: bool = True) -> list[Request]:
        """What the run asks of people, the oldest first. Raises RunNotFound."""
        await self.status()
        return await self._store.list_requests(workflow_id=self.id, only_open=only_open)


def _is_counted(row: StepRecord) -> bool:
    """Whether the row says what agents have used in it: with its result, or because nobody has begun it."""
    has_result = row.status in _WITH_RESULT or (row.status is StepStatus.FAILED and row.usage is not None)
    return has_result or not row.epoch


def result_of(detail: RunDetail) -> RunResult:
    """What the recorded steps of a run amount to."""
    outputs: dict[str, Any] = {}
    output = None
    for row in detail.steps:
        done = row.phase is Phase.DO and row.status in (
            StepStatus.COMPLETED,
            StepStatus.COMPENSATED,
            StepStatus.COMPENSATION_FAILED,
        )
        if done and row.output is not None:
            output = outputs[row.step] = from_json(row.output)
    run = detail.run
    last = output if run.status is RunStatus.COMPLETED else None
    return RunResult(run.id, run.status, last, outputs, run.error, usage_of(detail))


def usage_of(detail: RunDetail) -> Usage:
    """What agents used in all steps of a run, and in their compensations."""
    return Usage.total(used for row in detail.steps if (used := Usage.read(row.usage)) is not None)
