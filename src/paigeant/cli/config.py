"""`paigeant config`: what the settings are, and whether they work."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from paigeant.cli import console, session
from paigeant.cli.runs import AsJson
from paigeant.errors import ConfigurationError, PaigeantError, StoreUnavailable, TransportUnavailable

if TYPE_CHECKING:
    from paigeant.settings import Settings

__all__ = ["app"]

app = typer.Typer(help="See the settings, and check that they work.", no_args_is_help=True)


@app.command(epilog=session.examples("paigeant config show", "paigeant config show --json"))
def show(json: AsJson = False) -> None:
    """Show all settings with where each comes from. Passwords are hidden."""
    settings = session.read_settings()
    shown = settings.shown()
    if json:
        console.value(shown)
        return
    rows = [
        [
            console.plain(name),
            console.plain(console.shown(value, 80).strip('"')),
            console.plain(_source(settings, name), "dim" if _source(settings, name) == "default" else ""),
            console.plain(type(settings).model_fields[name].description, "dim"),
        ]
        for name, value in shown.items()
    ]
    console.out().print(console.table(["setting", "value", "from", ""], rows, cut=["value", ""]))


@app.command(epilog=session.examples("paigeant config check"))
def check(json: AsJson = False) -> None:
    """Check the settings: load the handlers, connect to store and transport, and say what is wrong."""
    settings = session.read_settings()
    findings = [_tried("handlers", lambda: _handlers(settings)), *_connected(settings)]
    if json:
        console.value(
            [{"part": part, "ok": error is None, "message": text} for part, text, error in findings]
        )
    else:
        for part, text, error in findings:
            mark = "[green]ok[/]   " if error is None else "[red]wrong[/]"
            console.out().print(f"{mark}  {part}", console.plain(text), soft_wrap=True)
    unreachable = [
        error for _, _, error in findings if isinstance(error, (StoreUnavailable, TransportUnavailable))
    ]
    wrong = [error for _, _, error in findings if error is not None]
    if wrong:
        raise typer.Exit(3 if unreachable and len(unreachable) == len(wrong) else 2)


Finding = tuple[str, str, PaigeantError | None]


def _source(settings: Settings, name: str) -> str:
    from paigeant.settings import CONFIG_FILE, check_file

    if any(variable.upper() == f"PAIGEANT_{name.upper()}" for variable in os.environ):
        return "environment"
    path = Path(CONFIG_FILE)
    return CONFIG_FILE if path.is_file() and name in check_file(path) else "default"


def _tried(part: str, look: Any) -> Finding:
    try:
        return part, look(), None
    except PaigeantError as exc:
        return part, str(exc), exc


def _handlers(settings: Settings) -> str:
    if not settings.handlers:
        return "none are named"
    loaded = session.handlers_of(settings, ())
    workflows = (
        ", ".join([workflow.name for workflow in loaded.workflows] + sorted(settings.workflows)) or "none"
    )
    activities = ", ".join(sorted(loaded.activities)) or "none"
    return f"{', '.join(loaded.names)}: activities {activities}; workflows {workflows}"


def _connected(settings: Settings) -> list[Finding]:
    shown = settings.shown()
    missing = [_missing(getattr(settings, name)) for name in ("store_url", "transport_url")]

    async def connect() -> None:
        async with session.opened(settings, makes=not all(missing)):
            pass

    def look() -> str:
        if all(missing):
            return "it is made when it is first used"
        session.wait_for(connect())
        return "reachable"

    _, text, error = _tried("", look)
    findings: list[Finding] = []
    for part, name, other in (
        ("store", "store_url", TransportUnavailable),
        ("transport", "transport_url", StoreUnavailable),
    ):
        is_its = error is not None and not isinstance(error, other)
        findings.append(
            (
                part,
                f"{shown[name]}: {text}" if error is None or is_its else shown[name],
                error if is_its else None,
            )
        )
    return findings


def _missing(url: str) -> bool:
    """Whether `url` names a file that isn't there yet and can be made."""
    if not url.startswith("sqlite:"):
        return False
    from paigeant.databases.sqlite import database_path

    try:
        path = database_path(url)
    except ConfigurationError:
        return False
    return not path.exists() and os.access(path.parent, os.W_OK)
