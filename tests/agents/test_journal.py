"""The journal: what is recorded of a step, and what a later attempt makes of it."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
from typing import Any

import pytest
from pydantic_core import from_json
from tests.agents.steps import Crash, Step
from tests.patience import PATIENCE

from paigeant import ActivityRegistry, RunStatus, StepContext, Workflow, codec
from paigeant.errors import InvalidDefinition, OutcomeUnknown, OutsideStep
from paigeant.parking import Parked, Parking
from paigeant.place import Done, Place, Unit, current_place, effect_key, readable
from paigeant.testing import ManualClock, MemoryApp


def here() -> Place:
    """The current place, of which a test knows that there is one."""
    place = current_place()
    assert place is not None
    return place


async def do(name: str, value: bytes = b"1", **options: Any) -> Done:
    """Do a unit that gives `value`."""

    async def produce() -> bytes:
        return value

    return await here().do(here().name(name), Unit(name, **options), produce)


async def test_a_unit_is_done_once() -> None:
    """The attempt after a crash gets the record, and one that finds it all recorded writes nothing."""
    step = Step()
    with pytest.raises(Crash):
        await step.attempt(lambda: do("u", b"1"), crash_after=1)
    assert await step.attempt(lambda: do("u", b"2")) == Done(b"1", executed=False)
    assert step.units == ["u"]


async def test_a_fresh_step_reads_nothing_and_another_one_reads_once() -> None:
    """The first attempt of a step reads no record, a later one all of them in one go, however many ask at once."""
    step = Step()

    async def work() -> list[Done]:
        return list(await asyncio.gather(*(do(f"u{number}") for number in range(5))))

    await step.attempt(work, first=True)
    assert step.read == 0
    assert not any(done.executed for done in await step.attempt(work))
    assert step.read == 1


async def test_who_gives_up_waiting_for_records_disturbs_neither_them_nor_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of two who wait for a record that is being made one is cancelled; the other one has it all the same."""
    step, may_end = Step(), asyncio.Event()
    save_unit = step.save_unit

    async def slowly(*unit: Any) -> bytes:
        await may_end.wait()
        return await save_unit(*unit)

    monkeypatch.setattr(step, "save_unit", slowly)

    async def work() -> list[str]:
        here().journal.save_soon("u", b"1")
        gives_up, waits = (asyncio.ensure_future(here().settled()) for _ in range(2))
        await asyncio.sleep(0)
        gives_up.cancel()
        await asyncio.wait([gives_up])
        assert gives_up.cancelled()
        assert not waits.done()
        may_end.set()
        await waits
        return step.units

    assert await step.attempt(work, first=True) == ["u"]


async def test_who_asks_late_waits_for_nothing_that_has_been_made() -> None:
    """As who asks in another thread may do: until the worker's event loop comes to that, all may be recorded."""
    step = Step()

    async def work() -> None:
        journal = here().journal
        journal.save_soon("u", b"1")
        await here().settled()
        async with asyncio.timeout(PATIENCE):
            await journal._wait_until_written(beside=False)
            await journal._wait_until_written(beside=True)

    await step.attempt(work, first=True)
    assert step.units == ["u"]


async def test_what_another_worker_recorded_first_stands() -> None:
    """Two attempts that run at the same time go on with the same value, whoever was later."""
    step = Step()
    both = asyncio.Barrier(2)

    def work(value: bytes) -> Any:
        async def produce() -> bytes:
            await both.wait()
            return value

        return lambda: here().do("u", Unit("u"), produce)

    one, other = await asyncio.gather(step.attempt(work(b"1")), step.attempt(work(b"2")))
    assert one.value == other.value
    assert one.executed
    assert other.executed


async def test_the_units_within_a_unit_are_its_own() -> None:
    """The same name within two units, and beside them, are three units; each counts on by itself."""
    step = Step()

    async def outer() -> bytes:
        await do("u")
        await do("u")
        return b"1"

    async def work() -> None:
        await do("u")
        for _ in range(2):
            await here().do(here().name("outer"), Unit("outer"), outer)

    await step.attempt(work)
    assert len(set(step.units)) == len(step.units) == 7
    assert [name.partition("/")[2] or name for name in step.units] == [
        *("u", "u", "u#2", "outer", "u", "u#2", "outer#2"),
    ]


