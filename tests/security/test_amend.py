"""What an operator sends: whoever has the role `amend` is believed by real workers, whoever hasn't is not."""

from __future__ import annotations

import asyncio
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.processes import Command, call
from tests.patience import PATIENCE
from tests.security.signed import TRUST, paying, required, serving, trusted

from paigeant import ActivityRegistry, Paigeant, Settings, Workflow
from paigeant.errors import ConfigurationError
from paigeant.keyfiles import write_private
from paigeant.keys import Key, KeyRing
from paigeant.slip import RunStatus
from paigeant.store import DeadLetter

HANDLERS = """
import pathlib
from paigeant import ActivityRegistry, StepContext

activity = ActivityRegistry()

@activity.execute(retries=0)
async def pay(ctx: StepContext) -> str:
    with open("paid", "a") as paid:
        paid.write(ctx.workflow_id + "\\n")
    if pathlib.Path("broken").exists():
        raise ValueError("broken")
    return "paid"

@activity.execute(retries=0)
async def confirm(ctx: StepContext) -> str:
    return await ctx.ask("which?")
"""
OPERATOR, VISITOR = "operator", "visitor"


@pytest.fixture
def worker(
    ring: KeyRing, postgres_store_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Command]:
    """A worker process, and two who send: one may amend and nothing else, one all but that, for another workflow.

    The visitor's own trust file says that it may all the same, so that its process sends what it likes.
    """
    operator, visitor = Key.generate(now=2.0), Key.generate(now=3.0)
    other = {"dispatch": ["parcel"], "run": ["parcel"]}
    trusted((ring.active, {"dispatch": ["*"], "run": ["*"]}), (operator, {"amend": True}), (visitor, other))
    for name, key in ((OPERATOR, operator), (VISITOR, visitor)):
        write_private(Path(f"{name}.json"), KeyRing((key,)).as_dict())
    lie = {"version": 1, "keys": [{"jwk": visitor.public, "amend": True}]}
    write_private(Path("lie.json"), lie, mode=0o644)
    Path("handlers.py").write_text(HANDLERS)
    told = {
        "handlers": "handlers.py",
        "store_url": postgres_store_url,
        "transport_url": redis_url,
        "namespace": f"amend-{secrets.token_hex(4)}",
        "signing": "require",
        "deployment": "shop",
        "grace": 3600,
        "sweep_interval": 3600,  # no sweep sends what somebody else was to send
    }
    Path("paigeant.yaml").write_text("".join(f"{name}: {value}\n" for name, value in told.items()))
    monkeypatch.setenv("PAIGEANT_TRUST_FILE", str(TRUST))
    with Command("run") as started:
        yield started


