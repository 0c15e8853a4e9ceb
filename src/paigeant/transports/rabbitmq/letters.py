"""Dead letters in RabbitMQ's own queue: what it took out of a topic itself, and what has no store to be kept in."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from paigeant.envelope import split
from paigeant.errors import MessageInvalid
from paigeant.message import decode
from paigeant.store import DeadLetter
from paigeant.transports.rabbitmq.frames import Outgoing
from paigeant.transports.rabbitmq.headers import ATTEMPTS, count, last_death, words
from paigeant.transports.rabbitmq.line import Delivery
from paigeant.transports.rabbitmq.queues import Queues

__all__ = ["packed", "unpacked"]

_REASON, _DETAIL, _TOPIC = "paigeant-reason", "paigeant-detail", "paigeant-topic"
_REASON_BYTES, _DETAIL_BYTES = 256, 2048
"""What is kept of them. RabbitMQ ends a connection on which properties are longer than a frame may be, of which the
smallest that it can be set to has 4,096 bytes."""


def packed(letter: DeadLetter) -> Outgoing:
    """A letter as it goes into that queue."""
    headers: dict[str, Any] = {
        _REASON: _cut(letter.reason, _REASON_BYTES),
        _DETAIL: _cut(letter.detail, _DETAIL_BYTES),
        _TOPIC: letter.topic,
        ATTEMPTS: letter.attempts,
    }
    return Outgoing(letter.id, letter.body, headers)


def unpacked(delivery: Delivery, queues: Queues, used: Collection[str]) -> DeadLetter:
    """The letter that came out of that queue; `used` are the topics among which it looks for long names."""
    headers = delivery.headers
    try:
        message_id = decode(
            split(delivery.body, len(delivery.body))[1], limit_bytes=len(delivery.body)
        ).message_id
    except MessageInvalid:
        message_id = delivery.property_id
    if _REASON in headers:
        topic, reason, detail = (words(headers, name) for name in (_TOPIC, _REASON, _DETAIL))
        attempts = count(headers, ATTEMPTS)
        return DeadLetter.about(message_id, topic, reason, detail, delivery.body, attempts)
    death = last_death(headers)
    queue, reason = words(death, "queue"), words(death, "reason", "unknown")
    detail = f"RabbitMQ took it out of the queue '{queue}': {reason}"
    attempts = queues.delivery_limit + 1 if queues.delivery_limit is not None else 0
    topic = queues.topic_of(queue, used)
    return DeadLetter.about(message_id, topic, reason, detail, delivery.body, attempts)


def _cut(text: str, most_bytes: int) -> str:
    """As much of it as can be sent."""
    return text.encode(errors="replace")[:most_bytes].decode(errors="ignore")
