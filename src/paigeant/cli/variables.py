"""`paigeant variables`: the variables of a run."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from paigeant.cli import console, session
from paigeant.cli.runs import AsJson, RunId
from paigeant.errors import InputInvalid, nearest

__all__ = ["app"]

app = typer.Typer(help="See and set the variables of a run.", no_args_is_help=True)

Key = Annotated[str, typer.Argument(help="The variable's name.", metavar="KEY")]


async def _variables(id: str) -> dict[str, Any]:
    async with session.opened(session.read_settings(), sends=False) as paigeant:
        return await paigeant.store.list_variables(id)


@app.command("list", epilog=session.examples("paigeant variables list order-42 --json"))
def list_(id: RunId, json: AsJson = False) -> None:
    """List the variables of a run."""
    found = session.wait_for(_variables(id))
    if json:
        console.value(found)
    elif found:
        rows = [
            [console.plain(name), console.plain(console.shown(found[name], 200))] for name in sorted(found)
        ]
        console.out().print(console.table(["variable", "value"], rows, cut=["value"]))
    else:
        console.note(f"run '{id}' has no variables", markup=False)


@app.command(epilog=session.examples("paigeant variables get order-42 customer"))
def get(id: RunId, key: Key, json: AsJson = False) -> None:
    """Print a variable: a text as it is, anything else (and all with --json) as JSON."""
    found = session.wait_for(_variables(id))
    if key not in found:
        raise InputInvalid(f"run '{id}' has no variable '{key}'; {nearest(key, found)}")
    if isinstance(found[key], str) and not json:
        text = found[key]  # whoever pipes it somewhere wants all of it; a terminal might obey it
        console.result(console.harmless(text) if sys.stdout.isatty() else text)
    else:
        console.value(found[key])


@app.command(
    "set",
    context_settings={"ignore_unknown_options": True},  # so that -5 is a value
    epilog=session.examples(
        "paigeant variables set order-42 limit 250", "paigeant variables set order-42 who '\"Ada\"'"
    ),
)
def set_(
    id: RunId,
    key: Key,
    value: Annotated[str, typer.Argument(help="The value as JSON.", metavar="VALUE")],
    json: AsJson = False,
) -> None:
    """Set a variable of a run: `ctx.load_variable` sees it at once, parameters once the run is taken up anew."""
    from paigeant.slip import check_name

    found = session.json_value(value, "VALUE")
    check_name("the name of a variable", key)

    async def command() -> None:
        async with session.opened(session.read_settings(), sends=False) as paigeant:
            await paigeant.store.save_variable(id, key, found)

    session.wait_for(command())
    if json:
        console.value({"id": id, "key": key, "value": found})
    else:
        console.note(f"{key} = {console.shown(found)}", markup=False)
