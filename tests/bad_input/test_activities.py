"""Activities that do what they shouldn't: the step fails with a reason, and everything else goes on."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import pytest
from tests.bad_input.bench import HANDLERS, INPUT, OTHER, PAIGEANT, call, check, complaints, done, put, rows
from tests.patience import PATIENCE

from paigeant import ActivityRegistry, Paigeant, Settings, Step, Workflow
from paigeant.errors import PaigeantError

SURFACE = "activities"


@dataclass(frozen=True)
class Attempt:
    """A run that fails because of what its activities are.

    `code` defines the activities, with @ for their decorator and @undo for that of a compensation. `steps` is the
    itinerary, `says` stands in the error of the run.
    """

    name: str
    code: str
    says: tuple[str, ...]
    steps: str = '["bad"]'
    input: dict[str, Any] = field(default_factory=lambda: dict(INPUT))
    status: str = "failed"
    policy: str = ""
    tells_where: bool = False
    """Whether there is a traceback in the log: what raised is the user's code."""

    def __str__(self) -> str:
        return self.name


def rejected(name: str, code: str, *says: str, steps: str = '["bad"]', **more: Any) -> Attempt:
    """A mistake that Paigeant finds. The activity would be tried again three times."""
    return Attempt(name, _decorated(code, "@activity.execute()\n"), says, steps, **more)


def raises(name: str, code: str, *says: str, steps: str = '["bad"]', **more: Any) -> Attempt:
    """An activity that fails by itself, without further attempts."""
    code = _decorated(code, "@activity.execute(retries=0)\n")
    return Attempt(name, code, says, steps, tells_where=True, **more)


def _decorated(code: str, decorator: str) -> str:
    return re.sub("@(?=async def|def)", decorator, code).replace("@undo", "@activity.compensate")


def when(name: str, expression: str, *says: str) -> Attempt:
    """A step whose condition can't be told."""
    steps = f'["good", Step("good", id="maybe", when={expression!r})]'
    return rejected(name, "@async def good(sku: str) -> str:\n    return sku", "maybe: ", *says, steps=steps)


def revises(name: str, code: str, *says: str, policy: str = "") -> Attempt:
    """A step that revises what is left in a way that can't be."""
    body = f"@async def bad(ctx: StepContext) -> None:\n    {code}\n@async def good() -> None: ..."
    return rejected(name, body, *says, policy=policy, tells_where=not policy)


GIVES = "@async def bad():\n    return "

