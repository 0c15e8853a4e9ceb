"""Transactions in the event loop's own thread: the loop goes on while one waits, in asyncio's loop and in uvloop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import struct
import sys
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, cast

import pytest
import uvloop
from greenlet import getcurrent
from tests.patience import PATIENCE

from paigeant import green, loops
from paigeant.green import Inlet, TooSlow, caught_up, elsewhere, is_green, pause, until_ready
from paigeant.lane import Driver, Lane, Tx
from paigeant.loops import EventLoop

LOOPS: list[EventLoop] = ["asyncio", "uvloop"]


class Closing:
    """A connection of which nobody asks more than to be closed."""

    is_closed = False

    def close(self) -> None:
        self.is_closed = True


class Place:
    """A lane whose transactions only count themselves."""

    def __init__(self) -> None:
        self.begun = self.done = 0
        self.connection = Closing()
        self.lane = Lane(
            "place", lambda: cast(Any, self.connection), guard=contextlib.nullcontext(), begin=self._begin
        )

    @contextlib.contextmanager
    def _begin(self, connection: object, durable: bool) -> Iterator[Tx]:
        self.begun += 1
        yield Tx(cast(Driver, None))
        self.done += 1


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Callable[[Callable[[Place], Coroutine[Any, Any, None]]], None]:
    """Runs a test with a place in one of the loops."""

    def run(test: Callable[[Place], Coroutine[Any, Any, None]]) -> None:
        async def main() -> None:
            async with asyncio.timeout(PATIENCE):
                place = Place()
                await test(place)
                await place.lane.stop()
                assert place.connection.is_closed == bool(place.begun)

        loops.run(main(), request.param)

    return run


Run = Callable[[Callable[[Place], Coroutine[Any, Any, None]]], None]


def one(work: Callable[[], Any]) -> Callable[[Tx, Sequence[Any]], list[Any]]:
    """A handler that does the same for each request."""
    return lambda tx, requests: [work() for _ in requests]


def as_asked(tx: Tx, requests: Sequence[int]) -> list[int]:
    """A handler that gives back what it is asked."""
    return list(requests)


def test_the_loop_goes_on_while_a_transaction_blocks_elsewhere(run: Run) -> None:
    """What blocks is done in another thread; the loop has its turns meanwhile."""

    async def test(place: Place) -> None:
        released = threading.Event()
        asked = place.lane.submit(one(lambda: elsewhere(lambda: released.wait(PATIENCE))), None)
        await asyncio.sleep(0.01)
        assert not asked.done()
        released.set()
        assert await asked

    run(test)


def test_what_is_done_elsewhere_has_begun_when_the_loop_goes_on(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever computes then, without a pause, doesn't put it off."""
    # On a machine with much else to do: the loop waits for the thread, and that isn't interrupted before it blocks.
    monkeypatch.setattr(green, "_BEGIN_SECONDS", PATIENCE)
    interval = sys.getswitchinterval()

    async def test(place: Place) -> None:
        begun, released = threading.Event(), threading.Event()

        def block() -> bool:
            begun.set()
            return released.wait(PATIENCE)

        asked = place.lane.submit(one(lambda: elsewhere(block)), None)
        await asyncio.sleep(0)
        assert begun.is_set()
        released.set()
        assert await asked

    sys.setswitchinterval(PATIENCE)
    try:
        run(test)
    finally:
        sys.setswitchinterval(interval)


def test_what_comes_meanwhile_shares_the_next_transaction(run: Run) -> None:
    """Fifty requests are one transaction, and each gets its own result."""

    async def test(place: Place) -> None:
        released = threading.Event()
        first = place.lane.submit(one(lambda: elsewhere(lambda: released.wait(PATIENCE))), None)
        await asyncio.sleep(0.01)
        others = [place.lane.submit(as_asked, number) for number in range(50)]
        released.set()
        assert await first
        assert await asyncio.gather(*others) == list(range(50))
        assert place.done == 2

    run(test)


def test_a_lane_for_which_few_are_waiting_rests_so_that_more_may_come(run: Run) -> None:
    """What is asked for just after a transaction shares the next one with what was asked for during it."""

    async def test(place: Place) -> None:
        released = threading.Event()
        first = place.lane.submit(one(lambda: elsewhere(lambda: released.wait(PATIENCE))), None)
        await asyncio.sleep(0.02)
        second = place.lane.submit(as_asked, 2)
        released.set()
        assert await first
        await asyncio.sleep(0)
        third = place.lane.submit(as_asked, 3)
        assert [await second, await third] == [2, 3]
        assert place.done == 2

    run(test)


