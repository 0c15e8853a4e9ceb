"""Monitor: answers over HTTP how a worker is: `/metrics`, `/live` and `/ready`. It changes nothing.

Answers come from threads of their own, so that a worker whose event loop hangs is still told from one that is gone.
What the store and the transport are asked for is asked in the worker's loop, when somebody looks, and at most once in
two seconds: never on the way of a step, and not at all where nobody looks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from concurrent.futures import CancelledError as FutureCancelled
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from paigeant.errors import ConfigurationError, PaigeantError
from paigeant.observers.metrics import Backlog, MetricsObserver, TopicBacklog

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from paigeant.store import Store
    from paigeant.transport import Transport
    from paigeant.worker import ActivityWorker

__all__ = ["Monitor"]

log = logging.getLogger("paigeant.monitor")

_FRESH_SECONDS = 2.0
_ASK_SECONDS = 3.0
"""How long the store and the transport have to answer. Prometheus gives up after 10 s, Kubernetes after 1 s."""
_IDLE_SECONDS = 5.0
"""How long a connection may say nothing; and how long it may be there at all when others wait for its place."""
_MOST_CONNECTIONS = 16


class Monitor:
    """Serves one worker's metrics and health. Use it as an async context manager, in the worker's loop.

    `port` 0 takes a free one: `port` says which. Without one (None) nothing is served, and `backlog` alone is asked.
    Raises ConfigurationError when the port can't be had.
    """

    def __init__(
        self,
        worker: ActivityWorker,
        metrics: MetricsObserver,
        *,
        host: str = "127.0.0.1",
        port: int | None = None,
    ) -> None:
        self.worker = worker
        self.metrics = metrics
        self.host = host
        self.port = port
        self.waits_for: str | None = None
        """Why its store and transport aren't open, so that the worker can't begin yet; None when they are."""
        self._server: _Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asking = asyncio.Lock()
        self._found: tuple[float, Backlog, list[str]] | None = None
        self._next: asyncio.Task[Any] | None = None

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        if self.port is not None:
            try:
                self._server = _Server((self.host, self.port), self)
            except OSError as exc:
                raise ConfigurationError(
                    f"metrics can't be served at {self.host}:{self.port}: {exc.strerror or exc}; "
                    "choose another `metrics_port`, or `metrics_host`"
                ) from exc
            self.port = self._server.server_port
            # Looked for every 0.1 s whether it is to stop; a request is answered at once.
            serve = threading.Thread(
                target=self._server.serve_forever, args=(0.1,), name="paigeant-monitor", daemon=True
            )
            serve.start()
            log.info("monitor.serving", extra={"host": self.host, "port": self.port})
        self.metrics.backlog = self.backlog
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        server, self._server = self._server, None
        self._loop = None
        if self._next is not None:
            self._next.cancel()
        if server is not None:
            await asyncio.to_thread(server.shutdown)
            server.server_close()

    # -- asked by other threads

    def dead(self) -> list[str]:
        """Why this process had better be ended and started anew; empty while it lives."""
        # No new start would bring a server back.
        return [] if self.waits_for else self.worker.heartbeat.troubles()

    def unready(self) -> list[str]:
        """Why this worker takes no messages now, or can't do anything with them; empty when it is ready."""
        if (why := self.waits_for) is not None:
            return [f"the worker waits for its servers: {why}"]
        found = self._now()
        return self.worker.idleness() + (["the event loop doesn't answer"] if found is None else found[2])

    def backlog(self) -> Backlog | None:
        """What is true now; None once the worker is being put away.

        In the worker's own loop, where nobody can wait for its answer: what was found by the question before.
        """
        found = self._now()
        if found is not None:
            return found[1]
        if self._loop is None:
            return None
        is_ready = self._is_within() and not self.worker.idleness()
        return Backlog(is_ready, len(self.worker.executor.running), self.worker.concurrency)

    def _is_within(self) -> bool:
        return asyncio._get_running_loop() is self._loop

    def _now(self) -> tuple[float, Backlog, list[str]] | None:
        found, loop = self._found, self._loop
        if found is not None and time.monotonic() - found[0] < _FRESH_SECONDS:
            return found
        if loop is None or loop.is_closed():
            return None
        if self._is_within():
            if self._next is None or self._next.done():
                self._next = loop.create_task(self._ask())
            return found
        asked = asyncio.run_coroutine_threadsafe(self._ask(), loop)
        try:
            return asked.result(_ASK_SECONDS + 1.0)
        except (TimeoutError, FutureCancelled):
            asked.cancel()
            return None

    # -- in the worker's loop

    async def _ask(self) -> tuple[float, Backlog, list[str]]:
        async with self._asking:  # several ask: one question for all of them
            found = self._found
            if found is not None and time.monotonic() - found[0] < _FRESH_SECONDS:
                return found
            if (why := self.waits_for) is not None:
                # Neither is asked before both are open. The store is opened first.
                up = {"store": why == "TransportUnavailable", "transport": False}
                return time.monotonic(), Backlog(False, 0, self.worker.concurrency, up=up), []
            store, transport = self.worker.store, self.worker.transport
            steps, stored = await _answer(_of_store(store))
            known = sorted({*self.worker.topics, *(steps.topics if steps is not None else ())})
            depths, moved = await _answer(_of_transport(transport, known))
            troubles = [
                f"the {what} doesn't answer: {why}"
                for what, why in (("store", stored), ("transport", moved))
                if why is not None
            ]
            topics: dict[str, TopicBacklog] = dict(steps.topics) if steps is not None else {}
            for topic, messages in (depths or {}).items():
                known_steps = topics.get(topic, TopicBacklog())
                topics[topic] = TopicBacklog(known_steps.steps, messages, known_steps.oldest)
            backlog = Backlog(
                ready=not troubles and not self.worker.idleness(),
                running=len(self.worker.executor.running),
                concurrency=self.worker.concurrency,
                topics=topics,
                dead_letters=None if steps is None else steps.dead_letters,
                expired_lease=None if steps is None else steps.expired_lease,
                up={"store": stored is None, "transport": moved is None},
            )
            self._found = (time.monotonic(), backlog, troubles)
            return self._found