CASES = [
    # -- what it is given
    rejected(
        "missing argument",
        "@async def good() -> int:\n    return 1\n@async def bad(nothing): ...",
        "bad: ",
        "activity 'bad' needs 'nothing', which isn't there",
        "there is: good, quantity, sku",
        steps='["good", "bad"]',
    ),
    rejected(
        "argument that doesn't fit",
        "@async def good() -> str:\n    return 'x'\n@async def bad(good: int): ...",
        "'good' of activity 'bad' doesn't fit",
        "valid integer",
        "found 'x'",
        steps='["good", "bad"]',
    ),
    rejected(
        "step args that don't fit",
        "@async def bad(sku: int): ...",
        "'sku' of activity 'bad' doesn't fit",
        "'many'",
        steps='[Step("bad", args={"sku": "many"}, when="true")]',
    ),
    when(
        "condition that names what isn't there",
        "weight > 1",
        "when='weight > 1' names 'weight'",
        "there is good, quantity, sku",
    ),
    when("condition that asks for a missing part", "good.weight > 1", "good.weight > 1"),
    when(
        "condition that gives no truth value",
        "quantity + 1",
        "when='quantity + 1' gives 3",
        "expected true or false",
    ),
    when(
        "condition that divides by zero",
        "quantity / 0 == 1",
        "when='quantity / 0 == 1' can't be computed",
        "zero",
    ),
    when("condition that compares the incomparable", "sku > 1", "when='sku > 1' can't be computed"),
    # -- what it returns
    rejected(
        "object", GIVES + "object()", "activity 'bad' returned <object object", "can't be written as JSON"
    ),
    rejected(
        "function",
        GIVES + "len",
        "activity 'bad' returned <built-in function len>",
        "can't be written as JSON",
    ),
    rejected(
        "value that contains itself",
        "@async def bad():\n    x = []; x.append(x)\n    return x",
        "activity 'bad' returned [[...]]",
        "contains itself",
    ),
    rejected(
        "value nested too deeply",
        "@async def bad():\n    x = 1\n    for _ in range(80): x = [x]\n    return x",
        "activity 'bad' returned [[[",
        "nested deeper than 64",
    ),
    rejected(
        "coroutine",
        "async def other(): ...\n" + GIVES + "other()",
        "activity 'bad' returned <coroutine",
        "can't be written as JSON",
    ),
    rejected(
        "asynchronous generator",
        "@async def bad():\n    yield 1",
        "activity 'bad' returned <async_generator",
        "can be read only once; make a list of it",
    ),
    rejected(
        "generator",
        "@def bad():\n    while True: yield 1",
        "activity 'bad' returned <generator",
        "can be read only once; make a list of it",
    ),
    rejected(
        "text that is no text", GIVES + r"'\ud800'", "activity 'bad' returned", "can't be written as JSON"
    ),
    rejected(
        "integer too large to be read",
        GIVES + "10 ** 5000",
        "activity 'bad' returned a value of type int",
        "can't be written as JSON",
    ),
    rejected(
        "other type than was said",
        "@async def bad() -> int:\n    return 'x'",
        "activity 'bad' returned 'x', which isn't what its annotation says: expected `int`, found str",
    ),
    # -- what it does
    rejected(
        "variable that isn't JSON",
        "@async def bad(ctx: StepContext):\n    await ctx.save_variable('a', object())",
        "variable 'a' can't be written as JSON",
    ),
    rejected(
        "record that isn't JSON",
        "@async def bad(ctx: StepContext):\n    await ctx.once('a', object)",
        "what 'a' returned can't be written as JSON",
    ),
    revises(
        "revision with what is no step",
        "ctx.insert(5)",
        "an itinerary holds activity names and Steps, found 5",
    ),
    revises(
        "revision with an id that is taken",
        "ctx.append(Step('good', id='bad'))",
        "step id 'bad' occurs twice",
    ),
    revises(
        "revision with args that aren't JSON",
        "ctx.insert(Step('good', args={'x': object()}))",
        "can't be written as JSON",
    ),
    revises(
        "revision with a bad condition",
        "ctx.insert(Step('good', when='x >'))",
        "when='x >' is not a CEL expression",
    ),
    revises(
        "activity that may not be added",
        "ctx.insert('pay')",
        "activity 'pay' may not be added",
        "known: good",
        policy="ItineraryPolicy(allowed=('good',))",
    ),
    revises(
        "more steps than may be added",
        "ctx.insert('good', 'good')",
        "2 added steps",
        "allows 1",
        policy="ItineraryPolicy(max_added=1)",
    ),
    revises(
        "more steps than a run may have",
        "ctx.append(*['good'] * 3)",
        "4 steps in all",
        "allows 3",
        policy="ItineraryPolicy(max_total=3)",
    ),
    # -- how it ends
    raises(
        "exception",
        "@async def bad():\n    raise ValueError('no such shelf')",
        "bad: ValueError: no such shelf",
    ),
    raises(
        "exception in a thread",
        "@def bad():\n    raise ValueError('no such shelf')",
        "bad: ValueError: no such shelf",
    ),
    raises("exception without a text", "@async def bad():\n    raise ValueError", "bad: ValueError"),
    raises(
        "exception with an endless text",
        "@async def bad():\n    raise ValueError('x' * 100000)",
        "bad: ValueError: xxx",
        "...",
    ),
    raises(
        "exception whose text can't be had",
        "class Odd(Exception):\n    def __str__(self): raise KeyError('x')\n@async def bad():\n    raise Odd",
        "bad: Odd",
    ),
    raises(
        "exception with a text that is no text",
        "@async def bad():\n    raise ValueError('\\ud800!\\0')",
        "bad: ValueError",
        "!",
    ),
    raises("sys.exit", "import sys\n@async def bad():\n    sys.exit(3)", "bad: SystemExit: 3"),
    raises("sys.exit in a thread", "import sys\n@def bad():\n    sys.exit(3)", "bad: SystemExit: 3"),
    raises(
        "sys.exit in a task",
        "import asyncio, sys\nasync def other(): sys.exit(2)\n@async def bad():\n    await asyncio.gather(other())",
        "bad: SystemExit: 2",
    ),
    raises("KeyboardInterrupt", "@async def bad():\n    raise KeyboardInterrupt", "bad: KeyboardInterrupt"),
    raises(
        "KeyboardInterrupt in a thread", "@def bad():\n    raise KeyboardInterrupt", "bad: KeyboardInterrupt"
    ),
    raises(
        "exception of the lowest kind",
        "class Odd(BaseException): ...\n@async def bad():\n    raise Odd('odd')",
        "bad: Odd: odd",
    ),
    raises(
        "exception of the lowest kind in a thread",
        "class Odd(BaseException): ...\n@def bad():\n    raise Odd('odd')",
        "bad: Odd: odd",
    ),
    raises("StopIteration", "@async def bad():\n    next(iter(()))", "bad: RuntimeError", "StopIteration"),
    raises("StopIteration in a thread", "@def bad():\n    next(iter(()))", "bad: ", "StopIteration"),
    raises(
        "cancelled from within",
        "import asyncio\n@async def bad():\n    raise asyncio.CancelledError",
        "bad: CancelledError",
    ),
    rejected(
        "variable with a name that is no text",
        "@async def bad(ctx: StepContext):\n    await ctx.save_variable('\\ud800', 1)",
        "the name of a variable",
        "'\\ud800'",
        tells_where=True,
    ),
    raises(
        "several exceptions",
        "@async def bad():\n    raise ExceptionGroup('both', [ValueError('a'), KeyError('b')])",
        "bad: ExceptionGroup: both (2 sub-exceptions)",
    ),
    raises(
        "takes too long",
        "import asyncio\n@async def bad():\n    await asyncio.Event().wait()",
        "bad: TimeoutError: the attempt took longer than 0.05 s",
        steps='[Step("bad", timeout=0.05)]',
    ),
    raises(
        "undo that fails",
        "@async def good() -> None: ...\n@undo('good', retries=0)\nasync def undo(): 1 / 0\n"
        "@async def bad():\n    raise ValueError('x')",
        "bad: ValueError: x",
        steps='["good", "bad"]',
        status="compensation_failed",
    ),
    rejected(
        "undo that needs what isn't there",
        "@async def good() -> None: ...\n@undo('good')\nasync def undo(shelf): ...\n@async def bad(nothing): ...",
        "needs 'nothing'",
        steps='["good", "bad"]',
        status="compensation_failed",
    ),
]


