"""`paigeant dispatch`: starts a run, and waits for it when asked to."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from json import JSONDecodeError
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paigeant.cli import console, session
from paigeant.cli.behalf import read_given
from paigeant.cli.opening import AWAY
from paigeant.cli.sight import Sight, observing
from paigeant.errors import (
    ConfigurationError,
    InputInvalid,
    MessageTooLarge,
    RunTimeout,
    StoreUnavailable,
    nearest,
)

if TYPE_CHECKING:
    from paigeant.app import Paigeant
    from paigeant.loading import Handlers
    from paigeant.run import Run
    from paigeant.settings import Settings

__all__ = ["read_input", "register"]


def register(app: typer.Typer) -> None:
    """Add `dispatch` to the program."""
    app.command(
        epilog=session.examples(
            "paigeant dispatch fulfil_order input.json --wait",
            "paigeant dispatch fulfil_order input.json --id order-42 --wait --timeout 60 --json",
            "paigeant dispatch fulfil_order input.json --start-at 2027-01-01T08:00:00+01:00 --deadline 2h",
            'echo \'{"sku": "A-1"}\' | paigeant dispatch fulfil_order - --handlers shop/orders.py',
            "get-token | paigeant dispatch fulfil_order input.json --on-behalf-of -",
        )
    )(dispatch)


def dispatch(
    workflow: Annotated[str, typer.Argument(help="The workflow's name.", metavar="WORKFLOW")],
    input: Annotated[
        str | None,
        typer.Argument(
            help="A file with the input as a JSON object; - reads it from standard input. Without it the input is {}.",
            metavar="INPUT.json|-",
            autocompletion=session.complete("*.json"),
        ),
    ] = None,
    handlers: Annotated[
        list[str] | None,
        typer.Option(
            help="File or module that defines the workflow; default: `handlers` of paigeant.yaml.",
            metavar="FILE",
            autocompletion=session.complete("*.py"),
        ),
    ] = None,
    id: Annotated[
        str | None,
        typer.Option(help="The run's id. The same id and input again is the same run.", metavar="ID"),
    ] = None,
    start_at: Annotated[
        str | None,
        typer.Option(
            "--start-at",
            help="When its first step is due: 2027-01-01T08:00:00+01:00 (with a time zone), or 'in 90m'.",
            metavar="WHEN",
        ),
    ] = None,
    deadline: Annotated[
        str | None,
        typer.Option(help="How long the run may take from its start on: 90s, 15m, 12h.", metavar="TIME"),
    ] = None,
    on_behalf_of: Annotated[
        str | None,
        typer.Option(
            "--on-behalf-of",
            help="For whom the run acts: a file, or env:NAME for a variable, or - for standard input, with an access "
            "token or a grant as JSON. Never the token itself.",
            metavar="FILE|env:NAME|-",
            autocompletion=session.complete("*"),
        ),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait until the run has ended; exit code 1 if it failed.")
    ] = False,
    timeout: Annotated[
        float | None, typer.Option(min=0, help="Seconds to wait at most; the run goes on.", metavar="N")
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print JSON: the id, or with --wait the whole run.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse a workflow with activities that no handler defines.")
    ] = False,
) -> None:
    """Start a run of WORKFLOW with the input in INPUT.json, if it needs any, and print its id."""
    if timeout is not None and not wait:
        raise ConfigurationError("--timeout says how long to wait; it needs --wait")
    limit = None if deadline is None else session.duration(deadline, "--deadline")
    begins = None if start_at is None else _start(start_at)
    if input == on_behalf_of == "-":
        raise ConfigurationError("standard input is one text: INPUT and --on-behalf-of can't both be -")
    given = None if on_behalf_of is None else read_given(on_behalf_of)
    settings = session.read_settings(strict=strict or None)
    payload = {} if input is None else read_input(input, settings.max_message_bytes)

    async def start(app: Paigeant) -> Run:
        now = await app.store.now()
        begin = datetime.fromtimestamp(now + begins, UTC) if isinstance(begins, float) else begins
        return await app.dispatch(
            workflow, payload, workflow_id=id, start_at=begin, deadline=limit, on_behalf_of=given
        )

    with console.only_results():
        loaded = session.handlers_of(settings, handlers or ())
        _check_known(workflow, settings, loaded)
        code = session.wait_for(_dispatch(settings, loaded, start, wait, timeout, json))
    if code:
        raise typer.Exit(code)


def _start(text: str) -> datetime | float:
    """The instant, or the seconds from now on, that `text` says. Raises ConfigurationError."""
    word, _, rest = text.strip().partition(" ")
    if word == "in":
        return session.duration(rest, "--start-at after 'in'")
    try:
        found = datetime.fromisoformat(text.strip())
    except ValueError:
        found = None
    if found is None or found.tzinfo is None:
        raise ConfigurationError(
            f"--start-at is an instant with a time zone such as 2027-01-01T08:00:00+01:00, or 'in 90m'; found {text!r}"
        )
    return found


def read_input(name: str, limit_bytes: int) -> Any:
    """The JSON value in the file of this name, or in standard input for `-`.

    Raises InputInvalid for what can't be read, is too large or isn't JSON.
    """
    from paigeant.codec import parse_strict
    from paigeant.errors import MessageInvalid

    shown = "standard input" if name == "-" else name
    try:
        body = (_read_stdin if name == "-" else _read_file)(name, limit_bytes)
        if len(body) > limit_bytes:
            raise MessageTooLarge(len(body), limit_bytes)
    except MessageTooLarge as exc:
        raise InputInvalid(f"{shown} is too large: {str(exc).removeprefix(f'{exc.reason}: ')}") from exc
    if not body.strip():
        raise InputInvalid(f"{shown} is empty; expected a JSON object, at least {{}}")
    try:
        return parse_strict(body.removeprefix(b"\xef\xbb\xbf"))
    except MessageInvalid as exc:
        reason = str(exc).removeprefix(f"{exc.reason}: ")
        raise InputInvalid(f"{shown} is not JSON: {reason}{_there(exc.__cause__)}, {_EXAMPLE}") from exc


_EXAMPLE = 'expected a JSON object such as {"sku": "A-1", "quantity": 2}'


_NAME_BEFORE = re.compile(r'"([^"]*)"\s*:\s*"?[^",:]*$')
"""The name of the field whose value has begun where a text ends."""

_NEAR = 1000


def _there(cause: BaseException | None) -> str:
    """What stands at the place where the JSON goes wrong, as far as that is told."""
    if not isinstance(cause, JSONDecodeError):
        return ""
    from paigeant.redaction import is_secret  # here, because it loads pydantic

    found = cause.doc[cause.pos :].partition("\n")[0]
    name = _NAME_BEFORE.search(cause.doc[: cause.pos][-_NEAR:])
    if name is not None and is_secret(name[1]):
        return f", found a value of '{name[1]}'"
    return f", found {found[:30]!r}" if found.strip() else ", found its end"


def _read_stdin(_: str, limit_bytes: int) -> bytes:
    if sys.stdin.isatty():
        console.note("[dim]type the input as JSON, then Ctrl-D[/]")
    return sys.stdin.buffer.read(limit_bytes + 1)


def _read_file(name: str, limit_bytes: int) -> bytes:
    path = Path(name)
    if name.lstrip().startswith("{"):
        from paigeant.redaction import redacted  # here, because it loads pydantic

        raise InputInvalid(
            f"expected a file with the input, found JSON: echo '{redacted(name)}' | paigeant dispatch WORKFLOW -"
        )
    try:
        if path.is_file() and path.stat().st_size > limit_bytes:
            raise MessageTooLarge(path.stat().st_size, limit_bytes)
        with path.open("rb") as file:
            return file.read(limit_bytes + 1)  # a device may have no end
    except FileNotFoundError as exc:
        there = [str(path.parent / entry.name) for entry in path.parent.glob("*.json")]
        hint = (
            nearest(name, there) if there else "expected a file with a JSON object, or - for standard input"
        )
        raise InputInvalid(f"there is no file {name}; {hint}") from exc
    except IsADirectoryError as exc:
        raise InputInvalid(f"{name} is a folder; expected a file with a JSON object") from exc
    except (OSError, ValueError) as exc:
        raise InputInvalid(f"can't read {name}: {getattr(exc, 'strerror', None) or exc}") from exc


def _check_known(workflow: str, settings: Settings, loaded: Handlers) -> None:
    if loaded.names or settings.workflows:
        return  # the application itself says which workflows there are
    hint = "--handlers handlers.py" if Path("handlers.py").is_file() else "--handlers FILE"
    raise ConfigurationError(
        f"no handlers are named, so that workflow '{workflow}' isn't known; give {hint}, "
        "or `handlers:` or `workflows:` in paigeant.yaml"
    )


async def _dispatch(
    settings: Settings,
    loaded: Handlers,
    start: Callable[[Paigeant], Awaitable[Run]],
    wait: bool,
    timeout: float | None,
    as_json: bool,
) -> int:
    with observing(settings, loaded, works=False) as sight:
        async with _opened(settings, loaded, sight) as app:
            run = await _started(start, app)
            if not wait:
                console.value({"id": run.id}) if as_json else console.result(run.id)
                if session.is_interactive():
                    console.note(
                        f"dispatched; `paigeant runs show {run.id}` tells where it is",
                        markup=False,
                        style="dim",
                    )
                return 0
            return await _wait(app, run, timeout, as_json)


@contextlib.asynccontextmanager
async def _opened(settings: Settings, loaded: Handlers, sight: Sight) -> AsyncIterator[Paigeant]:
    app = session.application(settings, loaded, makes=True, observers=sight.observers)
    try:
        await app.__aenter__()
    except AWAY as exc:
        raise type(exc)(f"{exc}. Nothing was recorded, so no run was started") from exc
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_exit(app)
        yield app


async def _started(start: Callable[[Paigeant], Awaitable[Run]], app: Paigeant) -> Run:
    try:
        return await start(app)
    except StoreUnavailable as exc:
        raise StoreUnavailable(
            f"{exc}. Whether the run was recorded isn't known: `paigeant runs list` tells; "
            "dispatched again with the --id that it had, it is the same run"
        ) from exc


async def _wait(app: Paigeant, run: Run, timeout: float | None, as_json: bool) -> int:
    """Wait for the run and print it; gives the exit code. Stopping to wait never stops the run."""
    from paigeant.cli import report
    from paigeant.slip import RunStatus

    late: RunTimeout | None = None
    await _look_for_workers(app)
    try:
        async with _progress(app, run):
            await run.wait(timeout)
    except RunTimeout as exc:
        late = exc
    except asyncio.CancelledError:
        console.note(f"waits no longer; run '{run.id}' goes on: `paigeant runs show {run.id}`", markup=False)
        raise
    detail, requests = await run.detail(), await run.requests(only_open=False)
    if as_json:
        console.value(report.as_json(detail, requests))
    else:
        console.out().print(report.as_tables(detail, requests, now=await app.store.now()))
    if late is not None:
        raise late
    return 0 if detail.run.status is RunStatus.COMPLETED else 1


async def _look_for_workers(app: Paigeant) -> None:
    now = await app.store.now()
    if not any(worker.lease_until > now for worker in await app.store.list_workers()):
        console.warn(
            "no worker is running on this store; start one in another terminal: paigeant run HANDLERS"
        )


@contextlib.asynccontextmanager
async def _progress(app: Paigeant, run: Run) -> Any:
    """Show the run as it goes, where a person looks on."""
    if not session.is_interactive():
        yield
        return
    from rich.live import Live

    from paigeant.cli import report

    async def show(live: Live) -> None:
        while True:
            detail, requests = await app.store.load_run(run.id), await run.requests()
            live.update(report.as_tables(detail, requests, now=await app.store.now()), refresh=True)
            await asyncio.sleep(0.2)

    with Live(console=console.errors(), auto_refresh=False, transient=True) as live:
        showing = asyncio.create_task(show(live))
        try:
            yield
        finally:
            showing.cancel()
            await asyncio.gather(showing, return_exceptions=True)
