"""Each end of a run, and all that people ask of one, is told to observers, at the instant at which it was recorded."""

from __future__ import annotations

from tests.observers import Seen

from paigeant import ActivityRegistry, Paigeant, Settings, StepContext, WaitFor, Workflow
from paigeant.testing import MemoryApp

activity = ActivityRegistry()


@activity.execute()
async def book() -> str:
    """It can be undone."""
    return "seat"


@activity.compensate("book")
async def cancel_booking(output: str) -> None:
    """Undoes it."""


@activity.execute(retries=0)
async def break_down() -> None:
    """It fails."""
    raise RuntimeError("no steam")


@activity.execute(retries=0)
async def confirm(ctx: StepContext) -> bool:
    """It asks somebody."""
    return await ctx.approve("Go on?")


async def test_a_run_that_is_cancelled_with_nothing_to_undo_has_ended() -> None:
    """The operator's process tells it."""
    told = Seen()
    async with MemoryApp(activity, observers=[told]) as app:
        run = await app.dispatch(Workflow("w", ["book"]))
        await run.cancel("not wanted")
        await app.drain()
    assert told.names("run.") == ["run.dispatched", "run.cancelled"]
    assert [event.error for event in told.events if event.name == "run.cancelled"] == ["not wanted"]


async def test_a_run_that_is_turned_round_is_told_before_it_has_ended() -> None:
    """First that it is being cancelled, and when all is undone that it is."""
    told = Seen()
    async with MemoryApp(activity, observers=[told]) as app:
        run = await app.dispatch(Workflow("w", ["book", WaitFor("paid")]))
        await app.drain()
        await run.cancel("not wanted")
        await app.drain()
    assert told.names("run.") == ["run.dispatched", "run.cancelling", "run.cancelled"]


async def test_a_retry_is_told() -> None:
    """Between the two ends of the run."""
    told = Seen()
    async with MemoryApp(activity, observers=[told]) as app:
        run = await app.dispatch(Workflow("w", ["break_down"]))
        await app.drain()
        await run.retry()
        await app.drain()
    assert told.names("run.") == ["run.dispatched", "run.failed", "run.retried", "run.failed"]


async def test_a_run_that_a_sweep_ends_is_told_to_have_failed() -> None:
    """When there was nothing to undo; it has expired before."""
    told = Seen()
    async with MemoryApp(activity, observers=[told]) as app:
        await app.dispatch(Workflow("w", [WaitFor("paid")], deadline=60.0))
        await app.drain()
        app.clock.advance(61)
        await app.drain()
    assert told.names("run.") == ["run.dispatched", "run.expired", "run.failed"]


async def test_signals_and_requests_are_told() -> None:
    """A signal that comes, a request that is made once however often its step goes on, and its answer, once."""
    told = Seen()
    async with MemoryApp(activity, observers=[told]) as app:
        run = await app.dispatch(Workflow("w", [WaitFor("paid"), "confirm"]))
        await app.drain()
        await run.signal("paid", 12, sender="ada")
        await app.drain()
        [request] = await app.requests()
        for _ in range(2):
            await app.answer(request.id, False, sender="ada")
        await app.drain()
    assert told.names("signal.", "request.") == ["signal.received", "request.opened", "request.denied"]
    signal, opened, denied = (
        event for event in told.events if event.name.startswith(("signal.", "request."))
    )
    assert signal.more == {"signal": "paid", "by": "ada"}
    assert (opened.step, opened.attempt, opened.more["request"]) == ("confirm", 1, request.id)
    assert (denied.step, denied.more["by"]) == ("confirm", "ada")


async def test_events_of_what_was_recorded_stand_in_its_order_by_their_instants() -> None:
    """Whatever process tells them: `at` never goes back from one to what follows from it."""
    told = Seen()
    settings = Settings(retry_base=0.01)
    async with Paigeant(settings, activities=activity, observers=[told]) as app:
        await app.dispatch(Workflow("w", ["book", "break_down"]))
        await app.worker().run(until_idle=True)
    instants = [event.at for event in told.events if event.name.startswith(("run.", "step."))]
    assert None not in instants
    assert instants == sorted(instant for instant in instants if instant is not None)