def handlers(case: Attempt) -> str:
    """The file that `case` describes, with the good handlers besides."""
    policy = f", policy={case.policy}" if case.policy else ""
    imports = "from paigeant import ItineraryPolicy, Step, StepContext\n"
    return f'{HANDLERS}\n{imports}{case.code}\nwrong = Workflow("wrong", {case.steps}{policy})\n'


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_an_activity_does_wrong_fails_its_run_alone(case: Attempt) -> None:
    """The run has the reason, `--wait` ends with 1, and the worker goes on with the run that was there."""
    put({"bad.py": handlers(case)})
    args = ("dispatch", "wrong", "-", "--handlers", "bad.py", "--id", "wrong")
    assert done(*args, input=json.dumps(case.input)) == {"id": "wrong"}
    worker = call("run", "bad.py", "--until-idle", traceback_in_logs=case.tells_where)
    assert worker.exit_code == 0, worker.stderr
    waited = call(*args, "--wait", "--json", input=json.dumps(case.input))
    shown = json.loads(waited.stdout)
    assert (waited.exit_code, complaints(waited)) == (1, [])
    assert shown == done("runs", "show", "wrong")
    assert shown["status"] == case.status
    assert all(part in shown["error"] for part in case.says), shown["error"]
    assert "\n" not in shown["error"]
    assert shown["steps"][-1]["attempts"] == 1
    assert done("runs", "show", OTHER)["output"] == "shipped A-1"


