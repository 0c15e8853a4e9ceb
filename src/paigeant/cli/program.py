"""The program: which commands there are, and the one place where an error becomes a message and an exit code."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.exceptions import Abort, Exit, TyperException
from typer.main import get_group

from paigeant.cli import console
from paigeant.errors import (
    AuthorityUnavailable,
    PaigeantError,
    RunTimeout,
    StoreRefused,
    StoreUnavailable,
    TransportUnavailable,
)

__all__ = ["app", "exit_code"]

FAILED, WRONG_USE, UNREACHABLE = 1, 2, 3

READER_GONE = 141
"""As of programs that end by SIGPIPE: it says nothing of a run."""

_COMMANDS = ("init", "run", "dispatch", "logs", "demo")
_GROUPS = ("runs", "requests", "variables", "topics", "dead-letters", "db", "config", "keys")
"""Each has a module of its name, and stands in the help in this order, behind the commands."""


def exit_code(error: PaigeantError) -> int:
    """1: the run failed, or isn't done; 2: wrong use or configuration; 3: a server or database can't be reached."""
    match error:
        case StoreRefused() | TransportUnavailable(__cause__=StoreRefused()):
            return WRONG_USE
        case StoreUnavailable() | TransportUnavailable() | AuthorityUnavailable():
            return UNREACHABLE
        case RunTimeout():
            return FAILED
        case _:
            return WRONG_USE


class _Commands(Mapping[str, Any]):
    """All commands by name. Each is made when it is asked for: to make them all takes longer than most of them."""

    def __getitem__(self, name: str) -> Any:
        if name not in tuple(self):
            raise KeyError(name)
        return _made(name)

    def __iter__(self) -> Iterator[str]:
        return iter(_COMMANDS + _GROUPS)

    def __len__(self) -> int:
        return len(_COMMANDS + _GROUPS)


@functools.cache
def _made(name: str) -> Any:
    """The command or group of this name."""
    module = importlib.import_module(f"paigeant.cli.{name.replace('-', '_')}")
    part = typer.Typer(rich_markup_mode="rich")
    if name in _COMMANDS:
        module.register(part)
    else:
        part.add_typer(module.app, name=name)
    made = get_group(part).commands[name]
    _show_values(made)
    return made


_HELP = ["-h", "--help"]


def _show_values(command: Any) -> None:
    """Have the help of a command, and of those below it, show what an option takes: `--wait`, `--step STEP`.

    By itself it shows Python's types, such as `--wait <bool>`: as if that took a value.
    """
    for parameter in command.get_params(typer.Context(command, help_option_names=_HELP)):
        if parameter.param_type_name == "option" and parameter.metavar is None:
            longest = max(parameter.opts, key=len).lstrip("-").upper()
            parameter.metavar = "" if parameter.is_flag else longest
    for each in getattr(command, "commands", {}).values():
        _show_values(each)


class _Program(TyperGroup):
    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.commands: Any = _Commands()

    def get_params(self, ctx: Any) -> Any:
        """The options of the program itself, which are flags: they take no value, and their help shows none."""
        params = super().get_params(ctx)
        for option in params:
            option.metavar = ""
        return params

    def invoke(self, ctx: Any) -> Any:
        """Do what the command line asks for; when whoever reads the output has gone, as `head` does, do no more."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            _forget_output()
            raise Exit(READER_GONE) from None

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Do what `args` ask for. Standing alone, end the process with the exit code that says how it went."""
        parse = functools.partial(
            super().main, args, prog_name, complete_var, False, windows_expand_args, **extra
        )
        if not standalone_mode:
            return parse()
        try:
            code = parse()
        except PaigeantError as exc:
            console.error(str(exc))
            code = exit_code(exc)
        except Abort:
            console.note("stopped")
            code = 130
        except TyperException as exc:
            code = _explain(exc)
        except UnicodeEncodeError as exc:
            # What comes from elsewhere, such as a variable or a file, may be a secret.
            is_given = any(exc.object in argument for argument in (sys.argv[1:] if args is None else args))
            what = repr(exc.object) if is_given else "something that isn't among the arguments"
            console.error(f"{what} is not a text in UTF-8; names and values are given in UTF-8")
            code = WRONG_USE
        except OSError as exc:
            console.error(f"{exc.filename or 'standard output'}: {exc.strerror or exc}")
            code = UNREACHABLE
            _forget_output()
        raise SystemExit(code if isinstance(code, int) else 0)


def _explain(exc: TyperException) -> int:
    """One line on a wrong use of the command line, with where to read how it is meant."""
    context = getattr(exc, "ctx", None)
    if type(exc).__name__ == "NoArgsIsHelpError":
        return WRONG_USE  # making it has printed the help
    where = f"; see `{context.command_path} --help`" if context is not None else ""
    console.error(f"{_message(exc).rstrip('.')}{_found(exc)}{where}")
    return int(getattr(exc, "exit_code", WRONG_USE))


def _forget_output() -> None:
    """Write no more: where nothing can be written, Python would try once again at its end, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _message(exc: TyperException) -> str:
    format_message = getattr(exc, "format_message", None)
    return str(exc) if format_message is None else str(format_message())


def _found(exc: TyperException) -> str:
    """What stood where a value of another kind was expected: Typer itself doesn't say."""
    read_errors = getattr(exc.__cause__, "errors", None)
    errors = [] if read_errors is None else read_errors()
    return f", found {errors[0]['input']!r}" if errors and "input" in errors[0] else ""


app = typer.Typer(
    name="paigeant",
    cls=_Program,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": _HELP},
    epilog="Start with [bold]paigeant init[/], see it at work with [bold]paigeant demo[/].",
)


@app.callback()
def program(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", is_eager=True, callback=lambda on: _version(on)
        ),
    ] = False,
) -> None:
    """Durable workflows for pydantic-ai agents: a routing slip travels from worker to worker.

    Exit codes: 0 done, 1 the run failed, 2 wrong use or configuration, 3 a server or database can't be reached.
    """


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        console.result(f"paigeant {version('paigeant')}")
        raise Exit(0)
