"""The values of runs in SQL: outputs, variables, and the units of steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pydantic_core import from_json
from sqlalchemy import select

from paigeant import codec
from paigeant.errors import InputInvalid, PaigeantError, RunNotFound
from paigeant.heads import lock_runs
from paigeant.lane import Later, Tx
from paigeant.rows import (
    ask_unit,
    encoded,
    save_units,
    save_variables,
    statuses_of,
    unit_of,
    units_of,
    variable_in,
)
from paigeant.slip import Phase
from paigeant.store import StepKey
from paigeant.stores.sql.part import SqlPart, its_run, unwrapped
from paigeant.tables import step_executions, workflow_variables

__all__ = ["SqlValues"]


class SqlValues(SqlPart):
    """What steps ask for and leave."""

    async def load_output(self, workflow_id: str, step: str) -> bytes | None:
        query = select(step_executions.c.output).where(
            step_executions.c.workflow_id == workflow_id,
            step_executions.c.step == step,
            step_executions.c.phase == Phase.DO,
        )
        return encoded(await self.database.ask(lambda connection: connection.execute(query).scalar()))

    async def save_variable(self, workflow_id: str, key: str, value: Any) -> None:
        try:
            text = codec.dump(value).decode()
        except codec.JsonInvalid as exc:
            raise InputInvalid(f"variable '{key}' can't be written as JSON: {exc}") from exc
        unwrapped(await self.database.write(self._save_variable, (workflow_id, key, text), size=len(text)))

    @its_run
    def _save_variable(self, tx: Tx, requests: Sequence[tuple[str, str, str]]) -> list[PaigeantError | None]:
        lock_runs(tx, {run_id for run_id, _, _ in requests})
        statuses = statuses_of(tx, [run_id for run_id, _, _ in requests])
        known = [request for request in requests if request[0] in statuses]
        save_variables(tx, known)
        return [None if run_id in statuses else RunNotFound(run_id) for run_id, _, _ in requests]

    async def load_variable(self, workflow_id: str, key: str, default: Any = None) -> Any:
        query = select(workflow_variables.c.value).where(
            workflow_variables.c.workflow_id == workflow_id, workflow_variables.c.key == key
        )
        text = await self.database.ask(lambda connection: connection.execute(query).scalar())
        return default if text is None else from_json(variable_in(text))

    async def save_unit(self, key: StepKey, name: str, value: bytes) -> bytes:
        return await self.database.write(self._save_unit, (key, name, value), size=len(value))

    def _save_unit(
        self, tx: Tx, requests: Sequence[tuple[StepKey, str, bytes]]
    ) -> Sequence[bytes | Later[bytes]]:
        # An agent reads its model's answer meanwhile, or puts the results of its tools together.
        tx.is_beside = True
        if save_units(tx, requests):
            return [value for _, _, value in requests]
        return [Later(self._standing(tx, *request)) for request in requests]

    @staticmethod
    def _standing(tx: Tx, key: StepKey, name: str, value: bytes) -> Callable[[], bytes]:
        # Asked along with the commit: nothing in the transaction depends on it.
        asked = ask_unit(tx, key, name)
        return lambda: found if (found := asked()) is not None else value

    async def load_unit(self, key: StepKey, name: str) -> bytes | None:
        return await self.database.read(self._load_unit, (key, name))

    def _load_unit(self, tx: Tx, requests: Sequence[tuple[StepKey, str]]) -> list[bytes | None]:
        return [unit_of(tx, key, name) for key, name in requests]

    async def load_units(self, key: StepKey) -> dict[str, bytes]:
        return await self.database.read(self._load_units, key)

    def _load_units(self, tx: Tx, requests: Sequence[StepKey]) -> list[dict[str, bytes]]:
        return [units_of(tx, key) for key in requests]