# -- what is refused before anything runs


def cyclic() -> dict[str, Any]:
    """A value that contains itself."""
    value: dict[str, Any] = {"sku": "A-1"}
    value["again"] = value
    return value


REFUSED: list[tuple[str, Workflow | str, Any, str]] = [
    ("input that contains itself", "order", cyclic(), "can't be written as JSON: it contains itself"),
    ("input that isn't JSON", "order", {"sku": object()}, "can't be written as JSON: Unable to serialize"),
    ("input that is no object", "order", [1], "is list [1]; expected an object"),
    (
        "input that no reader takes",
        "order",
        {"sku": "A", "n": 10**5000},
        "can't be written as JSON: number out",
    ),
    ("input that is no text", "order", {"sku": "\ud800"}, "can't be written as JSON"),
    ("input that is too large", "order", {"sku": "x" * 1_100_000}, "the limit is 1,048,576"),
    (
        "args that aren't JSON",
        Workflow("w", [Step("reserve", args={"sku": object()})]),
        {},
        "args in workflow 'w'",
    ),
    (
        "args of another type",
        Workflow("w", [Step("reserve", args={"sku": 5})]),
        {},
        "'sku' of activity 'reserve'",
    ),
    ("no workflow", 5, {}, "dispatch takes a Workflow or the name of one, found 5"),  # type: ignore[list-item]
    ("unknown workflow", "ordr", {}, "no workflow 'ordr' is defined here; did you mean 'order'"),
]
"""What `dispatch` is given in code: a name, the workflow, the input, and what the error says."""


@pytest.fixture
def activity() -> ActivityRegistry:
    """The good handlers, as code has them."""
    made: dict[str, Any] = {"__name__": "handlers"}
    exec(HANDLERS, made)
    registry: ActivityRegistry = made["activity"]
    return registry


@pytest.mark.parametrize(("name", "workflow", "given", "says"), REFUSED, ids=[case[0] for case in REFUSED])
async def test_a_dispatch_that_cannot_be_is_refused(
    name: str, workflow: Workflow | str, given: Any, says: str, activity: ActivityRegistry
) -> None:
    """The error is Paigeant's own, on one line, and nothing is recorded."""
    order = Workflow("order", ["reserve", "ship"])
    recorded = rows()
    async with Paigeant(Settings(), activities=activity, workflows=[order]) as app:
        with pytest.raises(PaigeantError) as error:
            await app.dispatch(workflow, given, workflow_id="wrong")
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert rows() == recorded


ASKED: list[tuple[str, Callable[[Paigeant], Awaitable[object]], str]] = [
    ("an age below 0", lambda app: app.prune(older_than=-1), "0 or more and below 100 years, found -1"),
    ("an age that is none", lambda app: app.prune(older_than=float("nan")), "older_than is in seconds"),
    (
        "a state that is none",
        lambda app: app.prune(older_than=0, statuses=["done"]),
        "statuses are some of pending, running, waiting, compensating, completed",
    ),
    ("a state in no list", lambda app: app.prune(older_than=0, statuses="failed"), "found 'failed'"),
    ("a level that is none", lambda app: app.logs(level="loud"), "no log level 'loud'"),
    (
        "an instant without a zone",
        lambda app: app.logs(since=datetime(2026, 1, 1)),  # noqa: DTZ001  # it is what is refused
        "since is a datetime with a time zone, found datetime.datetime(2026, 1, 1",
    ),
]
"""What an application is asked in code: a name, what is called, and what the error says."""


