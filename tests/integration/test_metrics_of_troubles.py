"""Metrics of workers that lose, wait, refuse and spend: real processes on a broker and a database, asked over HTTP."""

from __future__ import annotations

import asyncio
import secrets
import signal
from collections import Counter
from contextlib import aclosing
from pathlib import Path

import pytest
from tests.integration.processes import Command
from tests.integration.test_metrics import is_ready, sample, scraped, until
from tests.security.forgeries import forged
from tests.security.signed import RING, put

from paigeant import Paigeant, Settings, Workflow
from paigeant.keyfiles import write_private
from paigeant.keys import Key, KeyRing
from paigeant.monitor import _FRESH_SECONDS

HANDLERS = """
import asyncio
from paigeant import ActivityRegistry, StepContext

activity = ActivityRegistry()

@activity.execute()
async def watch() -> None:
    pass

@activity.execute(retries=1)
async def hold(ctx: StepContext) -> int:
    if ctx.attempt == 1:
        ctx.log.info("holding")
        await asyncio.Event().wait()
    return ctx.attempt

@activity.execute()
async def pay(sum: int = 0) -> str:
    return "paid"
"""

AGENT = """
from pydantic_ai import Agent, ModelResponse, RequestUsage, TextPart, ToolCallPart
from pydantic_ai.models.function import FunctionModel

def answer(messages, info):
    asks = len(messages) == 1
    part = ToolCallPart("look_up", {}) if asks else TextPart("done")
    usage = RequestUsage(input_tokens=1000, output_tokens=100)
    return ModelResponse(parts=[part], usage=usage, model_name="gpt-4o", provider_name="openai")

clerk = Agent(FunctionModel(answer, model_name="gpt-4o"), name="clerk")

@clerk.tool_plain
def look_up() -> str:
    return "found"

activity.agent(clerk, name="ask", prompt="{question}")
"""

COST_OF_AN_ANSWER = 1000 * 2.5e-6 + 100 * 10e-6
"""In dollars: what gpt-4o takes for the tokens that `answer` tells."""


@pytest.fixture(params=["redis"])
def settings(request: pytest.FixtureRequest, postgres_tables: str) -> Settings:
    """What all processes of a test read: handlers, a broker, a database, a short lease, no sweep but the first."""
    return written(postgres_tables, request.getfixturevalue(f"{request.param}_url"))


def written(store: str, transport: str) -> Settings:
    """The settings with these servers, in the folder of the test."""
    Path("handlers.py").write_text(HANDLERS)
    told = {"store_url": store, "transport_url": transport, "namespace": f"metrics-{secrets.token_hex(4)}"}
    lines = [f"{name}: {value}\n" for name, value in told.items()]
    Path("paigeant.yaml").write_text(
        "".join(lines)
        + "handlers: handlers.py\nlease: 5\nheartbeat: 0.2\nsweep_interval: 3600\ngrace: 3600\nretry_base: 0\n"
    )
    return Settings()


def serving(topic: str, **environment: str) -> Command:
    """A worker process for one topic, which tells its metrics."""
    return Command("run", "--topics", topic, "--metrics-port", "0", environment=environment)


def dispatch(steps: list[str], *ids: str, **payload: str) -> None:
    """Start a run of these steps for each id."""

    async def start() -> None:
        async with Paigeant() as app:
            for run_id in ids:
                await app.dispatch(Workflow("w", list(steps)), payload, workflow_id=run_id)

    asyncio.run(start())


def leases() -> tuple[float, list[float]]:
    """What the store's clock says, and when each worker's lease ends."""

    async def read() -> tuple[float, list[float]]:
        async with Paigeant() as app:
            workers = await app.store.list_workers()
            return await app.store.now(), [worker.lease_until for worker in workers]

    return asyncio.run(read())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_lease_that_nobody_sweeps_is_seen(settings: Settings, number: signal.Signals) -> None:
    """A worker is gone with a step: others tell for how long its lease is over, until one sweeps and tells that.

    The worker that was only stopped tells, when it goes on, that the step was taken from it.
    """
    expired = sample("paigeant_expired_lease_seconds")
    with serving("watch") as watcher, serving("hold") as victim:
        port = watcher.until("monitor.serving")["port"]
        its_port = victim.until("monitor.serving")["port"]
        until(lambda: is_ready(port))
        dispatch(["hold"], "r")
        victim.until("holding")
        assert scraped(port)[expired] == 0
        victim.signal(number)
        until(lambda: scraped(port)[expired] > 0)
        before, ends = leases()
        found = scraped(port)
        now, _ = leases()
        assert before - min(ends) - _FRESH_SECONDS <= found[expired] <= now - min(ends)
        assert found[sample("paigeant_topic_steps", topic="hold", state="running")] == 1
        with serving("hold") as rescuer:
            port_of_rescuer = rescuer.until("monitor.serving")["port"]
            assert rescuer.until("run.completed")["workflow_id"] == "r"
            found = scraped(port_of_rescuer)
            assert found[sample("paigeant_steps_swept_total")] == 1
            assert found[sample("paigeant_workers_lost_total")] == 1
            assert found[sample("paigeant_steps_total", activity="hold", outcome="completed")] == 1
            until(lambda: scraped(port)[expired] == 0)
        if number is signal.SIGSTOP:
            victim.signal(signal.SIGCONT)
            victim.until("step.lost")
            assert scraped(its_port)[sample("paigeant_leases_lost_total", activity="hold")] == 1


