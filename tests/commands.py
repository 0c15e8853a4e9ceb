"""Commands called in the process of the tests, and what that process is like afterwards."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import structlog
from typer.testing import CliRunner, Result

from paigeant.cli.program import app

__all__ = ["as_json", "as_the_process_was", "paigeant", "refused"]

_LASTING = tuple(f"{place}{os.sep}" for place in (sys.prefix, sys.base_prefix, Path(__file__).parents[1]))
"""Where modules come from that stay as they are: Python, libraries, the checkout."""


def paigeant(*args: str, input: str | bytes | None = None, code: int = 0) -> Result:
    """What a command gave, which ended with exit code `code` and without a traceback."""
    result = CliRunner().invoke(app, list(args), input=input)
    assert (result.exit_code, "\nTraceback" in result.output) == (code, False), result.output
    return result


def as_json(*args: str, **more: Any) -> Any:
    """The JSON that a command wrote to standard output, and nothing else."""
    return json.loads(paigeant(*args, "--json", **more).stdout)


def refused(*args: str, input: str | bytes | None = None, code: int = 2) -> str:
    """The one line on standard error with which a command was refused."""
    result = paigeant(*args, input=input, code=code)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.stdout == ""
    return line.removeprefix("error: ")


@contextlib.contextmanager
def as_the_process_was() -> Iterator[None]:
    """Undo at the end what commands do to a process that they take for their own: they import handlers, and log."""
    modules, path, root = set(sys.modules), list(sys.path), logging.getLogger()
    own, level = logging.getLogger("paigeant"), root.level
    yield
    for name in set(sys.modules) - modules:
        file = getattr(sys.modules[name], "__file__", None)
        if file and not file.startswith(_LASTING):
            del sys.modules[name]
    sys.path[:] = path
    for logger in (root, own):
        logger.handlers[:] = [handler for handler in logger.handlers if not hasattr(handler, "_is_paigeant")]
    own.propagate = True
    root.setLevel(level)
    own.setLevel(logging.NOTSET)
    structlog.reset_defaults()
