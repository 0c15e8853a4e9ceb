"""Runs that wait: for a while, for a signal, for a person. Nothing of them is kept in a worker meanwhile."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from tests.integration.workers import working
from tests.patience import PATIENCE

from paigeant import (
    ActivityRegistry,
    ItineraryPolicy,
    NonRetryableError,
    Paigeant,
    Run,
    RunStatus,
    Settings,
    Sleep,
    StepContext,
    WaitFor,
    WaitTimeout,
    Workflow,
)
from paigeant.errors import InputInvalid, InvalidDefinition, InvalidTransition, RequestNotFound
from paigeant.identity import GRANT_SIGNAL
from paigeant.slip import StepStatus
from paigeant.store import Request
from paigeant.testing import MemoryApp


@pytest.fixture(params=["memory://", "sqlite:///p.db", "postgres"], ids=["memory", "sqlite", "postgres"])
def settings(request: pytest.FixtureRequest) -> Settings:
    """Where the runs of a test live: transport and store alike."""
    url = str(request.getfixturevalue("postgres_tables") if request.param == "postgres" else request.param)
    return Settings(store_url=url, transport_url=url, sweep_interval=0.2)


class Shop:
    """Activities that note what they do."""

    def __init__(self) -> None:
        self.registry = ActivityRegistry()
        self.done: list[Any] = []
        self.patience = 1.5  # by then a busy machine has kept the request
        self.registry.execute()(self.pack)
        self.registry.execute(retries=0)(self.confirm)
        self.registry.execute(retries=0)(self.question)
        self.registry.execute(retries=0)(self.nap)
        self.registry.execute(retries=0)(self.both)
        self.registry.compensate("pack")(self.unpack)

    async def pack(self, order: str) -> str:
        """Pack it."""
        self.done.append(f"packed {order}")
        return f"box of {order}"

    async def unpack(self, output: str) -> None:
        """Unpack it."""
        self.done.append(f"unpacked {output}")

    async def confirm(self, order: str, context: StepContext) -> bool:
        """Ask whether it is to be sent."""
        await context.once("look", self.done.append, f"looked at {order}")
        self.done.append(f"attempt {context.attempt}")
        return await context.approve(f"Send {order}?", about={"order": order})

    async def question(self, context: StepContext) -> Any:
        """Ask for something."""
        return await context.ask("Which colour?", timeout=self.patience)

    async def nap(self, context: StepContext) -> float:
        """Sleep for longer than a worker would wait for."""
        began = await context.once("began", lambda: datetime.now(UTC).timestamp())
        await context.sleep(1.3)
        return datetime.now(UTC).timestamp() - float(began)

    async def both(self, context: StepContext) -> list[Any]:
        """Ask two things at once, and work beside that."""

        async def work() -> str:
            await asyncio.sleep(0.3)
            self.done.append("worked")
            return "work"

        asked = (context.ask("One?"), context.wait_for("two"), context.once("work", work))
        return list(await asyncio.gather(*asked))


@pytest.fixture
def shop() -> Shop:
    """The shop of a test."""
    return Shop()


async def parked(run: Run) -> None:
    """Wait until nobody works on the run, which waits itself."""
    async with asyncio.timeout(PATIENCE):
        while await run.status() is not RunStatus.WAITING:  # noqa: ASYNC110  # it tells only of its end
            await asyncio.sleep(0.01)


async def asked(run: Run) -> Request:
    """What the run asks, once it does."""
    await parked(run)
    [request] = await run.requests()
    return request


async def test_a_signal_ends_the_wait_for_it(settings: Settings, shop: Shop) -> None:
    """Its value is the step's output; the run waits meanwhile, and its step is in nobody's hands."""
    async with Paigeant(settings, activities=shop.registry) as app, working(app.worker()):
        run = await app.dispatch(Workflow("w", ["pack", WaitFor("paid")]), {"order": "tea"})
        await parked(run)
        row = (await run.detail()).steps[1]
        assert (row.status, row.worker, row.attempt) == (StepStatus.WAITING, None, 0)
        await run.signal("paid", {"amount": 7}, sender="the bank")
        result = await run.wait(PATIENCE)
        assert (result.status, result.output) == (RunStatus.COMPLETED, {"amount": 7})
        [signal] = (await run.detail()).signals
        assert (signal.name, signal.sender, signal.taken_by) == ("paid", "the bank", "paid")


async def test_signals_that_come_early_are_kept_and_each_is_taken_once(
    settings: Settings, shop: Shop
) -> None:
    """Two waits for one name take two signals, the oldest first, even when both were sent before anybody worked."""
    flow = Workflow("w", [WaitFor("paid", id="first"), "pack", WaitFor("paid", id="second")])
    async with Paigeant(settings, activities=shop.registry) as app:
        run = await app.dispatch(flow, {"order": "tea"})
        await run.signal("paid", 1)
        await run.signal("other", 5)
        await run.signal("paid", 2)
        await run.signal("paid", 3)
        async with working(app.worker()):
            result = await run.wait(PATIENCE)
        assert (result.outputs["first"], result.outputs["second"]) == (1, 2)
        taken = {signal.value: signal.taken_by for signal in (await run.detail()).signals}
        assert taken == {b"1": "first", b"5": None, b"2": "second", b"3": None}


async def test_a_wait_that_is_over_time_fails_and_what_was_done_is_undone(
    settings: Settings, shop: Shop
) -> None:
    """The error says what hasn't come; a wait with a default gives that instead."""
    async with Paigeant(settings, activities=shop.registry) as app, working(app.worker()):
        late = Workflow("late", ["pack", WaitFor("paid", timeout=0.1)])
        failed = await (await app.dispatch(late, {"order": "tea"})).wait(PATIENCE)
        assert failed.status is RunStatus.COMPENSATED
        assert "WaitTimeout: the signal 'paid' has not come within 0.1 s" in str(failed.error)
        assert shop.done == ["packed tea", "unpacked box of tea"]
        spared = Workflow("spared", [WaitFor("paid", timeout=timedelta(seconds=0.1), default=None), "pack"])
        result = await (await app.dispatch(spared, {"order": "tea"})).wait(PATIENCE)
        assert (result.status, result.outputs["paid"]) == (RunStatus.COMPLETED, None)