async def test_a_unit_that_is_recorded_hides_what_was_done_within() -> None:
    """Units within a recorded one are not asked for, and those of the next one are not taken for them."""
    step = Step()
    said: list[str] = []

    def outer(text: str) -> Any:
        async def produce() -> bytes:
            async def inner() -> bytes:
                said.append(text)
                return text.encode()

            return (await here().do(here().name("inner"), Unit("inner"), inner)).value

        return produce

    async def work() -> list[bytes]:
        return [
            (await here().do(here().name("outer"), Unit("outer"), outer(text))).value for text in ("1", "2")
        ]

    for crash_after in (2, 1, 1):
        with pytest.raises(Crash):
            await step.attempt(work, crash_after=crash_after)
    assert (await step.attempt(work), said) == ([b"1", b"2"], ["1", "2"])


async def test_a_name_that_looks_counted_is_kept_apart() -> None:
    """Whoever numbers names by hand isn't given the record of a name that was counted on, nor the other way round."""
    step = Step()

    async def work() -> list[Any]:
        names = ("u#2", "u", "u", "u#2", "u#2#1", "u#", "#2")
        return [(await do(name, b"%d" % value)).value for value, name in enumerate(names)]

    assert await step.attempt(work) == [b"%d" % value for value in range(7)]
    assert len(set(step.units)) == 7


async def test_a_name_of_any_length_is_kept_apart() -> None:
    """Very long names are cut where a store's index would not hold them, and stay different."""
    step = Step()

    async def work() -> None:
        await do("u" * 1000 + "1")
        await do("u" * 1000 + "2")

    await step.attempt(work)
    assert len(set(step.units)) == 2
    assert all(len(name) <= 300 for name in step.units)


# -- effect keys


async def test_an_effect_key_is_the_same_for_a_repeated_call() -> None:
    """It names the step's effects outside of units, and each unit's own within, in every attempt."""
    step = Step()
    keys: list[str] = []

    async def produce() -> bytes:
        keys.append(effect_key())
        raise Crash

    async def work() -> Any:
        keys.append(effect_key())
        return await here().do(here().name("u"), Unit("u"), produce)

    for _ in range(2):
        with pytest.raises(Crash):
            await step.attempt(work)
    assert keys[:2] == keys[2:]
    assert keys[0] == "run:step"
    assert keys[1].startswith("run:step:")


async def test_there_is_no_effect_key_outside_of_steps() -> None:
    """Nothing would be the same at a repetition; the error says how a thread of one's own comes to know the step."""
    with pytest.raises(OutsideStep, match="copy_context"):
        effect_key()


async def test_threads_know_their_step() -> None:
    """A plain function that is an activity, and a thread with a copy of the context, have the step's key."""
    activity = ActivityRegistry()
    keys: list[str] = []

    @activity.execute()
    def plain(context: StepContext) -> None:
        keys.extend((context.idempotency_key, effect_key()))
        thread = threading.Thread(
            target=contextvars.copy_context().run, args=(lambda: keys.append(effect_key()),)
        )
        thread.start()
        thread.join()

    async with MemoryApp(activity) as app:
        await app.dispatch(Workflow("w", ["plain"]), workflow_id="r")
        await app.drain()
    assert keys == ["r:plain"] * 3


async def test_what_is_done_once_has_a_key_of_its_own() -> None:
    """In what `ctx.once` does the key is that unit's, and what is once done within it is part of it."""
    activity = ActivityRegistry()
    keys: list[str] = []

    @activity.execute(retries=1)
    async def act(context: StepContext) -> int:
        async def outer() -> int:
            keys.append(effect_key())
            first: int = await context.once("inner", lambda: keys.append(effect_key()) or context.attempt)  # type: ignore[func-returns-value]  # None, so it goes on
            if context.attempt == 1:
                raise ConnectionError
            return first

        return int(await context.once("outer", outer))

    async with MemoryApp(activity) as app:
        run = await app.dispatch(Workflow("w", ["act"]), workflow_id="r")
        await app.drain()
        assert (await run.wait()).output == 1
    assert len(keys) == 3
    assert keys[0] == keys[2] != keys[1]


# -- tries


async def test_a_unit_is_tried_again_as_it_says() -> None:
    """A failed try is followed by another one, until `delay` gives none; what is recorded within it is kept."""
    step = Step()
    tries: list[int] = []
    inner: list[int] = []

    async def produce() -> bytes:
        async def once() -> bytes:
            inner.append(1)
            return b"1"

        tries.append(1)
        await here().do(here().name("inner"), Unit("inner"), once)
        if len(tries) < 3:
            raise ConnectionError
        return b"2"

    def work(most: int) -> Any:
        unit = Unit("u", delay=lambda number, _: 0.0 if number < most else None)
        return lambda: here().do("u", unit, produce)

    with pytest.raises(ConnectionError):
        await step.attempt(work(2))
    assert await step.attempt(work(2)) == Done(b"2", executed=True)
    assert (len(tries), len(inner)) == (3, 1)


