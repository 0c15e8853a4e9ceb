"""`paigeant dead-letters`: messages that nobody could handle."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paigeant.cli import console, session
from paigeant.cli.runs import AsJson
from paigeant.errors import InputInvalid, nearest

if TYPE_CHECKING:
    from rich.text import Text

    from paigeant.app import Paigeant
    from paigeant.store import DeadLetter

__all__ = ["app"]

app = typer.Typer(help="See, requeue and delete messages that nobody could handle.", no_args_is_help=True)

LetterId = Annotated[str, typer.Argument(help="The dead letter's id.", metavar="ID")]


def _summary(letter: DeadLetter) -> dict[str, Any]:
    return {
        "id": letter.id,
        "topic": letter.topic,
        "reason": letter.reason,
        "detail": letter.detail,
        "attempts": letter.attempts,
        "workflow_id": letter.workflow_id,
        "step": letter.step,
        "created_at": console.instant(letter.created_at),
    }


async def _load(paigeant: Paigeant, id: str) -> DeadLetter:
    letter = await paigeant.store.load_dead_letter(id)
    if letter is None:
        known = [letter.id for letter in await paigeant.store.list_dead_letters()]
        raise InputInvalid(f"there is no dead letter '{id}'; {nearest(id, known)}")
    return letter


@app.command(
    "list", epilog=session.examples("paigeant dead-letters list", "paigeant dead-letters list --json")
)
def list_(
    limit: Annotated[int, typer.Option(min=1, max=session.MOST, help="So many at most.", metavar="N")] = 100,
    json: AsJson = False,
) -> None:
    """List dead letters, the newest first."""

    async def command() -> None:
        async with session.opened(session.read_settings(), sends=False) as paigeant:
            found = await paigeant.store.list_dead_letters(limit=limit)
        if json:
            console.value([_summary(letter) for letter in found])
        elif found:
            rows: list[list[Text | str]] = [
                [
                    console.plain(letter.id),
                    console.plain(letter.topic),
                    console.local(letter.created_at),
                    str(letter.attempts),
                    console.plain(letter.detail, "red"),
                ]
                for letter in found
            ]
            columns = ["id", "topic", "created", "attempts", "reason"]
            console.out().print(console.table(columns, rows, cut=["reason"]))
        else:
            console.note("no dead letters")

    session.wait_for(command())


@app.command(epilog=session.examples("paigeant dead-letters show ID", "paigeant dead-letters show ID --json"))
def show(id: LetterId, json: AsJson = False) -> None:
    """Show a dead letter with its body. With --json, bytes that are no text stand in `body_base64`."""

    from paigeant.transport import BODY_KEPT_BYTES

    async def command() -> DeadLetter:
        async with session.opened(session.read_settings(), sends=False) as paigeant:
            return await _load(paigeant, id)

    letter = session.wait_for(command())
    if json:
        try:
            body = {"body": letter.body.decode()}
        except UnicodeDecodeError:
            body = {"body_base64": base64.b64encode(letter.body).decode()}
        console.value({**_summary(letter), **body})
        return
    found = {name: value for name, value in _summary(letter).items() if value is not None}
    console.out().print(console.facts({name: console.plain(str(value)) for name, value in found.items()}))
    console.result("\n" + console.harmless(letter.body.decode(errors="backslashreplace")))
    if len(letter.body) >= BODY_KEPT_BYTES:
        console.note(f"the first {BODY_KEPT_BYTES} bytes of it; no more is kept")


@app.command(epilog=session.examples("paigeant dead-letters requeue ID"))
def requeue(id: LetterId, json: AsJson = False) -> None:
    """Wake the step of a dead letter again, and forget the letter. What is sent is made from the store's rows.

    So a body that is damaged or cut is no hindrance, and doing it twice is harmless: a step is done once.
    """

    async def command() -> str:
        async with session.opened(session.read_settings()) as paigeant:
            return await paigeant.control.requeue(await _load(paigeant, id))

    run_id = session.wait_for(command())
    if json:
        console.value({"id": id, "workflow_id": run_id, "requeued": True})
    else:
        console.note(f"sent again; `paigeant runs show {run_id}` tells where its run is", markup=False)


@app.command(epilog=session.examples("paigeant dead-letters delete ID"))
def delete(id: LetterId, json: AsJson = False) -> None:
    """Forget a dead letter."""

    async def command() -> None:
        async with session.opened(session.read_settings(), sends=False) as paigeant:
            await _load(paigeant, id)
            await paigeant.store.delete_dead_letter(id)

    session.wait_for(command())
    if json:
        console.value({"id": id, "deleted": True})
    else:
        console.note("deleted")
