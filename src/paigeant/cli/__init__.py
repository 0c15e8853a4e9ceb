"""The command line, one file a group of commands. What takes long to import is imported when a command runs."""

from __future__ import annotations

import atexit
import gc
import io
import os
import sys

__all__ = ["main"]


def main() -> None:
    """Do what the command line asks for, and end the process with the exit code that says how it went."""
    _open_streams()
    # The end of a process would look twice more for garbage among all objects: a fifth of what a short command takes.
    atexit.register(gc.freeze)
    try:
        from paigeant.cli.program import app

        app(prog_name="paigeant")
    except KeyboardInterrupt:  # so early that no command is there yet to answer it
        raise SystemExit(130) from None


def _open_streams() -> None:
    """Have standard streams that take any text, and that lead nowhere where a process was started without them.

    Whatever is opened first would stand in for them otherwise: what is printed goes there, and uvloop ends the process
    when it closes one.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode)  # noqa: SIM115  # for good; it has the lowest number that is free
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # What a terminal of another encoding has no sign for is written out: a name in a run must not end the command.
        # Errors are written so by themselves.
        sys.stdout.reconfigure(errors="backslashreplace")
