"""`paigeant topics`: what waits where."""

from __future__ import annotations

import typer

from paigeant.cli import console, session
from paigeant.cli.runs import AsJson

__all__ = ["app"]

app = typer.Typer(help="See what waits in the topics.", no_args_is_help=True)


@app.command("list", epilog=session.examples("paigeant topics list", "paigeant topics list --json"))
def list_(json: AsJson = False) -> None:
    """List the topics that hold messages: how many wait, how many are with a worker, how old the oldest is."""

    async def command() -> None:
        async with session.opened(session.read_settings()) as paigeant:
            found = await paigeant.transport.topics()
        if json:
            console.value(
                [
                    {
                        "topic": depth.topic,
                        "waiting": depth.waiting,
                        "taken": depth.taken,
                        "oldest": depth.oldest,
                    }
                    for depth in found
                ]
            )
        elif found:
            rows = [
                [
                    console.plain(depth.topic),
                    str(depth.waiting),
                    str(depth.taken),
                    console.seconds(depth.oldest),
                ]
                for depth in found
            ]
            console.out().print(console.table(["topic", "waiting", "taken", "oldest"], rows))
        else:
            console.note("no messages wait")

    session.wait_for(command())
