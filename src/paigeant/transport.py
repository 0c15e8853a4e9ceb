"""Transport: what moves messages, and what each method promises. Adapters live in `transports/`.

A transport only wakes workers up. It may lose, double, delay and reorder messages: the store decides what happened.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from paigeant.values import value

if TYPE_CHECKING:
    from paigeant.message import PaigeantMessage
    from paigeant.store import DeadLetter, Store

__all__ = ["BODY_KEPT_BYTES", "Bury", "Posting", "TopicDepth", "Transport"]

BODY_KEPT_BYTES = 64 * 1024
"""How much of a rejected body a dead letter keeps."""

Bury = Callable[["DeadLetter"], Awaitable[None]]
"""Records a dead letter; returns once it is durable. Doing it twice for one letter is harmless."""


@value
class Posting:
    """A message ready to be sent: where to, its encoded body, and seconds before it may be delivered."""

    topic: str
    message_id: str
    body: bytes
    delay: float = 0.0


@dataclass(frozen=True, slots=True)
class TopicDepth:
    """What waits in a topic: messages not yet taken, those taken and not acked, and the oldest one's age in seconds."""

    topic: str
    waiting: int
    taken: int
    oldest: float | None


@runtime_checkable
class Transport(Protocol):
    """Moves messages from whoever publishes to one of those who subscribe to the topic."""

    async def connect(self) -> None:
        """Open it. Raises TransportUnavailable when that isn't possible, and leaves nothing open then.

        Connecting twice is harmless.
        """
        ...

    async def close(self) -> None:
        """End all subscriptions and give back what was delivered and not acked. Closing twice is harmless."""
        ...

    async def publish(self, topic: str, message: PaigeantMessage, *, delay: float = 0) -> None:
        """Send `message` to one subscriber of `topic`, no earlier than `delay` seconds from now.

        Once this returns, the message is as durable as the transport is. Publishing a message whose id is still there
        adds none, where the transport can tell: it is due at the earlier of the two instants, for whoever asks then.
        Raises TransportUnavailable, MessageTooLarge.
        """
        ...

    def subscribe(self, topic: str, *, prefetch: int = 1) -> AsyncIterator[PaigeantMessage]:
        """The messages of `topic`, for ever, at most `prefetch` of them fetched ahead of the one that is yielded.

        A body that can't be decoded is dead-lettered with its bytes and never ends the iterator. A broken connection
        is opened again. A message that is neither acked nor returned comes back, to this subscriber or another.
        Ending the iteration (`aclose`) gives back what was fetched and not yielded.
        """
        ...

    async def ack(self, message_id: str) -> None:
        """The transport may forget this message. Should the connection break first, it is delivered again.

        Acking what was acked, returned, or has been delivered to somebody else since changes nothing.
        """
        ...

    async def nack(self, message_id: str, *, delay: float = 0) -> None:
        """Give the message back, to be delivered again no earlier than `delay` seconds from now.

        Like an ack it changes nothing for a message that this transport doesn't hold.
        """
        ...

    async def dead_letter(self, message_id: str, reason: str) -> None:
        """Take the message out of its topic for good and keep it as a dead letter with `reason` and its bytes.

        Like an ack it changes nothing for a message that this transport doesn't hold.
        """
        ...

    async def topics(self, known: Collection[str] = ()) -> list[TopicDepth]:
        """The topics that hold messages, by name. One that is left out is taken to be empty: its steps are sent again.

        `known` names topics to look at where a broker can't list its queues; a transport that can ignores it. What
        holds no message is left out, whoever knows it. Raises TransportUnavailable.
        """
        ...

    def joins(self, store: Store) -> bool:
        """Whether it can publish inside the transactions of `store`, because both are one database."""
        ...

    def keeps_rows(self, topic: str) -> bool:
        """Whether messages for `topic` are rows of a database, in which no token may be: it is taken out before."""
        ...

    def bury_with(self, bury: Bury) -> None:
        """Dead letters are recorded with `bury` from now on; before, the transport keeps them itself."""
        ...
