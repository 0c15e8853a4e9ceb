"""Patience: a store that can't answer for a while is asked again, so that no step fails for its trouble."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from paigeant.errors import StoreUnavailable
from paigeant.store import Request, RunValues, StepKey

__all__ = ["PatientValues", "patiently"]

log = logging.getLogger("paigeant.patience")

Answer = TypeVar("Answer")

_LONGEST_PAUSE = 2.0


async def patiently(
    ask: Callable[[], Awaitable[Answer]],
    what: str,
    *,
    seconds: float,
    chance: Callable[[], float] = random.random,
) -> Answer:
    """What `ask` gives, asked again for `seconds` while the store can't answer; `what` names it in the log.

    There each reason is told once: in an outage all steps of a worker ask, again and again.

    Raises StoreUnavailable when the time is up.
    """
    until = time.monotonic() + seconds
    pause, told = 0.05, set[str]()
    while True:
        try:
            return await ask()
        except StoreUnavailable as exc:
            if time.monotonic() > until:
                raise
            why = str(exc)
            log.log(logging.DEBUG if why in told else logging.WARNING, "%s has to wait: %s", what, why)
            told.add(why)
        await asyncio.sleep(pause * (0.5 + chance()))
        pause = min(pause * 2, _LONGEST_PAUSE)


class PatientValues:
    """The values of runs as an activity asks for them. `opened` is told of a new request that a step has made."""

    def __init__(
        self,
        values: RunValues,
        *,
        seconds: float,
        chance: Callable[[], float] = random.random,
        opened: Callable[[Request], None] = lambda _: None,
    ) -> None:
        self._values = values
        self._seconds = seconds
        self._chance = chance
        self._opened = opened

    async def load_output(self, workflow_id: str, step: str) -> bytes | None:
        return await self._ask(lambda: self._values.load_output(workflow_id, step), f"output of '{step}'")

    async def load_variable(self, workflow_id: str, key: str, default: Any = None) -> Any:
        return await self._ask(
            lambda: self._values.load_variable(workflow_id, key, default), f"variable '{key}'"
        )

    async def save_unit(self, key: StepKey, name: str, value: bytes) -> bytes:
        return await self._ask(lambda: self._values.save_unit(key, name, value), f"record of '{name}'")

    async def load_unit(self, key: StepKey, name: str) -> bytes | None:
        return await self._ask(lambda: self._values.load_unit(key, name), f"record of '{name}'")

    async def load_units(self, key: StepKey) -> dict[str, bytes]:
        return await self._ask(lambda: self._values.load_units(key), f"records of step '{key.step}'")

    async def take_signal(
        self, key: StepKey, unit: str, name: str, *, otherwise: bytes | None = None
    ) -> bytes | None:
        return await self._ask(
            lambda: self._values.take_signal(key, unit, name, otherwise=otherwise), f"signal '{name}'"
        )

    async def open_request(self, request: Request) -> bool:
        is_new = await self._ask(lambda: self._values.open_request(request), f"request '{request.name}'")
        if is_new:
            self._opened(request)
        return is_new

    async def _ask(self, ask: Callable[[], Awaitable[Answer]], what: str) -> Answer:
        return await patiently(ask, what, seconds=self._seconds, chance=self._chance)
