"""Where lines of text go: a stream, and a file that begins anew when it is full, which several processes may share."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from paigeant.clock import SystemClock
from paigeant.errors import ConfigurationError
from paigeant.host import at_fork
from paigeant.observer import Event
from paigeant.observers.logs.lines import HEADS, LEVELS, Format, fields_of, renderer, text_of
from paigeant.redaction import Redactor

__all__ = ["LogFile", "StreamLog"]

log = logging.getLogger("paigeant.logs")

_CLOCK = SystemClock()

_MOST_AT_ONCE = 4096
"""Bytes in one write: more may be cut by the lines of other processes on the same pipe (`PIPE_BUF` of Linux)."""


_TURN_SECONDS = 1.0
"""How long a line waits for those of other processes on the same stream. Its reader may be slow, and all wait then."""

_PIECE = 4096
"""Bytes that a pipe takes in one piece."""


_Told = tuple[Event, float, Redactor]
"""What happened, when this process was told of it, and what hides the secrets in it."""


class _TextLog(ABC):
    """Lines of text, written as they come; those of events at `info` a turn of the event loop together.

    Steps are recorded together, so their events come together. Their lines are made one after the other when the loop
    has done what else there is: that costs less than making each where it comes, and is one write instead of many.
    Where a line can't be written nothing is raised; it is lost, and how many were is told once it can be again.
    """

    def __init__(self, *, least: int, most_at_once: int = _MOST_AT_ONCE) -> None:
        self.least = least
        self.lost = self._told = 0
        self._most_at_once = most_at_once
        self._lock = threading.RLock()  # what is shown of a user's value may log a line itself
        self._waiting: deque[_Told | str] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        at_fork(self._begin_anew)

    def _begin_anew(self) -> None:
        """In a process that an activity has forked off: the lines that wait are its parent's, who writes them."""
        self._lock = threading.RLock()
        self._waiting.clear()
        self._loop = None

    def write(self, level: int, fields: Mapping[str, Any]) -> None:
        """Write one line; this process's clock tells the time."""
        self._waiting.append(self._line(fields, _CLOCK.now()))
        self._flush()

    def tell(self, event: Event, at: float, redactor: Redactor) -> None:
        """Write the line of an event."""
        self._waiting.append((event, at, redactor))
        loop = asyncio._get_running_loop() if LEVELS[event.name] == logging.INFO else None
        if loop is None:
            self._flush()
        elif self._loop is not loop:  # another one may have ended without its turn
            self._loop = loop
            loop.call_soon(self._flush)

    @abstractmethod
    def _line(self, fields: Mapping[str, Any], at: float) -> str: ...

    def _line_of(self, event: Event, at: float, redactor: Redactor) -> str:
        return f'{{"timestamp": "{_as_json(at)}"{HEADS[event.name]}{text_of(event, redactor)}}}\n'

    @abstractmethod
    def _place(self, text: str) -> None:
        """Write whole lines. Raises OSError, or ValueError where the stream is closed."""

    @abstractmethod
    def _complain(self, exc: Exception) -> None:
        """Say that lines are lost from now on."""

    def _flush(self) -> None:
        with self._lock:
            self._loop = None  # before the lines are taken: who comes now has another turn
            lines: list[str] = []
            size = 0
            while self._waiting:
                told = self._waiting.popleft()
                line = told if isinstance(told, str) else self._made(told)
                size += len(line)
                if lines and size > self._most_at_once:
                    self._try(lines)
                    lines, size = [], len(line)
                lines.append(line)
            if lines:
                self._try(lines)

    def _made(self, told: _Told) -> str:
        event, at, redactor = told
        try:
            return self._line_of(event, at, redactor)
        except Exception:  # one line must not take the others with it
            log.exception("the line of %s can't be made", event.name)
            return ""

    def _try(self, lines: list[str]) -> None:
        if not self._placed("".join(lines)):
            self.lost += len(lines)
        elif lost := self.lost - self._told:
            told = {"level": "warning", "event": "log.lost", "lines": lost}
            if self._placed(self._line(told, _CLOCK.now())):
                self._told += lost

    def _placed(self, text: str) -> bool:
        try:
            self._place(text)
        except (
            OSError,
            ValueError,
        ) as exc:  # a full disk or a reader that is gone is no reason for a step to fail
            if self.lost == self._told:
                self._complain(exc)
            return False
        return True


class StreamLog(_TextLog):
    """Lines on a stream, as JSON or for a terminal. `shared`: other processes write their lines to it as well."""

    place = "stream"

    def __init__(self, stream: TextIO, *, least: int, format: Format, shared: bool = False) -> None:
        super().__init__(least=least)
        self._stream = stream
        self._turns = _Turns(stream) if shared else None
        self._is_json = format == "json"
        self._render = renderer(format, colors=_takes_colors(stream))

    def _begin_anew(self) -> None:
        super()._begin_anew()
        if self._turns is not None:  # a lock is that of an opening, which is the parent's as well
            self._turns = _Turns(self._stream)

    def _line(self, fields: Mapping[str, Any], at: float) -> str:
        time = _as_json(at) if self._is_json else f"{datetime.fromtimestamp(at, UTC).astimezone():%H:%M:%S}"
        return f"{self._render({'timestamp': time, **fields})}\n"

    def _line_of(self, event: Event, at: float, redactor: Redactor) -> str:
        if self._is_json:
            return super()._line_of(event, at, redactor)
        return self._line(fields_of(event, redactor), at)

    def _place(self, text: str) -> None:
        waits = self._turns if len(text) > _PIECE // 4 else None  # of up to four bytes each
        with waits or contextlib.nullcontext():
            self._stream.write(text)
            self._stream.flush()

    def _complain(self, exc: Exception) -> None:
        if self._stream is not sys.stderr:
            name = getattr(self._stream, "name", type(self._stream).__name__)
            sys.stderr.write(f"can't write log lines to {name}: {exc}\n")


