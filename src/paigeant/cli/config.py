"""`paigeant config`: what the settings are, and whether they work."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import typer

from paigeant.cli import console, session
from paigeant.cli.runs import AsJson
from paigeant.errors import (
    AuthorityUnavailable,
    ConfigurationError,
    PaigeantError,
    StoreUnavailable,
    TransportUnavailable,
)

if TYPE_CHECKING:
    from paigeant.authority import KeySource
    from paigeant.settings import Settings

__all__ = ["app"]

app = typer.Typer(help="See the settings, and check that they work.", no_args_is_help=True)

_PATIENCE_SECONDS = 20.0


@app.command(epilog=session.examples("paigeant config show", "paigeant config show --json"))
def show(json: AsJson = False) -> None:
    """Show all settings with where each comes from. Passwords are hidden."""
    settings = session.read_settings()
    shown = settings.shown()
    if json:
        console.value(shown)
        return
    sources = _sources(shown)
    rows = [
        [
            console.plain(name),
            console.plain(console.shown(value, 80).strip('"')),
            console.plain(sources[name], "dim" if sources[name] == "default" else ""),
            console.plain(type(settings).model_fields[name].description, "dim"),
        ]
        for name, value in shown.items()
    ]
    console.out().print(console.table(["setting", "value", "from", ""], rows, cut=["value"]))


class Finding(NamedTuple):
    """What was found of one part of the settings."""

    part: str
    text: str
    error: PaigeantError | None = None


class _Part(Protocol):
    async def connect(self) -> None: ...

    async def close(self) -> None: ...


@app.command(epilog=session.examples("paigeant config check", "paigeant config check --json"))
def check(json: AsJson = False) -> None:
    """Check the settings part by part: load the handlers, connect to store, transport and routes; say what is wrong."""
    settings = session.read_settings()
    findings = [
        _handlers(settings),
        _store(settings),
        *_transports(settings),
        _signing(settings),
        *_key_set(settings),
        *_people(settings),
        *_sight(settings),
    ]
    if json:
        console.value(
            [{"part": part, "ok": error is None, "message": text} for part, text, error in findings]
        )
    else:
        for part, text, error in findings:
            mark = "[green]ok[/]   " if error is None else "[red]wrong[/]"
            console.out().print(f"{mark} ", console.plain(f"{part} {text}"), soft_wrap=True)
    wrong = [finding.error for finding in findings if finding.error is not None]
    if wrong:
        away = (StoreUnavailable, TransportUnavailable, AuthorityUnavailable)
        unreachable = all(isinstance(error, away) for error in wrong)
        raise typer.Exit(3 if unreachable else 2)


def _sources(names: Iterable[str]) -> dict[str, str]:
    """Where each setting comes from."""
    from paigeant.settings import CONFIG_FILE, check_file, is_in_environment

    path = Path(CONFIG_FILE)
    written = check_file(path) if path.is_file() else {}
    return {
        name: "environment" if is_in_environment(name) else CONFIG_FILE if name in written else "default"
        for name in names
    }


def _handlers(settings: Settings) -> Finding:
    if not settings.handlers:
        return Finding("handlers", "none are named")
    try:
        with console.only_results():
            loaded = session.handlers_of(settings, ())
    except PaigeantError as exc:
        return Finding("handlers", settings.scrubbed(str(exc)), exc)
    workflows = (
        ", ".join([workflow.name for workflow in loaded.workflows] + sorted(settings.workflows)) or "none"
    )
    activities = ", ".join(sorted(loaded.activities)) or "none"
    return Finding("handlers", f"{', '.join(loaded.names)}: activities {activities}; workflows {workflows}")


def _store(settings: Settings) -> Finding:
    from paigeant.app import store_of

    return _connected(settings, "store", "store_url", settings.store_url, lambda: store_of(settings))


def _signing(settings: Settings) -> Finding:
    """Whether messages may travel as the settings have it, and are signed with keys that can be read."""
    from paigeant.app import envelope_of
    from paigeant.signing import SignedEnvelope

    try:
        envelope = envelope_of(settings)
        if isinstance(envelope, SignedEnvelope) and envelope.keys.signer()[1].is_none:
            raise ConfigurationError(
                f"{envelope.told}; so nothing can be sent: `paigeant keys trust` says what it is for"
            )
        return Finding("signing", envelope.told)
    except ConfigurationError as exc:
        return Finding("signing", settings.scrubbed(str(exc)), exc)


def _key_set(settings: Settings) -> list[Finding]:
    """Whether the key set is there that the trust file names by a URL; nothing where it names none."""
    path = settings.trusted()
    if settings.signing == "off" or path is None:
        return []
    from paigeant.jwks import Jwks
    from paigeant.keyfiles import read_trust

    try:
        url = read_trust(path).jwks_url
    except ConfigurationError:  # `signing` says so
        return []
    return [] if url is None else [_published(f"trusted keys {url}", Jwks(url))]


def _published(part: str, keys: KeySource) -> Finding:
    try:
        session.wait_for(keys.find(""))
    except PaigeantError as exc:
        return Finding(part, str(exc), exc)
    return Finding(part, "its keys are there")


def _transports(settings: Settings) -> list[Finding]:
    from paigeant.app import transport_of

    urls = {"transport": settings.transport_url}
    urls.update((f"route {pattern}", url) for pattern, url in settings.routes.items())
    return [
        _connected(
            settings,
            part,
            "transport_url" if part == "transport" else "routes",
            url,
            lambda url=url: transport_of(settings, url),  # type: ignore[misc]
        )
        for part, url in urls.items()
    ]


def _people(settings: Settings) -> list[Finding]:
    """What acting on behalf of people needs, where it is set: who this service is, and the keys of the issuers."""
    if not settings.token_issuers and settings.token_url is None:
        return []
    from paigeant.app import behalf_of

    try:
        behalf = behalf_of(settings)
    except PaigeantError as exc:
        return [Finding("client", str(exc), exc)]
    findings = []
    if settings.token_url is not None:
        who = f"{settings.client_id} at {settings.token_url}"
        lacks = None
        if behalf.exchanger is None:
            lacks = ConfigurationError("token_url needs client_id, and client_secret or client_key")
        findings.append(Finding("client", who if lacks is None else str(lacks), lacks))
    for name, keys in {} if behalf.verifier is None else behalf.verifier.keys.items():
        findings.append(_published(f"issuer {name}", keys))
    return findings


def _sight(settings: Settings) -> list[Finding]:
    """Whether the libraries are there that traces and metrics need, where they are on."""
    from paigeant.cli.sight import NEEDS, need

    findings = []
    for setting, (module, _) in NEEDS.items():
        value = getattr(settings, setting)
        if value is None or value is False:  # 0 is a port
            continue
        try:
            need(setting)
            findings.append(Finding(setting, f"{module} is installed"))
        except ConfigurationError as exc:
            findings.append(Finding(setting, str(exc), exc))
    return findings


def _connected(settings: Settings, part: str, setting: str, url: str, make: Callable[[], _Part]) -> Finding:
    """Whether what `make` makes can be connected to. The text is what it says itself when it can't."""
    from paigeant.urls import without_password

    place = without_password(url)
    try:
        session.check_shared(setting, url)
        settings.check_encrypted(setting, url)  # else the password would travel so, too
        if _missing(url):
            return Finding(part, f"{place}: it is made when it is first used")
        session.wait_for(_connect(make()))
    except PaigeantError as exc:
        # No adapter knows that its URL is that of a route.
        said = settings.scrubbed(str(exc)).replace("transport_url", setting)
        return Finding(part, f"{place}: {said}", exc)
    except Exception as exc:  # an adapter's gap; the other parts are to be checked all the same
        said = settings.scrubbed(f"{type(exc).__name__}: {' '.join(str(exc).split())}")
        return Finding(part, f"{place}: {said}", ConfigurationError(said))
    return Finding(part, f"{place}: reachable")


async def _connect(part: _Part) -> None:
    from paigeant.database import Database

    try:
        async with asyncio.timeout(_PATIENCE_SECONDS):
            await part.connect()
            if isinstance(database := getattr(part, "database", None), Database):
                await database.check_rights()
            if (check_room := getattr(part, "check_room", None)) is not None:
                await check_room()
    except TimeoutError as exc:
        raise TransportUnavailable(
            f"no answer within {_PATIENCE_SECONDS:g} s; is a firewall in between?"
        ) from exc
    finally:
        await part.close()


def _missing(url: str) -> bool:
    """Whether `url` names a file that isn't there yet and can be made."""
    if not url.startswith("sqlite:"):
        return False
    from paigeant.databases.sqlite import database_path

    try:
        path = database_path(url)
    except ConfigurationError:
        return False
    return not path.exists() and os.access(os.path.dirname(os.path.realpath(path)), os.W_OK)
