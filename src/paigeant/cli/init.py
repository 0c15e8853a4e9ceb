"""`paigeant init`: a small project that runs as it is."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from paigeant.cli import console, session
from paigeant.errors import ConfigurationError
from paigeant.extras import how_to_install

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
        Path, typer.Argument(help="Where; it is made if it isn't there.", metavar="DIR")
    ] = Path(),
    with_services: Annotated[
        bool,
        typer.Option(
            "--with-services",
            help="Also write docker-compose.yml with Postgres, Redis and RabbitMQ, and settings that name them.",
        ),
    ] = False,
) -> None:
    """Write paigeant.yaml, handlers.py and input.json, which run as they are. Nothing is overwritten.

    In a folder that has a paigeant.yaml, --with-services writes docker-compose.yml alone.
    """
    if with_services and (folder / FILES[0]).is_file() and not any(map(_is_there, _paths(folder, SERVICES))):
        _write(folder, SERVICES, with_services)
        console.note(f"wrote {', '.join(map(str, _paths(folder, SERVICES)))}\n", markup=False)
        console.note(
            f"To use these servers, have in {folder / FILES[0]}, which stays as it is:", markup=False
        )
        _tell(_urls())
        console.note("\nNext:")
        _tell([*_first(folder), *_services()])
        return
    names = [*FILES, *SERVICES] if with_services else [*FILES]
    there = [path for path in _paths(folder, names) if _is_there(path)]
    if there:
        raise ConfigurationError(
            f"{', '.join(map(str, there))} {'is' if len(there) == 1 else 'are'} there already, "
            "and nothing was written; name another folder: paigeant init DIR"
        )
    _write(folder, names, with_services)
    console.note(f"wrote {', '.join(map(str, _paths(folder, names)))}\n", markup=False)
    console.note("Next:")
    _tell([*_first(folder), *(_services() if with_services else []), "paigeant run"])
    console.note("and in another terminal" + (", there too:" if _first(folder) else ":"))
    _tell(["paigeant dispatch fulfil_order input.json --wait"])


def _paths(folder: Path, names: Iterable[str]) -> list[Path]:
    return [folder / name for name in names]


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _write(folder: Path, names: Iterable[str], with_services: bool) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            with (folder / name).open("x", encoding="utf-8") as file:
                file.write(_template(name, with_services).read_text(encoding="utf-8"))
    except (FileExistsError, NotADirectoryError) as exc:
        raise ConfigurationError(f"{folder} is no folder; name one, or a new one: paigeant init DIR") from exc
    except OSError as exc:
        raise ConfigurationError(f"can't write to {folder}: {exc.strerror}") from exc


def _first(folder: Path) -> list[str]:
    """How to get to the folder."""
    return [] if folder.resolve() == Path.cwd() else [f"cd {shlex.quote(str(folder))}"]


def _services() -> list[str]:
    """How to get the servers, and what is needed to speak to them."""
    library = [] if find_spec("psycopg") else [how_to_install("postgres")]
    return [*library, "docker compose up --detach --wait", "paigeant db upgrade"]


def _urls() -> list[str]:
    """The settings that name the servers, as lines of paigeant.yaml."""
    lines = _template(FILES[0], True).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith(("store_url:", "transport_url:"))]


def _tell(lines: Iterable[str]) -> None:
    from rich.markup import escape

    for line in lines:
        console.note(f"  [bold cyan]{escape(line)}[/]")


def _template(name: str, with_services: bool) -> Path:
    own = _SCAFFOLD / "services" / name
    return own if with_services and own.exists() else _SCAFFOLD / name
