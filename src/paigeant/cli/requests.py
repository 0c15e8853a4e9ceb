"""`paigeant requests`: what runs ask of people, and the answers to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from paigeant.cli import console, session
from paigeant.cli.runs import AsJson

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from paigeant.app import Paigeant
    from paigeant.store import Request

__all__ = ["app"]

app = typer.Typer(help="See what runs ask, approve, deny and answer it.", no_args_is_help=True)

RequestId = Annotated[str, typer.Argument(help="The request's id.", metavar="ID")]
By = Annotated[
    str | None, typer.Option(help="Who answers; default: the user at this terminal.", metavar="NAME")
]


@app.command(
    "list",
    epilog=session.examples(
        "paigeant requests list",
        "paigeant requests list --run order-42 --all",
        "paigeant requests list --json",
    ),
)
def list_(
    all: Annotated[
        bool, typer.Option("--all", help="Also those that are answered, or that nobody waits for any more.")
    ] = False,
    run: Annotated[str | None, typer.Option(help="Only those of this run.", metavar="ID")] = None,
    limit: Annotated[int, typer.Option(min=1, max=session.MOST, help="So many at most.", metavar="N")] = 100,
    json: AsJson = False,
) -> None:
    """List what runs ask and still wait for, the oldest first."""

    from paigeant.cli import waiting

    async def command() -> tuple[list[Request], float]:
        async with session.opened(session.read_settings(), sends=False) as paigeant:
            if run is not None:
                await paigeant.run(run).status()  # one that isn't there is a mistake, not an empty list
            found = await paigeant.store.list_requests(workflow_id=run, only_open=not all, limit=limit)
            return found, await paigeant.store.now()

    found, now = session.wait_for(command())
    if json:
        console.value([waiting.request_as_json(request) for request in found])
    elif found:
        rows = waiting.rows_of(found, now)
        console.out().print(console.table(waiting.COLUMNS, rows, cut=["asked", "run", "step"]))
        if len(found) == limit:
            console.note(f"[dim]the oldest {limit}; --limit shows more[/]")
    else:
        console.note("no requests" if all else "no request is open")


@app.command(epilog=session.examples("paigeant requests show ID", "paigeant requests show ID --json"))
def show(id: RequestId, json: AsJson = False) -> None:
    """Show a request whole: what is asked and what goes with it, by which run, until when, and the answer."""
    from paigeant.cli import waiting
    from paigeant.errors import RequestNotFound

    async def command() -> Request:
        async with session.opened(session.read_settings(), sends=False) as paigeant:
            found = await paigeant.store.load_request(id)
        if found is None:
            raise RequestNotFound(id)
        return found

    request = session.wait_for(command())
    if json:
        console.value(waiting.request_as_json(request))
    else:
        console.out().print(console.facts(waiting.facts_of(request)))


@app.command(
    epilog=session.examples(
        "paigeant requests approve ID", "paigeant requests approve ID --by 'Ada Lovelace'"
    )
)
def approve(id: RequestId, by: By = None, json: AsJson = False) -> None:
    """Approve of what a request asks for: its run goes on."""
    _settle(lambda app, sender: app.approve(id, sender=sender), by, json)


@app.command(epilog=session.examples("paigeant requests deny ID --reason 'too expensive'"))
def deny(
    id: RequestId,
    reason: Annotated[str, typer.Option(help="Why; whoever asked is told.")] = "",
    by: By = None,
    json: AsJson = False,
) -> None:
    """Deny what a request asks for: its run goes on without it."""
    _settle(lambda app, sender: app.deny(id, reason, sender=sender), by, json)


@app.command(
    context_settings={"ignore_unknown_options": True},  # so that -5 is a value
    epilog=session.examples(
        "paigeant requests answer ID '\"red\"'",
        'echo \'{"colour": "red"}\' | paigeant requests answer ID -',
    ),
)
def answer(
    id: RequestId,
    value: Annotated[
        str, typer.Argument(help="The answer as JSON; - reads it from standard input.", metavar="VALUE|-")
    ],
    by: By = None,
    json: AsJson = False,
) -> None:
    """Answer a question, or tell what has happened that a run waits for."""
    from paigeant.cli.dispatch import read_input

    settings = session.read_settings()
    found = (
        read_input("-", settings.max_message_bytes) if value == "-" else session.json_value(value, "VALUE")
    )
    _settle(lambda app, sender: app.answer(id, found, sender=sender), by, json)


def _settle(
    act: Callable[[Paigeant, str], Coroutine[Any, Any, Request]], by: str | None, as_json: bool
) -> None:
    from paigeant.cli import waiting

    sender = session.user() if by is None else by

    async def command() -> Request:
        async with session.opened(session.read_settings()) as paigeant:
            return await act(paigeant, sender)

    request = session.wait_for(command())
    if as_json:
        console.value(waiting.request_as_json(request))
    else:
        console.result(f"{request.id} {waiting.outcome(request)}")
        if session.is_interactive():
            console.note(
                f"`paigeant runs show {request.workflow_id}` tells where its run is",
                markup=False,
                style="dim",
            )