def sent(who: str, *args: str, trust: str = str(TRUST)) -> subprocess.CompletedProcess[str]:
    """What a command gave with the keys of `who`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAIGEANT_KEYS_FILE", f"{who}.json")
        patch.setenv("PAIGEANT_TRUST_FILE", trust)
        return call(*args)


def failed_and_asking(worker: Command) -> str:
    """Have run `failed` fail and run `asking` ask; gives the id of the request."""

    async def start() -> None:
        async with Paigeant(Settings()) as app:
            await app.dispatch(Workflow("w", ["pay"]), workflow_id="failed")
            await app.dispatch(Workflow("w", ["confirm", "pay"]), workflow_id="asking")

    async def requests() -> list[str]:
        async with Paigeant(Settings()) as app:
            return [request.id for request in await app.requests()]

    Path("broken").touch()
    asyncio.run(start())
    seen = {worker.until(_is_at_rest)["workflow_id"] for _ in range(2)}
    assert seen == {"failed", "asking"}
    Path("broken").unlink()
    [request] = asyncio.run(requests())
    return request


def _is_at_rest(line: dict[str, Any]) -> bool:
    return line["event"] in ("run.failed", "step.waiting")


def letters() -> list[DeadLetter]:
    """All that are kept."""

    async def read() -> list[DeadLetter]:
        async with Paigeant(Settings()) as app:
            return await app.store.list_dead_letters()

    return asyncio.run(read())


def paid() -> list[str]:
    """The runs whose step was carried out, each time."""
    return sorted(Path("paid").read_text().split())


@pytest.mark.slow
def test_whoever_may_amend_is_believed(worker: Command) -> None:
    """A retry and an answer of an operator who may do nothing else are taken by the worker, and both runs end."""
    request = failed_and_asking(worker)
    assert sent(OPERATOR, "runs", "retry", "failed").returncode == 0
    assert worker.until("run.completed")["workflow_id"] == "failed"
    assert sent(OPERATOR, "requests", "answer", request, '"this"').returncode == 0
    assert worker.until("run.completed")["workflow_id"] == "asking"
    assert paid() == ["asking", "failed", "failed"]
    assert letters() == []


@pytest.mark.slow
def test_whoever_may_not_amend_is_refused(worker: Command) -> None:
    """What it retries, answers and requeues is a dead letter of its own reason; an operator's requeue is taken."""
    request = failed_and_asking(worker)
    for args in (["runs", "retry", "failed"], ["requests", "answer", request, '"this"']):
        assert sent(VISITOR, *args, trust="lie.json").returncode == 0
        assert worker.until("delivery.rejected")["reason"] == "wrong_role"
    first, second = letters()
    assert {first.workflow_id, second.workflow_id} == {"failed", "asking"}
    assert sent(VISITOR, "dead-letters", "requeue", first.id, trust="lie.json").returncode == 0
    assert worker.until("delivery.rejected")["reason"] == "wrong_role"
    assert {(letter.id, letter.reason) for letter in letters()} == {
        (letter.id, "wrong_role") for letter in (first, second)
    }
    assert paid() == ["failed"]
    for letter in (first, second):
        assert sent(OPERATOR, "dead-letters", "requeue", letter.id).returncode == 0
        assert worker.until("run.completed")["workflow_id"] == letter.workflow_id
    assert paid() == ["asking", "failed", "failed"]
    assert letters() == []


async def test_a_letter_that_may_not_be_requeued_stays(ring: KeyRing) -> None:
    """A process that knows that its key has no role for it sends nothing, says so, and forgets nothing."""
    theirs = Key.generate(now=2.0)
    trusted((ring.active, {"dispatch": ["order"]}), (theirs, {"dispatch": ["parcel"]}))
    write_private(Path("theirs.json"), KeyRing((theirs,)).as_dict())
    settings = required(trust_file=str(TRUST))
    async with Paigeant(settings, activities=paying([])) as app:
        await app.dispatch(Workflow("order", ["pay"]), {"sum": 1}, workflow_id="r")
        letter = DeadLetter.about("r/pay/do/0", "pay", "wrong_role", "", b"", 1)
        await app.store.bury(letter)
    async with Paigeant(settings.model_copy(update={"keys_file": "theirs.json"})) as app:
        with pytest.raises(ConfigurationError, match="may not send a message for step 'pay' of run 'r'"):
            await app.control.requeue(letter)
        assert [kept.id for kept in await app.store.list_dead_letters()] == [letter.id]


async def test_whoever_writes_the_store_needs_no_role(ring: KeyRing) -> None:
    """A retry changes rows, and the worker of the topic sends what follows: roles are about messages alone."""
    theirs = Key.generate(now=2.0)
    trusted((ring.active, {"dispatch": ["order"], "run": ["pay"]}), (theirs, {"dispatch": ["parcel"]}))
    write_private(Path("theirs.json"), KeyRing((theirs,)).as_dict())
    activity, tries = ActivityRegistry(), 0

    @activity.execute(retries=0)
    async def pay() -> str:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise ValueError("broken")
        return "paid"

    settings = required(trust_file=str(TRUST))
    async with serving(settings, activity) as app:
        run = await app.dispatch(Workflow("order", ["pay"]), workflow_id="r")
        assert (await run.wait(PATIENCE)).status is RunStatus.FAILED
        async with Paigeant(settings.model_copy(update={"keys_file": "theirs.json"})) as other:
            await other.run("r").retry()
        assert (await run.wait(PATIENCE)).status is RunStatus.COMPLETED
        assert await app.store.list_dead_letters() == []
