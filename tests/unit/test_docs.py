"""The documentation against the code: what it names is there, what it shows runs, its tables leave nothing out."""

import ast
import asyncio
import codeop
import configparser
import contextlib
import dataclasses
import inspect
import json
import os
import re
import shlex
import shutil
import sqlite3
import textwrap
from collections.abc import Iterator
from datetime import datetime
from enum import StrEnum
from functools import cache
from pathlib import Path
from types import CoroutineType
from typing import Any, NamedTuple, Protocol, get_args

import pytest
import yaml
from tests.patience import PATIENCE
from typer.main import get_command

import paigeant
import paigeant.testing
from paigeant.cli.program import FAILED, READER_GONE, UNREACHABLE, WRONG_USE, app
from paigeant.errors import PaigeantError
from paigeant.message import PaigeantMessage, decode
from paigeant.observer import Event, EventName
from paigeant.observers.logs import LEVELS
from paigeant.settings import Settings
from paigeant.signing import REASONS
from paigeant.slip import RUN_ENDED, RUN_MOVES, STEP_MOVES, RunStatus, StepStatus
from paigeant.store import Refused
from paigeant.tables import metadata

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "paigeant"
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
OWN = [page for page in PAGES if page.name != "performance.md"]


class Fence(NamedTuple):
    page: str
    heading: str
    line: int
    language: str
    info: str
    text: str


def fences(*languages: str, page: str | None = None) -> list[Fence]:
    """The blocks in one of `languages`, of all pages or of one."""
    found = []
    for path in OWN:
        if page is None or path.name == page:
            found += [fence for fence in fences_of(path) if fence.language in languages]
    return found


def fences_of(path: Path) -> Iterator[Fence]:
    """All blocks of a page, without the indentation that they share."""
    heading, start, info = "", 0, ""
    lines: list[str] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.lstrip().startswith("```"):
            if start:
                language, _, rest = info.partition(" ")
                yield Fence(
                    path.name, heading, start, language, rest.strip(), textwrap.dedent("\n".join(lines))
                )
                start, lines = 0, []
            else:
                start, info = number, line.strip().removeprefix("```")
        elif start:
            lines.append(line)
        elif line.startswith("#"):
            heading = line.lstrip("#").strip()
    assert not start, f"{path.name}, line {start}: a block without an end"


def prose(path: Path) -> str:
    """The page without its blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def section(page: str, heading: str, *, alone: bool = False) -> str:
    """What stands under `heading` until the next one of its level or above; `alone`: until any other one."""
    text = (ROOT / "docs" / page).read_text()
    found = re.search(rf"^(#+) {re.escape(heading)}$", text, flags=re.MULTILINE)
    assert found, f"{page} has no heading '{heading}'"
    rest = text[found.end() :]
    end = re.search(rf"^#{{1,{6 if alone else len(found[1])}}} ", rest, flags=re.MULTILINE)
    return rest[: end.start()] if end else rest


def rows(text: str) -> list[list[str]]:
    """The cells of all tables in `text`, without their heads. Code loses its ticks, an escaped bar its escape."""
    found = []
    lines = [line.strip() for line in text.splitlines()]
    for place, line in enumerate(lines):
        is_head = place + 1 < len(lines) and re.fullmatch(r"\|[-| :]+\|", lines[place + 1])
        if line.startswith("|") and not re.fullmatch(r"\|[-| :]+\|", line) and not is_head:
            cells = re.split(r"(?<!\\)\|", line.strip("|"))
            found.append([cell.strip().replace("\\|", "|").strip("`") for cell in cells])
    return found


def test_each_threat_names_tests_that_exist() -> None:
    """What the table of threats calls its proof is a test of this repository."""
    named = {
        test
        for page in ("security.md", "on-behalf-of.md")
        for row in rows(section(page, "Threats"))
        for test in re.findall(r"test_\w+", row[3])
    }
    there = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^(?:async )?def (test_\w+)", path.read_text(), flags=re.MULTILINE)
    }
    assert named
    assert named <= there


# -- places


def slug(heading: str) -> str:
    """What a link to a heading ends with."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    """Every relative link names a file that is there, and a heading in it."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if "://" in target or target.startswith("mailto:"):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), f"{path.name} links to {target}, which isn't there"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), flags=re.MULTILINE)
            assert anchor in map(slug, headings), f"{path.name} links to {target}, where no such heading is"


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_paths_exist(path: Path) -> None:
    """Every path of this repository that is named in code type is there."""
    for code in re.findall(r"`([^`\n]+)`", prose(path)):
        if re.fullmatch(r"(src|tests|docs|examples|benchmarks|\.ci)/[\w./-]*", code):
            assert (ROOT / code).exists(), f"{path.name} names {code}, which isn't there"


