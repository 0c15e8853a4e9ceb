"""Keys change while messages are in flight: workers on a broker and a database, and the commands of an operator."""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from tests.integration.processes import Command, call
from tests.patience import PATIENCE

from paigeant import Paigeant, Run, Settings, Workflow
from paigeant.keyfiles import _LOOK_SECONDS
from paigeant.slip import RunStatus

MESSAGES, WORKERS, PLACES = 1000, 2, 4
FIRST, SECOND = 50, 150
"""So many steps each worker begins before it waits for the new key, and for the old one to be revoked."""

HANDLERS = f"""
import asyncio, os, pathlib
from paigeant import ActivityRegistry, StepContext

activity = ActivityRegistry()
begun = 0

def note(*words):
    with open(f"journal-{{os.getpid()}}", "a") as journal:
        journal.write(" ".join(map(str, words)) + "\\n")

async def there(*names):
    while not all(pathlib.Path(name).exists() for name in names):
        await asyncio.sleep(0.02)

@activity.execute(retries=1)
async def pay(ctx: StepContext, n: int) -> int:
    global begun
    begun += 1
    note("begun", n)
    await there(*["rotated"][: begun > {FIRST}], *["revoked"][: begun > {SECOND}])
    if pathlib.Path("revoked").exists() and n % 10 == 0 and ctx.attempt == 1:
        raise ValueError("again")  # what follows is a message that this process signs
    note("paid", n)
    return n

@activity.execute()
async def newer() -> None:
    note("newer")
    pathlib.Path(f"newer-{{os.getpid()}}").touch()
    while len(list(pathlib.Path().glob("newer-*"))) < {WORKERS}:  # each worker does one
        await asyncio.sleep(0.02)
"""


def journals() -> list[list[list[str]]]:
    """What each worker has noted."""
    return [
        [line.split() for line in journal.read_text().splitlines()] for journal in Path().glob("journal-*")
    ]


def noted(what: str) -> list[int]:
    """The numbers noted so, by all workers."""
    return [int(words[1]) for journal in journals() for words in journal if words[0] == what]


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Ask until it is so: other processes tell it by files and rows alone."""
    async with asyncio.timeout(PATIENCE):
        for _ in itertools.count():
            if await holds():
                return
            await asyncio.sleep(0.02)


async def until_begun(count: int) -> None:
    """Wait until so many steps have begun."""

    async def have_begun() -> bool:
        return len(noted("begun")) >= count

    await until(have_begun)
    assert len(noted("begun")) == count


async def keys(*args: str) -> Any:
    """What `paigeant keys` gives with `--json`."""
    done = await asyncio.to_thread(call, "keys", *args, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


async def dispatched(app: Paigeant, step: str, numbers: range) -> list[Run]:
    """Runs of one step, a few started at once."""
    gate = asyncio.Semaphore(20)

    async def start(n: int) -> Run:
        async with gate:
            return await app.dispatch(
                Workflow("w", [step]), {"n": n} if step == "pay" else None, workflow_id=f"{step}-{n}"
            )

    return await asyncio.gather(*map(start, numbers))


@pytest.fixture
def settings(postgres_store_url: str, redis_url: str) -> Settings:
    """What all processes read. Nothing is sent again within the test: what is lost stays lost."""
    Path("handlers.py").write_text(HANDLERS)
    told = {
        "handlers": "handlers.py",
        "store_url": postgres_store_url,
        "transport_url": redis_url,
        "namespace": f"keys-{secrets.token_hex(4)}",
        "signing": "require",
        "deployment": "shop",
        "concurrency": PLACES,
        "retry_base": 0,
        "grace": 3600,
        "sweep_interval": 0.1,
        "log_level": "error",  # nobody reads what the workers say, and a pipe that is full would stop them
    }
    Path("paigeant.yaml").write_text("".join(f"{name}: {value}\n" for name, value in told.items()))
    return Settings()


def touch(name: str) -> None:
    """Open a gate."""
    Path(name).touch()


@pytest.mark.slow
async def test_a_key_is_rotated_then_revoked_under_a_thousand_messages(settings: Settings) -> None:
    """Two worker processes lose nothing that the old key signed until it is revoked; from then on none of that runs.

    It becomes a dead letter with its reason, and the next sweep sends each of those steps anew: all runs end once.
    """
    old = (await keys("generate"))["kid"]
    with Command("run", "--topics", "pay,newer"), Command("run", "--topics", "pay,newer"):
        async with Paigeant(settings) as app:
            await _change_keys(app, old)


async def _change_keys(app: Paigeant, old: str) -> None:
    runs = await dispatched(app, "pay", range(MESSAGES))
    await until_begun(WORKERS * (FIRST + PLACES))

    new = (await keys("rotate"))["kid"]

    async def signs_with_the_new_one() -> bool:
        return new in app.forwarder.envelope.told

    await until(signs_with_the_new_one)
    runs += await dispatched(app, "newer", range(40))
    newer = {f"newer-{n}" for n in range(40)}
    touch("rotated")
    await until_begun(WORKERS * (SECOND + PLACES))
    for journal in journals():
        # All of this was signed with the old key, and taken by a process that had taken what the new one signed.
        assert sum(words[0] == "begun" for words in journal[journal.index(["newer"]) :]) > FIRST
    assert await app.store.list_dead_letters() == []

    async def none_is_lost() -> bool:
        depths = {depth.topic: depth.waiting + depth.taken for depth in await app.transport.topics()}
        return depths["pay"] == MESSAGES - len(noted("begun"))  # what is acked together takes a moment

    await until(none_is_lost)

    await keys("revoke", old)
    held = set(noted("begun"))
    await asyncio.sleep(_LOOK_SECONDS)  # within which every process is to know
    touch("revoked")

    async def all_refused() -> bool:
        return len(set(noted("begun"))) + await app.store.count_dead_letters() >= MESSAGES

    await until(all_refused)
    letters = await app.store.list_dead_letters(limit=MESSAGES)
    refused = {letter.workflow_id for letter in letters}
    # Each worker had one message at hand that it had verified before, and waited for a free place.
    begun = set(noted("begun"))
    assert len(begun - held) <= WORKERS
    assert refused == {run.id for run in runs} - {f"pay-{n}" for n in begun} - newer
    assert {letter.reason for letter in letters} == {"revoked_key"}
    assert all(old in letter.detail for letter in letters)

    with psycopg.connect(app.settings.store_url) as database:  # as if the grace time was over
        due = database.execute("UPDATE step_executions SET wake_at = 0 WHERE status = 'ready'")
    assert due.rowcount >= len(letters)
    async with asyncio.timeout(PATIENCE):
        ends = await asyncio.gather(*(run.wait() for run in runs))
    assert {end.status for end in ends} == {RunStatus.COMPLETED}
    assert [end.output for end in ends[:MESSAGES]] == list(range(MESSAGES))
    assert Counter(noted("paid")) == Counter(range(MESSAGES))
    again = [n for n, times in Counter(noted("begun")).items() if times > 1]
    assert again
    assert set(again) <= set(range(0, MESSAGES, 10))
    assert await app.store.count_dead_letters() == len(letters)
