"""Bodies of 50 MB that wait in a broker: refused with their reason, never run, never piled up in a worker's memory."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from tests.integration.processes import Command, call
from tests.patience import PATIENCE
from tests.security.signed import STORE, paying, put, serving
from tests.services import RabbitServer

from paigeant import RunStatus, Settings, Workflow
from paigeant.errors import MessageTooLarge

MEBIBYTE = 1024 * 1024
LARGE = 50 * MEBIBYTE
COUNT = 8

GROWS = {"sqlite": 300, "postgres": 60, "redis": 200, "rabbitmq": 40}
"""How much more memory a worker may ever take for them, in MiB; together they have 400.

Postgres sends the beginning of such a body alone. SQLite does, too, but copies the row, within this process, to say who
holds it. Redis sends what there is, one or two at a time, and it is copied out of what was received. RabbitMQ sends as
many at the same time as were asked for, in small frames, of which no more than the beginning is kept.
"""

HANDLERS = """
from pathlib import Path
from paigeant import ActivityRegistry, Workflow
activity = ActivityRegistry()

@activity.execute(retries=0)
async def pay(sum: int = 0) -> str:
    with Path("calls").open("a") as calls:
        calls.write(f"{sum}\\n")
    return "paid"

order = Workflow("order", ["pay"])
"""


def memory(pid: int) -> tuple[float, float]:
    """The memory of a process that is in use now, and the most that ever was, in MiB."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    now, most = (int(lines[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))
    return now, most


@pytest.mark.slow
def test_large_bodies_are_refused_in_flat_memory(
    places: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is a dead letter `too_large` with a bounded body, none is run, and the worker never holds two of them."""
    Path("handlers.py").write_text(HANDLERS)
    Path("input.json").write_text('{"sum": 1}')
    told: dict[str, Any] = {**places, "signing": "require", "deployment": "shop", "concurrency": 8}
    for name, value in told.items():
        monkeypatch.setenv(f"PAIGEANT_{name.upper()}", str(value))
    assert call("keys", "generate").returncode == 0
    assert (
        call("dispatch", "order", "input.json", "--handlers", "handlers.py", "--id", "good").returncode == 0
    )
    asyncio.run(put(places, {f"large{number}/pay/do/0": b"[" * LARGE for number in range(COUNT)}))
    with Command("run", "handlers.py") as worker:
        worker.until("worker.started")
        before = memory(worker.process.pid)
        awaited = ["run.completed", *["delivery.rejected"] * COUNT]
        while awaited:  # in any order: it takes several messages at once
            line = worker.until(lambda line: line["event"] in awaited)
            awaited.remove(line["event"])
            assert line.get("reason", "too_large") == "too_large"
        after = memory(worker.process.pid)
    letters = json.loads(call("dead-letters", "list", "--json").stdout)
    assert [letter["reason"] for letter in letters] == ["too_large"] * COUNT
    assert all("has 52,428,800 bytes" in letter["detail"] for letter in letters)
    assert Path("calls").read_text() == "1\n"
    kind = (
        places["transport_url"]
        .partition(":")[0]
        .replace("amqp", "rabbitmq")
        .replace("postgresql", "postgres")
    )
    assert after[1] - before[1] < GROWS[kind], (before, after)
    assert after[0] - before[0] < 2.5 * LARGE / MEBIBYTE, (before, after)


async def test_rabbitmq_refuses_what_is_larger_than_it_allows() -> None:
    """With a `max_message_size` of its own it takes no such body, and what is sent after that is done."""
    calls: list[int] = []
    with RabbitServer(lines=[f"max_message_size = {16 * MEBIBYTE}"]) as server:
        places = {"transport_url": server.url, "store_url": STORE, "signing": "off"}
        with pytest.raises(MessageTooLarge, match="the limit is 16,777,216"):
            await put(places, {"large/pay/do/0": b"[" * LARGE})
        async with serving(Settings(**places), paying(calls)) as app:
            run = await app.dispatch(Workflow("order", ["pay"]), {"sum": 1})
            assert (await run.wait(PATIENCE)).status is RunStatus.COMPLETED
            assert await app.store.list_dead_letters() == []
    assert calls == [1]
