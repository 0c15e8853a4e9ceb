"""`paigeant init`: a small project that runs as it is."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from paigeant.cli import console, session
from paigeant.errors import ConfigurationError

__all__ = ["FILES", "SERVICES", "register"]

FILES = ("paigeant.yaml", "handlers.py", "input.json")
SERVICES = ("docker-compose.yml",)
"""What `--with-services` writes besides; its paigeant.yaml names these servers."""

_SCAFFOLD = Path(__file__).parent / "scaffold"


def register(app: typer.Typer) -> None:
    """Add `init` to the program."""
    app.command(
        epilog=session.examples("paigeant init", "paigeant init shop", "paigeant init shop --with-services")
    )(init)


def init(
    folder: Annotated[
        Path, typer.Argument(help="Where; it is made if it isn't there.", metavar="[DIR]")
    ] = Path(),
    with_services: Annotated[
        bool,
        typer.Option(
            "--with-services",
            help="Also write docker-compose.yml with Postgres, Redis and RabbitMQ, and settings that name them.",
        ),
    ] = False,
) -> None:
    """Write paigeant.yaml, handlers.py and input.json, which run as they are. Nothing is overwritten."""
    names = [*FILES, *SERVICES] if with_services else [*FILES]
    there = [name for name in names if (folder / name).exists() or (folder / name).is_symlink()]
    if there:
        raise ConfigurationError(
            f"{', '.join(str(folder / name) for name in there)} {'is' if len(there) == 1 else 'are'} there already, "
            "and nothing was written; name another folder: paigeant init DIR"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            with (folder / name).open("x", encoding="utf-8") as file:
                file.write(_template(name, with_services).read_text(encoding="utf-8"))
    except (FileExistsError, NotADirectoryError) as exc:
        raise ConfigurationError(f"{folder} is no folder; name one, or a new one: paigeant init DIR") from exc
    except OSError as exc:
        raise ConfigurationError(f"can't write to {folder}: {exc.strerror}") from exc
    console.note(f"wrote {', '.join(str(folder / name) for name in names)}\n", markup=False)
    steps = [] if folder.resolve() == Path.cwd() else [f"cd {shlex.quote(str(folder))}"]
    first = ["docker compose up --detach --wait", "paigeant db upgrade"] if with_services else []
    console.note("Next:")
    for line in [*steps, *first, "paigeant run"]:
        console.note(f"  [bold cyan]{line}[/]")
    console.note("and in another terminal" + (", there too:" if steps else ":"))
    console.note("  [bold cyan]paigeant dispatch fulfil_order input.json --wait[/]")


def _template(name: str, with_services: bool) -> Path:
    own = _SCAFFOLD / "services" / name
    return own if with_services and own.exists() else _SCAFFOLD / name