async def _answer(question: Awaitable[Any]) -> tuple[Any, str | None]:
    """What it gives, or None and why it gives nothing."""
    try:
        async with asyncio.timeout(_ASK_SECONDS / 2):
            return await question, None
    except TimeoutError:
        return None, f"nothing for {_ASK_SECONDS / 2:g} s"
    except PaigeantError as exc:
        return None, type(exc).__name__  # its text may name hosts and users, and anybody may ask
    except Exception as exc:  # whatever goes wrong in asking, the worker goes on
        log.exception("can't tell how the worker is")
        return None, type(exc).__name__


async def _of_store(store: Store) -> Backlog:
    now = await store.now()
    topics = {
        topic.topic: TopicBacklog(
            {"ready": topic.ready, "later": topic.later, "running": topic.running}, oldest=topic.oldest
        )
        for topic in await store.open_topics()
    }
    expired = [now - worker.lease_until for worker in await store.list_workers()]
    return Backlog(
        True, 0, 0, topics, await store.count_dead_letters(), expired_lease=max(0.0, *expired, 0.0)
    )


async def _of_transport(transport: Transport, known: list[str]) -> dict[str, dict[str, int]]:
    return {
        depth.topic: {"waiting": depth.waiting, "taken": depth.taken}
        for depth in await transport.topics(known)
    }


class _Server(ThreadingHTTPServer):
    """Python's own server, with a bound on how many it talks to at once: others wait in the system's queue."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], monitor: Monitor) -> None:
        self.monitor = monitor
        self._free = threading.BoundedSemaphore(_MOST_CONNECTIONS)
        self._since: dict[socket.socket, float] = {}
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # All addresses are those of IPv4 as well, whatever the system's default is.
        if self.server_address[0] == "::":
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # Not HTTPServer's: that asks the DNS for this host's name, in the event loop, for as long as that takes.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._has_place():
            self.shutdown_request(request)
            return
        self._since[request] = time.monotonic()
        try:
            super().process_request(request, client_address)
        except BaseException:  # there is no thread to be had now
            self._give_back(request)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._give_back(request)

    def _give_back(self, request: Any) -> None:
        del self._since[request]
        self._free.release()

    def _has_place(self) -> bool:
        """Whether there is one, or will be: nobody keeps theirs by saying a little now and then."""
        if self._free.acquire(blocking=False):
            return True
        first = min(list(self._since.values()), default=0.0)
        if self._free.acquire(timeout=max(0.0, first + _IDLE_SECONDS - time.monotonic())):
            return True
        for slow, since in list(self._since.items()):
            if time.monotonic() - since >= _IDLE_SECONDS:
                with contextlib.suppress(OSError):  # it has ended meanwhile
                    slow.shutdown(socket.SHUT_RDWR)
        return self._free.acquire(timeout=1.0)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a request to the monitor failed", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _IDLE_SECONDS
    protocol_version = "HTTP/1.0"  # one request a connection: nobody keeps a place
    server_version = "paigeant"
    sys_version = ""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        monitor = self.server.monitor
        match self.path.partition("?")[0]:
            case "/metrics":
                body, content_type = monitor.metrics.exposition(self.headers.get("Accept", ""))
                self._say(200, body, content_type)
            case "/live":
                self._health(monitor.dead())
            case "/ready":
                self._health(monitor.unready())
            case _:
                self._say(404, b"there is /metrics, /live and /ready\n")

    def _health(self, troubles: list[str]) -> None:
        text = "".join(f"{trouble}\n" for trouble in troubles or ["ok"])
        self._say(503 if troubles else 200, text.encode())

    def _say(self, status: int, body: bytes, content_type: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("monitor: " + format, *args)