def test_it_waits_for_a_socket_to_be_read_and_to_have_room(run: Run) -> None:
    """It wakes when there is something to read, or room to write, and says which."""

    async def test(place: Place) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with ours, theirs:
            reading = place.lane.submit(one(lambda: (until_ready(ours.fileno()), ours.recv(9))), None)
            await asyncio.sleep(0.01)
            assert not reading.done()
            theirs.sendall(b"word")
            assert await reading == (True, b"word")
            assert await place.lane.submit(one(lambda: until_ready(ours.fileno(), write=True)), None) is False
            theirs.sendall(b"word")
            assert await place.lane.submit(one(lambda: until_ready(ours.fileno())), None) is True

    run(test)


def test_one_greenlet_does_all_transactions_of_a_lane(run: Run) -> None:
    """A new one for each would take memory of the system's each time."""

    async def test(place: Place) -> None:
        done_by = [await place.lane.submit(one(getcurrent), None) for _ in range(3)]
        assert len(set(done_by)) == 1
        with pytest.raises(ZeroDivisionError):
            await place.lane.submit(one(lambda: 1 / 0), None)
        assert await place.lane.submit(one(getcurrent), None) is done_by[0]

    run(test)


def test_a_lane_that_is_stopped_has_no_greenlet_that_rests(run: Run) -> None:
    """It would be ended by the garbage collector, in the midst of whatever runs then."""

    async def test(place: Place) -> None:
        greenlet = await place.lane.submit(one(getcurrent), None)
        assert not greenlet.dead
        await place.lane.stop()
        assert greenlet.dead

    run(test)


def test_a_lane_that_rests_keeps_nothing_of_what_it_did(run: Run) -> None:
    """A request may be large, and the next one long in coming."""

    class Request:
        pass

    async def test(place: Place) -> None:
        request = Request()
        known = weakref.ref(request)
        await place.lane.submit(one(is_green), request)
        del request
        await asyncio.sleep(0)
        assert known() is None

    run(test)


@pytest.mark.parametrize("kind", LOOPS)
def test_a_lane_that_nobody_stops_is_gone_with_its_loop(kind: EventLoop) -> None:
    """What it rests in keeps neither it nor its connection."""

    async def leave_one() -> weakref.ref[Lane]:
        place = Place()
        await place.lane.submit(one(is_green), None)
        return weakref.ref(place.lane)

    left = loops.run(leave_one(), kind)
    gc.collect()
    assert left() is None


@pytest.mark.parametrize("kind", LOOPS)
def test_a_lane_goes_where_its_loop_goes(kind: EventLoop) -> None:
    """A loop that opens things in one thread may run in another one from then on."""
    loop = asyncio.new_event_loop() if kind == "asyncio" else uvloop.new_event_loop()

    async def opened() -> Place:
        place = Place()
        await place.lane.submit(one(is_green), None)
        return place

    async def used(place: Place) -> bool:
        async with asyncio.timeout(PATIENCE):
            done = await place.lane.submit(one(is_green), None)
            await place.lane.stop()
        return cast(bool, done)

    place = loop.run_until_complete(opened())
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(loop.run_until_complete, used(place)).result(PATIENCE) is True
    loop.close()


def test_what_cuts_tidying_up_off_ends_no_lane(run: Run) -> None:
    """A Ctrl-C may come there, too: what was done is told, and the next transaction is done."""

    async def test(place: Place) -> None:
        def cut_off(*_: object) -> None:
            raise KeyboardInterrupt

        place.lane._tidy = cut_off
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        told = place.lane.submit(as_asked, 1)
        with contextlib.suppress(KeyboardInterrupt):
            place.lane._next_if_idle()
        assert await told == 1
        place.lane._tidy = lambda *_: None
        assert await place.lane.submit(as_asked, 2) == 2

    run(test)


