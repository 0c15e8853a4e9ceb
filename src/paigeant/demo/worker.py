"""A worker process of the demonstration: `python -m paigeant.demo.worker ORDERS`, started by `play.py`.

It works until its standard input ends. That happens when `play.py` closes it, and also when `play.py` is gone, however
that came about: no worker is left behind.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic_ai.models import Model

from paigeant import loops
from paigeant.app import Paigeant
from paigeant.demo import offline
from paigeant.demo.journal import Hold, Journal
from paigeant.demo.pipeline import TOPIC, activities
from paigeant.settings import Settings

__all__ = ["Orders", "main", "models"]


@dataclass(frozen=True, slots=True)
class Orders:
    """What a worker process is told: the database, the journal with its pace and hold, the model (None: offline)."""

    url: str
    journal: str
    pace: float
    hold: Hold | None
    model: str | None

    def packed(self) -> str:
        """The orders as one argument of a command line."""
        return json.dumps(asdict(self))

    @classmethod
    def unpacked(cls, text: str) -> Orders:
        """The orders that were packed so."""
        told = json.loads(text)
        hold = told.pop("hold")
        return cls(**told, hold=None if hold is None else Hold(**hold))


def models(name: str | None) -> str | Mapping[str, Model]:
    """The model of that name, or the offline ones."""
    return name or offline.models()


async def _work(orders: Orders) -> None:
    journal = Journal(Path(orders.journal), pace=orders.pace, hold=orders.hold)
    settings = Settings(transport_url=orders.url, store_url=orders.url)
    async with Paigeant(settings) as app:
        worker = app.worker(activities(models(orders.model), journal), topics=[TOPIC])
        loop = asyncio.get_running_loop()
        stopping: list[asyncio.Task[None]] = []

        def stop() -> None:
            stopping.append(loop.create_task(worker.stop(grace=2.0)))

        def wait_for_the_end() -> None:
            sys.stdin.buffer.read()
            loop.call_soon_threadsafe(stop)

        threading.Thread(target=wait_for_the_end, daemon=True).start()
        await worker.run()


def main() -> None:
    """Work as ordered."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    loops.run(_work(Orders.unpacked(sys.argv[1])))
    sys.stdout.flush()
    os._exit(0)  # the thread that reads standard input would not let the interpreter end


if __name__ == "__main__":
    main()