async def test_a_try_that_takes_too_long_is_an_error_that_says_so() -> None:
    """`timeout` bounds a try; a TimeoutError of the work's own stays what it is."""

    async def never() -> bytes:
        await asyncio.Event().wait()
        raise AssertionError

    async def other() -> bytes:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match=r"the thing took longer than 0\.01 s"):
        await Step().attempt(lambda: here().do("u", Unit("the thing", timeout=0.01), never))
    with pytest.raises(TimeoutError, match="its own"):
        await Step().attempt(lambda: here().do("u", Unit("the thing", timeout=10), other))


async def test_what_may_be_done_once_at_most_is_not_begun_again() -> None:
    """That it begins is recorded first: when the outcome is lost, a person is asked, and told the effect key."""
    step = Step()
    keys: list[str] = []

    async def produce() -> bytes:
        keys.append(effect_key())
        raise Crash

    def work() -> Any:
        return here().do("u", Unit("the payment", at_most_once=True), produce)

    with pytest.raises(Crash):
        await step.attempt(work)
    for _ in range(2):
        with pytest.raises(Parked):
            await step.attempt(work)
    asked = from_json((await step.asked()).asked)
    assert asked["effect_key"] == keys[0]
    assert "how it ended was never recorded" in asked["question"]
    await step.answer(b'{"approved":false,"reason":"it was paid"}')
    refused = pytest.raises(OutcomeUnknown, match=rf"it was begun.*\(it was paid\).*{keys[0]}")
    for _ in range(2):
        with refused:
            await step.attempt(work)
    assert len(keys) == 1


async def test_what_a_person_allows_is_begun_once_more() -> None:
    """Under the same effect key; when that outcome is lost as well, they are asked again."""
    step = Step()
    keys: list[str] = []

    async def produce() -> bytes:
        keys.append(effect_key())
        if len(keys) < 3:
            raise Crash
        return b"7"

    def work() -> Any:
        return here().do("u", Unit("the payment", at_most_once=True), produce)

    for count in (1, 2):
        with pytest.raises(Crash):
            await step.attempt(work)
        with pytest.raises(Parked):
            await step.attempt(work)
        await step.answer(b'{"approved":true}')
        assert len(keys) == count
    assert await step.attempt(work) == Done(b"7", executed=True)
    assert await step.attempt(work) == Done(b"7", executed=False)
    assert len(set(keys)) == 1


async def test_what_was_done_once_at_most_and_recorded_is_replayed() -> None:
    """Its record is as good as any other's."""
    step = Step()
    with pytest.raises(Crash):
        await step.attempt(lambda: do("u", b"7", at_most_once=True), crash_after=2)
    assert await step.attempt(lambda: do("u", b"8", at_most_once=True)) == Done(b"7", executed=False)


async def test_only_one_of_two_workers_begins_what_may_be_done_once_at_most() -> None:
    """Of two attempts at the same time one does it, and the other asks."""
    step = Step()
    done: list[int] = []

    async def produce() -> bytes:
        done.append(1)
        await asyncio.sleep(0)
        return b"1"

    def work() -> Any:
        return here().do("u", Unit("u", at_most_once=True), produce)

    answers = await asyncio.gather(step.attempt(work), step.attempt(work), return_exceptions=True)
    assert {type(answer) for answer in answers} == {Done, Parked}
    assert len(done) == 1


async def test_what_may_be_done_once_at_most_and_fails_goes_to_a_person() -> None:
    """Nobody can tell whether it took effect: the question says what was raised."""
    step = Step()

    async def produce() -> bytes:
        raise ConnectionError("reset by peer")

    with pytest.raises(Parked):
        await step.attempt(lambda: here().do("u", Unit("u", at_most_once=True), produce))
    assert "it failed: ConnectionError: reset by peer" in from_json((await step.asked()).asked)["question"]


# -- waits beside other work


async def waits() -> Any:
    """Wait for a signal that never comes."""
    return await here().signal("never", "never", timeout=None, what="it")


