"""The folder in which every case of bad input is tried: handlers, and a database with runs done and still to do."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.bad_input.bench import HANDLERS, INPUT, OTHER
from tests.commands import as_the_process_was

from paigeant import ActivityRegistry, Paigeant, Settings, Workflow


@pytest.fixture(scope="session")
def before(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A database with a run that is done, one that failed and one that waits for a worker."""
    path = tmp_path_factory.mktemp("before") / "paigeant.db"
    asyncio.run(_worked(path))
    return path.read_bytes()


async def _worked(path: Path) -> None:
    activity = ActivityRegistry()

    @activity.execute(retries=0)
    async def reserve(sku: str, quantity: int = 1) -> dict[str, object]:
        return {"sku": sku, "quantity": quantity}

    @activity.execute(retries=0)
    async def ship(reserve: dict[str, object]) -> str:
        return f"shipped {reserve['sku']}"

    @activity.execute(retries=0)
    async def weigh(kilos: float = 0) -> float:
        return 1 / kilos

    order, weighing = Workflow("order", ["reserve", "ship"]), Workflow("weighing", ["weigh"])
    url = f"sqlite:///{path}"
    async with Paigeant(Settings(transport_url=url, store_url=url), activities=activity) as app:
        await app.dispatch(order, INPUT, workflow_id="completed")
        await app.dispatch(weighing, {}, workflow_id="failed")
        await app.worker().run(until_idle=True)
        await app.store.save_variable("completed", "customer", "Ada")
        await app.dispatch(order, INPUT, workflow_id=OTHER)


@pytest.fixture(autouse=True)
def _folder(before: bytes, _elsewhere: None) -> Iterator[None]:
    Path("handlers.py").write_text(HANDLERS)
    Path("paigeant.db").write_bytes(before)
    with as_the_process_was():
        yield
