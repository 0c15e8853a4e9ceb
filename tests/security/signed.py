"""Workers that take nothing unsigned: their settings and keys, what they do, and bytes that are put before them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from tests.observers import Seen
from tests.patience import PATIENCE

from paigeant import ActivityRegistry, Paigeant, PaigeantMessage, RoutingSlip, Settings, Step
from paigeant.envelope import PlainEnvelope
from paigeant.keyfiles import FileKeys, write_private
from paigeant.keys import Key, KeyRing, Roles
from paigeant.signing import SignedEnvelope
from paigeant.transports import open_transport

__all__ = [
    "FAST",
    "RING",
    "STORE",
    "TRUST",
    "Raw",
    "message",
    "paying",
    "put",
    "required",
    "sealing",
    "serving",
    "trusted",
]

STORE = "sqlite:///runs.db"
"""A file in the folder of the test."""

RING, TRUST = Path("paigeant-keys.json"), Path("trust.json")
FAST: dict[str, Any] = {"sweep_interval": 0.05, "grace": 0.5, "retry_base": 0.0, "deployment": "shop"}


def required(**changes: Any) -> Settings:
    """Settings under which nothing unsigned is taken; one SQLite file unless `changes` say otherwise."""
    return Settings(**{**FAST, "transport_url": STORE, "store_url": STORE, "signing": "require", **changes})


def sealing(key: Key, roles: Roles | None = None, **changes: Any) -> SignedEnvelope:
    """An envelope that signs with `key`, wherever that is trusted."""

    class Source(FileKeys):
        def signer(self) -> tuple[Key, Roles]:
            return key, roles or Roles(("*",), ("*",), True)

    told = {"deployment": "shop", "requires": True, "lifetime": 3600.0, "clock": time.time, **changes}
    return SignedEnvelope(Source(lambda: KeyRing((key,))), **told)


def trusted(*entries: tuple[Key, dict[str, Any]]) -> None:
    """Write the trust file: keys, with what they are for."""
    keys = [{"jwk": key.public, **fields} for key, fields in entries]
    write_private(TRUST, {"version": 1, "keys": keys}, mode=0o644)


def message(message_id: str = "r/pay/do/0", **changes: Any) -> PaigeantMessage:
    """A message for the only step of a run that nobody has dispatched."""
    fields: dict[str, Any] = {
        "message_id": message_id,
        "workflow_id": "r",
        "routing_slip": RoutingSlip((Step("pay", id="pay"),)),
        "payload": {"sum": 5},
        "workflow": "order",
    }
    return PaigeantMessage(**{**fields, **changes})


class Raw:
    """An envelope that sends bytes as they are: what a foreign publisher puts into a topic."""

    limit_bytes = 1 << 30
    seal_bytes = 0
    serves_all = True
    told = "raw"

    def __init__(self) -> None:
        self.wire = b""

    def seal(self, message: PaigeantMessage, topic: str) -> bytes:
        return self.wire

    async def open(self, topic: str, wire: bytes) -> PaigeantMessage:
        return await PlainEnvelope(self.limit_bytes).open(topic, wire)

    def may_send(self, message: PaigeantMessage, topic: str) -> bool:
        return True

    async def may_start(self, message: PaigeantMessage) -> bool:
        return True


async def put(places: dict[str, str], wires: dict[str, bytes], topic: str = "pay") -> None:
    """Publish bytes under ids, past every check."""
    raw = Raw()
    transport = open_transport(
        places["transport_url"], envelope=raw, namespace=places.get("namespace", "paigeant")
    )
    await transport.connect()
    try:
        for message_id, raw.wire in wires.items():
            await transport.publish(topic, message(message_id))
    finally:
        await transport.close()


@contextlib.asynccontextmanager
async def serving(
    settings: Settings, activity: ActivityRegistry, seen: Seen | None = None, **options: Any
) -> AsyncIterator[Paigeant]:
    """An open application with a worker."""
    async with Paigeant(settings, activities=activity, observers=[seen] if seen else []) as app:
        worker = app.worker(**options)
        task = asyncio.create_task(worker.run())
        try:
            yield app
        finally:
            await worker.stop(grace=PATIENCE)
            await task


def paying(calls: list[Any]) -> ActivityRegistry:
    """An activity `pay` that notes its calls."""
    activity = ActivityRegistry()

    @activity.execute(retries=0)
    async def pay(sum: int = 0) -> str:
        calls.append(sum)
        return "paid"

    return activity
