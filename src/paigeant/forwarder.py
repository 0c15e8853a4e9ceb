"""Forwarder: puts slips into messages and sends them, within a transaction of the store where that is possible."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

from pydantic import ValidationError
from pydantic_core import to_json

from paigeant import folding, ledger
from paigeant.activity import ActivityRegistry
from paigeant.envelope import Envelope, PlainEnvelope, inner
from paigeant.errors import MessageTooLarge, PaigeantError, StoreUnavailable, TransportUnavailable
from paigeant.message import JUST_BEGUN, SENT_FROM, MessageId, PaigeantMessage, encode
from paigeant.secret import OBO_TOKEN, SecretToken
from paigeant.slip import Compensation, Phase, RoutingSlip, Step, StepStatus
from paigeant.store import NextStep, RunDetail, StepKey, Store
from paigeant.transport import Posting, Transport
from paigeant.values import value

__all__ = ["LONGEST_DELAY", "STORED_PAYLOAD", "Forwarder", "Letter"]

LONGEST_DELAY = 60.0
"""Seconds. A message for a later time would only lie about: the sweeper sends it when it is due."""

_AWAY_SECONDS = 5.0
"""So long is sent what goes to servers of which one is away; the rest waits for the next time."""

_EXECUTED_BYTES = len(b'{"step_id":,"activity":,"status":"skipped"},') - len(b'{"activity":,"id":},')
_UNDO_BYTES = len(b'{"step_id":,"activity":,"topic":},')
_LONGEST_TOPIC = 802
"""Bytes: two hundred characters of up to four each, in quotes."""

_MORE_BYTES = 200
"""For what messages have later: an epoch in their ids, the ending of a slip, headers of ours."""

STORED_PAYLOAD = "paigeant-payload"
"""A header: the payload would make the message too large, and is to be read from the store."""

log = logging.getLogger("paigeant.forwarder")


@value
class Letter:
    """A message with its address."""

    topic: str
    message: PaigeantMessage
    delay: float = 0.0


class Forwarder:
    """Knows where steps go and how to send them there. Losing a letter is harmless: the sweeper sends another."""

    def __init__(
        self,
        store: Store,
        transport: Transport,
        registry: ActivityRegistry,
        *,
        envelope: Envelope | None = None,
        inline_bytes: int = 65536,
        elsewhere: Callable[[str], bool] = lambda topic: False,
    ) -> None:
        self.store = store
        self.transport = transport
        self.registry = registry
        self.envelope = envelope or PlainEnvelope()
        self.inline_bytes = inline_bytes
        self.elsewhere = elsewhere
        """Whether a topic's messages go to another broker than the one that the store may publish to."""

    def topic_of(self, step: Step) -> str:
        """Where workers wait for this step: its own topic, its activity's, or one called like the activity."""
        if step.topic is not None:
            return step.topic
        activity = self.registry.find(step.activity)
        return step.activity if activity is None else activity.topic

    def next_step(self, workflow_id: str, slip: RoutingSlip) -> NextStep | None:
        """What is due on `slip`, with its address."""
        match slip.next_step() or slip.next_undo():
            case Step() as step:
                return NextStep(StepKey(workflow_id, step.id), step.activity, self.topic_of(step))
            case Compensation(step_id=step_id, activity=activity, topic=topic):
                return NextStep(StepKey(workflow_id, step_id, Phase.UNDO), activity, topic)
            case None:
                return None

    def letter(
        self,
        message: PaigeantMessage,
        topic: str,
        *,
        epoch: int,
        delay: float = 0.0,
        sent_from: str | None = None,
    ) -> Letter:
        """`message` for whoever claims its step after claim `epoch`. The same letter always has the same message id.

        `sent_from`: the topic of the step that the sender has just recorded.
        """
        if OBO_TOKEN in message.headers and not (message.phase is Phase.DO and self.carries(topic)):
            # What is undone is undone by the service itself, and whoever undoes it needs nobody's token.
            message = message.evolve(headers=_tokenless(message.headers))
        message_id = MessageId(message.workflow_id, message.step_id, message.phase, epoch)
        if sent_from is not None and not self.envelope.serves_all:  # else nobody asks
            message = message.evolve(headers={**message.headers, SENT_FROM: sent_from})
        return Letter(topic, message.evolve(message_id=str(message_id)), delay)

    def carries(self, topic: str) -> bool:
        """Whether a token may travel with messages for `topic`: not through a table, where it would be recorded."""
        return not self.transport.keeps_rows(topic)

    def posting(self, letter: Letter) -> Posting | None:
        """`letter` for a transaction of the store; None when that doesn't publish it. Raises MessageTooLarge.

        What receivers wouldn't take from this process is left to the sweeps of others.
        """
        if not self._is_posted(letter) or not self._may_send(letter):
            return None
        message = letter.message
        try:
            body = self.envelope.seal(message, letter.topic)
        except MessageTooLarge:
            body = self.envelope.seal(_without_payload(message), letter.topic)
        return Posting(letter.topic, message.message_id, body, letter.delay)

    def check(self, message: PaigeantMessage, posting: Posting | None = None) -> None:
        """Raise MessageTooLarge unless `message` and all that follow from it until its run ends can travel.

        If need be with their payload left in the store. What is done takes more room in a slip than what is to do.
        `posting` is the same message where it has been sealed: mostly that is small enough.
        """
        limit = self.envelope.limit_bytes
        if posting is not None and self._most_growth(message, posting.body) <= limit - len(posting.body):
            return
        growth = self._growth(message)
        size = len(encode(inner(_without_payload(message)), limit_bytes=limit)) + growth
        if size > limit:
            raise MessageTooLarge(size, limit)

    def _most_growth(self, message: PaigeantMessage, body: bytes) -> int:
        """What `_growth` never exceeds, found with little work: the names that it counts stand in the body, too."""
        steps = len(message.routing_slip.itinerary)
        per_step = _EXECUTED_BYTES + _UNDO_BYTES + _LONGEST_TOPIC
        return 4 * len(body) + steps * per_step + _MORE_BYTES + 2 * _LONGEST_TOPIC + self.envelope.seal_bytes

    def _growth(self, message: PaigeantMessage) -> int:
        """By how many bytes messages of this run may become larger, as long as nobody adds steps."""
        growth, longest, topic = 0, 0, 0
        for step in message.routing_slip.itinerary:
            activity = self.registry.find(step.activity)
            name, longest = len(to_json(step.id)), max(longest, len(quote(step.id)))
            own_topic = len(to_json(self.topic_of(step)))
            topic = max(topic, own_topic)
            growth += _EXECUTED_BYTES
            if activity is None:
                growth += _UNDO_BYTES + name + len(to_json(step.activity)) + _LONGEST_TOPIC
            elif activity.compensation is not None:
                growth += _UNDO_BYTES + name + len(to_json(step.activity)) + own_topic
        ids = len(quote(message.workflow_id)) + longest
        return growth + _MORE_BYTES + ids + 2 * topic + self.envelope.seal_bytes

    def _may_send(self, letter: Letter) -> bool:
        if self.envelope.may_send(letter.message, letter.topic):
            return True
        log.warning("not sent to %s, which the key of this process may not do; others will", letter.topic)
        return False

    async def send(self, letter: Letter) -> bool:
        """Publish `letter`, unless the store has. False when that failed: the sweeper tries again."""
        return self._is_posted(letter) or await self.publish(letter)

    def _is_posted(self, letter: Letter) -> bool:
        return self.store.publishes and not self.elsewhere(letter.topic)

    async def publish(self, letter: Letter) -> bool:
        """Publish `letter`. False when that failed, or isn't for this process to do."""
        if not self._may_send(letter):
            return False
        try:
            await self._publish(letter)
        except PaigeantError as exc:  # whatever it is, the step stands in the store
            log.warning("not published to %s, will be sent again: %s", letter.topic, exc)
            return False
        return True

    async def _publish(self, letter: Letter) -> None:
        try:
            await self.transport.publish(letter.topic, letter.message, delay=letter.delay)
        except MessageTooLarge:
            message = _without_payload(letter.message)
            await self.transport.publish(letter.topic, message, delay=letter.delay)

    async def send_again(
        self,
        keys: Iterable[StepKey],
        unsent: Mapping[StepKey, str] = MappingProxyType({}),
        *,
        covered: Collection[str] = (),
        token: SecretToken | None = None,
    ) -> dict[StepKey, str]:
        """Publish messages for ready steps, made from the store alone, and from a `token` that they are to carry.

        Those that wait for long in `covered` topics, which have a message for each of their steps, mostly need none.
        Gives those that could not be sent because a server is away, with their topics: to be given back as `unsent`
        together with the next `keys`. Those that weren't tried are the first of them.
        """
        left: dict[StepKey, str] = {}
        untried: dict[StepKey, str] = {}
        away: set[str] = set()
        clock = asyncio.get_running_loop()
        until = clock.time() + _AWAY_SECONDS
        for key in dict.fromkeys([*unsent, *keys]):
            if away and clock.time() > until:  # one that hangs must not hold up a sweep for each topic
                untried[key] = unsent.get(key, "")
                continue
            if unsent.get(key) in away:  # found out by another one, and perhaps waited for
                left[key] = unsent[key]
                continue
            topic = unsent.get(key, "")
            try:
                detail = await self.store.load_run(key.workflow_id, inline_bytes=self.inline_bytes)
                now = await self.store.now()
                row = next((row for row in detail.steps if row.key == key), None)
                if row is None or row.status is not StepStatus.READY:
                    continue  # it has gone on meanwhile
                topic = row.topic
                if topic in away:
                    left[key] = topic
                    continue
                due_at, grace = row.due_at, self.store.grace
                has_one = topic in covered and key not in unsent
                if has_one and not ledger.is_due_once_more(due_at=due_at, now=now, grace=grace):
                    continue
                message = message_of(detail, inline_bytes=self.inline_bytes)
                if not self.envelope.may_send(message, topic):
                    continue  # others may, and their sweeps do
                if token is not None:
                    message = message.evolve(headers={**message.headers, OBO_TOKEN: token.reveal()})
                delay = max(row.not_before - now, 0.0)
                await self._publish(self.letter(message, topic, epoch=row.epoch, delay=delay))
            except StoreUnavailable as exc:
                log.warning("can't make a message for %s, will try again: %s", key, exc)
                left[key] = topic
            except TransportUnavailable as exc:
                log.warning("not published to %s, will be sent again: %s", topic, exc)
                left[key] = topic
                away.add(topic)
            except (PaigeantError, ValidationError) as exc:  # a slip of newer code is for that to send
                log.warning("can't make a message for %s: %s", key, " ".join(str(exc).split()))
        return {**untried, **left}

    async def may_wake(self, key: StepKey) -> bool:
        """Whether receivers would take a message for this step from this process. Raises RunNotFound."""
        if self.envelope.serves_all:
            return True
        detail = await self.store.load_run(key.workflow_id, inline_bytes=self.inline_bytes)
        message = message_of(detail, inline_bytes=self.inline_bytes)
        return all(self.envelope.may_send(message, row.topic) for row in detail.steps if row.key == key)

    async def payload(self, message: PaigeantMessage) -> PaigeantMessage:
        """`message` with its payload, read from the store where it was too large to travel. Raises RunNotFound.

        All of one is read from there that counts only as the first of its run: whoever may start runs could say of any
        other step, of any run, that it is that.
        """
        if message.headers.get(STORED_PAYLOAD) != "stored" and JUST_BEGUN not in message.headers:
            return message
        return await self.renewed(message)

    def is_for(self, message: PaigeantMessage, epoch: int) -> bool:
        """Whether `message` was written for claim `epoch` of its step: then it says how things stand."""
        written = MessageId.read(message.message_id)
        return written is not None and written.epoch == epoch - 1

    def place(self, message: PaigeantMessage) -> int | None:
        """That of the step in its run, where `message` was written when the step was new: before its first claim."""
        return message.routing_slip.place if self.is_for(message, 1) else None

    async def renewed(self, message: PaigeantMessage) -> PaigeantMessage:
        """`message` as the rows of its run have it now, with the token that it came with, which no row has.

        Raises RunNotFound, StoreUnavailable.
        """
        detail = await self.store.load_run(message.workflow_id, inline_bytes=self.inline_bytes)
        made = message_of(detail, inline_bytes=self.inline_bytes)
        token = message.headers.get(OBO_TOKEN)
        headers = made.headers if token is None else {**made.headers, OBO_TOKEN: token}
        return made.evolve(message_id=message.message_id, headers=headers)


def message_of(detail: RunDetail, *, inline_bytes: int) -> PaigeantMessage:
    """The message that a run's rows stand for, yet without an id."""
    slip, payload = folding.fold(detail, inline_bytes=inline_bytes)
    run = detail.run
    return PaigeantMessage(
        message_id="",
        workflow_id=run.id,
        routing_slip=slip,
        payload=payload,
        workflow=run.workflow,
        correlation_id=run.correlation_id,
        trace_id=run.trace_id,
        headers=dict(run.headers),
    )


def _tokenless(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name != OBO_TOKEN}


def _without_payload(message: PaigeantMessage) -> PaigeantMessage:
    headers: dict[str, Any] = {**message.headers, STORED_PAYLOAD: "stored"}
    return message.evolve(payload={}, headers=headers)