async def test_a_short_sleep_isn_t_left_for_another_wait() -> None:
    """Nobody would wake the step when it is over: what waits without an end beside it has no instant."""
    activity = ActivityRegistry()

    @activity.execute(retries=0)
    async def race(context: StepContext) -> str:
        go, nap = asyncio.ensure_future(context.wait_for("go")), asyncio.ensure_future(context.sleep(0.2))
        done, _ = await asyncio.wait({go, nap}, return_when=asyncio.FIRST_COMPLETED)
        go.cancel()
        return "go" if go in done else "nap"

    async with MemoryApp(activity) as app:
        run = await app.dispatch(Workflow("w", ["race"]))
        await app.drain()
        assert (await run.wait(PATIENCE)).output == "nap"


async def test_a_step_isn_t_left_between_two_tries_nor_before_a_record_is_made() -> None:
    """Both belong to the unit: it is over when it is recorded."""
    saving = asyncio.Event()

    class Slow(Step):
        async def save_unit(self, key: Any, name: str, value: bytes) -> bytes:
            await asyncio.sleep(0.1)
            saving.set()
            return await super().save_unit(key, name, value)

    step = Slow()
    tries: list[int] = []

    async def produce() -> bytes:
        tries.append(1)
        if len(tries) < 2:
            raise ConnectionError
        return b"1"

    async def work() -> None:
        unit = Unit("u", delay=lambda number, _: 0.1)
        await asyncio.gather(waits(), here().do("u", unit, produce))

    with pytest.raises(Parked):
        await step.attempt(work)
    assert len(tries) == 2
    assert saving.is_set()
    assert "u" in step.units


async def test_a_step_isn_t_left_before_all_of_its_waits_have_begun() -> None:
    """However slow the store is: nothing would wake the step for a wait that began later."""

    class Slow(Step):
        async def take_signal(self, key: Any, unit: str, name: str, **options: Any) -> bytes | None:
            if name == "slow":
                await asyncio.sleep(0.1)
            return await super().take_signal(key, unit, name, **options)

    waited_for: list[tuple[str, ...]] = []

    async def work() -> None:
        parking = here().journal.parking
        try:
            await asyncio.gather(
                waits(), here().signal("slow", "slow", timeout=9.0, what="it"), return_exceptions=True
            )
        finally:
            assert parking.until is not None
            waited_for.append(parking.waits_for)

    await Slow().attempt(work)
    assert waited_for == [("never", "slow")]


async def test_what_comes_in_the_last_moment_counts(clock: ManualClock) -> None:
    """Whoever sent it was told that it will be heard: it is looked for once more when the time is up."""

    class Late(Step):
        is_late = False

        async def take_signal(self, key: Any, unit: str, name: str, **options: Any) -> bytes | None:
            taken = await super().take_signal(key, unit, name, **options)
            if taken is None and self.is_late:
                await self.store.record_signal(key.workflow_id, name, b"7")
            return taken

    step = Late(clock)
    await step.start()

    def work() -> Any:
        return here().signal("u", "paid", timeout=5, what="it")

    with pytest.raises(Parked):
        await step.attempt(work)
    clock.advance(5)
    step.is_late = True
    assert (await step.attempt(work))["value"] == 7


async def test_what_a_left_attempt_goes_on_with_begins_no_unit() -> None:
    """`gather` leaves the others running: the next attempt would do the same at the same time."""
    step = Step()
    left = asyncio.Event()
    others: list[asyncio.Task[Done]] = []

    async def beside() -> Done:
        await left.wait()
        return await do("u")

    async def work() -> None:
        others.append(asyncio.create_task(beside()))
        await asyncio.gather(waits(), others[0])

    with pytest.raises(Parked):
        await step.attempt(work)
    left.set()
    with pytest.raises(Parked):
        await others[0]
    assert step.units == []


async def test_what_a_failed_attempt_has_left_running_begins_no_unit() -> None:
    """`gather` leaves the others running: what they did would have an effect after all was undone."""
    activity = ActivityRegistry()
    over = asyncio.Event()
    others: list[asyncio.Task[Any]] = []
    did: list[str] = []

    async def later(context: StepContext) -> None:
        await over.wait()
        await context.once("pay", lambda: did.append("paid"))

    async def fails() -> None:
        raise ConnectionError("no answer")

    @activity.execute(retries=1)
    async def both(context: StepContext) -> None:
        others.extend(asyncio.create_task(one) for one in (later(context), context.wait_for("never")))
        await asyncio.gather(fails(), *others)

    @activity.execute()
    async def book() -> str:
        return "booked"

    @activity.compensate("book")
    async def unbook() -> None:
        did.append("unbooked")

    async with MemoryApp(activity) as app:
        run = await app.dispatch(Workflow("w", ["book", "both"]))
        await app.drain()
        assert (await run.wait(PATIENCE)).status is RunStatus.COMPENSATED
        over.set()
        ends = await asyncio.gather(*others, return_exceptions=True)
    assert [type(end) for end in ends] == [Parked] * 4
    assert did == ["unbooked"]


