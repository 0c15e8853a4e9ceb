"""What comes to runs from outside, in SQL: signals, and the requests that some of them answer; rows by `inbox.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from paigeant import interventions
from paigeant.errors import InvalidTransition, PaigeantError, RequestNotFound, RunNotFound
from paigeant.heads import lock_runs
from paigeant.lane import Tx, needing
from paigeant.rows import statuses_of
from paigeant.slip import RUN_ENDED
from paigeant.store import Request, StepKey
from paigeant.stores.sql import inbox
from paigeant.stores.sql.part import SqlPart, its_run, unwrapped

__all__ = ["SqlOutside"]


class SqlOutside(SqlPart):
    """Signals and requests."""

    async def take_signal(
        self, key: StepKey, unit: str, name: str, *, otherwise: bytes | None = None
    ) -> bytes | None:
        return await self.database.write(self._take_signal, (key, unit, name, otherwise))

    @needing(lock_runs, lambda request: (request[0].workflow_id,))
    def _take_signal(
        self, tx: Tx, requests: Sequence[tuple[StepKey, str, str, bytes | None]]
    ) -> list[bytes | None]:
        lock_runs(tx, {key.workflow_id for key, *_ in requests})
        return [inbox.take(tx, *request) for request in requests]

    async def record_signal(self, workflow_id: str, name: str, value: bytes, *, sender: str = "") -> None:
        unwrapped(
            await self.database.write(self._signal, (workflow_id, name, value, sender), size=len(value))
        )

    @its_run
    def _signal(self, tx: Tx, requests: Sequence[tuple[str, str, bytes, str]]) -> list[PaigeantError | None]:
        lock_runs(tx, {run_id for run_id, *_ in requests})
        statuses = statuses_of(tx, [run_id for run_id, *_ in requests])
        answers: list[PaigeantError | None] = []
        for run_id, name, value, sender in requests:
            status = statuses.get(run_id)
            if status is None:
                answers.append(RunNotFound(run_id))
            elif status in RUN_ENDED:
                answers.append(InvalidTransition(f"run '{run_id}' has ended {status}; it takes no signals"))
            else:
                self.write(tx, inbox.put(tx, run_id, name, value, sender))
                answers.append(None)
        return answers

    async def record_grant(
        self, workflow_id: str, *, headers: Mapping[str, str] | None = None, sender: str = ""
    ) -> list[StepKey]:
        woken: list[StepKey] = unwrapped(
            await self.database.write(self._grant, (workflow_id, headers, sender))
        )
        return woken

    @its_run
    def _grant(
        self, tx: Tx, requests: Sequence[tuple[str, Mapping[str, str] | None, str]]
    ) -> list[list[StepKey] | PaigeantError]:
        return [self._grant_one(tx, *request) for request in requests]

    def _grant_one(
        self, tx: Tx, run_id: str, headers: Mapping[str, str] | None, sender: str
    ) -> list[StepKey] | PaigeantError:
        lock_runs(tx, [run_id])
        status = statuses_of(tx, [run_id]).get(run_id)
        if status is None:
            return RunNotFound(run_id)
        if status in RUN_ENDED:
            return InvalidTransition(f"run '{run_id}' has ended {status}; it takes no grants")
        try:
            woken, changes = inbox.grant(tx, run_id, headers, sender, grace=self.grace)
        except PaigeantError as exc:
            return exc
        self.write(tx, changes)
        return woken

    async def open_request(self, request: Request) -> bool:
        return await self.database.write(self._open_request, request, size=len(request.asked))

    def _open_request(self, tx: Tx, requests: Sequence[Request]) -> list[bool]:
        new = {
            request.id: inbox.keep_request(tx, request)
            for request in sorted(requests, key=lambda request: request.id)
        }
        return [new[request.id] for request in requests]

    async def answer_request(self, request_id: str, answer: bytes, *, sender: str = "") -> Request:
        known = await self.load_request(request_id)
        if known is None:
            raise RequestNotFound(request_id)
        answered: Request = unwrapped(
            await self.database.write(
                self._answer, (known.workflow_id, request_id, answer, sender), size=len(answer)
            )
        )
        return answered

    @its_run
    def _answer(
        self, tx: Tx, requests: Sequence[tuple[str, str, bytes, str]]
    ) -> list[Request | PaigeantError]:
        return [self._answer_one(tx, *request) for request in requests]

    def _answer_one(
        self, tx: Tx, run_id: str, request_id: str, answer: bytes, sender: str
    ) -> Request | PaigeantError:
        lock_runs(tx, [run_id])
        found = inbox.requests_of(tx, request_id=request_id)
        request = found[0] if found else None
        try:
            if not interventions.answers(request_id, request, answer):
                return found[0]
        except PaigeantError as exc:
            return exc
        self.write(tx, inbox.put(tx, run_id, found[0].signal, answer, sender))
        return inbox.requests_of(tx, request_id=request_id)[0]

    async def load_request(self, request_id: str) -> Request | None:
        found = await self.database.read(self._requests, (request_id, None, False, 1))
        return found[0] if found else None

    async def list_requests(
        self, *, workflow_id: str | None = None, only_open: bool = True, limit: int = 100
    ) -> list[Request]:
        return await self.database.read(self._requests, (None, workflow_id, only_open, limit))

    def _requests(
        self, tx: Tx, requests: Sequence[tuple[str | None, str | None, bool, int]]
    ) -> list[list[Request]]:
        return [
            inbox.requests_of(
                tx, request_id=request_id, workflow_id=workflow_id, only_open=only_open, limit=limit
            )
            for request_id, workflow_id, only_open, limit in requests
        ]
