"""Receiving: a `Feed` is what one queue delivers for ever, over one `Line` after the other."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import sys
import time
from collections.abc import Callable

from aio_pika.exceptions import CONNECTION_EXCEPTIONS

from paigeant.errors import ConfigurationError, TransportUnavailable
from paigeant.transports.rabbitmq.channel import Channel
from paigeant.transports.rabbitmq.line import Delivery, Line
from paigeant.transports.rabbitmq.link import CLOSE_SECONDS, OPEN_SECONDS, Link, closings, is_cancelled
from paigeant.transports.rabbitmq.queues import DELETED_SECONDS, Queue, declare

__all__ = ["IDLE_SECONDS", "LONGEST_PAUSE_SECONDS", "PAUSE_SECONDS", "Feed"]

log = logging.getLogger("paigeant.transport")

PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 2.0
"""Between attempts to receive again: first and last."""

_STARVED_SECONDS = 0.02
"""How long an iteration waits for a message while all that it has fetched is unsettled, before it fetches more."""

_MOST_AHEAD = 65535
"""What AMQP can count. It takes 0 for any number."""

LOOK_SECONDS = 1.0
"""How often a consumer to which nothing comes looks whether messages wait: then RabbitMQ passes it over."""

IDLE_SECONDS, LONGEST_IDLE_SECONDS = 2.0, 10.0
"""Without a message for so long, and then for twice as long, ..., a consumer is opened anew: RabbitMQ may send its
messages to one that is no more."""

APART_SECONDS = 10.0
"""How long a queue that can be received from again keeps a connection of its own."""


class Feed:
    """What one queue delivers, for ever: over one line at a time, and a new one when it has gone, however it went.

    All feeds share the connection of `link`, but those of queues that can't be received from: for one whose leader is
    away RabbitMQ ends the whole connection, or never answers, and what the others hold comes to them again each time.
    Such a feed has a connection of its own until its queue has worked for a while.

    `keeps`: how many bytes of a body a delivery has at the most, the first ones.
    """

    def __init__(
        self,
        link: Link,
        queue: Queue,
        prefetch: int,
        drop: Callable[[Delivery], None],
        *,
        keeps: int = sys.maxsize,
    ) -> None:
        self._shared = self._link = link
        self._queue = queue
        self._prefetch = min(max(prefetch, 1), _MOST_AHEAD)
        self._drop = drop
        self._keeps = keeps
        self._line: Line | None = None
        self._news = asyncio.Event()
        self._has_worked = False
        self._is_suspect = False
        """Whether the shared connection has ended while the queue was opened over it: then it may be the cause."""
        self._was_deleted = False
        self._idle = IDLE_SECONDS
        self._pause = PAUSE_SECONDS
        self._told: set[str] = set()
        """What was said to be wrong since it last worked for a while."""
        self._apart_until = 0.0
        self._is_over = False

    async def next(self) -> Delivery | None:
        """The next message; None when the transport was closed. Raises ConfigurationError before it first works."""
        while not self._is_over:
            if is_cancelled():  # and aiormq, or a call to it that ended at that very moment, has lost it
                raise asyncio.CancelledError
            line = self._line
            if line is None:
                await self._reopen()
            elif self._link is not self._shared and time.monotonic() > self._apart_until:
                await self._leave()
            elif line.inbox:
                return line.hand_out()
            else:
                await self._wait(line)
        return None

    def stop(self) -> None:
        """The transport closes."""
        self._is_over = True
        self._news.set()

    async def end(self) -> None:
        """Give back what was not handed out. The channel stays open for what was, until that is settled."""
        self._is_over = True
        await self._leave()

    async def _leave(self) -> None:
        try:
            await asyncio.shield(self._shared.start(self._end()))
        except asyncio.CancelledError:
            if is_cancelled():  # else the transport was closed meanwhile, which gives back all of it
                raise

    async def _end(self) -> None:
        line, self._line = self._line, None
        link, self._link = self._link, self._shared
        if line is None:
            self._part(link)
            return
        line.is_ending = True
        if line.watching is not None:
            line.watching.cancel()
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                # Also where nothing is out: a quorum queue agrees when it has written down what was acked before, of
                # which RabbitMQ would forget a part with the channel.
                await line.stop()
            line.give_back()
        except CONNECTION_EXCEPTIONS:  # else what still comes would never be settled
            self._lose(line)
        if line.out:
            line.channel.ended.add_done_callback(lambda _: self._part(link))
            return
        if not line.is_void:  # else the broker may never agree to that either
            await line.channel.close()
        self._part(link)

    async def _wait(self, line: Line) -> None:
        self._news.clear()
        if not line.is_starved:
            await self._news.wait()
            return
        try:
            async with asyncio.timeout(_STARVED_SECONDS):
                await self._news.wait()
        except TimeoutError:
            if line.is_starved and line is self._line:
                with contextlib.suppress(*CONNECTION_EXCEPTIONS):
                    await line.consume()

    async def _reopen(self) -> None:
        self._is_suspect = False
        self._join()
        while not self._is_over and self._line is None and not is_cancelled():
            pause, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE_SECONDS)
            if self._has_worked:
                await self._rest(pause / 4, pause)
                if self._was_deleted:
                    self._was_deleted = False
                    await self._rest(DELETED_SECONDS, 2 * DELETED_SECONDS)
                if self._is_over:  # nobody would close what it opens
                    return
            trouble = await self._try_to_open()
            if trouble is None:
                return
            self._tell(str(trouble) or type(trouble).__name__)
            await self._choose_link(trouble)
            if not self._has_worked:
                await self._rest(pause / 4, pause)

    def _tell(self, trouble: str) -> None:
        """Say what keeps this queue from being received from; of the same at each attempt only who debugs hears."""
        level = logging.DEBUG if trouble in self._told else logging.WARNING
        self._told.add(trouble)
        log.log(level, "can't receive from '%s', will try again: %s", self._queue.name, trouble)

    async def _try_to_open(self) -> Exception | None:
        """Open a line; gives what has kept it from being opened. Raises ConfigurationError before it first works."""
        try:
            with closings():
                async with asyncio.timeout(OPEN_SECONDS):
                    line = await self._open()
        except ConfigurationError as exc:
            # After it has worked, a setting may be refused by a broker that is still starting.
            if not self._has_worked:
                raise
            return exc
        except (TransportUnavailable, *CONNECTION_EXCEPTIONS) as exc:
            return exc
        self._has_worked = True
        if line.is_void:
            return ConnectionError("it was lost at once")
        self._line = line
        self._apart_until = time.monotonic() + APART_SECONDS
        return None

    async def _choose_link(self, trouble: Exception) -> None:
        """Go on over the shared connection, unless it was the queue that is in trouble; cut what answers nothing."""
        if isinstance(trouble, (TransportUnavailable, ConfigurationError)):
            self._join()
            self._is_suspect = False
        elif self._link is not self._shared:
            if isinstance(trouble, TimeoutError):
                self._link.cut()
        elif isinstance(trouble, TimeoutError) and not await self._shared.answers():
            self._shared.cut()
        elif self._is_suspect or isinstance(trouble, TimeoutError):
            self._link = self._shared.apart()
        else:  # what ended the connection may have been another feed's doing
            self._is_suspect = True

    def _join(self) -> None:
        """Go on over the connection that all feeds share."""
        link, self._link = self._link, self._shared
        self._part(link)

    def _part(self, link: Link) -> None:
        if link is not self._shared:
            self._shared.start(self._shared.part(link))

    async def _rest(self, least: float, most: float) -> None:
        until = asyncio.get_running_loop().time() + random.uniform(least, most)
        while not self._is_over:
            self._news.clear()
            try:
                async with asyncio.timeout_at(until):
                    await self._news.wait()
            except TimeoutError:
                return

    async def _open(self) -> Line:
        connection = await self._link.open()
        await declare(connection, self._queue)
        channel = await Channel.open(connection)
        channel.keeps = self._keeps
        line = Line(channel, self._queue.name, self._prefetch, self._receive, self._end_of_queue)
        channel.ended.add_done_callback(lambda _: self._end_of_line(line))
        try:
            await line.open()
        except BaseException:
            channel.leave()
            raise
        line.watching = self._shared.start(self._watch(line))
        return line

    def _receive(self) -> None:
        self._idle = IDLE_SECONDS
        self._news.set()

    def _end_of_line(self, line: Line) -> None:
        """The broker has closed it, or agreed to that, or the connection is gone."""
        if line is self._line and not line.channel.connection.gone.done():
            log.warning(
                "RabbitMQ has closed the channel of '%s', receiving anew: %s",
                self._queue.name,
                line.channel.reason,
            )
        self._lose(line)

    def _end_of_queue(self, line: Line) -> None:
        """It was deleted, or the node that has it is gone."""
        log.warning("'%s' was deleted, or its node is gone: receiving anew", self._queue.name)
        self._was_deleted = True
        self._lose(line)

    async def _watch(self, line: Line) -> None:
        """Open the line anew when nothing comes: whether the broker still knows it can't be asked."""
        before, quiet = -1, 0.0
        while quiet < self._idle:
            pause = LOOK_SECONDS * random.uniform(0.75, 1.25)
            await asyncio.sleep(pause)
            self._pause = PAUSE_SECONDS  # it has lasted: nothing that came has ended it
            if self._told:
                log.info("receiving from '%s' again", self._queue.name)
                self._told.clear()
            if line.received != before or line.out or line.inbox:  # or nothing more was asked for
                before, quiet = line.received, 0.0
                continue
            quiet += pause
            if await self._is_passed_over(line) and line.received == before:
                log.warning("messages wait in '%s' and don't come: receiving anew", self._queue.name)
                break
        self._idle = min(2 * self._idle, LONGEST_IDLE_SECONDS)
        line.watching = None  # this, which `_lose` would cancel
        self._lose(line)

    async def _is_passed_over(self, line: Line) -> bool:
        """Whether messages wait, though this line has room for them."""
        with contextlib.suppress(*CONNECTION_EXCEPTIONS):
            async with asyncio.timeout(OPEN_SECONDS):
                return await line.waiting() > 0
        return False

    def _lose(self, line: Line) -> None:
        """What came on a line that is no more will come again: forget it."""
        line.is_void = True
        line.channel.leave()
        if line.watching is not None:
            line.watching.cancel()
        for delivery in tuple(line.out):
            self._drop(delivery)
        line.out.clear()
        line.inbox.clear()
        if self._line is line:
            self._line = None
            self._news.set()