async def test_sleeping_takes_no_worker_and_survives_all_of_them(settings: Settings, shop: Shop) -> None:
    """A run sleeps on when its worker is gone, and goes on in another one."""
    flow = Workflow("w", [Sleep(3.0), "pack"])
    async with Paigeant(settings, activities=shop.registry) as app:
        run = await app.dispatch(flow, {"order": "tea"})
        began = await app.store.now()
        async with working(app.worker()):
            await parked(run)
        assert (await run.detail()).steps[0].worker is None
        async with working(app.worker()):
            result = await run.wait(PATIENCE)
        assert result.status is RunStatus.COMPLETED
        row = (await run.detail()).steps[1]
        assert row.completed_at is not None
        assert row.completed_at - began >= 3.0


async def test_an_activity_sleeps_in_the_middle(settings: Settings, shop: Shop) -> None:
    """What is a unit before the sleep isn't done again behind it."""
    async with Paigeant(settings, activities=shop.registry) as app, working(app.worker()):
        result = await (await app.dispatch(Workflow("w", ["nap"]))).wait(PATIENCE)
        assert 1.3 <= result.output < PATIENCE


async def test_a_person_approves(settings: Settings, shop: Shop) -> None:
    """The request says what is asked and of which step; the step goes on behind its units, its attempt counted once."""
    async with Paigeant(settings, activities=shop.registry) as app, working(app.worker()):
        run = await app.dispatch(Workflow("w", ["confirm"]), {"order": "tea"})
        request = await asked(run)
        assert (request.kind, request.name, request.step) == ("approval", "Send tea?", "confirm")
        assert request.asked == b'{"question":"Send tea?","about":{"order":"tea"}}'
        assert [found.id for found in await app.requests()] == [request.id]
        await app.approve(request.id, sender="ada")
        result = await run.wait(PATIENCE)
        assert (result.status, result.output) == (RunStatus.COMPLETED, True)
        assert shop.done == ["looked at tea", "attempt 1", "attempt 1"]
        assert await run.requests() == []
        [settled] = await run.requests(only_open=False)
        assert (settled.answered_by, settled.answer) == ("ada", b'{"approved":true}')
        assert settled.answered_at is not None


