"""`paigeant logs`: what happened, as the store's log lines tell it, of one run or of all."""

from __future__ import annotations

import asyncio
import json as encoder
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paigeant.cli import console, session
from paigeant.errors import ConfigurationError, RunNotFound, StoreUnavailable, nearest

if TYPE_CHECKING:
    from paigeant.app import Paigeant
    from paigeant.observer import LogLine

__all__ = ["register"]

LEVELS = ("debug", "info", "warning", "error")

_LOOK_SECONDS = 0.25
_AWAY_SECONDS = 1.0
_SETTLE_SECONDS = 1.0
"""How long a line may be on its way into the store: until then others may come that belong before what is there."""

_PAGE = 1000


def register(app: typer.Typer) -> None:
    """Add `logs` to the program."""
    app.command(
        epilog=session.examples(
            "paigeant logs order-42",
            "paigeant logs order-42 --follow",
            "paigeant logs --level warning --since 1h",
            "paigeant logs order-42 --step charge_card --json",
        )
    )(logs)


def logs(
    id: Annotated[
        str | None, typer.Argument(help="The run's id; without one the lines of all runs.", metavar="ID")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on with what comes, until the run has ended or Ctrl-C.")
    ] = False,
    level: Annotated[
        str,
        typer.Option(help="Only lines of this level and above.", autocompletion=lambda: list(LEVELS)),
    ] = "debug",
    step: Annotated[str | None, typer.Option(help="Only lines of this step.")] = None,
    since: Annotated[
        str | None,
        typer.Option(
            help="Only lines from then on: an age such as 15m, or an instant such as 2026-01-31T08:00Z.",
            metavar="WHEN",
        ),
    ] = None,
    limit: Annotated[
        int, typer.Option(min=1, max=session.MOST, help="So many of the newest lines at most.", metavar="N")
    ] = _PAGE,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")] = False,
) -> None:
    """Tell what happened, of one run or of all, in the order in which it did.

    The lines are there if `log_sql` was on in the processes that they tell of.
    """
    if level not in LEVELS:
        raise ConfigurationError(f"no line has the level '{level}'; {nearest(level, LEVELS)}")
    ago = None if since is None else _Since.read(since)
    found = session.wait_for(_show(_Lines(id, level, step), ago, limit, follow, _Printer(as_json=json)))
    if not found:
        console.note(_why_none(id), markup=False)


class _Since:
    """An instant, or how long it is ago."""

    def __init__(self, instant: datetime | None, ago: float = 0.0) -> None:
        self._instant = instant
        self._ago = ago

    @classmethod
    def read(cls, text: str) -> _Since:
        try:
            instant = datetime.fromisoformat(text)
        except ValueError:
            other = ", or an instant such as 2026-01-31T08:00Z (without an offset: local time)"
            return cls(None, session.duration(text, "--since", otherwise=other))
        try:
            return cls(instant.astimezone(UTC))
        except (OverflowError, ValueError) as exc:
            raise ConfigurationError(
                f"--since is an instant of the years 1 to 9999, in UTC as well; found {text!r}"
            ) from exc

    def instant(self, now: float) -> datetime:
        return self._instant or datetime.fromtimestamp(now - self._ago, UTC)


class _Lines:
    """Which lines are asked for."""

    def __init__(self, workflow_id: str | None, level: str, step: str | None) -> None:
        self.workflow_id = workflow_id
        self._level = level
        self._step = step

    async def newest(self, app: Paigeant, since: datetime | None, limit: int) -> list[LogLine]:
        return await app.logs(self.workflow_id, level=self._level, step=self._step, since=since, limit=limit)

    async def written_after(
        self, app: Paigeant, last: LogLine | None, since: datetime | None
    ) -> list[LogLine]:
        """All that were written behind the line `last`."""
        found = await self._from(app, 0 if last is None else last.id, since)
        if last is None:
            return found
        if found and (found[0].id, found[0].at) == (last.id, last.at):
            return found[1:]
        # It was deleted, and SQLite gives ids anew once the newest lines are: only the time tells which ones are new.
        then = datetime.fromtimestamp(last.at, UTC)
        return [line for line in await self._from(app, 0, then) if line.at > last.at]

    async def _from(self, app: Paigeant, id: int, since: datetime | None) -> list[LogLine]:
        """All with this id or a greater one, page by page."""
        found: list[LogLine] = []
        last = id - 1
        while page := await app.logs(
            self.workflow_id, level=self._level, step=self._step, since=since, after=last, limit=_PAGE
        ):
            found += page
            last = page[-1].id
        return found