def test_an_inlet_stays_with_the_loop_between_two_transactions(run: Run) -> None:
    """What comes meanwhile, which nobody wants to read then, doesn't keep the loop busy and is there later."""

    async def test(place: Place) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        inlet = Inlet()

        def read() -> bytes:
            inlet.until_readable(ours.fileno())
            return ours.recv(9)

        with ours, theirs:
            for word in (b"one", b"two"):
                reading = place.lane.submit(one(read), None)
                await asyncio.sleep(0.01)
                assert not reading.done()
                theirs.sendall(word)
                assert await reading == word
                assert inlet.wire == ours.fileno()
            theirs.sendall(b"unasked")
            async with asyncio.timeout(PATIENCE):
                while inlet.wire is not None:  # noqa: ASYNC110  # else the loop is told over and over
                    await asyncio.sleep(0)
            assert await place.lane.submit(one(read), None) == b"unasked"
            await place.lane.submit(one(inlet.leave), None)
            assert inlet.wire is None

    run(test)


def test_an_inlet_of_a_broken_connection_tells_of_its_end(run: Run) -> None:
    """libuv watches a socket no more that has had an error: what comes behind that, the end, would never be told."""

    async def test(place: Place) -> None:
        inlet = Inlet()
        with socket.create_server(("127.0.0.1", 0)) as server:
            ours = socket.create_connection(server.getsockname())
            theirs, _ = server.accept()

        def read() -> bytes:
            inlet.until_readable(ours.fileno())
            return ours.recv(9)

        def broken() -> bytes:
            with pytest.raises(ConnectionResetError):
                read()
            return read()

        with ours, theirs:
            theirs.sendall(b"word")
            assert await place.lane.submit(one(read), None) == b"word"
            reading = place.lane.submit(one(broken), None)
            await asyncio.sleep(0.01)
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            theirs.close()  # with a reset
            assert await reading == b""
            assert await place.lane.submit(one(read), None) == b""

    run(test)


def test_an_inlet_leaves_the_loop_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is called of a loop within a transaction finds the loop's own stack gone: uvloop ends the process."""
    called: list[str] = []

    def told(name: str, does: Callable[..., Any], *given: Any) -> Any:
        assert not is_green(), name
        called.append(name)
        return does(*given)

    async def main() -> None:
        loop, place, inlet = asyncio.get_running_loop(), Place(), Inlet()
        for name in ("add_reader", "remove_reader"):
            monkeypatch.setattr(loop, name, partial(told, name, getattr(loop, name)))
        ours, theirs = socket.socketpair()

        def read_and_leave() -> None:
            inlet.until_readable(ours.fileno())
            inlet.leave()
            inlet.until_readable(ours.fileno())
            inlet.leave()
            assert called[-1] == "add_reader"
            caught_up()  # as before the socket is closed
            assert called[-1] == "remove_reader"

        with ours, theirs:
            theirs.sendall(b"word")
            async with asyncio.timeout(PATIENCE):
                await place.lane.submit(one(read_and_leave), None)
                await place.lane.stop()

    loops.run(main(), "asyncio")
    assert called == ["add_reader", "remove_reader"] * 2


def test_an_inlet_goes_over_to_another_socket(run: Run) -> None:
    """A new connection has another one. One that is gone is an error, and nobody is left to wait for it."""

    async def test(place: Place) -> None:
        inlet = Inlet()

        def read(ours: socket.socket) -> bytes:
            inlet.until_readable(ours.fileno())
            return ours.recv(9)

        with contextlib.ExitStack() as stack:
            pairs = [socket.socketpair() for _ in range(2)]
            for ours, theirs in pairs:
                stack.enter_context(ours)
                stack.enter_context(theirs)
                theirs.sendall(b"word")
                assert await place.lane.submit(one(partial(read, ours)), None) == b"word"
                assert inlet.wire == ours.fileno()
            inlet.leave()
            gone, _ = pairs[1]
            gone.close()
            with pytest.raises((OSError, ValueError)):
                await place.lane.submit(one(partial(read, gone)), None)
            assert inlet.wire is None

    run(test)


def test_it_sleeps_without_keeping_the_loop(run: Run) -> None:
    """A transaction that waits before its next try lets the loop go on."""

    async def test(place: Place) -> None:
        slept = place.lane.submit(one(lambda: pause(1.0)), None)
        for _ in range(4):
            await asyncio.sleep(0)
            assert not slept.done()
        await slept

    run(test)


def test_an_error_elsewhere_is_that_of_its_request(run: Run) -> None:
    """Nothing is committed, and the lane works on."""

    async def test(place: Place) -> None:
        with pytest.raises(ValueError, match="invalid literal"):
            await place.lane.submit(one(lambda: elsewhere(lambda: int("x"))), None)
        assert (place.begun, place.done) == (1, 0)
        assert await place.lane.submit(one(is_green), None) is True

    run(test)


