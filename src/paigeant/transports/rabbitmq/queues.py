"""The queues: what they are called, how they are set, and declaring them.

`<namespace>.<topic>` is the queue of a topic, quoted, and a digest where that is too long; what begins with
`<namespace>:` is ours and can't be a topic.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import secrets
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from aio_pika.exceptions import ChannelPreconditionFailed
from aiormq.exceptions import ChannelAccessRefused, ChannelLockedResource
from pamqp.commands import Queue as Methods

from paigeant.clock import Clock
from paigeant.errors import ConfigurationError, TopicUnavailable
from paigeant.transports.rabbitmq.channel import throwaway
from paigeant.transports.rabbitmq.link import place
from paigeant.transports.rabbitmq.wire import Connection
from paigeant.urls import is_namespace

__all__ = ["DELETED_SECONDS", "NAME_BYTES", "Queue", "Queues", "check_rights", "declare"]

NAME_BYTES = 255
"""What AMQP allows for the name of a queue, and for the message_id of a message."""

DELETED_SECONDS = 1.0
"""How long a deleted queue is left alone before it is declared anew. RabbitMQ 3.10 tells its consumers a moment later;
if there is one of the same name again by then, it attaches them to that without a word, and nothing reaches them."""

_RETURNS = 10
"""So often a message goes back to its queue, then a copy takes its place: RabbitMQ 4 drops what came back 20 times."""

_STEPS = (10, 12, 15, 20, 25, 30, 40, 50, 60, 80)
"""Milliseconds that a wait queue holds messages, and ten times these, a hundred times, ...: whole seconds and minutes
are among them, and a delay is at most a third longer than asked for."""

_LONGEST_WAIT = 86_400.0
"""A wait queue holds no message for longer than a day; one that has further to go then takes another round."""

_WAIT_SPAN = 3600.0
_WAIT_SLACK = 600.0
"""Clocks that differ by up to this send no message into a wait queue that expires too soon."""


class Queue(NamedTuple):
    """A queue as it has to be declared, after those that it refers to."""

    name: str
    arguments: Mapping[str, Any]
    needs: tuple[Queue, ...] = ()
    lasts: float = math.inf
    """Seconds for which it is surely there when it has been declared, and after which nobody asks for it."""


class Queues:
    """The queues: their names and their settings, which must be the same wherever they are declared."""

    def __init__(self, namespace: str, queue_type: str, delivery_limit: int | None, *, clock: Clock) -> None:
        if queue_type not in ("quorum", "classic"):
            raise ConfigurationError(f"queue_type is '{queue_type}'; expected quorum or classic")
        if not is_namespace(namespace):
            raise ConfigurationError(
                f"the namespace of RabbitMQ's queues is '{namespace}'; expected up to 100 letters, digits and -_, "
                "and not 'amq', which RabbitMQ keeps for itself"
            )
        if delivery_limit is not None and queue_type == "classic":
            raise ConfigurationError("delivery_limit is for quorum queues; leave it out for classic ones")
        self.namespace = namespace
        self.queue_type = queue_type
        self.delivery_limit = delivery_limit
        self.longest_wait = _LONGEST_WAIT
        """Seconds that a message waits at most before it goes another round."""
        # What is returned on purpose must not end as a dead letter: the limit is for those whose consumers die.
        self.most_returns = _RETURNS if delivery_limit is None else min(_RETURNS, delivery_limit // 2)
        self.dead = Queue(f"{namespace}:dead-letters", {"x-queue-type": queue_type})
        self.names = {self.dead.name}
        """Of those that were asked for, save wait queues: they are many, and vanish by themselves."""
        self._topics: dict[str, Queue] = {}
        self._clock = clock

    def topic(self, topic: str) -> Queue:
        """The queue of a topic. What RabbitMQ itself takes out of it goes to the dead letters."""
        queue = self._topics.get(topic)
        if queue is None:
            arguments = self._dying_to(self.dead, self.queue_type)
            if self.delivery_limit is not None:
                arguments["x-delivery-limit"] = self.delivery_limit
            name = self._name(f"{self.namespace}.", _quoted(topic), f"{self.namespace}:topic.")
            queue = self._topics[topic] = Queue(name, arguments, (self.dead,))
            self.names.add(name)
        return queue

    def wait(self, target: Queue, delay: float) -> Queue:
        """The queue in which messages wait for at least `delay` seconds before they go on to `target`.

        Always a classic queue: wait queues come and go, and with 3.10.8 a quorum queue that was made within the last
        second is dead for good when the broker crashes. A crash may cost a classic queue some of what waits in it, and
        what comes due before the topic's queue has a leader again is lost; the sweeper sends both when they are due.

        It vanishes by itself, at a time that it is given once, so there is a new one for each span of time, which
        outlives the last message sent to it in that span.
        """
        wait_ms = min(_rounded_up(delay), int(self.longest_wait * 1000))
        span = max(_WAIT_SPAN, wait_ms / 1000)
        arguments = self._dying_to(target, "classic") | {
            "x-message-ttl": wait_ms,
            "x-expires": int((span + wait_ms / 1000 + _WAIT_SLACK) * 1000),
        }
        begin = f"{self.namespace}:wait.{wait_ms}.{int(self._clock.now() // span)}."
        return Queue(self._name(begin, target.name, begin), arguments, (target,), span)

    def trial(self) -> Queue:
        """One of its own for `check_rights`, among the wait queues, for which everybody has to have the rights."""
        name = f"{self.namespace}:wait.trial.{secrets.token_hex(8)}"
        return Queue(name, self._dying_to(self.dead, "classic"))

    def topic_of(self, queue: str, used: Collection[str]) -> str:
        """The topic whose queue this is; its name is kept short when it is long, then only `used` ones are found."""
        if queue.startswith(f"{self.namespace}."):
            return unquote(queue.removeprefix(f"{self.namespace}.").replace("+", "%"))
        return next((topic for topic in used if self.topic(topic).name == queue), queue)

    def _dying_to(self, target: Queue, queue_type: str) -> dict[str, Any]:
        # At most once, as RabbitMQ does by default: what gets lost on this way the store has sent again. The strategy
        # at-least-once would need overflow=reject-publish, and quorum queues on both sides.
        return {
            "x-queue-type": queue_type,
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": target.name,
        }

    @staticmethod
    def _name(begin: str, rest: str, begin_of_digest: str) -> str:
        name = begin + rest
        if len(name.encode()) > NAME_BYTES:
            return begin_of_digest + hashlib.sha256(rest.encode()).hexdigest()
        return name


async def declare(connection: Connection, queue: Queue) -> None:
    """Make sure that there are this queue and those that it needs.

    Raises ConfigurationError when it doesn't fit, TopicUnavailable when there are too many.
    """
    for needed in queue.needs:
        await declare(connection, needed)
    with _refused(connection, queue):
        # On a channel of its own: RabbitMQ closes it when the queue doesn't fit, with all that is under way on it.
        async with throwaway(connection) as channel:
            await channel.ask(
                Methods.Declare(queue=queue.name, durable=True, arguments=dict(queue.arguments))
            )


async def check_rights(connection: Connection, trial: Queue) -> None:
    """Raises ConfigurationError for a user who may not have queues from which messages go on, as those of topics do.

    `trial` is declared for that, and gone at once.
    """
    with _refused(connection, trial):
        async with throwaway(connection) as channel:
            await channel.ask(
                Methods.Declare(queue=trial.name, exclusive=True, arguments=dict(trial.arguments))
            )
            await channel.ask(Methods.Delete(queue=trial.name))


@contextlib.contextmanager
def _refused(connection: Connection, queue: Queue) -> Iterator[None]:
    try:
        yield
    except ChannelPreconditionFailed as exc:
        if "queue limit" in str(exc):  # of the virtual host: those that are there go on
            raise TopicUnavailable(
                f"RabbitMQ at {place(connection.url)} takes no more queues: {exc}; raise its limit "
                "(rabbitmqctl list_vhost_limits), and mind that delayed messages wait in queues of their own"
            ) from exc
        raise ConfigurationError(
            f"the queue '{queue.name}' of RabbitMQ at {place(connection.url)} is there with other settings: {exc}. "
            "Set queue_type and delivery_limit to what it has, choose another namespace, or delete it once it is empty "
            f"(rabbitmqctl delete_queue {queue.name}): messages that are lost are sent again"
        ) from exc
    except (ChannelAccessRefused, ChannelLockedResource) as exc:
        raise ConfigurationError(
            f"the user of transport_url may not declare the queue '{queue.name}' of RabbitMQ at "
            f"{place(connection.url)}: {exc}. It needs the permissions configure and read on the queues, and write on "
            "the exchange amq.default"
        ) from exc


def _rounded_up(delay: float) -> int:
    """The shortest time in milliseconds, among those of the wait queues, that is no shorter than `delay` seconds."""
    wanted = max(math.ceil(delay * 1000 - 1e-6), _STEPS[0])
    scale = 1
    while wanted > 10 * _STEPS[0] * scale:
        scale *= 10
    steps = (*_STEPS, 10 * _STEPS[0])
    return next(step * scale for step in steps if step * scale >= wanted)


def _quoted(topic: str) -> str:
    """A topic in the characters that pamqp allows in the name of a queue; each other byte as + and two digits."""
    return quote(topic, safe="-_.:@#,/ ").replace("~", "%7E").replace("%", "+")