class _Turns:
    """Lets the processes that share a stream write one after the other.

    What a pipe doesn't take in one piece, as a long traceback, would have others' lines within it.
    """

    def __init__(self, stream: TextIO) -> None:
        self._file: int | None = None
        self._again = 0.0
        # Opened anew: a lock is that of an opening, and all processes have inherited the same one. A socket can't be.
        with contextlib.suppress(OSError, ValueError):
            self._file = os.open(
                f"/proc/self/fd/{stream.fileno()}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY
            )

    def __enter__(self) -> None:
        now = time.monotonic()
        if self._file is None or now < self._again:
            return
        import fcntl

        # Not for long, nor often: one that was stopped within its turn must not hold up the work of the others.
        while time.monotonic() < now + _TURN_SECONDS:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                time.sleep(0.0005)
            else:
                return
        self._again = time.monotonic() + 60.0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            import fcntl

            fcntl.flock(self._file, fcntl.LOCK_UN)


def _takes_colors(stream: TextIO) -> bool:
    """Whether it is a terminal that shows colours, whose user wants them (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class LogFile(_TextLog):
    """JSON lines in a file. One of `most_bytes` is put aside as `path.1`, that before as `path.2`, `files` in all.

    Processes that share the file notice when another one has put it aside, or when somebody else has.
    """

    place = "file"

    def __init__(self, path: str | Path, *, least: int, most_bytes: int, files: int) -> None:
        super().__init__(least=least, most_at_once=min(_MOST_AT_ONCE, most_bytes))
        self.path = Path(path).absolute()  # an activity may change the working directory
        self._most_bytes = most_bytes
        self._files = files
        self._render = renderer("json")
        self._file: int | None = None
        self._is_torn = False  # it ends within a line, for the disk was full
        try:
            self._open()
        except OSError as exc:
            raise ConfigurationError(
                f"can't write the log file {self.path}: {exc.strerror}; expected a file in a folder that is there"
            ) from exc

    def _begin_anew(self) -> None:
        super()._begin_anew()
        self._close()  # it is opened anew, for a lock is that of an opening, which is the parent's as well

    def close(self) -> None:
        """Close it; a later line opens it again."""
        with self._lock:
            self._flush()
            self._close()

    def _line(self, fields: Mapping[str, Any], at: float) -> str:
        return f"{self._render({'timestamp': _as_json(at), **fields})}\n"

    def _complain(self, exc: Exception) -> None:
        sys.stderr.write(f"can't write the log file {self.path}: {getattr(exc, 'strerror', exc)}\n")

    def _place(self, text: str) -> None:
        try:
            self._append(text.encode("utf-8", "backslashreplace"))
        except OSError:
            self._close()
            raise

    def _append(self, line: bytes) -> None:
        if self._file is None or self._is_aside():
            self._close()
            self._open()
        assert self._file is not None
        size = os.fstat(self._file).st_size
        if size and size + len(line) > self._most_bytes:
            self._rotate()
        if self._is_torn:
            line = b"\n" + line
        # One call: lines of other processes come before or behind it, never within.
        written = os.write(self._file, line)
        if written < len(line):
            self._is_torn = True
            written += os.write(self._file, line[written:])  # the disk is full, as this says
        self._is_torn = written < len(line)
        if self._is_torn:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _open(self) -> None:
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _is_aside(self) -> bool:
        assert self._file is not None
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return True
        mine = os.fstat(self._file)
        return (found.st_dev, found.st_ino) != (mine.st_dev, mine.st_ino)

    def _rotate(self) -> None:
        import fcntl  # here: it isn't everywhere, nor needed before

        assert self._file is not None
        # Of several processes one puts the file aside; the others find, once they have the lock, that it is done.
        fcntl.flock(self._file, fcntl.LOCK_EX)
        if not self._is_aside():
            for number in range(self._files - 1, 0, -1):
                with contextlib.suppress(FileNotFoundError):
                    os.replace(self._numbered(number - 1), self._numbered(number))
        self._close()
        self._open()
        self._is_torn = False

    def _numbered(self, number: int) -> str:
        return f"{self.path}.{number}" if number else str(self.path)


def _as_json(instant: float) -> str:
    second, micro = divmod(int(instant * 1e6), 1_000_000)
    return f"{_second(second)}.{str(1_000_000 + micro)[1:]}Z"


@lru_cache(maxsize=8)
def _second(instant: int) -> str:
    return datetime.fromtimestamp(instant, UTC).strftime("%Y-%m-%dT%H:%M:%S")
