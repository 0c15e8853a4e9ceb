"""One folder for a whole run of pytest, which all its processes know: begun and ended by the first of them."""

from __future__ import annotations

import atexit
import os
import shutil
from functools import cache
from pathlib import Path

from tests.services.server import temporary_folder

__all__ = ["begin_session", "end_session", "is_session_owner", "session_folder", "session_owner"]

FOLDER = "TEST_SERVICES_FOLDER"
OWNER = "TEST_SERVICES_OWNER"


def begin_session() -> None:
    """Make the folder and tell it to the processes that are started from here on."""
    os.environ[FOLDER] = str(temporary_folder("session"))
    os.environ[OWNER] = str(os.getpid())


def end_session() -> None:
    """Delete the folder."""
    shutil.rmtree(os.environ.pop(FOLDER), ignore_errors=True)
    del os.environ[OWNER]


def session_folder() -> Path:
    """The folder of the session; outside of one a folder of this process."""
    return Path(os.environ[FOLDER]) if FOLDER in os.environ else _own_folder()


def session_owner() -> int:
    """The process whose end is the end of the session."""
    return int(os.environ.get(OWNER, os.getpid()))


def is_session_owner() -> bool:
    """Whether this process has begun the session that is on."""
    return os.environ.get(OWNER) == str(os.getpid())


@cache
def _own_folder() -> Path:
    folder = temporary_folder("session")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
