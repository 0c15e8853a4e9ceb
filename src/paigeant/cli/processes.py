"""Several worker processes: starts them, starts anew what dies, hands signals on, and ends when they have ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from paigeant.cli import session
from paigeant.cli.opening import AWAY
from paigeant.cli.stops import stop_signals

if TYPE_CHECKING:
    from paigeant.settings import Settings

__all__ = ["pause_before", "supervise"]

log = logging.getLogger("paigeant.supervisor")

_HEALTHY_SECONDS = 30.0
_WRONG_USE, _UNREACHABLE = 2, 3


def pause_before(deaths: int) -> float:
    """Seconds to wait before a process is started again after `deaths` in a row: doubling, at most 30."""
    return float(min(0.5 * 2 ** max(deaths - 1, 0), 30.0))


async def supervise(command: Sequence[str], settings: Settings, *, until_idle: bool) -> int:
    """Keep `settings.processes` processes of `command` running until they are to stop; gives the exit code.

    A process that ends unasked is started again after a pause that grows, unless it ended because it was told to end
    when idle, or because it is configured wrongly, which no new start would mend, or has waited for its servers for as
    long as it was to.
    """
    app = session.application(settings, makes=True)
    log.info(
        "supervisor.started",
        extra={"processes": settings.processes, "signing": app.forwarder.envelope.told},
    )
    with contextlib.suppress(*AWAY):  # the workers tell, and wait
        async with app:
            pass  # what is wrong with store or transport is told once, here
    final = {_WRONG_USE} if settings.start_timeout is None else {_WRONG_USE, _UNREACHABLE}
    supervisor = _Supervisor(command, until_idle=until_idle, metrics_port=settings.metrics_port, final=final)
    loop = asyncio.get_running_loop()
    numbers = stop_signals()
    for number in numbers:
        loop.add_signal_handler(number, supervisor.stop, number)
    try:
        return await supervisor.run(settings.processes)
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


class _Supervisor:
    def __init__(
        self, command: Sequence[str], *, until_idle: bool, metrics_port: int | None, final: Collection[int]
    ) -> None:
        self._command = command
        self._final = final
        self._metrics_port = metrics_port
        self._until_idle = until_idle
        self._running: set[asyncio.subprocess.Process] = set()
        self._stopping = asyncio.Event()

    async def run(self, processes: int) -> int:
        codes = await asyncio.gather(*(self._keep(number) for number in range(1, processes + 1)))
        return max(codes)

    def stop(self, number: int) -> None:
        """Hand the signal on; nothing is started any more."""
        self._stopping.set()
        for process in self._running:
            _tell(process, number)

    async def _keep(self, number: int) -> int:
        deaths = 0
        while True:
            began = time.monotonic()
            code = await self._once(number)
            if self._stopping.is_set() or (code == 0 and self._until_idle):
                return 0
            if code in self._final:
                self.stop(signal.SIGTERM)
                return code
            deaths = 1 if time.monotonic() - began > _HEALTHY_SECONDS else deaths + 1
            pause = pause_before(deaths)
            log.warning(
                "process.ended", extra={"number": number, "how": _how(code), "starts_again_in": pause}
            )
            try:
                async with asyncio.timeout(pause):
                    await self._stopping.wait()
                return 0
            except TimeoutError:
                pass

    async def _once(self, number: int) -> int:
        # A session of its own (uvloop can't give it just a group): Ctrl-C reaches this process alone, which hands it on
        # once. Its standard input ends with this process, however that ends: then the worker stops too.
        process = await asyncio.create_subprocess_exec(
            *self._command, *self._port(number), stdin=asyncio.subprocess.PIPE, start_new_session=True
        )
        self._running.add(process)
        log.info("process.started", extra={"number": number, "pid": process.pid})
        if self._stopping.is_set():
            _tell(process, signal.SIGTERM)
        try:
            return await process.wait()
        finally:
            self._running.discard(process)

    def _port(self, number: int) -> list[str]:
        """Each process serves its metrics at a port of its own: the first at the given one, the others behind it."""
        port = self._metrics_port
        return [] if port is None else ["--metrics-port", str(port and port + number - 1)]


def _tell(process: asyncio.subprocess.Process, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended; the others are to be told all the same
        process.send_signal(number)


def _how(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