async def _show(lines: _Lines, since: _Since | None, limit: int, follow: bool, printer: _Printer) -> int:
    async with session.opened(session.read_settings(), sends=False) as app:
        if lines.workflow_id is not None:
            await _check_is_there(app, lines.workflow_id)
        begin = None if since is None else since.instant(await app.store.now())
        shown = 0
        if not follow:
            found = await lines.newest(app, begin, limit)
            printer.print(found)
            if len(found) == limit:
                console.note(f"[dim]the newest {limit}; --limit shows more[/]")
            return len(found)
        async for settled in _followed(app, lines, await lines.newest(app, begin, limit), begin):
            printer.print(settled)
            shown += len(settled)
        return shown


async def _check_is_there(app: Paigeant, workflow_id: str) -> None:
    try:
        await app.run(workflow_id).status()
    except RunNotFound:
        # Lines may tell of a run that others keep, or that was refused; then there is something to show.
        if not await app.logs(workflow_id, limit=1):
            raise


async def _followed(
    app: Paigeant, lines: _Lines, first: list[LogLine], since: datetime | None
) -> AsyncIterator[list[LogLine]]:
    """Lines as they come, those held back for a moment that others may still come before.

    While the store is away it waits: whoever looks on wants to see what comes then.
    """
    held = first
    last = max(first, key=lambda line: line.id, default=None)
    ended_at: float | None = None
    is_away = False
    while True:
        try:
            now = await app.store.now()
            new = await lines.written_after(app, last, since)
            has_ended = ended_at is None and await _has_ended(app, lines.workflow_id)
        except StoreUnavailable as exc:
            if not is_away:
                console.warn(f"{exc}; lines come again when it is back")
            is_away = True
            await asyncio.sleep(_AWAY_SECONDS)
            continue
        is_away = False
        over = ended_at is not None and now > ended_at + _SETTLE_SECONDS
        last = max(new, key=lambda line: line.id, default=last)
        held = sorted([*held, *new], key=lambda line: (line.at, line.id))
        settled = [line for line in held if over or line.at <= now - _SETTLE_SECONDS]
        held = held[len(settled) :]
        if settled:
            yield settled
        if over:
            return
        if has_ended:
            ended_at = now
        await asyncio.sleep(_LOOK_SECONDS)


async def _has_ended(app: Paigeant, workflow_id: str | None) -> bool:
    from paigeant.slip import RUN_ENDED

    if workflow_id is None:
        return False
    try:
        return await app.run(workflow_id).status() in RUN_ENDED
    except RunNotFound:
        return True  # it was deleted meanwhile, or was never here


def _why_none(workflow_id: str | None) -> str:
    of = "" if workflow_id is None else f" of run '{workflow_id}'"
    return (
        f"no log lines{of} are in the store, or none that fit; `log_sql: info` in paigeant.yaml "
        "(PAIGEANT_LOG_SQL=info) has workers and dispatchers keep theirs from then on"
    )


class _Printer:
    """Prints lines, as JSON or as a terminal shows log lines."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._render: Any = None

    def print(self, lines: list[LogLine]) -> None:
        for line in lines:
            console.result(self._text(line))

    def _text(self, line: LogLine) -> str:
        fields = {"level": line.level, "event": line.event, **line.fields}
        if self._as_json:
            moment = datetime.fromtimestamp(line.at, UTC).isoformat(timespec="microseconds")
            return encoder.dumps({"timestamp": moment.replace("+00:00", "Z"), **fields})
        if self._render is None:
            from paigeant.observers.logs.lines import renderer

            out = console.out()
            colors = out.is_terminal and not out.no_color and not out.is_dumb_terminal
            self._render = renderer("console", colors=colors)
        return str(self._render({"timestamp": console.local(line.at), **fields}))
