"""Workers that are killed behind every unit of an agent's run, with the real OpenAI client and an MCP server."""

from __future__ import annotations

import json
import re
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic_core import from_json
from tests.agents.chat_server import Answer, ChatServer, Turn
from tests.agents.crew import Crew, settings

from paigeant.app import Paigeant
from paigeant.slip import RunStatus
from paigeant.store import StepKey

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def told(messages: list[dict[str, Any]]) -> Answer:
    """A turn that repeats what all tools gave."""
    answers = {
        message["tool_call_id"]: message["content"] for message in messages if message["role"] == "tool"
    }
    return Answer(json.dumps(answers, sort_keys=True))


SCRIPT: dict[str, list[Turn]] = {
    "writer": [
        Answer(calls=[("c1", "weather", {"city": "Ghent"}), ("c2", "price", {"item": "umbrella"})]),
        Answer(
            "Let me ask.", [("c3", "ask", {"question": "Why?"}), ("c4", "add", {"first": 2, "second": 3})]
        ),
        told,
    ],
    "expert": [Answer("because of the clouds")],
}

REQUESTS = {("writer", 0), ("writer", 1), ("writer", 2), ("expert", 0)}


UNITS = {
    "writer__mcp_server__sums.get_tools(writer:1,1)",
    "writer__model.request(writer:1,1)",
    'writer__function_toolset__<agent>.call_tool:weather(writer:1,1,"c1")',
    'writer__function_toolset__<agent>.call_tool:price(writer:1,1,"c2")',
    "writer__model.request(writer:1,2)",
    ".../expert__model.request(expert:1,1)",
    'writer__function_toolset__<agent>.call_tool:ask(writer:1,2,"c3")',
    'writer__mcp_server__sums.call_tool:add(writer:1,2,"c4")',
    "writer__model.request(writer:1,3)",
}
"""The names of all units. They are stored: never change them along with code."""


@dataclass
class Scene:
    """A store, a chat server and worker processes."""

    url: str
    folder: Path
    chat: ChatServer
    crew: Crew

    async def units(self, run: str) -> set[str]:
        """The names of what is recorded of the step."""
        async with Paigeant(settings(self.url)) as app:
            return set(await app.store.load_units(StepKey(run, "writer")))

    async def outcome(self, run: str) -> tuple[Any, Any]:
        """Output and usage of the step, once its run is completed."""
        async with Paigeant(settings(self.url)) as app:
            detail = await app.run(run).detail()
        assert detail.run.status is RunStatus.COMPLETED, detail.run.error
        [step] = detail.steps
        return from_json(step.output or b"null"), from_json(step.usage or b"null")

    def effects(self, run: str) -> Counter[tuple[str, str]]:
        """What the tools did, by tool and effect key without the run's id, since it was last asked."""
        path = self.folder / "effects"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        path.write_text("")
        return Counter(
            (tool, key.removeprefix(f"{run}:")) for tool, _, key in (line.partition(" ") for line in lines)
        )

    def sums(self) -> int:
        """How often the MCP server was called since it was last asked."""
        path = self.folder / "sums"
        calls = path.read_text().count("\n") if path.exists() else 0
        path.write_text("")
        return calls


