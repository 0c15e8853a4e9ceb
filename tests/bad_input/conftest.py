"""The folder in which every case of bad input is tried: handlers, and a database with runs done and still to do."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from tests.bad_input.bench import HANDLERS, INPUT, OTHER

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
    modules, path, root = set(sys.modules), list(sys.path), logging.getLogger()
    own, level = logging.getLogger("paigeant"), root.level
    Path("handlers.py").write_text(HANDLERS)
    Path("paigeant.db").write_bytes(before)
    yield
    # A command sets up logs and imports handlers for its process, which here is that of all tests.
    lasting = tuple(f"{place}{os.sep}" for place in (sys.prefix, sys.base_prefix, Path(__file__).parents[2]))
    for name in set(sys.modules) - modules:
        file = getattr(sys.modules[name], "__file__", None)
        if file and not file.startswith(lasting):
            del sys.modules[name]
    sys.path[:] = path
    for logger in (root, own):
        logger.handlers[:] = [handler for handler in logger.handlers if not hasattr(handler, "_is_paigeant")]
    own.propagate = True
    root.setLevel(level)
    own.setLevel(logging.NOTSET)
    structlog.reset_defaults()
