"""Messages in queues of RabbitMQ: a durable queue for each topic, others in which delayed messages wait, and a confirm
for each publish.

`transport` keeps the contract, and what was delivered and isn't settled. It sends by its `publisher` and receives by
`feed`s, over a `link` of its own for each: a broker that takes no messages for now goes on to deliver. A publisher has
one `outlet` after the other, a feed one `line`: each has a `channel`, and its messages go as `frames` over the `wire`.
`queues` says what the queues are called and declares them, `letters` what lies in the one of dead letters.
"""

from __future__ import annotations

from paigeant.transports.rabbitmq.transport import RabbitMQTransport

__all__ = ["RabbitMQTransport"]
