"""What handler files and modules give, and what is said about those that can't be used."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic_ai import Agent
from pydantic_ai.models.test import TestModel

from paigeant import ActivityRegistry, ItineraryPolicy, Workflow
from paigeant.errors import HandlerError
from paigeant.loading import load, unknown_activities

ONE = """
from paigeant import ActivityRegistry, Workflow
activity = ActivityRegistry()
@activity.execute()
async def greet(name: str) -> str: return name
hello = Workflow("hello", ["greet"])
"""


@pytest.fixture(autouse=True)
def _fresh_imports() -> Iterator[None]:
    modules, path = set(sys.modules), list(sys.path)
    yield
    for name in set(sys.modules) - modules:
        del sys.modules[name]
    sys.path[:] = path


def write(name: str, text: str) -> str:
    """Write a file, with its folders; gives its name."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return name


def test_a_file_gives_its_registries_and_workflows() -> None:
    """What stands at the top level of a file is found, under whatever name."""
    found = load([write("shop.py", ONE)])
    assert (list(found.activities), [workflow.name for workflow in found.workflows]) == (["greet"], ["hello"])


def test_what_stands_for_something_else_is_left_alone() -> None:
    """An object that is set up when it is first used, and can't be here, doesn't keep a file from being loaded."""
    lazy = "class Lazy:\n    @property\n    def __class__(self): raise RuntimeError('not set up')\nsettings = Lazy()\n"
    assert list(load([write("shop.py", ONE + lazy)]).activities) == ["greet"]


def test_a_module_is_found_in_the_working_directory() -> None:
    """A dotted name is imported from where the command was given."""
    write("services/__init__.py", "")
    write("services/orders.py", ONE)
    assert list(load(["services.orders"]).activities) == ["greet"]


def test_a_file_in_a_package_may_import_relatively() -> None:
    """A file of a package is imported as its module, so that relative imports work."""
    write("services/__init__.py", "")
    write("services/names.py", "WORLD = 'world'")
    path = write("services/orders.py", "from .names import WORLD\n" + ONE)
    load([path])
    assert sys.modules["services.orders"].WORLD == "world"


def test_a_file_may_import_its_neighbours() -> None:
    """The folder of a handler file is importable, as it is for a script."""
    write("app/neighbour.py", "WORLD = 'world'")
    assert len(load([write("app/shop.py", "import neighbour\n" + ONE)]).workflows) == 1


def test_a_file_called_like_a_module_of_python_loads() -> None:
    """The name of a file doesn't matter, even when the import system knows another module of that name."""
    assert list(load([write("json.py", ONE)]).activities) == ["greet"]


def test_a_file_whose_name_is_no_identifier_loads() -> None:
    """Not even a name with a dash in it is in the way."""
    assert list(load([write("my-shop.py", ONE)]).activities) == ["greet"]


def test_annotations_of_a_file_that_is_no_module_are_found() -> None:
    """Annotations as texts are looked up in the file's own names, whatever the module is called."""
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\n" + ONE
    text += "@dataclass\nclass Box:\n    size: int\n@activity.execute()\nasync def pack(box: Box) -> Box: return box\n"
    assert "pack" in load([write("my-shop.py", text)]).activities


def test_one_file_by_two_names_counts_once() -> None:
    """A file and its module are the same registry, not two with equal names."""
    write("shop.py", ONE)
    assert len(load(["shop.py", "shop", "./shop.py"]).workflows) == 1


def test_a_registry_imported_by_another_file_counts_once() -> None:
    """What two files share is one thing."""
    write("shop.py", ONE)
    write("more.py", "from shop import activity, hello")
    assert list(load(["shop.py", "more.py"]).activities) == ["greet"]


def test_several_files_are_put_together() -> None:
    """Registries of all files become one."""
    write("shop.py", ONE)
    write("bank.py", ONE.replace("greet", "pay").replace("hello", "buy"))
    assert sorted(load(["shop.py", "bank.py"]).activities) == ["greet", "pay"]


