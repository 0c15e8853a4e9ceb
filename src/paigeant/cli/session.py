"""How a command comes to its settings, its handlers, its values and an open application."""

from __future__ import annotations

import contextlib
import getpass
import logging
import re
import sys
from collections.abc import AsyncIterator, Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from paigeant import loops
from paigeant.cli import console
from paigeant.errors import ConfigurationError, InputInvalid

if TYPE_CHECKING:
    from paigeant.app import Paigeant
    from paigeant.loading import Handlers
    from paigeant.settings import Settings

__all__ = [
    "application",
    "check_shared",
    "complete",
    "duration",
    "examples",
    "handlers_of",
    "json_value",
    "opened",
    "read_settings",
    "user",
    "wait_for",
]

Result = TypeVar("Result")


def read_settings(**given: Any) -> Settings:
    """The settings, with what the command line gives (None: nothing) above all else. Raises ConfigurationError."""
    from paigeant.settings import Settings

    return Settings(**{name: value for name, value in given.items() if value is not None})


def handlers_of(settings: Settings, given: Sequence[str]) -> Handlers:
    """The handlers that the command line names, else those of the settings. Raises HandlerError."""
    from paigeant.loading import load

    return load(given or settings.handlers)


@contextlib.asynccontextmanager
async def opened(
    settings: Settings,
    handlers: Handlers | None = None,
    *,
    makes: bool = False,
    sends: bool = True,
    **more: Any,
) -> AsyncIterator[Paigeant]:
    """The application, open. `makes`: an embedded database that isn't there yet is made; else it counts as empty.

    Without `sends` no broker is asked: for what the store alone tells. Raises ConfigurationError for a store or
    transport in memory: no other process would ever see what is in it.
    """
    async with application(settings, handlers, makes=makes, sends=sends, **more) as app:
        yield app


def application(
    settings: Settings,
    handlers: Handlers | None = None,
    *,
    makes: bool = False,
    sends: bool = True,
    **more: Any,
) -> Paigeant:
    """What `opened` opens. Raises ConfigurationError as that does."""
    from paigeant.app import Paigeant

    for name in ("store_url", "transport_url"):
        check_shared(name, getattr(settings, name))
    if not sends:  # it needs no key either
        nowhere = {"transport_url": "memory://", "routes": {}, "signing": "off"}
        settings = settings.model_copy(update=nowhere)
    if not makes and (missing := _missing_file(settings.store_url)) is not None:
        console.note(
            f"there is no {missing} here yet; `paigeant run` or `paigeant dispatch` makes it", markup=False
        )
        nowhere = {"store_url": "memory://", "log_sql": "off"}
        if _missing_file(settings.transport_url) is not None:  # a broker is asked all the same
            nowhere["transport_url"] = "memory://"
        settings = settings.model_copy(update=nowhere)
    if handlers is not None:
        more = {**more, "activities": handlers.activities, "workflows": handlers.workflows}
    return Paigeant(settings, **more)


def check_shared(name: str, url: str) -> None:
    """Raise ConfigurationError when the setting `name` is a place that no other process sees."""
    if url.startswith("memory:"):
        raise ConfigurationError(
            f"{name} is memory://, which lives in one process, so that no other command would see it; "
            "expected sqlite:///paigeant.db or a server"
        )


def _missing_file(url: str) -> Path | None:
    if not url.startswith("sqlite:"):
        return None
    from paigeant.databases.sqlite import database_path

    path = database_path(url)
    return path if path.parent.is_dir() and not path.exists() else None


def wait_for(command: Coroutine[Any, Any, Result]) -> Result:
    """What `command` gives. Warnings of Paigeant's own parts go to standard error meanwhile."""
    own = logging.getLogger("paigeant")
    handler = _Warnings(logging.WARNING)
    own.addHandler(handler)
    try:
        return loops.run(command)
    finally:
        own.removeHandler(handler)


class _Warnings(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        console.warn(record.getMessage())


def json_value(text: str, what: str) -> Any:
    """The JSON value in `text`. Raises InputInvalid with the reason."""
    from paigeant.codec import parse_strict
    from paigeant.errors import MessageInvalid

    try:
        return parse_strict(text.encode("utf-8", "surrogateescape"))
    except MessageInvalid as exc:
        reason = str(exc).removeprefix(f"{exc.reason}: ")
        hint = "" if text[:1] in '[{"' else f"; a text needs quotes of its own: '\"{text}\"'"
        raise InputInvalid(f"{what} is not JSON: {reason}, found {text[:30]!r}{hint}") from exc


MOST = 1_000_000_000
"""The largest `--limit`: a database counts no further than 2^63, and nobody reads so far."""

_LONGEST = 100 * 365 * 86400.0


def duration(text: str, what: str, *, otherwise: str = "") -> float:
    """The seconds in a time span such as 30d, up to 100 years. Raises ConfigurationError.

    `otherwise` says what else may stand there.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhdw])", text.strip(), flags=re.ASCII)
    if found is None:
        raise ConfigurationError(
            f"{what} is a number with s, m, h, d or w behind it, such as 90s, 15m, 12h, 30d or 2w{otherwise}; "
            f"found {text!r}"
        )
    seconds = float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}[found[2]]
    if seconds > _LONGEST:  # beyond which dates end, sooner or later
        raise ConfigurationError(f"{what} is 100 years (36500d) at most; found {text[:40]!r}")
    return seconds


def user() -> str:
    """The name of the user at this terminal; empty where there is none."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # in a container a user may have a number and no name
        return ""


def examples(*lines: str) -> str:
    """The end of a help text: commands to copy."""
    return "\n".join(["[bold]Examples[/]", *(f"[cyan]{line}[/]" for line in lines)])


def complete(*patterns: str) -> Any:
    """Completes the names of files that fit, and of folders on the way to them."""

    def names(incomplete: str) -> list[str]:
        folder = incomplete.rpartition("/")[0] + "/" if "/" in incomplete else ""
        found = [
            f"{folder}{entry.name}{'/' if entry.is_dir() else ''}"
            for entry in Path(folder or ".").glob("*")
            if not entry.name.startswith(".") and (entry.is_dir() or any(map(entry.match, patterns)))
        ]
        return sorted(name for name in found if name.startswith(incomplete))

    return names


def is_interactive() -> bool:
    """Whether a person reads the messages as they come."""
    return sys.stderr.isatty()