async def waits_for_both(activity: ActivityRegistry) -> None:
    """Its activity `both` gives what the signals `one` and `two` say, once these are there."""
    async with MemoryApp(activity) as app:
        run = await app.dispatch(Workflow("w", ["both"]))
        await app.drain()
        assert await run.status() is RunStatus.WAITING
        await run.signal("one", 1)
        await run.signal("two", 2)
        await app.drain()
        assert (await run.wait(PATIENCE)).output == [1, 2]


async def test_an_activity_that_catches_its_leaving_is_left_all_the_same() -> None:
    """What it makes of waits that are not over is no result."""
    activity = ActivityRegistry()

    @activity.execute(retries=0)
    async def both(context: StepContext) -> list[Any]:
        found = await asyncio.gather(context.wait_for("one"), context.wait_for("two"), return_exceptions=True)
        return [value for value in found if not isinstance(value, BaseException)]

    await waits_for_both(activity)


async def test_a_unit_that_catches_its_leaving_is_not_done() -> None:
    """What it makes of waits that are not over is recorded no more than what an activity makes of them."""
    activity = ActivityRegistry()

    @activity.execute(retries=0)
    async def both(context: StepContext) -> Any:
        async def wait() -> list[Any]:
            waits = (context.wait_for("one"), context.wait_for("two"))
            found = await asyncio.gather(*waits, return_exceptions=True)
            return [value for value in found if not isinstance(value, BaseException)]

        return await context.once("wait", wait)

    await waits_for_both(activity)


async def test_a_unit_of_an_attempt_that_is_over_is_not_done_without_its_parts() -> None:
    """One that goes on beside a failure is recorded, unless it catches that it may begin nothing more."""
    activity = ActivityRegistry()
    over = asyncio.Event()
    others: list[asyncio.Task[Any]] = []
    did: list[str] = []

    @activity.execute(retries=1)
    async def both(context: StepContext) -> list[Any]:
        async def whole() -> str:
            await over.wait()
            did.append("whole")
            return "whole"

        async def parts() -> list[Any]:
            await over.wait()
            found = await asyncio.gather(context.once("part", lambda: 1), return_exceptions=True)
            return [value for value in found if not isinstance(value, BaseException)]

        if context.attempt == 1:
            others.extend(
                asyncio.create_task(work)
                for work in (context.once("whole", whole), context.once("parts", parts))
            )
            await asyncio.sleep(0)
            raise ConnectionError
        over.set()
        await asyncio.gather(*others, return_exceptions=True)
        return [await context.once("whole", whole), await context.once("parts", parts)]

    async with MemoryApp(activity) as app:
        run = await app.dispatch(Workflow("w", ["both"]))
        await app.drain()
        assert (await run.wait(PATIENCE)).output == ["whole", [1]]
    assert did == ["whole"]


async def test_waits_of_which_only_the_first_is_awaited_are_no_errors() -> None:
    """`asyncio.wait` hands nobody the end of a wait: leaving it says nothing of errors that were never retrieved."""
    said: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context))
    activity = ActivityRegistry()

    @activity.execute(retries=0)
    async def race(context: StepContext) -> str:
        signal = asyncio.create_task(context.wait_for("go"))
        sleep = asyncio.create_task(context.sleep(3600))
        done, _ = await asyncio.wait({signal, sleep}, return_when=asyncio.FIRST_COMPLETED)
        sleep.cancel()
        return "go" if signal in done else "slept"

    async with MemoryApp(activity) as app:
        run = await app.dispatch(Workflow("w", ["race"]))
        await app.drain(advance=False)
        await run.signal("go", 1)
        await app.drain(advance=False)
        assert (await run.wait(PATIENCE)).output == "go"
    gc.collect()
    assert said == []


async def test_an_error_beside_a_wait_that_is_left_is_told() -> None:
    """It is one that was overlooked, whatever else has ended with it."""
    said: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context["exception"]))
    parking = Parking()

    async def both() -> None:
        try:
            await parking.wait(("go",), None)
        except Parked as left:
            raise BaseExceptionGroup("both", [left, ValueError("a word")]) from None

    task = asyncio.create_task(both())
    await asyncio.sleep(0)
    parking.leave()
    await asyncio.wait([task])
    del task
    gc.collect()
    [error] = said
    assert error.subgroup(ValueError)