async def test_the_first_answer_stands(settings: Settings, shop: Shop) -> None:
    """The same answer again changes nothing; another one is refused, and so is one to nobody's question."""
    async with Paigeant(settings, activities=shop.registry) as app:
        async with working(app.worker()):
            run = await app.dispatch(Workflow("w", ["confirm"]), {"order": "tea"})
            request = await asked(run)
        # Nobody works now: the answer is kept all the same.
        await app.deny(request.id, "no tea left", sender="bob")
        await app.deny(request.id, "no tea left", sender="eve")
        with pytest.raises(InvalidTransition, match="answered by bob already"):
            await app.approve(request.id)
        with pytest.raises(RequestNotFound, match="requests list"):
            await app.approve("nobody's")
        with pytest.raises(InputInvalid, match="true or false"):
            await app.answer(request.id, "yes")
        async with working(app.worker()):
            assert (await run.wait(PATIENCE)).output is False


async def test_nobody_is_asked_for_longer_than_the_time_given(settings: Settings, shop: Shop) -> None:
    """The step fails, and an answer that comes then is refused."""
    async with Paigeant(settings, activities=shop.registry) as app, working(app.worker()):
        run = await app.dispatch(Workflow("w", ["question"]))
        result = await run.wait(PATIENCE)
        assert result.status is RunStatus.FAILED
        assert "the answer to 'Which colour?' has not come within 1.5 s" in str(result.error)
        [request] = await run.requests(only_open=False)
        assert not request.is_open
        with pytest.raises(InvalidTransition, match="time is up"):
            await app.answer(request.id, "red")


async def test_waits_side_by_side_leave_when_all_else_is_done(settings: Settings, shop: Shop) -> None:
    """Both questions are asked before the step is left, work beside them is finished first, and done once."""
    async with Paigeant(settings, activities=shop.registry) as app, working(app.worker()):
        run = await app.dispatch(Workflow("w", ["both"]))
        request = await asked(run)
        assert shop.done == ["worked"]
        await run.signal("two", 2)
        await parked(run)
        await app.answer(request.id, {"one": 1})
        assert (await run.wait(PATIENCE)).output == [{"one": 1}, 2, "work"]
        assert shop.done == ["worked"]


async def test_a_run_that_waits_is_cancelled(settings: Settings, shop: Shop) -> None:
    """What was done is undone, and what was asked is closed."""
    async with Paigeant(settings, activities=shop.registry) as app, working(app.worker()):
        run = await app.dispatch(Workflow("w", ["pack", "confirm"]), {"order": "tea"})
        request = await asked(run)
        await run.cancel()
        assert (await run.wait(PATIENCE)).status is RunStatus.CANCELLED
        assert shop.done[-1] == "unpacked box of tea"
        with pytest.raises(InvalidTransition, match="its step has ended"):
            await app.approve(request.id)
        with pytest.raises(InvalidTransition, match="takes no signals"):
            await run.signal("late")


async def test_what_nobody_waits_for_any_more_is_not_asked(settings: Settings, shop: Shop) -> None:
    """While a run is undone, and when its step went on without the answer, the request is closed."""

    async def race(context: StepContext) -> str:
        done = {asyncio.ensure_future(context.ask("Which?")), asyncio.ensure_future(context.wait_for("go"))}
        first, others = await asyncio.wait(done, return_when=asyncio.FIRST_COMPLETED)
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        return str(first.pop().result())

    shop.registry.execute(retries=0)(race)
    async with Paigeant(settings, activities=shop.registry) as app, working(app.worker()):
        run = await app.dispatch(Workflow("w", ["race", WaitFor("end")]))
        request = await asked(run)
        await run.signal("go", "gone")
        await eventually_at(run, "end")
        assert await run.requests() == []
        with pytest.raises(InvalidTransition, match="nobody waits"):
            await app.answer(request.id, "red")
        await run.signal("end")
        assert (await run.wait(PATIENCE)).outputs["race"] == "gone"


async def eventually_at(run: Run, step: str) -> None:
    """Wait until the run waits in this step."""
    async with asyncio.timeout(PATIENCE):
        while not any(  # noqa: ASYNC110
            row.step == step and row.status is StepStatus.WAITING for row in (await run.detail()).steps
        ):
            await asyncio.sleep(0.01)


async def test_an_operator_s_retry_waits_anew(settings: Settings, shop: Shop) -> None:
    """A run that failed because nobody answered in time asks again, by a new request, and waits as long again."""
    flow = Workflow("w", ["question", WaitFor("paid", timeout=0.2)])
    async with Paigeant(settings, activities=shop.registry) as app, working(app.worker()):
        run = await app.dispatch(flow)
        assert (await run.wait(PATIENCE)).status is RunStatus.FAILED
        [late] = await run.requests(only_open=False)
        await run.retry()
        assert (await run.wait(PATIENCE)).status is RunStatus.FAILED
        [_, again] = await run.requests(only_open=False)
        assert again.id != late.id
        shop.patience = PATIENCE
        await run.retry()
        async with asyncio.timeout(PATIENCE):
            while not (opened := await run.requests()):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await app.answer(opened[0].id, "red")
        result = await run.wait(PATIENCE)
        assert (result.status, result.outputs["question"]) == (RunStatus.FAILED, "red")
        assert "the signal 'paid' has not come" in str(result.error)