@pytest.mark.parametrize(("name", "ask", "says"), ASKED, ids=[case[0] for case in ASKED])
async def test_what_cannot_be_asked_is_refused(
    name: str, ask: Callable[[Paigeant], Awaitable[object]], says: str, activity: ActivityRegistry
) -> None:
    """The error is Paigeant's own, on one line, and nothing is deleted."""
    async with Paigeant(Settings(), activities=activity) as app:
        await app.dispatch(Workflow("none", []), {}, workflow_id="ended")
        with pytest.raises(PaigeantError) as error:
            await ask(app)
        assert await app.run("ended").status() == "completed"
    assert says in str(error.value)
    assert "\n" not in str(error.value)


ABROAD = HANDLERS + 'abroad = Workflow("abroad", ["reserve", "shipp"])\n'


@pytest.mark.parametrize(
    "command",
    [("run", "abroad.py", "--until-idle"), ("dispatch", "abroad", "input.json", "--handlers", "abroad.py")],
    ids=["run", "dispatch"],
)
def test_an_unknown_activity_is_a_warning_and_with_strict_an_error(command: tuple[str, ...]) -> None:
    """Another service may have it; with --strict nothing is done."""
    put({"abroad.py": ABROAD, "input.json": json.dumps(INPUT)})
    recorded = rows()
    says = ("no activity 'shipp' is registered here", "did you mean 'ship'")
    check(call(*command, "--strict"), says, 2)
    assert rows() == recorded
    check(call(*command), ("workflow 'abroad'", *says, "another service may have it"), 0, label="warning")


def test_a_step_that_nobody_knows_waits_and_nothing_else_does() -> None:
    """The run stands at the unknown activity; the others are done."""
    put({"abroad.py": ABROAD, "input.json": json.dumps(INPUT)})
    assert done("dispatch", "abroad", "input.json", "--handlers", "abroad.py", "--id", "far") == {"id": "far"}
    assert call("run", "abroad.py", "--until-idle").exit_code == 0
    shown = done("runs", "show", "far")
    assert [(step["id"], step["status"]) for step in shown["steps"]] == [
        ("reserve", "completed"),
        ("shipp", "ready"),
    ]
    assert done("runs", "show", OTHER)["output"] == "shipped A-1"


def test_an_activity_that_blocks_the_loop_loses_nothing() -> None:
    """A worker whose loop stands still for longer than its lease says so; the run is completed, by it or another."""
    code = "import time\n@activity.execute()\nasync def bad() -> None:\n    time.sleep(3)\n"
    settings = "lease: 1.5\nheartbeat: 0.1\nsweep_interval: 0.1\n"
    # What it had claimed besides counts as an attempt of a worker that was lost, so there has to be a second one.
    handlers = HANDLERS.replace("retries=0", "retries=3")
    put({"bad.py": f'{handlers}{code}wrong = Workflow("wrong", ["bad"])\n', "paigeant.yaml": settings})
    done("dispatch", "wrong", "-", "--handlers", "bad.py", "--id", "wrong", input="{}")
    workers = [
        subprocess.Popen([*PAIGEANT, "run", "bad.py", "--until-idle"], stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = "".join(worker.communicate()[1] for worker in workers)
    assert [worker.returncode for worker in workers] == [0, 0], said
    assert "the event loop has been blocked" in said
    assert "Traceback" not in said
    assert done("runs", "show", "wrong")["status"] == "completed"
    assert done("runs", "show", OTHER)["output"] == "shipped A-1"


def test_a_function_that_never_ends_is_given_up() -> None:
    """A thread can't be interrupted: its step fails at its timeout, and the worker ends all the same."""
    code = "import threading\n@activity.execute(retries=0, timeout=0.1)\ndef bad():\n    threading.Event().wait()\n"
    put({"bad.py": f'{HANDLERS}{code}wrong = Workflow("wrong", ["bad"])\n'})
    done("dispatch", "wrong", "-", "--handlers", "bad.py", "--id", "wrong", input="{}")
    worker = subprocess.run(
        [*PAIGEANT, "run", "bad.py", "--until-idle"],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert worker.returncode == 0, worker.stderr
    shown = done("runs", "show", "wrong")
    assert (shown["status"], shown["error"]) == (
        "failed",
        "bad: TimeoutError: the attempt took longer than 0.1 s",
    )
    assert done("runs", "show", OTHER)["output"] == "shipped A-1"
