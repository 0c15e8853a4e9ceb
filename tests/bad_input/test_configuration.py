"""Settings that can't be: in paigeant.yaml, in the environment and in code."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from tests.bad_input.bench import INPUT, Case, call, check, put, rows

from paigeant import ActivityRegistry, ItineraryPolicy, Paigeant, RetryPolicy, Settings, Step, Workflow
from paigeant.errors import PaigeantError

SURFACE = "configuration"


def file(name: str, text: str | bytes, *says: str) -> Case:
    """A `paigeant.yaml` that any command has to refuse."""
    return Case(name, ("runs", "list", "--json"), says, files={"paigeant.yaml": text})


def workflow(name: str, text: str, *says: str) -> Case:
    """A workflow in `paigeant.yaml`, below `workflows:`."""
    files = {"paigeant.yaml": f"workflows:\n  pay:\n{text}", "input.json": json.dumps(INPUT)}
    return Case(name, ("dispatch", "pay", "input.json", "--json"), says, files=files)


def variable(name: str, key: str, value: str, *says: str) -> Case:
    """A variable of the environment."""
    return Case(name, ("runs", "list"), says, env={key: value})


CASES = [
    file(
        "unknown key",
        "transport: sqlite:///x.db\n",
        "paigeant.yaml has an unknown key 'transport'",
        "did you mean 'transport_url'",
    ),
    file(
        "unknown key far from any", "colour: red\n", "unknown key 'colour'", "known: adopt, allow_plaintext"
    ),
    file("no YAML", "concurrency: 5\nhandlers: [a, b\n", "paigeant.yaml, line 3 is not YAML"),
    file("a tab in YAML", "workflows:\n\tpay: [a]\n", "paigeant.yaml, line 2 is not YAML"),
    file("a list", "- handlers.py\n", "paigeant.yaml holds a list", "`key: value`"),
    file("a text", "handlers\n", "paigeant.yaml holds a str"),
    file("not UTF-8", b"handlers: \xff\xfe\n", "can't read paigeant.yaml"),
    file("not a number", "concurrency: many\n", "concurrency", "valid integer", "'many'"),
    file("no steps at once", "concurrency: 0\n", "concurrency", "greater than or equal to 1", "0"),
    file("not yes or no", "strict: perhaps\n", "strict", "valid boolean", "'perhaps'"),
    file("not one of the words", "log_format: xml\n", "log_format", "'auto', 'console' or 'json'", "'xml'"),
    file("a number for handlers", "handlers: 5\n", "handlers", "5"),
    file("names in a list of workflows", "workflows: [pay]\n", "workflows", "`name`", "'pay'"),
    file("heartbeat as long as the lease", "heartbeat: 30\nlease: 30\n", "heartbeat=30", "lease=30"),
    file("a lease without time", "lease: 0\n", "lease", "greater than 0"),
    file("a lease that isn't a number", "lease: .nan\n", "lease"),
    file("a lease without end", "lease: .inf\nheartbeat: 5\n", "lease"),
    file("no URL", "store_url: paigeant.db\n", "store_url", "found 'paigeant.db'", "sqlite://"),
    file(
        "unknown scheme",
        "store_url: mysql://localhost/x\n",
        "store_url",
        "'mysql://...'",
        "postgresql://",
    ),
    file("a URL without a file", "store_url: 'sqlite://'\n", "names no file", "sqlite:///file.db"),
    file(
        "a store that is a broker",
        "store_url: redis://me:hunter2@h\n",
        "store_url begins with redis://",
        "sqlite://",
    ),
    file(
        "a folder that isn't there",
        "store_url: sqlite:///gone/paigeant.db\n",
        "the folder gone",
        "doesn't exist",
        "make it",
    ),
    file(
        "a URL that no file can have", f"store_url: sqlite:///{'x' * 300}.db\n", "no file can be called 'xxx"
    ),
    file("a URL with a null byte", 'store_url: "sqlite:///a\\0b.db"\n', "no file can be called 'a\\x00b.db'"),
    variable(
        "unknown variable", "PAIGEANT_CONCURENCY", "5", "PAIGEANT_CONCURENCY", "did you mean 'concurrency'"
    ),
    variable("variable is no number", "PAIGEANT_RETRIES", "often", "retries", "valid integer", "'often'"),
    variable("variable is no URL", "PAIGEANT_STORE_URL", "", "store_url", "found ''"),
    variable("variable is no JSON", "PAIGEANT_WORKFLOWS", "pay", "PAIGEANT_WORKFLOWS", "which is not JSON"),
    variable(
        "memory as a store",
        "PAIGEANT_STORE_URL",
        "memory://",
        "store_url is memory://",
        "lives in one process",
    ),
    variable(
        "password in a wrong URL", "PAIGEANT_STORE_URL", "mysql://me:hunter2@h/x", "mysql://", "postgresql://"
    ),
    workflow(
        "unknown field of a workflow",
        "    stps: [a]\n",
        "workflow 'pay' has an unknown key 'stps'",
        "did you mean 'steps'",
    ),
    workflow(
        "a workflow that is a text",
        "    charge\n",
        "workflow 'pay' is a list of steps or a mapping",
        "'charge'",
    ),
    workflow("steps that are a text", "    steps: charge\n", "workflow 'pay'", "list", "'charge'"),
    workflow("a step that is a number", "    steps: [5]\n", "workflow 'pay'", "`activity`", "5"),
    workflow(
        "a step without an activity", "    steps: [{id: x}]\n", "workflow 'pay'", "`activity`", "'id': 'x'"
    ),
    workflow(
        "unknown field of a step",
        "    steps: [{activity: a, whn: 'x > 1'}]\n",
        "unknown key 'whn'",
        "did you mean 'when'",
    ),
    workflow(
        "when that doesn't compile",
        "    steps: [{activity: a, when: 'x >'}]\n",
        "workflow 'pay'",
        "when='x >' is not a CEL expression",
    ),
    workflow(
        "when that is a number",
        "    steps: [{activity: a, when: 5}]\n",
        "`when` is a CEL expression",
        "found 5",
    ),
    workflow("retries below 0", "    steps: [{activity: a, retries: -1}]\n", "retries", "-1"),
    workflow(
        "a timeout of 0",
        "    steps: [{activity: a, timeout: 0}]\n",
        "timeout of step 'a'",
        "above 0",
        "found 0",
    ),
    workflow(
        "a timeout in words",
        "    steps: [{activity: a, timeout: 5s}]\n",
        "timeout of step 'a'",
        "seconds",
        "'5s'",
    ),
    workflow("args that are a list", "    steps: [{activity: a, args: [1]}]\n", "args of step 'a'", "[1]"),
    workflow(
        "a step id twice",
        "    steps: [{activity: a, id: x}, {activity: b, id: x}]\n",
        "step id 'x' occurs twice",
    ),
    workflow(
        "unknown field of a policy",
        "    steps: [a]\n    policy: {max_ad: 3}\n",
        "the policy of workflow 'pay'",
        "'max_ad'",
        "did you mean 'max_added'",
    ),
    workflow("a policy that is a number", "    steps: [a]\n    policy: 3\n", "policy", "workflow 'pay'", "3"),
    workflow(
        "a policy that allows below 0", "    steps: [a]\n    policy: {max_added: -1}\n", "max_added", "-1"
    ),
    workflow(
        "more steps than the policy",
        "    steps: [a, b]\n    policy: {max_total: 1}\n",
        "has 2 steps",
        "allows 1",
    ),
    workflow(
        "a deadline in words", "    steps: [a]\n    deadline: soon\n", "deadline of workflow 'pay'", "'soon'"
    ),
    workflow(
        "unknown word for a failed undo",
        "    steps: [a]\n    on_compensation_failure: wait\n",
        "'continue' or 'stop'",
        "'wait'",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_settings_that_cannot_be_are_refused(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says which setting it is and what it may be, the exit code is 2, and nothing is recorded."""
    put(case.files)
    for name, value in case.env.items():
        monkeypatch.setenv(name, value)
    recorded = rows()
    result = call(*case.does, input=case.input)
    check(result, case.says, case.code)
    assert "hunter2" not in result.stderr
    assert rows() == recorded


