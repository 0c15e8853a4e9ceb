"""The command line, one file a group of commands. What takes long to import is imported when a command runs."""

from __future__ import annotations

import atexit
import gc

__all__ = ["main"]


def main() -> None:
    """Do what the command line asks for, and end the process with the exit code that says how it went."""
    # The end of a process would look twice more for garbage among all objects: a fifth of what a short command takes.
    atexit.register(gc.freeze)
    try:
        from paigeant.cli.program import app

        app(prog_name="paigeant")
    except KeyboardInterrupt:  # so early that no command is there yet to answer it
        raise SystemExit(130) from None
