"""Handler files and modules that can't be found, don't load, or define what can't work."""

from __future__ import annotations

import pytest
from tests.bad_input.bench import HANDLERS, Case, call, check, put, rows, works_on

SURFACE = "handlers"

HEAD = "from paigeant import ActivityRegistry, StepContext, Workflow\nactivity = ActivityRegistry()\n"
FUNCTION = "\n@activity.execute()\nasync def "
AGENT = "from pydantic_ai import Agent\nfrom pydantic_ai.models.test import TestModel\n"


def bad(name: str, text: str | bytes, *says: str) -> Case:
    """A file `bad.py` that `paigeant run bad.py` has to refuse."""
    return Case(name, ("run", "bad.py", "--until-idle"), says, files={"bad.py": text})


def defines(name: str, text: str, *says: str) -> Case:
    """A file that loads, with something in it that can't work."""
    return bad(name, HEAD + text, "bad.py", *says)


def named(name: str, handlers: str, *says: str, text: str | None = None) -> Case:
    """Something else than the path to a Python file."""
    return Case(name, ("run", handlers), says, files={} if text is None else {handlers: text})


CASES = [
    named("missing file", "handler.py", "there is no file handler.py", "did you mean 'handlers.py'"),
    named(
        "missing folder",
        "gone/handlers.py",
        "there is no file gone/handlers.py",
        "expected a path to a Python file",
    ),
    named("a folder", "./", "./ is a folder", "name a Python file in it"),
    named(
        "a file without .py", "./handlers.txt", "./handlers.txt is not a Python file", ".py", text=HANDLERS
    ),
    named("missing module", "shop.orders", "no module 'shop.orders' can be imported here", "shop/orders.py"),
    named("no name at all", "", "a path such as handlers.py", "found ''"),
    named(
        "a module without handlers",
        "json",
        "json defines no ActivityRegistry and no Workflow",
        "ActivityRegistry()",
    ),
    named("a name that is no module", "not a module", "no module 'not a module'"),
    named("a relative module", ".handlers", "a path such as handlers.py", "found '.handlers'"),
    named(
        "a name in a module",
        "handlers:activity",
        "or a module such as shop.orders, of which every registry",
        "found 'handlers:activity'",
    ),
    bad("syntax error", "import os\n\ndef broken(:\n    pass\n", "error: bad.py, line 3: SyntaxError"),
    bad("wrong indentation", "def f():\npass\n", "bad.py, line 2: IndentationError"),
    bad("not Python", "# Shopping\n\n* milk & eggs\n", "bad.py, line 3: SyntaxError"),
    bad("not UTF-8", b"name = '\xff\xfe'\n", "bad.py", "SyntaxError", "utf-8"),
    bad("a null byte", b"x = 1\n\x00\n", "bad.py", "null bytes"),  # before 3.11.4 a ValueError
    bad(
        "an exception at import", "a = 1\nb = a / 0\n", "bad.py, line 2: ZeroDivisionError: division by zero"
    ),
    bad(
        "an import that isn't there",
        "\nimport nowhere_to_be_found\n",
        "bad.py, line 2: ModuleNotFoundError",
        "nowhere_to_be_found",
    ),
    bad(
        "a name that paigeant hasn't",
        "from paigeant import Registry\n",
        "bad.py, line 1: ImportError",
        "Registry",
    ),
    bad(
        "sys.exit at import",
        "import sys\nsys.exit(3)\n",
        "bad.py, line 2",
        "sys.exit() when it is imported",
        "__main__",
    ),
    bad("endless recursion", "def f():\n    return f()\nf()\n", "bad.py, line 2: RecursionError"),
    bad("nothing in it", "", "bad.py defines no ActivityRegistry and no Workflow"),
    bad(
        "a workflow and no activity",
        "from paigeant import Workflow\nw = Workflow('w', ['a'])\n",
        "bad.py defines no activity",
        "@activity.execute()",
    ),
    defines(
        "two activities of one name",
        FUNCTION + "pay(): ...\n" + FUNCTION + "pay(): ...\n",
        "activity 'pay' is defined twice",
        "bad.py, line 7",
    ),
    defines(
        "two compensations of one activity",
        FUNCTION
        + "pay(): ...\n"
        + "\n@activity.compensate('pay')\ndef a(): ...\n" * 1
        + "\n@activity.compensate('pay')\ndef b(): ...\n",
        "compensation of activity 'pay' is defined twice",
    ),
    Case(
        "one activity in two files",
        ("run", "handlers.py", "bad.py"),
        ("activity 'reserve' is defined twice", "handlers.py, bad.py"),
        files={"bad.py": HEAD + FUNCTION + "reserve(): ...\n"},
    ),
    Case(
        "one workflow in two files",
        ("run", "handlers.py", "bad.py"),
        ("workflow 'order' is defined in handlers.py and in bad.py",),
        files={"bad.py": HEAD + FUNCTION + "x(): ...\nw = Workflow('order', ['x'])\n"},
    ),
    defines(
        "a compensation of an unknown activity",
        FUNCTION + "pay(): ...\n@activity.compensate('pya')\ndef back(): ...\n",
        "a compensation undoes an activity that isn't there",
        "no activity 'pya'",
        "did you mean 'pay'",
    ),
    defines(
        "a compensation of nothing",
        "@activity.compensate\ndef back(): ...\n",
        "compensate takes the name of the activity",
    ),
    defines(
        "any number of arguments",
        FUNCTION + "pay(*args): ...\n",
        "activity 'pay' has the parameter *args",
        "by name",
    ),
    defines(
        "positional-only parameter",
        FUNCTION + "pay(sku, /): ...\n",
        "activity 'pay' has the parameter sku",
        "positional-only",
    ),
    defines(
        "unreadable annotation",
        FUNCTION + "pay(sku: 'Skew'): ...\n",
        "the annotations of activity 'pay' can't be read",
        "'Skew'",
    ),
    defines(
        "annotation that JSON can't be read into",
        "import socket" + FUNCTION + "pay(line: socket.socket): ...\n",
        "parameter 'line' of activity 'pay'",
        "socket",
        "can't be read from JSON",
    ),
    defines(
        "return annotation that can't be written",
        "import socket" + FUNCTION + "pay() -> socket.socket: ...\n",
        "the return annotation of activity 'pay'",
        "socket",
    ),
    defines("no function", "activity.execute()(5)\n", "an activity is a function, found 5"),
    defines(
        "a classmethod without brackets",
        "class Shop:\n    @activity.execute\n    @classmethod\n    def sell(cls): ...\n",
        "the name of an activity is a non-empty text, found <classmethod",
    ),
    defines(
        "a function without a name",
        "activity.execute()(lambda: 1)\n",
        "a function without a name",
        "name='...'",
    ),
    defines(
        "a timeout below 0",
        "\n@activity.execute(timeout=-1)\ndef pay(): ...\n",
        "timeout is in seconds, above 0 and below 100 years",
        "-1",
    ),
    defines(
        "a timeout in words",
        "\n@activity.execute(timeout='5s')\ndef pay(): ...\n",
        "timeout is in seconds, above 0 and below 100 years",
        "'5s'",
    ),
    defines(
        "retries below 0",
        "\n@activity.execute(retries=-1)\ndef pay(): ...\n",
        "retries is a number from 0 to",
        "-1",
    ),
    defines(
        "no concurrency",
        "\n@activity.execute(concurrency=0)\ndef pay(): ...\n",
        "concurrency is a number of 1 or more",
        "0",
    ),
    defines(
        "concurrency in words",
        "\n@activity.execute(concurrency='2')\ndef pay(): ...\n",
        "concurrency is a number of 1 or more",
        "'2'",
    ),
    defines("an unknown option", "\n@activity.execute(retry=2)\ndef pay(): ...\n", "TypeError", "'retry'"),
    defines("a workflow without a name", "Workflow('', ['a'])\n", "a workflow needs a name", "''"),
    defines(
        "a function for its name",
        "\n@activity.execute\ndef pay(): ...\nWorkflow('w', [pay])\n",
        "an itinerary holds activity names and Steps",
        "write the name of its activity: 'pay'",
    ),
    defines(
        "an agent for its name",
        "from pydantic_ai import Agent\nWorkflow('w', [Agent(None, name='writer')])\n",
        "write the name of its activity: 'writer'",
    ),
    defines(
        "our module for a registry",
        "from paigeant import activity\n@activity.execute()\ndef pay(): ...\n",
        "'paigeant.activity' has no attribute 'execute'",
        "activity = paigeant.ActivityRegistry()",
    ),
    defines("a step that is a number", "Workflow('w', ['a', 5])\n", "workflow 'w'", "found 5 of type int"),
    defines(
        "a name for a list of steps", "Workflow('w', 'abc')\n", "steps of workflow 'w' are a list", "'abc'"
    ),
    defines(
        "an agent without a name",
        AGENT + "activity.agent(Agent(TestModel()), prompt='x')\n",
        "the agent has no name",
        "name='writer'",
    ),
    defines("no agent", "activity.agent('gpt', prompt='x', name='writer')\n", "Agent", "'gpt'"),
    defines(
        "a prompt with one brace",
        AGENT + "activity.agent(Agent(TestModel(), name='w'), prompt='a {b')\n",
        "the prompt 'a {b' is no template",
        "{name}",
    ),
    defines(
        "a prompt with a format",
        AGENT + "activity.agent(Agent(TestModel(), name='w'), prompt='{a:>9}')\n",
        "{a:>9}",
        "put in as they are",
    ),
    defines(
        "an empty prompt",
        AGENT + "activity.agent(Agent(TestModel(), name='w'), prompt='')\n",
        "a prompt is a text",
        "''",
    ),
    defines(
        "deps that can't be called by name",
        AGENT + "def deps(*a): ...\nactivity.agent(Agent(TestModel(), name='w'), prompt='a', deps=deps)\n",
        "*a",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_handlers_that_cannot_be_are_refused(case: Case) -> None:
    """One line names the file, the line where there is one, and what to do; nothing is taken from the topics."""
    put(case.files)
    recorded = rows()
    check(call(*case.does), case.says, case.code)
    assert rows() == recorded


def test_good_handlers_do_what_bad_ones_left() -> None:
    """After handlers that were refused the same database is worked on."""
    put({"bad.py": "1 / 0\n"})
    assert call("run", "bad.py").exit_code == 2
    works_on()
