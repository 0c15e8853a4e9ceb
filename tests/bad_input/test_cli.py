"""Wrong use of the commands: options, ids, values and times that can't be meant."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
from tests.bad_input.bench import INPUT, PAIGEANT, Case, call, check, put, rows

SURFACE = "command line"

DISPATCH = ("dispatch", "order", "input.json", "--handlers", "handlers.py")
BYTES = "\udcff"
"""What Python makes of an argument whose one byte is not UTF-8."""

FILES: Mapping[str, str] = {"input.json": json.dumps(INPUT)}


def dispatched(name: str, *args: str, says: tuple[str, ...], code: int = 2) -> Case:
    """`dispatch` with a good input and something wrong besides."""
    return Case(name, (*DISPATCH, *args), says, code, FILES)


CASES = [
    Case("unknown command", ("rn",), ("No such command 'rn'", "Did you mean 'run'", "--help")),
    Case("unknown subcommand", ("runs", "lst"), ("No such command 'lst'", "`paigeant runs --help`")),
    Case("unknown option", ("runs", "list", "--stat", "failed"), ("No such option: --stat", "--status")),
    Case("missing argument", ("runs", "show"), ("Missing argument 'ID'", "`paigeant runs show --help`")),
    Case("one argument too many", ("runs", "show", "a", "b"), ("unexpected extra argument", "b")),
    Case("no value of an option", ("runs", "list", "--limit"), ("--limit", "requires an argument")),
    Case("limit is no number", ("runs", "list", "--limit", "x"), ("Invalid value for '--limit'", "'x'")),
    Case(
        "limit of nothing",
        ("runs", "list", "--limit", "0"),
        ("Invalid value for '--limit'", "or equal to 1, found '0'"),
    ),
    Case(
        "unknown status",
        ("runs", "list", "--status", "complete"),
        ("no run has the status 'complete'", "'completed'"),
    ),
    Case(
        "show an unknown run",
        ("runs", "show", "nobody", "--json"),
        ("no run 'nobody'", "`paigeant runs list`"),
    ),
    Case(
        "show a run whose id is no text",
        ("runs", "show", BYTES, "--json"),
        ("no run", "`paigeant runs list`"),
    ),
    Case("cancel an unknown run", ("runs", "cancel", "nobody"), ("no run 'nobody'", "`paigeant runs list`")),
    Case("retry an unknown run", ("runs", "retry", "nobody", "--json"), ("no run 'nobody'",)),
    Case("signal an unknown run", ("runs", "signal", "nobody", "go", "--json"), ("no run 'nobody'",)),
    Case("cancel a run that is done", ("runs", "cancel", "completed"), ("run 'completed'", "completed")),
    Case("retry a run that is done", ("runs", "retry", "completed"), ("run 'completed'", "completed")),
    Case("signal a run that is done", ("runs", "signal", "completed", "go"), ("run 'completed'",)),
    Case(
        "signal without a name",
        ("runs", "signal", "other", ""),
        ("the name of a signal is a non-empty text", "found ''"),
    ),
    Case("signal with no JSON", ("runs", "signal", "other", "go", "yes"), ("VALUE is not JSON", "'\"yes\"'")),
    *(
        Case(
            f"{command[0]} an unknown request",
            ("requests", *command),
            ("no request 'x'", "`paigeant requests list`"),
        )
        for command in (
            ("show", "x"),
            ("approve", "x"),
            ("deny", "x", "--reason", "no"),
            ("answer", "x", "1"),
        )
    ),
    Case("answer with no JSON", ("requests", "answer", "x", "red"), ("VALUE is not JSON", "'\"red\"'")),
    Case(
        "answer by nobody that can be",
        ("requests", "approve", "x", "--by", "a\nb"),
        ("a sender is a text", "\\n"),
    ),
    Case("signal by bytes", ("runs", "signal", "other", "go", "--by", BYTES), ("a sender is a text",)),
    Case("requests of an unknown run", ("requests", "list", "--run", "nobody"), ("no run 'nobody'",)),
    Case("variables of an unknown run", ("variables", "list", "nobody", "--json"), ("no run 'nobody'",)),
    Case(
        "unknown variable",
        ("variables", "get", "completed", "custmer"),
        ("no variable 'custmer'", "'customer'"),
    ),
    Case(
        "set a variable to no JSON", ("variables", "set", "completed", "a", "{a:1}"), ("VALUE is not JSON",)
    ),
    Case("set a variable without a name", ("variables", "set", "completed", "", "1"), ("non-empty text",)),
    Case("set a variable of an unknown run", ("variables", "set", "nobody", "a", "1"), ("no run 'nobody'",)),
    Case(
        "unknown dead letter",
        ("dead-letters", "show", "x", "--json"),
        ("no dead letter 'x'", "none is known"),
    ),
    Case("requeue an unknown dead letter", ("dead-letters", "requeue", "x"), ("no dead letter 'x'",)),
    Case("delete an unknown dead letter", ("dead-letters", "delete", "x"), ("no dead letter 'x'",)),
    Case("no topic", ("run", "handlers.py", "--topics", ","), ("--topics names no topic", "commas")),
    Case(
        "unknown topic",
        ("run", "handlers.py", "--topics", "resreve", "--until-idle"),
        ("no activity here has the topic 'resreve'", "did you mean 'reserve'"),
        0,
        warns=True,
    ),
    Case("no handlers", ("run",), ("no handlers are named", "`paigeant run handlers.py`", "paigeant.yaml")),
    Case(
        "no step at once",
        ("run", "handlers.py", "--concurrency", "0"),
        ("'--concurrency'", "or equal to 1, found '0'"),
    ),
    Case(
        "steps at once are no number",
        ("run", "handlers.py", "--concurrency", "many"),
        ("'--concurrency'", "'many'"),
    ),
    Case(
        "no process",
        ("run", "handlers.py", "--processes", "0"),
        ("'--processes'", "or equal to 1, found '0'"),
    ),
    Case(
        "unknown workflow",
        ("dispatch", "ordr", *DISPATCH[2:]),
        ("no workflow 'ordr'", "did you mean 'order'"),
        2,
        FILES,
    ),
    Case(
        "dispatch without handlers",
        DISPATCH[:3],
        ("no handlers are named", "--handlers handlers.py"),
        2,
        FILES,
    ),
    dispatched("timeout without wait", "--timeout", "5", says=("--timeout", "it needs --wait")),
    dispatched("start at no time", "--start-at", "soon", says=("--start-at", "time zone", "found 'soon'")),
    dispatched("start without a zone", "--start-at", "2027-01-01", says=("time zone", "found '2027-01-01'")),
    dispatched("start in no time", "--start-at", "in 5", says=("--start-at after 'in'", "90s", "found '5'")),
    dispatched("deadline without a unit", "--deadline", "5", says=("--deadline", "90s", "found '5'")),
    dispatched(
        "deadline at once",
        "--deadline",
        "0s",
        says=("deadline is in seconds, above 0 and below 100 years, found 0",),
    ),
    dispatched("deadline of bytes", "--deadline", BYTES, says=("--deadline",)),
    dispatched("timeout below 0", "--wait", "--timeout", "-1", says=("Invalid value for '--timeout'",)),
    dispatched(
        "timeout is no number",
        "--wait",
        "--timeout",
        "soon",
        says=("Invalid value for '--timeout'", "'soon'"),
    ),
    dispatched("timeout is not a number", "--wait", "--timeout", "nan", says=("--timeout", "found 'nan'")),
    dispatched(
        "id with other input",
        "--id",
        "failed",
        "--json",
        says=("run 'failed' already exists", "choose another id"),
    ),
    dispatched("empty id", "--id", "", says=("a run's id is a text of 1 to 200 characters", "''")),
    dispatched("id with blanks", "--id", "order 42", says=("no blanks", "'order 42'")),
    dispatched("id with a line break", "--id", "order\n42", says=("no control characters", "'order\\n42'")),
    dispatched("id without an end", "--id", "x" * 201, says=("1 to 200 characters",)),
    *(
        dispatched(f"on behalf of {name}", "--on-behalf-of", source, says=says)
        for name, source, says in (
            ("a missing file", "gone", ("can't read gone: No such file", "env:NAME", "standard input as -")),
            ("a folder", ".", ("can't read .: Is a directory",)),
            ("a name that no file can have", "a\0b", ("can't read", "null byte")),
            ("a file for everybody", "/etc/passwd", ("others can read /etc/passwd", "chmod 600 /etc/passwd")),
            ("an unknown variable", "env:NOBODY", ("no variable 'NOBODY'",)),
            ("a variable without a name", "env:", ("no variable ''",)),
            ("nothing", "/dev/null", ("/dev/null is empty", "expected a token")),
            ("a file without an end", "/dev/zero", ("/dev/zero is too large for a token", "16,384")),
        )
    ),
    *(
        Case(
            f"on behalf of {name}",
            (*DISPATCH, "--on-behalf-of", "-"),
            ("standard input", *says),
            files=FILES,
            input=text,
        )
        for name, text, says in (
            ("bytes", b"\xff\xfe", ("it is no text",)),
            ("broken JSON", '{"handle": ', ("is not JSON", "a grant is")),
            ("another object", '{"token": "x"}', ("is no grant", "found token")),
            (
                "a grant with something more",
                '{"handle": "h", "subject": "s", "issuer": "i", "to": 1}',
                ("to",),
            ),
        )
    ),
    Case(
        "on behalf of a grant of no scopes",
        (*DISPATCH, "--on-behalf-of", "-"),
        ("a scope is a text", "'a b'"),
        files=FILES,
        input='{"handle": "h", "subject": "s", "issuer": "i", "scopes": ["a b"]}',
    ),
    Case(
        "on behalf of a grant of no text",
        (*DISPATCH, "--on-behalf-of", "-"),
        ("the subject of a grant is a text", "found int"),
        files=FILES,
        input='{"handle": "h", "subject": 5, "issuer": "i"}',
    ),
    Case(
        "on behalf of a token over a database",
        (*DISPATCH, "--on-behalf-of", "-"),
        ("a token can't travel through a database",),
        files=FILES,
        input="opaque",
    ),
    Case(
        "standard input for two",
        ("dispatch", "order", "-", *DISPATCH[3:], "--on-behalf-of", "-"),
        ("INPUT and --on-behalf-of can't both be -",),
        input="{}",
    ),
    Case(
        "unknown migration",
        ("db", "upgrade", "0042"),
        ("no migration is called '0042'", "known: 0001, base, head"),
    ),
    Case(
        "delete runs without asking",
        ("db", "downgrade", "base"),
        ("deletes the tables with what is in them (runs: 3", "--yes"),
    ),
    Case("further back than the first", ("db", "downgrade", "-9"), ("beyond the first migration", "base")),
    Case(
        "init in a file", ("init", "input.json"), ("input.json is no folder", "paigeant init DIR"), 2, FILES
    ),
    Case("init over handlers", ("init",), ("handlers.py", "already")),
    Case("demo of no file", ("demo", "nothing.md"), ("nothing.md",)),
    Case(
        "demo of no text",
        ("demo", "picture.md"),
        ("picture.md",),
        2,
        {"picture.md": b"\x89PNG\r\n\xff\xfe\x00"},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_wrong_use_is_refused(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says what was found and what to do, the exit code is 2, and nothing is recorded."""
    put(case.files)
    for name, value in case.env.items():
        monkeypatch.setenv(name, value)
    recorded = rows()
    result = call(*case.does, input=case.input)
    check(result, case.says, case.code, label="warning" if case.warns else "error")
    if not case.warns:
        assert rows() == recorded


def test_a_standard_output_that_is_full_is_told() -> None:
    """Where the result can't be written is said on one line, and the exit code is 3."""
    with Path("/dev/full").open("wb") as full:
        command = [*PAIGEANT, "runs", "list", "--json"]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (result.returncode, result.stderr) == (3, "error: standard output: No space left on device\n")