@pytest.fixture(params=["sqlite", "postgres"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new store with its tables."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'runs.db'}"
    return str(request.getfixturevalue("postgres_store_url"))


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    """What forks the workers of all tests: to load everything takes longer than most of them."""
    with Crew() as crew:
        yield crew


@pytest.fixture(params=[False, True], ids=["whole", "streamed"])
def scene(request: pytest.FixtureRequest, crew: Crew, store_url: str, tmp_path: Path) -> Iterator[Scene]:
    """All that the agents need, with streams that are watched or without."""
    with ChatServer(SCRIPT) as chat:
        crew.tell(url=store_url, chat_url=chat.url, folder=str(tmp_path), streamed=request.param)
        yield Scene(store_url, tmp_path, chat, crew)


def recorded_requests(units: set[str]) -> set[tuple[str, int]]:
    """The model requests that are among the recorded units, as the chat server logs them."""
    found = set()
    for unit in units:
        name, _, rest = unit.partition("__model.request")
        if rest:
            agent = name.rpartition("/")[2]
            found.add((agent, int(rest.rpartition(",")[2].rstrip(")")) - 1))
    return found


CALLS = {"c1": "weather:Ghent", "c2": "price:umbrella", "c3": "ask:Why?"}


def recorded_effects(units: set[str]) -> set[str]:
    """The tools whose calls are among the recorded units, as they note their effects."""
    calls = [unit for unit in units if ".call_tool:" in unit]
    return {tool for call, tool in CALLS.items() if any(f'"{call}"' in unit for unit in calls)}


async def whole_run(scene: Scene) -> tuple[tuple[Any, Any], set[tuple[str, str]], list[str]]:
    """Outcome, effects and units of a run that nothing interrupts."""
    assert scene.crew.work("whole") == 0
    requests = [(request.model, request.turn) for request in scene.chat.take()]
    assert Counter(requests) == Counter(REQUESTS)
    effects = scene.effects("whole")
    assert set(effects.values()) == {1}
    assert scene.sums() == 1
    outcome = await scene.outcome("whole")
    assert json.loads(outcome[0]) == {
        "c1": "rain in Ghent",
        "c2": '{"item":"umbrella","cents":250}',
        "c3": "because of the clouds",
        "c4": "5",
    }
    units = await scene.units("whole")
    if not any("event_stream_handler" in unit for unit in units):
        assert {re.sub("^[0-9a-f]{32}/", ".../", unit) for unit in units} == UNITS
    return outcome, set(effects), sorted(units)


async def check(scene: Scene, run: str, before: set[str], effects: Counter[tuple[str, str]]) -> None:
    """No model request and no tool call that was recorded `before` a worker began has been made by it."""
    again = {(request.model, request.turn) for request in scene.chat.take()} & recorded_requests(before)
    assert not again, f"sent again: {again}"
    mine = scene.effects(run)
    again_called = {tool for tool, _ in mine} & recorded_effects(before)
    assert not again_called, f"called again: {again_called}"
    sums = scene.sums()
    assert sums == 0 or not any("call_tool:add" in unit for unit in before), "the MCP server was called again"
    effects.update(mine)


async def test_a_run_goes_on_behind_every_unit(scene: Scene) -> None:
    """Each worker is killed as soon as it has recorded one more unit: the run ends as if nothing had been."""
    outcome, whole_effects, whole_units = await whole_run(scene)
    effects: Counter[tuple[str, str]] = Counter()
    deaths = 0
    while True:
        before = await scene.units("run") if deaths else set()
        code = scene.crew.work("run", die_after=1)
        await check(scene, "run", before, effects)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        deaths += 1
        assert deaths <= len(whole_units)
    assert (
        deaths >= len(whole_units) - 4
    )  # what was under way beside the one that was counted may be recorded too
    assert await scene.outcome("run") == outcome
    assert set(effects) == whole_effects
    assert sorted(await scene.units("run")) == whole_units


@pytest.mark.parametrize("scene", [False], indirect=True, ids=["whole"])
async def test_a_worker_may_be_killed_behind_any_unit(scene: Scene) -> None:
    """For every unit: its first worker is killed behind it, and the second one ends the run like an unbroken one."""
    outcome, whole_effects, whole_units = await whole_run(scene)
    for number in range(1, len(whole_units) + 1):
        run = f"run-{number}"
        effects: Counter[tuple[str, str]] = Counter()
        assert scene.crew.work(run, die_after=number) == -signal.SIGKILL
        await check(scene, run, set(), effects)
        before = await scene.units(run)
        assert len(before) >= number
        assert scene.crew.work(run) == 0
        await check(scene, run, before, effects)
        assert await scene.outcome(run) == outcome
        assert set(effects) == whole_effects
        assert sorted(await scene.units(run)) == whole_units
