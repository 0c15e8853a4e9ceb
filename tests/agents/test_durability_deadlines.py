"""PaigeantDurability: deadlines of runs and pauses of the library, over attempts."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic_ai import RunContext
from pydantic_ai._agent_graph import _agent_graph_sleep
from pydantic_ai.capabilities import AbstractCapability
from pydantic_ai.exceptions import RunTimedOut
from tests.agents.durable import durable
from tests.agents.steps import Crash, Step, called, scripted

from paigeant.parking import Parked
from paigeant.testing import ManualClock


async def test_rule_16_a_deadline_counts_from_the_first_attempt() -> None:
    """`timeout=` of a run is over when it is over, however many attempts there were."""
    clock = ManualClock(datetime.now(UTC) - timedelta(seconds=1000))
    model, requests = scripted("done")
    agent = durable(model)
    step = Step(clock)
    with pytest.raises(Crash):
        await step.attempt(lambda: agent.run("go", timeout=500), crash_after=1)
    clock.advance(1000)
    with pytest.raises(RunTimedOut):
        await step.attempt(lambda: agent.run("go", timeout=500))
    assert requests == []
    assert (await step.attempt(lambda: agent.run("go", timeout=5000))).output == "done"


async def test_rule_16_nested_runs_inherit_the_deadline() -> None:
    """An agent that a tool runs has no more time than the run that it works for."""
    deadlines: list[datetime | None] = []
    inner = durable(scripted("done")[0], name="inner")

    @inner.instructions
    def note(ctx: RunContext[Any]) -> str:
        deadlines.append(ctx.deadline)
        return ""

    outer = durable(scripted(called("ask", "c1"), "done")[0], name="outer")

    @outer.tool
    async def ask(ctx: RunContext[Any]) -> str:
        deadlines.append(ctx.deadline)
        return str((await inner.run("go", timeout=5000)).output)

    await Step().attempt(lambda: outer.run("go", timeout=500))
    assert deadlines[0] is not None
    assert deadlines == deadlines[:1] * 2


async def test_rule_16_a_pause_of_the_library_isn_t_begun_anew() -> None:
    """Between two polls of a response the run waits until a recorded instant, its step left: it goes on then."""
    clock = ManualClock()

    class Pausing(AbstractCapability[Any]):
        async def before_model_request(self, ctx: RunContext[Any], request_context: Any) -> Any:
            await _agent_graph_sleep(60.0)
            return request_context

    model, requests = scripted("done")
    agent = durable(model, capabilities=[Pausing()])
    step = Step(clock)
    for seconds in (0, 45):
        clock.advance(seconds)
        with pytest.raises(Parked):
            await step.attempt(lambda: agent.run("go"))
    assert requests == []
    clock.advance(15)
    assert (await step.attempt(lambda: agent.run("go"))).output == "done"
