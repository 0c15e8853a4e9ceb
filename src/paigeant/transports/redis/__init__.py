"""Messages in Redis streams, one for each topic, that a consumer group shares out; an ack deletes the entry.

`transport` keeps the contract. A `subscription` is one iteration over a topic: its `reader` waits at the server for
messages, its `lookout` has delayed ones delivered when they are due. `hands` knows what was delivered and isn't
settled, `letters` keeps what nothing else keeps. All of them ask `streams` for what is done at the server, mostly by
`scripts`. Beneath are the `servers` that a `place` names, with a `line` for commands to each; `checks` says whether
they will do, `trouble` what is wrong with them.
"""

from __future__ import annotations

from paigeant.transports.redis.transport import RedisStreamTransport

__all__ = ["RedisStreamTransport"]
