"""Dead letters are rows of the store, whatever moved the message; requeueing one wakes its step and no more."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.integration.processes import call
from tests.integration.workers import working
from tests.patience import PATIENCE

from paigeant import ActivityRegistry, NonRetryableError, Paigeant, Settings, Workflow
from paigeant.errors import InputInvalid, RunNotFound, TransportUnavailable
from paigeant.message import MessageId, PaigeantMessage, encode
from paigeant.slip import Phase, RoutingSlip, RunStatus
from paigeant.store import DeadLetter
from paigeant.testing import MemoryApp
from paigeant.transport import BODY_KEPT_BYTES

HERE, THERE = "sqlite:///here.db", "sqlite:///there.db"


class Work:
    """Activities that count what they did."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.activity = ActivityRegistry()

        @self.activity.execute(topic="partner.a")
        async def a(text: str = "") -> str:
            self.done.append("a")
            return "a"

        @self.activity.compensate("a")
        async def undo_a(output: str) -> None:
            self.done.append("undo a")

        @self.activity.execute(retries=0)
        async def b(fails: bool = False) -> str:
            self.done.append("b")
            if fails:
                raise NonRetryableError("no")
            return "b"

    flow = Workflow("flow", ["a", "b"])


async def buried(app: Paigeant, *, body: bytes | None = None, id: str | None = None) -> DeadLetter:
    """A letter for the step of run `r` that waits now."""
    [key] = await app.store.open_steps("r")
    detail = await app.store.load_run("r")
    row = next(row for row in detail.steps if row.key == key)
    message_id = id or str(MessageId(*key, row.epoch))
    if body is None:
        body = encode(await app.forwarder.renewed(_message(message_id)))
    letter = DeadLetter.about(message_id, row.topic, "not_json", "not_json: x", body, 1)
    await app.store.bury(letter)
    found = await app.store.load_dead_letter(message_id)
    assert found is not None
    return found


def _message(message_id: str) -> PaigeantMessage:
    return PaigeantMessage(message_id, "r", RoutingSlip())


async def test_a_letter_does_nothing_to_a_terminal() -> None:
    """Whoever may write to a broker chooses its bytes, and an operator looks at them."""
    async with Paigeant(Settings()) as app:
        letter = DeadLetter.about("m", "a", "not_json", "not_json: x", b"one\n\x1b]0;owned\x07 \xc2\x9b2J", 1)
        await app.store.bury(letter)
    done = await asyncio.to_thread(call, "dead-letters", "show", "m")
    assert "one\n\\x1b]0;owned\\x07 \\u009b2J" in done.stdout
    assert not set(done.stdout) & set("\x1b\x07\x9b")


@pytest.mark.parametrize("transport", [HERE, THERE], ids=["in the store's database", "elsewhere"])
@pytest.mark.parametrize(
    "body",
    [None, b"", b"not json", b"\xff\x00", b'{"spec_version": "9.0"}', b"x" * (BODY_KEPT_BYTES + 5)],
    ids=["whole", "empty", "no json", "no text", "another version", "cut"],
)
async def test_a_letter_is_requeued_whatever_its_body_is(body: bytes | None, transport: str) -> None:
    """The rows make the message; the letter only says which step is meant, and by its id where its body can't."""
    work = Work()
    async with Paigeant(
        Settings(transport_url=transport, store_url=HERE, grace=1000), activities=work.activity
    ) as app:
        run = await app.dispatch(Work.flow, {"text": "x" * 100_000}, workflow_id="r")
        letter = await buried(app, body=body)
        assert len(letter.body) <= BODY_KEPT_BYTES
        async with asyncio.timeout(PATIENCE):
            async for message in app.transport.subscribe("partner.a"):  # lost
                await app.transport.ack(message.message_id)
                break
        async with working(app.worker()):
            assert await app.control.requeue(letter) == "r"
            assert (await run.wait(PATIENCE)).status is RunStatus.COMPLETED
        assert work.done == ["a", "b"]
        assert await app.store.list_dead_letters() == []


async def test_a_letter_of_a_routed_topic_goes_to_its_broker() -> None:
    """The topic tells where, as for any other message."""
    work = Work()
    here = Settings(transport_url=HERE, store_url=HERE, routes={"partner.*": THERE}, grace=1000)
    there = Settings(transport_url=THERE, store_url=HERE, routes={"*": HERE}, grace=1000)
    async with (
        Paigeant(here, activities=work.activity) as app,
        Paigeant(there, activities=work.activity) as partner,
    ):
        run = await app.dispatch(Work.flow, workflow_id="r")
        async with asyncio.timeout(PATIENCE):
            async for message in partner.transport.subscribe("partner.a"):  # lost
                await partner.transport.ack(message.message_id)
                break
        await app.control.requeue(await buried(app, body=b"cut"))
        async with working(app.worker(topics=["b"])), working(partner.worker(topics=["partner.a"])):
            assert (await run.wait(PATIENCE)).status is RunStatus.COMPLETED
        assert work.done == ["a", "b"]