@pytest.mark.parametrize("settings", ["redis", "rabbitmq"], indirect=True)
def test_the_depth_of_a_topic_is_its_brokers(settings: Settings) -> None:
    """Messages that wait, those that somebody holds where the broker tells them, and the steps that they are for."""
    dispatch(["pay"], "r1", "r2", "r3")
    taken = 1 if settings.transport_url.startswith("redis") else 0

    def messages() -> dict[str, float]:
        return {
            state: scraped(port).get(sample("paigeant_topic_messages", topic="pay", state=state), 0)
            for state in ("waiting", "taken")
        }

    async def hold_one() -> None:
        async with Paigeant() as app, aclosing(app.transport.subscribe("pay")) as held:  # type: ignore[type-var]
            await anext(held)
            await asyncio.to_thread(until, lambda: messages() == {"waiting": 2, "taken": taken})

    with serving("watch") as worker:
        port = worker.until("monitor.serving")["port"]
        until(lambda: messages() == {"waiting": 3, "taken": 0})
        asyncio.run(hold_one())
        found = scraped(port)
    assert found[sample("paigeant_topic_steps", topic="pay", state="ready")] == 3
    assert found[sample("paigeant_backlog_up", of="transport")] == 1


def test_what_is_refused_is_counted_by_its_reason(settings: Settings) -> None:
    """Forgeries of each kind in a broker: as many rejections of each reason, and as many dead letters."""
    ring = KeyRing((Key.generate(now=1.0),))
    write_private(RING, ring.as_dict())
    cases = forged(ring.active)
    expected = Counter(reason for _, reason in cases.values())
    assert len(expected) >= 9
    places = {"transport_url": settings.transport_url, "namespace": settings.namespace}
    asyncio.run(put(places, {f"{name}/pay/do/0": wire for name, (wire, _) in cases.items()}))
    with serving("pay", PAIGEANT_SIGNING="require", PAIGEANT_DEPLOYMENT="shop") as worker:
        port = worker.until("monitor.serving")["port"]
        for _ in cases:
            worker.until("delivery.rejected")
        until(lambda: scraped(port)[sample("paigeant_dead_letters")] == len(cases))
        found = scraped(port)
    counted = {
        dict(labels)["reason"]: value
        for (name, labels), value in found.items()
        if name == "paigeant_rejections_total"
    }
    assert counted == expected
    assert found[sample("paigeant_deliveries_total", outcome="rejected")] == len(cases)
    assert found[sample("paigeant_deliveries_total", outcome="claimed")] == 0


def test_what_an_agent_has_used_is_counted(settings: Settings) -> None:
    """Requests, tool calls, tokens and dollars of two runs, by activity and model."""
    Path("handlers.py").write_text(HANDLERS + AGENT)
    dispatch(["ask"], "r1", "r2", question="where is it?")
    with serving("ask") as worker:
        port = worker.until("monitor.serving")["port"]
        for _ in range(2):
            worker.until("run.completed")
        found = scraped(port)
    its = {"activity": "ask", "model": "gpt-4o"}
    assert found[sample("paigeant_agent_requests_total", **its)] == 4
    assert found[sample("paigeant_agent_tool_calls_total", activity="ask")] == 2
    assert found[sample("paigeant_agent_tokens_total", **its, type="input")] == 4000
    assert found[sample("paigeant_agent_tokens_total", **its, type="output")] == 400
    cost = found[sample("paigeant_agent_cost_dollars_total", **its)]
    assert cost == pytest.approx(4 * COST_OF_AN_ANSWER)
