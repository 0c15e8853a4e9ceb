"""Where lines of text go: a stream, and a file that begins anew when it is full, which several processes may share."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from paigeant.clock import SystemClock, as_datetime
from paigeant.errors import ConfigurationError
from paigeant.observers.logs.lines import Format, renderer

__all__ = ["LogFile", "StreamLog"]

_CLOCK = SystemClock()


class StreamLog:
    """Lines on a stream, as JSON or for a terminal."""

    def __init__(self, stream: TextIO, *, least: int, format: Format) -> None:
        self.least = least
        self._stream = stream
        self._is_json = format == "json"
        self._render = renderer(format, colors=stream.isatty())
        self._lock = threading.Lock()

    def write(self, level: int, fields: Mapping[str, Any], at: float | None = None) -> None:
        """Write one line; `at` is left out: this process's clock tells the time."""
        now = _now()
        time = _as_json(now) if self._is_json else now.astimezone().strftime("%H:%M:%S")
        text = self._render({"timestamp": time, **fields})
        with self._lock:
            self._stream.write(f"{text}\n")
            self._stream.flush()


class LogFile:
    """JSON lines in a file. One of `most_bytes` is put aside as `path.1`, that before as `path.2`, `files` in all.

    Processes that share the file notice when another one has put it aside, or when somebody else has. Where it can't be
    written nothing is raised; the lines are lost, and so many are told once it can be again.
    """

    def __init__(self, path: str | Path, *, least: int, most_bytes: int, files: int) -> None:
        self.path = Path(path)
        self.least = least
        self.lost = 0
        self._most_bytes = most_bytes
        self._files = files
        self._render = renderer("json")
        self._lock = threading.Lock()
        self._file: int | None = None
        try:
            self._open()
        except OSError as exc:
            raise ConfigurationError(
                f"can't write the log file {self.path}: {exc.strerror}; expected a file in a folder that is there"
            ) from exc

    def write(self, level: int, fields: Mapping[str, Any], at: float | None = None) -> None:
        """Write one line; `at` is left out: this process's clock tells the time."""
        line = self._line(fields)
        with self._lock:
            try:
                self._place(line)
                if self.lost:
                    lost, self.lost = self.lost, 0
                    self._place(self._line({"level": "warning", "event": "log.lost", "lines": lost}))
            except OSError as exc:  # a full disk is no reason for a step to fail
                if not self.lost:
                    sys.stderr.write(f"can't write the log file {self.path}: {exc.strerror}\n")
                self.lost += 1
                self._close()

    def close(self) -> None:
        """Close it; a later line opens it again."""
        with self._lock:
            self._close()

    def _line(self, fields: Mapping[str, Any]) -> bytes:
        text = self._render({"timestamp": _as_json(_now()), **fields})
        return f"{text}\n".encode("utf-8", "backslashreplace")

    def _place(self, line: bytes) -> None:
        if self._file is None or self._is_aside():
            self._close()
            self._open()
        assert self._file is not None
        size = os.fstat(self._file).st_size
        if size and size + len(line) > self._most_bytes:
            self._rotate()
        # One call: lines of other processes come before or behind it, never within.
        os.write(self._file, line)

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

    def _numbered(self, number: int) -> str:
        return f"{self.path}.{number}" if number else str(self.path)


def _now() -> datetime:
    now = as_datetime(_CLOCK.now())
    assert now is not None
    return now


def _as_json(instant: datetime) -> str:
    return instant.isoformat().replace("+00:00", "Z")