async def test_a_deadline_ends_a_run_that_waits(settings: Settings, shop: Shop) -> None:
    """Whatever it waits for."""
    async with Paigeant(settings, activities=shop.registry) as app, working(app.worker()):
        run = await app.dispatch(Workflow("w", ["pack", WaitFor("never")]), {"order": "tea"}, deadline=2.0)
        result = await run.wait(PATIENCE)
        assert result.status is RunStatus.COMPENSATED
        assert "DeadlineExceeded" in str(result.error)


async def test_a_run_starts_when_it_is_told_to(settings: Settings, shop: Shop) -> None:
    """Not before, and its deadline counts from then on."""
    async with Paigeant(settings, activities=shop.registry) as app, working(app.worker()):
        start = datetime.fromtimestamp(await app.store.now() + 0.8, UTC)
        run = await app.dispatch(Workflow("w", ["pack"]), {"order": "tea"}, start_at=start, deadline=60)
        result = await run.wait(PATIENCE)
        assert result.status is RunStatus.COMPLETED
        row = (await run.detail()).steps[0]
        assert row.started_at is not None
        assert row.started_at >= start.timestamp()
        with pytest.raises(InputInvalid, match="time zone"):
            await app.dispatch(Workflow("w", []), start_at=datetime(2030, 1, 1))  # noqa: DTZ001


async def test_until_idle_a_worker_waits_for_time_but_not_for_people(settings: Settings, shop: Shop) -> None:
    """A run that sleeps goes on by itself; one that asks goes on when somebody answers, whoever works then."""
    async with Paigeant(settings, activities=shop.registry) as app:
        sleeps = await app.dispatch(Workflow("w", [Sleep(1.1), "pack"]), {"order": "tea"})
        asks = await app.dispatch(Workflow("v", ["confirm"]), {"order": "tea"})
        async with asyncio.timeout(PATIENCE):
            await app.worker().run(until_idle=True)
        assert await sleeps.status() is RunStatus.COMPLETED
        assert await asks.status() is RunStatus.WAITING


def test_waits_that_make_no_sense_are_refused() -> None:
    """At once, where they are written."""
    with pytest.raises(InvalidDefinition, match="seconds above 0 and below"):
        Sleep(-1)
    with pytest.raises(InvalidDefinition, match="has a default, but no timeout"):
        WaitFor("paid", default=1)
    with pytest.raises(InvalidDefinition, match="name of a signal"):
        WaitFor("")
    assert issubclass(WaitTimeout, NonRetryableError)


@pytest.mark.parametrize("name", ["", " ", "a\nb", "x" * 201, "paigeant.request/q", GRANT_SIGNAL], ids=repr)
async def test_what_is_waited_for_can_be_sent(name: str) -> None:
    """What is no name of a signal is none wherever it is written: nobody waits for what nobody may send."""
    activity = ActivityRegistry()

    @activity.execute(retries=0)
    async def wait(name: str, context: StepContext) -> None:
        await context.wait_for(name)

    with pytest.raises(InvalidDefinition, match="signal"):
        WaitFor(name)
    async with MemoryApp(activity) as app:
        run = await app.dispatch(Workflow("w", ["wait"]), {"name": name})
        with pytest.raises(InputInvalid, match="signal"):
            await run.signal(name, 1)
        await app.drain()
        assert "InvalidDefinition" in str((await run.wait()).error)


async def test_a_step_comes_back_after_a_while_as_often_as_the_policy_lets() -> None:
    """It puts a sleep and itself behind it: that is how a run looks again and again."""
    activity = ActivityRegistry()

    @activity.execute()
    async def look(context: StepContext) -> None:
        context.insert(Sleep(3600), "look")

    async with MemoryApp(activity) as app:
        began = app.clock.now()
        run = await app.dispatch(Workflow("w", ["look"], policy=ItineraryPolicy(max_total=301)))
        await app.drain()
        result = await run.wait()
        assert (app.clock.now() - began) // 3600 == 150
    assert "this would make 303 steps in all, the policy allows 301" in str(result.error)
