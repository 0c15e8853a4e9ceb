"""Real processes for tests: the command line as a user calls it, waited for by what it says and never by the clock."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

from tests.integration import warm

PAIGEANT = [sys.executable, "-P", "-m", "paigeant.cli"]


def call(*args: str, input: str | None = None) -> subprocess.CompletedProcess[str]:
    """What a command gave, once it has ended."""
    return warm.run(*args, input=input)


def call_afresh(*args: str) -> subprocess.CompletedProcess[str]:
    """The same with an interpreter of its own, where how a command starts is the point."""
    return subprocess.run([*PAIGEANT, *args], capture_output=True, text=True, check=False)


def shown(run_id: str) -> Any:
    """The run as `runs show --json` gives it."""
    return json.loads(call("runs", "show", run_id, "--json").stdout)


class Command:
    """A command that goes on in the background. Leaving the block kills it, should it still be there.

    `environment` is what it has besides that of the test. With `program` it has an interpreter of its own.
    """

    def __init__(
        self, *args: str, program: list[str] | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        self.process: warm.Forked | subprocess.Popen[str]
        if program is None:
            self.process = warm.Forked(*args, environment=environment)
        else:
            self.process = subprocess.Popen(
                [*program, *args],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, **(environment or {})},
            )
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.said: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()

    def lines(self) -> Iterator[str]:
        """What it writes to standard error, as it comes, until that ends."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            yield line

    def until(self, fits: Callable[[dict[str, Any]], object] | str) -> dict[str, Any]:
        """The next log line that fits, or that tells an event of this name."""
        for line in self.lines():
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                if found["event"] == fits if isinstance(fits, str) else fits(found):
                    return found
        raise AssertionError("it ended without saying so:\n" + "".join(self.said))

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def end(self) -> int:
        """Its exit code, once it and all that share its standard error have ended."""
        for _ in self.lines():
            pass
        return self.process.wait()