def test_a_socket_that_is_gone_is_an_error_of_its_request(run: Run) -> None:
    """It can't be waited for, and whoever tries isn't left to wait for ever."""

    async def test(place: Place) -> None:
        ours, theirs = socket.socketpair()
        number = ours.fileno()
        ours.close()
        theirs.close()
        with pytest.raises((OSError, ValueError)):
            await place.lane.submit(one(lambda: until_ready(number)), None)
        with pytest.raises((OSError, ValueError)):
            await place.lane.submit(one(lambda: until_ready(-1)), None)
        assert await place.lane.submit(one(is_green), None) is True

    run(test)


def test_a_listener_that_fails_does_not_end_the_lane(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged, and what the transaction still waits for is waited for."""

    async def test(place: Place) -> None:
        def fail(_: object) -> None:
            raise ValueError("a listener")

        def ringing(tx: Tx, requests: Sequence[None]) -> list[None]:
            tx.rings.add("a name")
            return [None] * len(requests)

        place.lane._heard = fail
        place.lane._tidy = lambda *_: pause(0.01)
        await place.lane.submit(ringing, None)
        assert "what waited for a transaction failed" in caplog.text
        place.lane._heard = lambda _: None
        assert await place.lane.submit(one(is_green), None) is True

    run(test)


def test_what_is_too_slow_is_done_anew_in_another_thread(run: Run) -> None:
    """The first try is undone."""

    async def test(place: Place) -> None:
        def slow() -> int:
            if is_green():
                raise TooSlow
            return threading.get_ident()

        assert await place.lane.submit(one(slow), None) != threading.get_ident()
        assert (place.begun, place.done) == (2, 1)

    run(test)


def test_two_lanes_wait_side_by_side(run: Run) -> None:
    """Each has its own thread for what blocks."""

    async def test(place: Place) -> None:
        other = Place()
        met = threading.Barrier(2)
        meet = one(lambda: elsewhere(lambda: met.wait(PATIENCE)))
        met_by = await asyncio.gather(place.lane.submit(meet, None), other.lane.submit(meet, None))
        assert sorted(met_by) == [0, 1]
        await other.lane.stop()

    run(test)


def test_a_loop_that_is_closed_in_the_middle_leaves_nothing_that_waits() -> None:
    """The thread ends its work and has nobody to tell."""
    released, ended = threading.Event(), threading.Event()

    def block() -> None:
        released.wait(PATIENCE)
        ended.set()

    async def leave() -> None:
        Place().lane.submit(one(lambda: elsewhere(block)), None)
        await asyncio.sleep(0.01)

    loops.run(leave())
    released.set()
    assert ended.wait(PATIENCE)


def test_outside_of_a_lane_it_waits_like_anybody() -> None:
    """The same calls block where no event loop would have to wait."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"word")
        assert until_ready(ours.fileno()) is True
        assert ours.recv(9) == b"word"
        assert until_ready(ours.fileno(), write=True) is False
        theirs.sendall(b"word")
        Inlet().until_readable(ours.fileno())
        assert ours.recv(9) == b"word"
    assert elsewhere(threading.get_ident) == threading.get_ident()
    pause(0.001)
    assert not is_green()


@pytest.mark.parametrize("kind", LOOPS)
def test_what_is_tidied_up_without_an_end_is_cut_off(kind: EventLoop) -> None:
    """A server that falls silent right behind a commit holds up neither the answer nor the end of a lane."""
    ours, theirs = socket.socketpair()
    cuts: list[object] = []

    def cut(connection: object) -> None:
        cuts.append(connection)
        theirs.send(b"x")

    def silent() -> None:
        until_ready(ours.fileno())

    async def main() -> None:
        place = Place()
        lane = Lane(
            "silent",
            lambda: cast(Any, place.connection),
            guard=contextlib.nullcontext(),
            begin=place._begin,
            tidy=lambda *_: silent(),
            limit=0.2,
            cut=cut,
        )
        async with asyncio.timeout(PATIENCE):
            assert await lane.submit(as_asked, 1) == 1
            await lane.stop()
        assert cuts == [place.connection]
        assert place.connection.is_closed

    with ours, theirs:
        loops.run(main(), kind)