def test_no_names_give_nothing() -> None:
    """No handlers at all is an answer, not an error: a dispatcher may have none."""
    assert load([]).workflows == ()


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("gone.py", None, "there is no file gone.py"),
        ("gone", None, "no module 'gone' can be imported here"),
        ("gone.deeper", None, "no module 'gone.deeper' can be imported here"),
        ("deep/gone.py", None, "there is no file deep/gone.py; expected a path to a Python file"),
        ("./notes.txt", "x", "./notes.txt is not a Python file"),
        ("bad.py", "def f(:\n", "bad.py, line 1: SyntaxError"),
        ("bad.py", "\n\n1 / 0\n", "bad.py, line 3: ZeroDivisionError: division by zero"),
        (
            "bad.py",
            "\nimport not_there\n",
            "bad.py, line 2: ModuleNotFoundError: No module named 'not_there'",
        ),
        ("bad", "\nimport not_there\n", "bad.py, line 2: ModuleNotFoundError: No module named 'not_there'"),
        ("bad.py", "import sys\nsys.exit(1)\n", "it calls sys.exit() when it is imported"),
        ("bad.py", "x = 1\n", "bad.py defines no ActivityRegistry and no Workflow"),
        ("bad.py", "x = '\0'\n", "source code string cannot contain null bytes"),
        (
            "bad.py",
            ONE + "@activity.execute()\nasync def greet(): ...\n",
            "activity 'greet' is defined twice",
        ),
        ("bad.py", ONE + "other = Workflow('hello', [])\n", "workflow 'hello' is defined twice in bad.py"),
        (
            "bad.py",
            ONE + "broken = Workflow('b', [1])\n",
            "an itinerary holds activity names and Steps, found 1",
        ),
        (
            "bad.py",
            ONE + "@activity.compensate('gret')\nasync def undo(): ...\n",
            "a compensation undoes an activity that isn't there: no activity 'gret' is registered here; "
            "did you mean 'greet'?",
        ),
        (
            "bad.py",
            ONE + "@activity.execute()\nasync def f(x: 'Gone'): ...\n",
            "the annotations of activity 'f'",
        ),
        ("bad.py", ONE + "@activity.execute()\nasync def f(*x): ...\n", "activity 'f' has the parameter *x"),
    ],
)
def test_what_cannot_be_used_is_said_on_one_line(name: str, text: str | None, said: str) -> None:
    """Each has an error that says where and what, on one line."""
    if text is not None:
        write(name if "." in name else f"{name}.py", text)
    with pytest.raises(HandlerError) as error:
        load([name])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_compared_with_its_neighbours() -> None:
    """A mistyped path is answered with the nearest file."""
    write("handlers.py", ONE)
    with pytest.raises(HandlerError, match=r"did you mean 'handlers.py'"):
        load(["handler.py"])


def test_a_folder_is_no_handler_file() -> None:
    """A folder is told apart from a file that isn't there."""
    Path("shop").mkdir()
    with pytest.raises(HandlerError, match="shop/ is a folder"):
        load(["shop/"])


def test_equal_activities_of_two_files_are_named() -> None:
    """Two files that define one activity are both in the message."""
    write("shop.py", ONE)
    write("bank.py", ONE.replace("hello", "buy"))
    with pytest.raises(HandlerError, match=r"shop.py, bank.py: activity 'greet' is defined twice"):
        load(["shop.py", "bank.py"])


def test_equal_workflows_of_two_files_are_named() -> None:
    """Two files that define one workflow are both in the message."""
    write("shop.py", ONE)
    write("bank.py", ONE.replace("greet", "pay"))
    with pytest.raises(HandlerError, match=r"workflow 'hello' is defined in shop.py and in bank.py"):
        load(["shop.py", "bank.py"])


def test_a_file_that_failed_can_be_loaded_once_it_is_mended() -> None:
    """A failed import leaves nothing behind that would count as the module."""
    write("my-shop.py", "1 / 0")
    with pytest.raises(HandlerError):
        load(["my-shop.py"])
    write("my-shop.py", ONE)
    assert list(load(["my-shop.py"]).activities) == ["greet"]


def test_unknown_activities_are_found_once_each() -> None:
    """Each activity that nobody here knows is told once for a workflow, however often it occurs."""
    workflow = Workflow("w", ["greet", "greet", "pay"])
    found = [(where, error.name) for where, error in unknown_activities([workflow], ActivityRegistry())]
    assert found == [("workflow 'w'", "greet"), ("workflow 'w'", "pay")]


def test_unknown_activities_that_an_agent_may_add_are_found() -> None:
    """A slip of the pen in `may_add` would have a model add steps that nobody ever does."""
    registry = ActivityRegistry()
    agent = Agent(TestModel(), name="planner")
    registry.agent(agent, prompt="Plan.", may_add=ItineraryPolicy(allowed=["planner", "shorte"]))
    found = [(where, error.name) for where, error in unknown_activities([], registry)]
    assert found == [("may_add of activity 'planner'", "shorte")]
