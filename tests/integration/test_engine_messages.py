"""Whole runs as their messages show them: they say what the store says, and what is too large travels without."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from tests.integration.runs import AT_ONCE, attempts, working
from tests.patience import PATIENCE

from paigeant import ActivityRegistry, NonRetryableError, Settings, Step, StepContext, Workflow
from paigeant.errors import InputInvalid, MessageTooLarge
from paigeant.forwarder import message_of


@pytest.fixture(params=["memory://", "sqlite:///p.db", "postgres"], ids=["memory", "sqlite", "postgres"])
def url(request: pytest.FixtureRequest) -> str:
    """Where the runs of a test live."""
    return str(request.getfixturevalue("postgres_tables") if request.param == "postgres" else request.param)


async def test_bodies_on_the_wire_are_what_the_store_says(url: str) -> None:
    """Every message that is published equals the one folded from the rows: losing it loses nothing."""
    settings = Settings(
        transport_url="memory://", store_url=url, local_steps=1, inline_bytes=100, retry_base=0.0
    )
    activity = ActivityRegistry()

    @activity.execute(retries=AT_ONCE)
    async def work(n: int, ctx: StepContext) -> str:
        if ctx.attempt == 1 and n % 2:
            raise RuntimeError("first")
        await ctx.save_variable("v", n)
        await ctx.save_variable("skipped", f"by {ctx.step_id}")  # a step of this name is skipped
        await ctx.save_variable("a", f"by {ctx.step_id}")  # a step of this name has an output
        if not ctx.step_id.startswith("a."):
            ctx.insert("other")
        return "x" * n

    activity.compensate("work")(lambda: None)
    activity.execute(name="other")(lambda: {"deep": [1, 2.5]})

    @activity.execute(retries=0)
    async def fail() -> None:
        raise RuntimeError("no")

    async with working(settings, activity) as app:
        compared: list[tuple[Any, Any]] = []
        publish = app.transport.publish

        async def watch(topic: str, message: Any, *, delay: float = 0) -> None:
            detail = await app.store.load_run(message.workflow_id, inline_bytes=100)
            told = message_of(detail, inline_bytes=100).evolve(message_id=message.message_id)
            compared.append((message, told))
            await publish(topic, message, delay=delay)

        app.transport.publish = watch  # type: ignore[method-assign]
        steps: list[str | Step] = [
            Step("work", id="a"),
            Step("other", id="skipped", when="false"),
            Step("work", id="b"),
            "fail",
        ]
        for n in (1, 2, 200):
            run = await app.dispatch(Workflow("w", steps), {"n": n, "a": "an input of a step's name"})
            assert (await run.wait(PATIENCE)).status == "compensated"
    assert len(compared) > 20
    for sent, told in compared:
        assert sent == told


# -- what is too large


async def test_a_large_output_stays_in_the_store(settings: Settings) -> None:
    """It is fetched where it is used: by a step, by a condition's neighbour, by an undo, and by the result."""
    activity = ActivityRegistry()
    undone: list[int] = []

    @activity.execute()
    async def make(size: int) -> str:
        return "x" * size

    @activity.compensate("make")
    async def unmake(output: str) -> None:
        undone.append(len(output))

    @activity.execute()
    async def measure(make: str) -> int:
        return len(make)

    @activity.execute(retries=0)
    async def fail(measure: int) -> None:
        raise RuntimeError("no")

    settings = settings.model_copy(update={"inline_bytes": 1000, "max_message_bytes": 4096})
    async with working(settings, activity, workers=2) as app:
        for size in (999, 1001, 100_000):
            workflow = Workflow("w", ["make", "measure", Step("measure", id="n", when="make != ''"), "fail"])
            result = await (await app.dispatch(workflow, {"size": size})).wait(PATIENCE)
            assert result.status == "compensated"
            assert len(result.outputs["make"]) == size
            assert (result.outputs["measure"], result.outputs["n"]) == (size, size)
    assert undone == [999, 1001, 100_000]