async def test_a_letter_that_is_refused_at_once_again_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker may be quicker with the next letter about the same message than the first one is forgotten."""
    async with Paigeant(
        Settings(transport_url=THERE, store_url=HERE, grace=1000), activities=Work().activity
    ) as app:
        await app.dispatch(Work.flow, workflow_id="r")
        letter = await buried(app)

        async def refused(topic: str, message: PaigeantMessage, *, delay: float = 0) -> None:
            await app.store.bury(replace(letter, reason="wrong_role"))

        monkeypatch.setattr(app.transport, "publish", refused)
        await app.control.requeue(letter)
        assert [(kept.id, kept.reason) for kept in await app.store.list_dead_letters()] == [
            (letter.id, "wrong_role")
        ]


async def test_a_letter_that_cannot_be_sent_stays() -> None:
    """Where the broker is out of reach the letter is there for another try."""
    work = Work()
    here = Settings(transport_url=HERE, store_url=HERE, routes={"partner.*": "sqlite:///no/folder.db"})
    async with Paigeant(here, activities=work.activity) as app:
        await app.dispatch(Work.flow, workflow_id="r")
        letter = await buried(app)
        with pytest.raises(TransportUnavailable, match="can't be published now; the letter stays"):
            await app.control.requeue(letter)
        assert [found.id for found in await app.store.list_dead_letters()] == [letter.id]


async def test_a_letter_that_names_no_step_is_not_requeued() -> None:
    """Neither by its body nor by its id: there is nothing to wake, and the letter stays."""
    async with MemoryApp(Work().activity) as app:
        for id in ("m-1", "r/a/neither/0", "r/a/do/x"):
            with pytest.raises(InputInvalid, match="its body is no message"):
                await app.control.requeue(DeadLetter(id, "t", "x", "x", b"no"))
        with pytest.raises(RunNotFound):
            await app.control.requeue(DeadLetter("elsewhere/a/do/0", "t", "x", "x", b"no"))


moves = st.lists(st.sampled_from(["requeue", "twice", "drain", "stale"]), min_size=1, max_size=8)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(moves=moves, fails=st.booleans())
async def test_requeueing_often_has_one_effect(moves: list[str], fails: bool) -> None:
    """However often and whenever letters are requeued, fresh or stale ones, each step is done, and undone, once."""
    work = Work()
    async with MemoryApp(work.activity) as app:
        await app.dispatch(Work.flow, {"fails": fails}, workflow_id="r")
        stale = DeadLetter("r/a/do/0", "partner.a", "x", "x", b"cut")
        for move in moves:
            match move:
                case "drain":
                    await app.drain()
                case "stale":
                    await _try(app, stale)
                case _ if await app.store.open_steps("r"):
                    letter = await buried(app)
                    for _ in range(2 if move == "twice" else 1):
                        await _try(app, letter)
        await app.drain()
        assert work.done == (["a", "b", "undo a"] if fails else ["a", "b"])


async def _try(app: Paigeant, letter: DeadLetter) -> None:
    try:
        await app.control.requeue(letter)
    except InputInvalid as exc:
        assert "doesn't wait any more" in str(exc)  # noqa: PT017  # it need not be raised


async def test_an_undo_is_requeued_like_a_step() -> None:
    """The phase is part of what a letter says: the undo that waits is woken, the step of its name isn't done again."""
    work = Work()
    async with Paigeant(
        Settings(transport_url=HERE, store_url=HERE, grace=1000), activities=work.activity
    ) as app:
        run = await app.dispatch(Work.flow, workflow_id="r")
        await app.worker(topics=["partner.a"]).run(until_idle=True)
        await run.cancel()
        async with asyncio.timeout(PATIENCE):
            async for message in app.transport.subscribe("partner.a"):  # lost
                await app.transport.ack(message.message_id)
                break
        letter = await buried(app, body=b"cut")
        assert letter.id.startswith(f"r/a/{Phase.UNDO}/")
        with pytest.raises(InputInvalid, match="doesn't wait any more"):
            await app.control.requeue(DeadLetter("r/a/do/0", "t", "x", "x", b"cut"))
        await app.control.requeue(letter)
        await app.worker().run(until_idle=True)
        assert await run.status() is RunStatus.CANCELLED
        assert work.done == ["a", "undo a"]