@pytest.mark.parametrize("name", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_modules_exist(name: str) -> None:
    """Every module that is named without its folder is one of the package or of the repository."""
    for code in re.findall(r"`([a-z_]+(?:/[a-z_]+)*(?:\.py|/))`", prose(ROOT / name)):
        assert (SOURCE / code).exists() or (ROOT / code).exists(), f"{name} names {code}, which isn't there"


def test_all_modules_are_described() -> None:
    """The table of modules has each module and folder of the package, and no other."""
    described = {row[0].rstrip("/") for row in rows(section("architecture.md", "Where things live"))}
    there = {path.name for path in SOURCE.iterdir() if path.is_file() or (path / "__init__.py").exists()}
    assert described == there - {"__init__.py", "__main__.py"}


# -- state machines


@pytest.mark.parametrize(
    ("heading", "moves", "first", "ended"),
    [
        ("Runs", RUN_MOVES, RunStatus.PENDING, RUN_ENDED),
        ("Steps", STEP_MOVES, StepStatus.READY, None),
    ],
    ids=["runs", "steps"],
)
def test_state_machine_is_that_of_the_code(heading: str, moves: Any, first: str, ended: Any) -> None:
    """The diagram draws each move of the table, and nothing else."""
    [diagram] = [fence for fence in fences("mermaid", page="architecture.md") if fence.heading == heading]
    lines = [line.strip() for line in diagram.text.splitlines() if line.strip()]
    assert lines[0] == "stateDiagram-v2"
    edges = [re.fullmatch(r"(\S+) --> (\S+?)(?: ?: .+)?", line) for line in lines[1:]]
    drawn = [(edge[1], edge[2]) for edge in edges if edge]
    assert len(drawn) == len(lines) - 1, "a line of the diagram is no move"
    assert len(set(drawn)) == len(drawn), "a move is drawn twice"
    begins = {after for before, after in drawn if before == "[*]"}
    ends = {before for before, after in drawn if after == "[*]"}
    inner = {edge for edge in drawn if "[*]" not in edge}
    assert inner == {(str(before), str(after)) for before, following in moves.items() for after in following}
    assert begins == {first}
    assert ends == {str(state) for state in ended or [s for s in moves if not moves[s]]}


@pytest.mark.parametrize(
    ("heading", "words"),
    [("States of a run", RunStatus), ("States of a step", StepStatus)],
    ids=["run", "step"],
)
def test_every_state_is_explained(heading: str, words: type[StrEnum]) -> None:
    """The table of states has each of them once."""
    assert [row[0] for row in rows(section("concepts.md", heading))] == [str(word) for word in words]


# -- snippets


def python_sections() -> list[Any]:
    """The Python blocks, those under one heading together."""
    found: dict[tuple[str, str], list[Fence]] = {}
    for fence in fences("python"):
        if fence.info != "signatures":
            found.setdefault((fence.page, fence.heading), []).append(fence)
    return [pytest.param(blocks, id=f"{page}:{slug(heading)}") for (page, heading), blocks in found.items()]


async def run_block(fence: Fence, names: dict[str, Any]) -> None:
    """Run the block with `names`, which it adds to, and then the tests that it defines."""
    code = compile(
        "\n" * fence.line + fence.text,
        str(ROOT / "docs" / fence.page),
        "exec",
        flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT,
        dont_inherit=True,
    )
    value = eval(code, names)
    if isinstance(value, CoroutineType):
        await value
    for name, function in list(names.items()):
        if name.startswith("test_"):
            del names[name]
            await function()


@pytest.mark.parametrize("blocks", python_sections())
async def test_python_runs(
    blocks: list[Fence], database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Python under a heading runs from top to bottom, beside a database, and the tests in it pass."""
    shutil.copy(database, tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "snippet"}
    for block in blocks:
        async with asyncio.timeout(PATIENCE):
            await run_block(block, names)


@pytest.mark.parametrize(
    "fence",
    [fence for fence in fences("python") if fence.info != "signatures"],
    ids=lambda fence: f"{fence.page}:{fence.line}",
)
def test_python_can_be_pasted(fence: Fence) -> None:
    """`python -m asyncio`, which reads line by line, takes each block as it stands."""
    compiled = codeop.CommandCompiler()
    compiled.compiler.flags |= ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    statement = ""
    for line in [*fence.text.splitlines(), ""]:
        statement += f"{line}\n"
        if compiled(statement.removesuffix("\n")) is not None:
            statement = ""
    assert statement == ""


@pytest.mark.parametrize("fence", fences("yaml"), ids=lambda fence: f"{fence.page}:{fence.line}")
def test_configuration_is_accepted(fence: Fence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A paigeant.yaml that is shown is one, with workflows that can be made."""
    monkeypatch.chdir(tmp_path)
    Path("paigeant.yaml").write_text(fence.text)
    assert set(yaml.safe_load(fence.text)) <= Settings().model_fields_set


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a run that is completed, one that failed, and one that nobody has begun."""
    path = tmp_path_factory.mktemp("docs") / "paigeant.db"

    async def make() -> None:
        activity = paigeant.ActivityRegistry()

        @activity.execute(retries=0)
        async def divide(by: int) -> float:
            return 1 / by

        workflow = paigeant.Workflow("share", ["divide"])
        settings = Settings(store_url=f"sqlite:////{path}", transport_url=f"sqlite:////{path}")
        async with paigeant.Paigeant(settings, activities=activity) as opened:
            await opened.dispatch(workflow, {"by": 2}, workflow_id="good")
            await opened.dispatch(workflow, {"by": 0}, workflow_id="bad")
            await opened.worker().run(until_idle=True)
            await opened.dispatch(workflow, {"by": 3}, workflow_id="new")

    asyncio.run(make())
    return path


@pytest.mark.parametrize("fence", fences("sql"), ids=lambda fence: f"{fence.page}:{fence.line}")
def test_query_works(fence: Fence, database: Path) -> None:
    """A query that is shown runs over the real tables; `-- gives` under it is what it finds in the example."""
    query, _, expected = fence.text.partition("-- gives ")
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection, connection:
        found = connection.execute(query).fetchall()
    connection.close()
    if expected:
        assert str(found) == expected.strip()


# -- commands


@cache
def commands() -> dict[str, Any]:
    """All commands by what is typed for them."""

    def walk(command: Any, typed: str) -> Iterator[tuple[str, Any]]:
        inner = getattr(command, "commands", None)
        if inner is None:
            yield typed, command
        else:
            for name, part in inner.items():
                yield from walk(part, f"{typed} {name}")

    return dict(walk(get_command(app), "paigeant"))


def groups() -> set[str]:
    """What is typed before the name of a command."""
    return {typed.rsplit(" ", 1)[0] for typed in commands()}


def find(words: list[str]) -> tuple[Any, list[str]]:
    """The command that `words` call, None for a group, and what follows its name."""
    known = commands()
    for length in (3, 2):
        if " ".join(words[:length]) in known:
            return known[" ".join(words[:length])], words[length:]
    named = " ".join(word for word in words if not word.startswith("-"))
    assert named in groups(), f"there is no command `{' '.join(words)}`"
    options = {"--help", "-h", "--version", "--install-completion", "--show-completion"}
    assert {word for word in words if word.startswith("-")} <= options
    return None, []


def options_of(command: Any) -> set[str]:
    """The options that its help shows."""
    return {
        name
        for parameter in command.params
        if parameter.param_type_name == "option" and not parameter.hidden
        for name in [*parameter.opts, *parameter.secondary_opts]
    }


def shell_lines() -> list[Any]:
    """Each line that is shown for a shell, and each that a unit file executes."""
    found = []
    for fence in fences("sh", "console"):
        text = fence.text.replace("\\\n", " ")
        found += [
            pytest.param(line, id=f"{fence.page}:{fence.line}:{line[:40]}") for line in text.splitlines()
        ]
    for fence in fences("ini"):
        for line in fence.text.splitlines():
            if line.startswith("Exec"):
                found.append(
                    pytest.param(line.partition("=")[2], id=f"{fence.page}:{fence.line}:{line[:40]}")
                )
    return found


def calls(line: str) -> Iterator[list[str]]:
    """The calls of `paigeant` in a line for the shell."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    words = list(lexer)
    call: list[str] | None = None
    for word in [*words, "|"]:
        if call is not None and re.fullmatch(r"[|&;<>]+", word):
            yield call
            call = None
        elif call is not None:
            call.append(word)
        elif Path(word).name == "paigeant":
            call = ["paigeant"]


@pytest.mark.parametrize("line", shell_lines())
def test_shell_line_is_understood(line: str) -> None:
    """A command that is shown exists, and takes the arguments and options that it is given."""
    for call in calls(line):
        command, arguments = find(call)
        if command is not None and not {"--help", "-h"} & set(arguments):
            command.make_context(call[-1], arguments)
    for variable in re.findall(r"\b(PAIGEANT_[A-Z_]+)=", line):
        assert variable.removeprefix("PAIGEANT_").lower() in Settings.model_fields


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_commands_in_the_text_exist(path: Path) -> None:
    """A command that the text names exists with the options that stand with it."""
    for code in re.findall(r"`paigeant ([^`\n]+)`", prose(path)):
        command, rest = find(["paigeant", *code.split()])
        if command is not None:
            given = {word.partition("=")[0] for word in rest if word.startswith("--")}
            assert given <= options_of(command) | {"--help"}, f"{path.name}: `paigeant {code}`"


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_variables_of_the_environment_are_settings(path: Path) -> None:
    """Every PAIGEANT_ variable that a page names is one that is read."""
    for variable in re.findall(r"\bPAIGEANT_([A-Z][A-Z_]*)\b", path.read_text()):
        assert variable.lower() in Settings.model_fields, f"{path.name} names PAIGEANT_{variable}"


@pytest.mark.parametrize("path", [ROOT / "README.md", *OWN], ids=lambda path: path.name)
def test_make_targets_exist(path: Path) -> None:
    """Every `make` command that a page names is a target of the Makefile."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for target in re.findall(r"(?:^|`|PYTHON=\S+ )make ([a-z]+)", path.read_text(), flags=re.MULTILINE):
        assert target in targets, f"{path.name} names `make {target}`"


@pytest.mark.parametrize("fence", fences("ini"), ids=lambda fence: f"{fence.page}:{fence.line}")
def test_unit_file_can_be_read(fence: Fence) -> None:
    """A unit file that is shown has the three sections that systemd wants, and settings that exist."""
    unit = configparser.ConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]  # systemd's names have capitals
    unit.read_string(fence.text)
    assert unit.sections() == ["Unit", "Service", "Install"]
    grace = Settings.model_fields["shutdown_grace"].default
    assert unit.getint("Service", "TimeoutStopSec") > grace, "systemd would kill what may still finish"


# -- reference


def test_every_command_is_listed() -> None:
    """The reference has each command, with all of its options and arguments, in brackets those that may be left out."""
    listed = {}
    for row in rows(section("reference.md", "Commands", alone=True)):
        listed[row[0]] = set(re.findall(r"--?[a-z][a-z-]*", row[1]))
    real = {}
    for typed, command in commands().items():
        arguments = [
            parameter.metavar if parameter.required else f"[{parameter.metavar}]"
            for parameter in command.params
            if parameter.param_type_name == "argument"
        ]
        real[" ".join([typed, *arguments])] = options_of(command)
    assert listed == real


def test_exit_codes_are_listed() -> None:
    """The reference explains each exit code that the program ends with."""
    listed = [int(row[0]) for row in rows(section("reference.md", "Exit codes"))]
    assert listed == [0, FAILED, WRONG_USE, UNREACHABLE, 130, READER_GONE]


def test_every_setting_is_listed() -> None:
    """The reference has each setting with its default and what it is for."""
    listed = {
        row[0]: row[1] for row in rows(section("reference.md", "Settings")) if not row[0].startswith("PAI")
    }
    defaults = {
        name: field.get_default(call_default_factory=True) for name, field in Settings.model_fields.items()
    }
    assert listed == {name: shown_default(value) for name, value in defaults.items()}


def shown_default(value: Any) -> str:
    """A default as the reference shows it."""
    if value is None or value == () or value == {}:
        return "none"
    return value if isinstance(value, str) else str(json.dumps(value))


@pytest.mark.parametrize("table", list(metadata.tables.values()), ids=lambda table: table.name)
def test_every_column_is_listed(table: Any) -> None:
    """The reference has each table with all of its columns, their types and which of them are the key."""
    listed = [row[:2] for row in rows(section("reference.md", f"`{table.name}`"))]
    real = [[column.name, column_type(column)] for column in table.columns]
    assert listed == real


def column_type(column: Any) -> str:
    """The type of a column as the reference shows it."""
    words = [str(column.type).lower().replace("blob", "bytes")]
    words += ["key"] if column.primary_key else ["or null"] if column.nullable else []
    return ", ".join(words) if column.primary_key else " ".join(words)


def test_no_table_is_invented() -> None:
    """The reference names no table that there isn't."""
    text = section("reference.md", "Tables")
    assert set(re.findall(r"^### `(\w+)`$", text, flags=re.MULTILINE)) == set(metadata.tables)


def test_every_event_is_listed() -> None:
    """The reference has each event with the level of its log line."""
    listed = {row[0]: row[1] for row in rows(section("reference.md", "Events"))}
    names = {10: "debug", 20: "info", 30: "warning", 40: "error"}
    assert listed == {name: names[LEVELS[name]] for name in get_args(EventName)}


def test_every_field_of_an_event_is_explained() -> None:
    """The text under the events says what each of their fields is."""
    text = section("reference.md", "Events")
    assert [name for name in Event._fields if f"`{name}`" not in text] == []


def test_every_field_of_a_message_is_listed() -> None:
    """The reference has each field of a message on the wire."""
    listed = [row[0] for row in rows(section("reference.md", "Fields of a message"))]
    assert listed == [field.name for field in dataclasses.fields(PaigeantMessage)]


def test_example_message_can_be_read() -> None:
    """The message that the reference shows is one."""
    [fence] = [fence for fence in fences("json", page="reference.md") if fence.info == "message"]
    assert decode(fence.text.encode()).step_id == "charge_card"


def test_every_reason_for_rejection_is_listed() -> None:
    """The reference has each word by which a body, or its signature, is rejected."""
    listed = {row[0] for row in rows(section("reference.md", "Reasons for rejection"))}
    words = re.search(r"`reason` is (.*?)\.$", inspect.getdoc(decode) or "", flags=re.DOTALL | re.MULTILINE)
    assert words
    assert listed == set(re.findall(r"\w+_\w+", words[1])) | set(REASONS)


def test_every_refusal_is_explained() -> None:
    """The concepts have each word by which the store refuses a claim or a result."""
    listed = {row[0] for row in rows(section("concepts.md", "What the store refuses"))}
    words = re.search(r"`reason`: (.*?)\.", inspect.getdoc(Refused) or "", flags=re.DOTALL)
    assert words
    assert listed == set(re.findall(r"\b\w+\b", words[1])) - {"or"}


# -- public names

MADE_ELSEWHERE = {"ActivityWorker", "Run", "RunResult", "StepContext", "ActivityRegistry"}
"""Nobody calls these with arguments: an application hands them out, or they take none."""


def call_of(name: str, function: Any) -> str:
    """How `name` is called, on one line or, where that is too long, on several."""
    signature = inspect.signature(function)
    parts: list[str] = []
    only_by_name = False
    for parameter in signature.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not only_by_name:
            parts.append("*")
        only_by_name |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        parts.append(parameter_of(parameter))
    returns = signature.return_annotation
    gives = "" if returns in (None, "None", signature.empty) else f" -> {returns}"
    line = f"{name}({', '.join(parts)}){gives}"
    if len(line) <= 96:
        return line
    body = textwrap.fill(" ".join(part.replace(" ", "\xa0") + "," for part in parts), 92)
    return f"{name}(\n{textwrap.indent(body, '    ')}\n){gives}".replace("\xa0", " ")


def parameter_of(parameter: inspect.Parameter) -> str:
    """A parameter with its annotation and default."""
    stars = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}
    star = stars.get(parameter.kind.name, "")
    text = f"{star}{parameter.name}: {parameter.annotation}"
    return text if parameter.default is parameter.empty else f"{text} = {default_of(parameter.default)}"


def default_of(value: Any) -> str:
    """A default; dots for one that is made anew or is of no interest."""
    if callable(value) and hasattr(value, "__self__"):
        return f"random.{value.__name__}"
    if repr(value) == "<factory>" or callable(value) or isinstance(value, datetime):
        return "..."
    if isinstance(value, StrEnum):
        return f"{type(value).__name__}.{value.name}"
    return f"{type(value).__name__}()" if dataclasses.is_dataclass(value) else json_or_repr(value)


def json_or_repr(value: Any) -> str:
    """A text in double quotes, anything else as Python writes it."""
    return f'"{value}"' if isinstance(value, str) else repr(value)


def described(kind: Any) -> dict[str, str]:
    """The members of a class that users meet, each with its line in the reference; of a function, itself."""
    name = kind.__name__
    if inspect.isfunction(kind):
        return {name: call_of(name, kind)}
    if issubclass(kind, PaigeantError):
        return {name: f"class {name}({', '.join(base.__name__ for base in kind.__bases__)})"}
    if issubclass(kind, StrEnum):
        return {member.name: f'{name}.{member.name} = "{member.value}"' for member in kind}
    found = {}
    is_contract = Protocol in kind.__mro__ and kind.__module__ in ("paigeant.store", "paigeant.transport")
    if is_contract:
        found[name] = f"class {name}(Protocol)"
    elif kind is Settings:
        found[name] = "Settings(**values)"
    elif name in MADE_ELSEWHERE:
        found[name] = f"class {name}"
        if dataclasses.is_dataclass(kind):
            for field in dataclasses.fields(kind):
                if not field.name.startswith("_"):
                    found[field.name] = f"{name}.{field.name}: {field.type}"
    else:
        found[name] = call_of(name, kind)
    members: dict[str, Any] = {}
    for base in reversed(kind.__mro__) if is_contract else [kind]:
        if base.__module__.startswith("paigeant"):
            members.update(vars(base))
    for member, value in members.items():
        if member.startswith("_") or (kind is Settings and member == "settings_customise_sources"):
            continue
        if isinstance(value, classmethod):
            value = value.__get__(None, kind)
        if isinstance(value, property):
            returns = str(inspect.signature(value.fget).return_annotation).strip("'")  # type: ignore[arg-type]
            found[member] = f"{name}.{member}: {returns}"
        elif inspect.isroutine(value):
            prefix = "async " if inspect.iscoroutinefunction(value) else ""
            found[member] = prefix + call_of(f"{name}.{member}", value)
    return found


def block(kind: Any) -> str:
    """The signatures of a class as the reference shows them."""
    return "\n".join(described(kind).values())


PUBLIC = [getattr(paigeant, name) for name in paigeant.__all__]
TESTING = [getattr(paigeant.testing, name) for name in paigeant.testing.__all__]


@pytest.mark.parametrize("kind", PUBLIC + TESTING, ids=lambda kind: kind.__name__)
def test_signatures_are_those_of_the_code(kind: Any) -> None:
    """The reference shows each public name with the signatures that it has."""
    text = section("reference.md", f"`{kind.__name__}`")
    found = re.search(r"```python signatures\n(.*?)\n```", text, flags=re.DOTALL)
    assert found, f"no signatures under {kind.__name__}; expected:\n{block(kind)}"
    assert found[1] == block(kind)


@pytest.mark.parametrize("kind", PUBLIC + TESTING, ids=lambda kind: kind.__name__)
def test_everything_public_is_described(kind: Any) -> None:
    """The text under a public name has each of its members, and each parameter that they take."""
    text = re.sub(r"```.*?```", "", section("reference.md", f"`{kind.__name__}`"), flags=re.DOTALL)
    names = set(described(kind)) - {kind.__name__}
    if inspect.isfunction(kind):
        names = set(inspect.signature(kind).parameters)
    elif issubclass(kind, StrEnum):
        return  # the concepts explain each state
    elif Protocol not in kind.__mro__ and not issubclass(kind, PaigeantError):
        calls = [getattr(kind, name) for name in names if inspect.isroutine(getattr(kind, name, None))]
        if kind.__name__ not in MADE_ELSEWHERE and kind is not Settings:
            calls.append(kind)
        names |= {name for call in calls for name in inspect.signature(call).parameters} - {"self"}
    missing = sorted(name for name in names if not re.search(rf"`(\*+)?{name}\b", text))
    assert missing == [], f"not described under {kind.__name__}"


if __name__ == "__main__":  # what the reference has to hold, to be pasted into it
    for kind in PUBLIC + TESTING:
        os.write(1, f"### `{kind.__name__}`\n\n```python signatures\n{block(kind)}\n```\n\n".encode())
