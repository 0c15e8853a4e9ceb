"""Finds handler files and modules, and collects every ActivityRegistry and Workflow that stands at their top level."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from paigeant.activity import ActivityRegistry
from paigeant.errors import HandlerError, PaigeantError, UnknownActivity, nearest
from paigeant.workflow import Workflow

__all__ = ["Handlers", "load", "unknown_activities"]


@dataclass(frozen=True, slots=True)
class Handlers:
    """What handler modules define, put together. `names` are those by which they were asked for."""

    names: tuple[str, ...]
    activities: ActivityRegistry
    workflows: tuple[Workflow, ...]


def load(names: Iterable[str]) -> Handlers:
    """Import each of `names`, a path to a Python file or a dotted module, and collect what they define.

    A file's folder (for a file in a package, the package's) and the working directory become importable, as they are
    for a script. Raises HandlerError for what can't be found or doesn't load, for one without a registry or workflow,
    and for activities or workflows of one name.
    """
    wanted = tuple(dict.fromkeys(names))
    registries: dict[int, tuple[ActivityRegistry, str]] = {}
    workflows: dict[str, tuple[Workflow, str]] = {}
    for name in wanted:
        # By their types: `isinstance` asks a value for its class as well, and one that stands for something else until
        # it is used, like the settings of Django, would be set up by that, or fail.
        found = [(type(value), value) for value in vars(_module(name)).values()]
        here = [value for kind, value in found if issubclass(kind, ActivityRegistry)]
        for registry in here:
            registries.setdefault(id(registry), (registry, name))
        defined = [value for kind, value in found if issubclass(kind, Workflow)]
        for workflow in defined:
            _add(workflows, workflow, name)
        if not here and not defined:
            raise HandlerError(
                f"{name} defines no ActivityRegistry and no Workflow at its top level; "
                "write `activity = ActivityRegistry()` there and decorate functions with @activity.execute()"
            )
    merged = _merged([registry for registry, _ in registries.values()], wanted)
    return Handlers(wanted, merged, tuple(workflow for workflow, _ in workflows.values()))


def unknown_activities(
    workflows: Iterable[Workflow], activities: ActivityRegistry
) -> Iterator[tuple[str, UnknownActivity]]:
    """The activities that `workflows`, and agents that may add steps, name and `activities` doesn't have.

    Each comes with what names it.
    """
    named = {
        f"workflow '{workflow.name}'": [step.activity for step in workflow.steps] for workflow in workflows
    }
    named.update((f"may_add of activity '{name}'", list(activities.get(name).may_add)) for name in activities)
    for where, names in named.items():
        for name in dict.fromkeys(names):
            if name not in activities:
                yield where, UnknownActivity(name, activities)


def _add(workflows: dict[str, tuple[Workflow, str]], workflow: Workflow, name: str) -> None:
    other, place = workflows.setdefault(workflow.name, (workflow, name))
    if other is not workflow:
        where = f"twice in {name}" if place == name else f"in {place} and in {name}"
        raise HandlerError(f"workflow '{workflow.name}' is defined {where}; rename one")


def _merged(registries: list[ActivityRegistry], names: tuple[str, ...]) -> ActivityRegistry:
    where = ", ".join(names)
    try:
        merged = ActivityRegistry.merged(registries)
        merged.check()
    except UnknownActivity as exc:
        raise HandlerError(f"{where}: a compensation undoes an activity that isn't there: {exc}") from exc
    except PaigeantError as exc:
        raise HandlerError(f"{where}: {exc}") from exc
    return merged


# -- importing


def _module(name: str) -> ModuleType:
    is_path = name.endswith(".py") or "/" in name or os.sep in name
    importlib.invalidate_caches()  # the file may be younger than what the import system remembers of its folder
    try:
        return _from_file(name, Path(name)) if is_path else _from_name(name)
    except HandlerError:
        raise
    except SyntaxError as exc:
        line = "" if exc.lineno is None else f", line {exc.lineno}"
        where = _shortest(exc.filename) if exc.filename else name
        raise HandlerError(f"{where}{line}: {type(exc).__name__}: {exc.msg}") from exc
    except (Exception, SystemExit) as exc:  # importing runs the user's code, which may raise anything
        raise HandlerError(f"{_place(name, exc)}: {_text(exc)}") from exc


def _from_name(name: str) -> ModuleType:
    if not all(name.split(".")) or ":" in name:
        raise HandlerError(
            "handlers are a path such as handlers.py or a module such as shop.orders, "
            f"of which every registry and workflow counts; found {name!r}"
        )
    _importable(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as exc:
        if exc.name is None or not f"{name}.".startswith(f"{exc.name}."):
            raise  # it is there; something that it imports isn't
        raise HandlerError(
            f"no module '{name}' can be imported here ({Path.cwd()}); "
            f"expected a dotted module name or a path such as {name.replace('.', '/')}.py"
        ) from exc


def _from_file(name: str, path: Path) -> ModuleType:
    if path.is_dir():
        raise HandlerError(f"{name} is a folder; name a Python file in it, or a module with dots")
    if not path.is_file():
        folder = path.parent
        others = [str(folder / entry.name) for entry in folder.glob("*.py")] if folder.is_dir() else []
        raise HandlerError(f"there is no file {name}; {_others(name, others)}")
    if path.suffix != ".py":
        raise HandlerError(f"{name} is not a Python file; handler files end in .py")
    path = path.resolve()
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file and file == str(path) and getattr(module, "__name__", "") != "__main__":
            return module
    root, dotted = _package(path)
    _importable(root)
    if dotted.replace(".", "").isidentifier() and dotted not in sys.modules:
        spec = importlib.util.find_spec(dotted)
        if spec is not None and spec.origin == str(path):
            return importlib.import_module(dotted)
    return _under_another_name(path)


def _under_another_name(path: Path) -> ModuleType:
    """The module of a file that can't have its own name: another module has it, or it is no identifier."""
    name = f"paigeant_handlers_{abs(hash(str(path))):x}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # annotations are looked up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _package(path: Path) -> tuple[Path, str]:
    """The folder from which the file is importable, and the dotted name that it has there."""
    parts = [] if path.stem == "__init__" else [path.stem]
    folder = path.parent
    while (folder / "__init__.py").is_file():
        parts.insert(0, folder.name)
        folder = folder.parent
    return folder, ".".join(parts)


def _importable(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _others(name: str, others: list[str]) -> str:
    if others:
        return nearest(name, others)
    return "expected a path to a Python file, or a module name with dots"


def _place(name: str, exc: BaseException) -> str:
    """The file and line of the user's code where `exc` came from: the last frame that isn't a library's."""
    frames = [
        frame
        for frame in traceback.extract_tb(exc.__traceback__)
        if not frame.filename.startswith("<") and not _is_library(frame.filename)
    ]
    if not frames:
        return name
    return f"{_shortest(frames[-1].filename)}, line {frames[-1].lineno}"


def _is_library(filename: str) -> bool:
    own = str(Path(__file__).parent)
    return (
        filename.startswith((own, sys.base_prefix + os.sep, sys.prefix + os.sep))
        or "site-packages" in filename
    )


def _shortest(filename: str) -> str:
    try:
        return str(Path(filename).relative_to(Path.cwd()))
    except ValueError:
        return filename


def _text(exc: BaseException) -> str:
    if isinstance(exc, SystemExit):
        return "it calls sys.exit() when it is imported; guard that with if __name__ == '__main__'"
    lines = str(exc).splitlines()
    return f"{type(exc).__name__}: {lines[0]}" if lines else type(exc).__name__
