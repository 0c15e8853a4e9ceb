"""`paigeant topics`: what waits where."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import typer

from paigeant.cli import console, session
from paigeant.cli.runs import AsJson

if TYPE_CHECKING:
    from rich.text import Text

    from paigeant.app import Paigeant

__all__ = ["app"]

app = typer.Typer(help="See what waits in the topics.", no_args_is_help=True)


class _Topic(NamedTuple):
    """A topic as the transport counts its messages and the store its steps."""

    topic: str
    waiting: int = 0
    taken: int = 0
    oldest: float | None = None
    ready: int = 0
    later: int = 0
    running: int = 0
    oldest_ready: float | None = None


@app.command("list", epilog=session.examples("paigeant topics list", "paigeant topics list --json"))
def list_(json: AsJson = False) -> None:
    """List the topics that hold messages or open steps: how many, and for how long the oldest has waited.

    Messages are counted by the transport, steps by the store. A step that a worker went on with at once has no message.
    """

    async def command() -> list[_Topic]:
        async with session.opened(session.read_settings()) as paigeant:
            return await _topics(paigeant)

    found = session.wait_for(command())
    if json:
        console.value([topic._asdict() for topic in found])
    elif found:
        rows: list[list[Text | str]] = [
            [
                console.plain(topic.topic),
                str(topic.waiting),
                str(topic.taken),
                console.seconds(topic.oldest),
                str(topic.ready),
                str(topic.later),
                str(topic.running),
                console.seconds(topic.oldest_ready),
            ]
            for topic in found
        ]
        columns = ["topic", "messages", "taken", "oldest", "ready", "later", "running", "oldest ready"]
        console.out().print(console.table(columns, rows))
    else:
        console.note("no messages wait, and no steps are open")


async def _topics(paigeant: Paigeant) -> list[_Topic]:
    steps = {topic.topic: topic for topic in await paigeant.store.open_topics()}
    # The broker may be one that answers only for topics that it is asked about by name.
    found = {depth.topic: depth for depth in await paigeant.transport.topics(list(steps))}
    rows = []
    for name in sorted({*steps, *found}):
        row, depth, step = _Topic(name), found.get(name), steps.get(name)
        if depth is not None:
            row = row._replace(waiting=depth.waiting, taken=depth.taken, oldest=depth.oldest)
        if step is not None:
            row = row._replace(
                ready=step.ready, later=step.later, running=step.running, oldest_ready=step.oldest
            )
        rows.append(row)
    return rows
