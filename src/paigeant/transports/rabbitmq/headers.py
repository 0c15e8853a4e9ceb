"""Reading the headers of messages. Whoever may write to a queue chooses them, so nothing here raises."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pamqp.base import Frame
from pamqp.commands import Basic
from pamqp.commands import Channel as Channels
from pamqp.header import ContentHeader

from paigeant.counts import is_count

__all__ = ["ATTEMPTS", "count", "instant", "last_death", "tolerate", "words"]

ATTEMPTS = "paigeant-attempts"
"""The header that says of a copy how often the message was delivered before."""

Headers = Mapping[str, Any]


def count(headers: Headers, name: str, default: int = 0) -> int:
    """How often something happened; `default` for what is no whole number from 0 to `LARGEST_COUNT`."""
    found = headers.get(name)
    return found if isinstance(found, int) and is_count(found, 0) else default


def instant(headers: Headers, name: str) -> float | None:
    """Seconds since 1970-01-01 UTC, written in milliseconds; None for what is no finite number."""
    found = headers.get(name)
    if not isinstance(found, (int, float)) or isinstance(found, bool):
        return None
    try:
        seconds = found / 1000
    except OverflowError:
        return None
    return seconds if math.isfinite(seconds) else None


def words(headers: Headers, name: str, default: str = "") -> str:
    """A text; `default` for what is none."""
    found = headers.get(name)
    return found if isinstance(found, str) else default


def last_death(headers: Headers) -> Headers:
    """Where and why RabbitMQ took the message out of a queue, as `queue` and `reason`; empty when it doesn't say."""
    deaths = headers.get("x-death")
    last = deaths[0] if isinstance(deaths, list) and deaths else None
    return last if isinstance(last, dict) else {}


_PLAIN_BYTES = 12
"""What stands in front of the properties: the class, the weight and the size of the body."""

_unmarshal = ContentHeader.unmarshal
_unmarshal_method = Frame.unmarshal


def tolerate() -> None:
    """Have pamqp take properties, and addresses, that it can't read for none, in this process.

    Else a text that isn't UTF-8 in them, or a timestamp behind all dates, ends the connection on which it comes, and
    that on which it comes again: whatever waits behind it never comes. A message has any address where a header (CC)
    has RabbitMQ send it to further queues. And RabbitMQ cuts a long reason for closing a channel at any byte.
    """

    def unmarshal(self: ContentHeader, data: bytes) -> None:
        try:
            _unmarshal(self, data)
        except Exception:  # whatever their reader meets
            if len(data) < _PLAIN_BYTES:
                raise
            self.properties = Basic.Properties()

    def unmarshal_deliver(self: Basic.Deliver, data: bytes) -> None:
        try:
            _unmarshal_method(self, data)
        except UnicodeDecodeError:  # exchange and routing key are the last that is read
            self.routing_key = ""

    def unmarshal_close(self: Channels.Close, data: bytes) -> None:
        try:
            _unmarshal_method(self, data)
        except UnicodeDecodeError:
            # Behind the code, and its own length.
            self.reply_text = data[3 : 3 + data[2]].decode(errors="ignore")

    ContentHeader.unmarshal = unmarshal  # type: ignore[method-assign]
    Basic.Deliver.unmarshal = unmarshal_deliver  # type: ignore[method-assign, assignment]
    Channels.Close.unmarshal = unmarshal_close  # type: ignore[method-assign, assignment]
