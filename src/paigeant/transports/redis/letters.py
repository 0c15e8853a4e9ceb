"""Dead letters that nothing else keeps: a hash of JSON, by the ids of the messages."""

from __future__ import annotations

import base64
import json

from paigeant.store import DeadLetter
from paigeant.transports.redis.streams import Streams

__all__ = ["Letters"]

_FIELDS = ("id", "topic", "reason", "detail", "attempts", "workflow_id", "step")


class Letters:
    """The dead letters of a namespace. Raises what redis-py raises."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams

    async def keep(self, letter: DeadLetter) -> None:
        """Doing it twice is harmless."""
        key = self._streams.letters_key
        await self._streams.servers.ask(key, "HSETNX", key, letter.id, _written(letter))

    async def all(self) -> list[DeadLetter]:
        """By id."""
        key = self._streams.letters_key
        values = await self._streams.servers.ask(key, "HVALS", key)
        return sorted(map(_read, values), key=lambda letter: letter.id)


def _written(letter: DeadLetter) -> bytes:
    values = {name: getattr(letter, name) for name in _FIELDS}
    return json.dumps(values | {"body": base64.b64encode(letter.body).decode()}).encode()


def _read(text: bytes) -> DeadLetter:
    values = json.loads(text)
    return DeadLetter(**values | {"body": base64.b64decode(values["body"])})