CODE: list[tuple[str, Callable[[], object], str]] = [
    (
        "unknown setting",
        lambda: Settings(concurency=5),
        "unknown key 'concurency'; did you mean 'concurrency'",
    ),
    ("setting of another type", lambda: Settings(lease="long"), "lease: Input should be a valid number"),
    ("no setting in time", lambda: Settings(lease=5, heartbeat=5), "found heartbeat=5 and lease=5"),
    ("step without a name", lambda: Step(""), "the activity of a step is a non-empty text, found ''"),
    ("step that is no text", lambda: Step("\ud800"), "no control characters, found '\\ud800'"),
    ("step with a bad condition", lambda: Step("a", when="1 +"), "when='1 +' is not a CEL expression"),
    ("step with a bad timeout", lambda: Step("a", timeout=float("inf")), "timeout of step 'a' is in seconds"),
    ("workflow of no list", lambda: Workflow("w", 5), "steps of workflow 'w' are a list, found 5"),  # type: ignore[arg-type]
    ("workflow of bytes", lambda: Workflow("w", [b"a"]), "found b'a' of type bytes"),  # type: ignore[list-item]
    ("workflow with a bad deadline", lambda: Workflow("w", ["a"], deadline=0), "deadline of workflow 'w'"),
    (
        "policy that allows a text",
        lambda: ItineraryPolicy(allowed="ab"),
        "a list of activity names, found 'ab'",
    ),
    (
        "policy without a step",
        lambda: ItineraryPolicy(max_total=0),
        "max_total is a number from 1 to 2147483647, found 0",
    ),
    (
        "activities in a list",
        lambda: Paigeant().worker([ActivityRegistry()]),  # type: ignore[arg-type]
        "activities are ActivityRegistry objects, found [ActivityRegistry(",
    ),
    (
        "activities that are names",
        lambda: Paigeant(activities="ab"),  # type: ignore[arg-type]
        "activities are ActivityRegistry objects, found 'a'",
    ),
    (
        "topics that are a text",
        lambda: Paigeant().worker(topics="reserve"),
        "topics are a list of names, found 'reserve'",
    ),
    ("policy of no attempt", lambda: RetryPolicy(attempts=0), "attempts"),
    ("policy that waits below 0", lambda: RetryPolicy(base=-1), "base"),
]
"""The same mistakes in code: a name, what is called, and what the error says."""


@pytest.mark.parametrize(("name", "make", "says"), CODE, ids=[name for name, _, _ in CODE])
def test_code_that_cannot_be_is_refused(name: str, make: Callable[[], object], says: str) -> None:
    """The error is Paigeant's own, on one line, and says what was found."""
    with pytest.raises(PaigeantError) as error:
        make()
    assert says in str(error.value)
    assert "\n" not in str(error.value)