async def test_attempts_that_are_left_at_once_have_the_tasks_gone_through_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There are as many tasks as attempts at least: two thousand took two seconds and a half for that."""
    looks: list[object] = []
    all_tasks = asyncio.all_tasks

    def counted(loop: asyncio.AbstractEventLoop) -> set[asyncio.Task[Any]]:
        looks.append(loop)
        return all_tasks(loop)

    parkings = [Parking() for _ in range(20)]
    for _ in range(2):  # turns
        waits = [asyncio.create_task(parking.wait(("go",), None)) for parking in parkings]
        await asyncio.sleep(0)
        with monkeypatch.context() as patch:
            patch.setattr(asyncio, "all_tasks", counted)
            for parking in parkings:
                parking._end_waits()
            ends = await asyncio.gather(*waits, return_exceptions=True)
        assert [type(end) for end in ends] == [Parked] * 20
    assert len(looks) == 2


async def test_nothing_waits_inside_of_what_may_be_done_once_at_most() -> None:
    """Behind the wait it would have to be begun again: that is said at once, and to nobody as a question."""

    async def produce() -> bytes:
        return codec.dump(await here().signal("s", "go", timeout=None, what="go"))

    with pytest.raises(InvalidDefinition, match="may be done at most once: behind the wait"):
        await Step().attempt(lambda: here().do("u", Unit("u", at_most_once=True), produce))


async def test_people_can_read_what_a_unit_is_within() -> None:
    """Units within units are named by digests; where the outer one is recorded its name is told."""
    step = Step()

    async def outer() -> bytes:
        async def middle() -> bytes:
            await do("inner")
            return b"1"

        await here().do(here().name("middle"), Unit("the middle one"), middle)
        return b"2"

    await step.attempt(lambda: here().do("outer", Unit("the outer one"), outer))
    assert sorted(readable(step.units).values()) == ["outer", "outer / middle", "outer / middle / inner"]
    [inner] = [name for name in step.units if name.endswith("/inner")]
    assert list(readable([inner, "a/b"]).values()) == [f"{inner[:8]}... / inner", "a/b"]


def begun(label: str) -> bytes:
    """The record that a unit which may be done at most once has begun."""
    return codec.dump({"by": "lost", "unit": label, "about": {}})


async def test_a_unit_that_is_lost_again_and_again_is_decided_on_each_time() -> None:
    """Each decision stands for one loss. Records about decisions and failures are no units that have begun."""
    step = Step()
    await step.start()
    allowed = codec.dump({"value": {"approved": True}, "by": "", "at": 1.0})
    for name, value in {
        "u!begun": begun("it"),
        "u!begun!decision!token": b'"a"',
        "u!begun!decision": allowed,
        "u!begun#2": begun("it"),
        "u!begun#2!failed": b'"it failed"',
        "u!begun#2!decision!token": b'"b"',
        "u!begun#2!decision": allowed,
        "u!begun#3": begun("it"),
        "done": b"1",
        "done!begun": begun("what is done"),
    }.items():
        await step.store.save_unit(step.key, name, value)
    with pytest.raises(Parked):
        await step.attempt(lambda: here().decide_lost())
    [request] = await step.store.list_requests()
    assert request.name == "it again"
    await step.store.answer_request(request.id, codec.dump({"approved": True}))
    await step.attempt(lambda: here().decide_lost())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ('agent__t.call_tool:look(agent:1,1,"x!begun#y")', b'{"value":{"result":1,"kind":"tool_return"}}'),
        ('agent__t.call_tool:look(agent:1,1,"x!begun")', b'{"value":1}'),
        ("question a!begun", b'{"value":{"value":1},"by":"","at":1.0}'),
        ("question a!begun#2", b'"text"'),
        ("x!begun#2!decision", b'{"value":{"approved":true},"by":"","at":1.0}'),
        ("x!begun#99999999999999999999", begun("x")),
    ],
)
async def test_names_that_look_like_lost_units_are_none(name: str, value: bytes) -> None:
    """Call ids, questions and names of signals are in names: a model may write anything there."""
    step = Step()
    await step.start()
    await step.store.save_unit(step.key, name, value)
    await step.attempt(lambda: here().decide_lost())
    assert await step.store.list_requests() == []
