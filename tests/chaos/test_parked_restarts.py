"""Workers, broker and database end whenever a run waits: it goes on when they are back, and asks nothing twice."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.chaos.places import Place
from tests.integration.processes import Command
from tests.kill.roles import TIMES
from tests.patience import PATIENCE

from paigeant import Paigeant, Run, RunStatus, Settings, Sleep, Step, WaitFor, Workflow

HANDLERS = """
from pathlib import Path
from pydantic_ai import Agent, ModelResponse, TextPart, ToolCallPart
from pydantic_ai.models.function import FunctionModel
from paigeant import ActivityRegistry, StepContext
activity = ActivityRegistry()

def note(what):
    with Path("notes").open("a") as notes:
        notes.write(f"{what}\\n")

def say(messages, info):
    turn = sum(isinstance(message, ModelResponse) for message in messages)
    note(f"asked {turn}")
    return ModelResponse([TextPart("fine") if turn else ToolCallPart("pay", {"euros": 9})])

banker = Agent(FunctionModel(say), name="banker")

@banker.tool_plain(requires_approval=True)
async def pay(euros: int) -> str:
    note(f"paid {euros}")
    return "paid"

activity.agent(banker, prompt="Pay.")

@activity.execute()
def close(ctx: StepContext) -> str:
    note(f"closed {ctx.workflow_id}")
    return ctx.workflow_id
"""
FLOWS: dict[str, str | Step] = {"person": "banker", "signal": WaitFor("go"), "time": Sleep(8.0)}


@pytest.mark.slow
async def test_runs_that_wait_outlast_everything(place: Place, tmp_path: Path) -> None:
    """For a person, for a signal, for a time: meanwhile all processes and servers are killed and started again."""
    (tmp_path / "handlers.py").write_text(HANDLERS)
    options: dict[str, Any] = {**place.settings, **TIMES, "signing": "off"}
    told = {f"PAIGEANT_{name.upper()}": str(value) for name, value in options.items()}
    settings = Settings(**options)
    async with Paigeant(settings) as app:
        with Command("run", "handlers.py", environment=told):
            for name, step in FLOWS.items():
                if name == "time" and place.settle is not None:  # by now all queues are there
                    await asyncio.to_thread(place.settle)
                await until_parked(await app.dispatch(Workflow("w", [step, "close"]), workflow_id=name))
    for server in {id(each): each for each in (place.broker, place.store)}.values():
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
    async with Paigeant(settings) as app:
        [request] = await app.requests()
        await app.approve(request.id, sender="ada")
        await app.run("signal").signal("go", "gone")
        with Command("run", "handlers.py", environment=told):
            results = [await app.run(name).wait(PATIENCE) for name in FLOWS]
        [request] = await app.requests(only_open=False)
    assert [result.output for result in results] == list(FLOWS)
    assert request.answered_by == "ada"
    assert sorted((tmp_path / "notes").read_text().splitlines()) == [
        *("asked 0", "asked 1"),
        *(f"closed {name}" for name in FLOWS),
        "paid 9",
    ]


async def until_parked(run: Run) -> None:
    """Wait until nobody works on the run, which waits itself."""
    async with asyncio.timeout(PATIENCE):
        while await run.status() is not RunStatus.WAITING:  # noqa: ASYNC110  # it tells only of its end
            await asyncio.sleep(0.05)