async def test_many_small_outputs_may_outgrow_a_message(settings: Settings) -> None:
    """When the payload as a whole is too large to travel it is read from the store."""
    activity = ActivityRegistry()

    @activity.execute()
    async def make() -> str:
        return "x" * 900

    @activity.execute()
    async def count(**rest: Any) -> int:
        return sum(len(value) for value in rest.values())

    settings = settings.model_copy(update={"inline_bytes": 1000, "max_message_bytes": 4096, "local_steps": 1})
    async with working(settings, activity, workers=2) as app:
        run = await app.dispatch(Workflow("w", [*["make"] * 8, "count"]))
        assert (await run.wait(PATIENCE)).output == 8 * 900


async def test_an_output_that_is_too_large_fails_the_step(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For good, too; so does what `once` gives, and a variable is refused."""
    monkeypatch.setattr("paigeant.codec.LARGEST_BYTES", 1000)
    activity = ActivityRegistry()

    @activity.execute(retries=5)
    def give() -> str:
        return "x" * 1000

    @activity.execute(retries=5)
    async def once(ctx: StepContext) -> None:
        async def large() -> str:
            return "x" * 1000

        await ctx.once("large", large)

    async with working(settings, activity) as app:
        for name in ("give", "once"):
            run = await app.dispatch(Workflow("w", [name]))
            result = await run.wait(PATIENCE)
            assert await attempts(run) == {name: 1}
            assert "1,002 bytes as JSON, at most 1,000 are recorded" in str(result.error)
            with pytest.raises(InputInvalid, match="1,002 bytes"):
                await app.store.save_variable(run.id, "large", "x" * 1000)


async def test_what_is_dispatched_can_travel_to_the_end(settings: Settings) -> None:
    """What is done takes more room in a slip than what is to do: a dispatch that leaves too little is refused."""
    activity = ActivityRegistry()
    done: Counter[tuple[str, str]] = Counter()

    def register(name: str) -> None:
        @activity.execute(name, topic=f"{name}-{'t' * 100}")
        async def work(ctx: StepContext) -> None:
            done[ctx.workflow_id, ctx.step_id] += 1
            if name == "last":
                raise NonRetryableError("turn round")

        @activity.compensate(name)
        async def undo() -> None: ...

    names = [*(f"step-{number}" for number in range(6)), "last"]
    for name in names:
        register(name)
    workflow = Workflow("w", names)
    settings = settings.model_copy(update={"max_message_bytes": 4096, "local_steps": 1})
    async with working(settings, activity, workers=2) as app:
        fits, too_large = 0, 4096
        while too_large - fits > 1:
            size = (fits + too_large) // 2
            try:
                await app.dispatch(workflow, headers={"x": "h" * size}, workflow_id=f"r{size}")
                fits = size
            except MessageTooLarge:
                too_large = size
        assert fits > 1024  # no more is kept free than is needed
        assert (await app.run(f"r{fits}").wait(PATIENCE)).status == "compensated"
    assert set(done.values()) == {1}


async def test_a_step_is_done_once_also_where_no_message_can_follow(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker with a lower limit than the dispatcher's records what it did; with a higher one the run goes on."""
    activity = ActivityRegistry()
    done: list[str] = []

    @activity.execute()
    async def first() -> None:
        done.append("first")
        envelope.limit_bytes = 100

    @activity.execute()
    async def second() -> None:
        done.append("second")

    settings = settings.model_copy(update={"grace": 0.1, "local_steps": 1})
    async with working(settings, activity) as app:
        envelope = app.worker().executor.forwarder.envelope
        run = await app.dispatch(Workflow("w", ["first", "second"]))
        async with asyncio.timeout(PATIENCE):
            while "too_large" not in caplog.text:  # noqa: ASYNC110  # nothing else tells
                await asyncio.sleep(0.01)
        envelope.limit_bytes = 8192
        assert (await run.wait(PATIENCE)).status == "completed"
    assert done == ["first", "second"]
