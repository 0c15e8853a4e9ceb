"""A run whose first message is taken never gets one that is too large, however its steps are called."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from paigeant.activity import ActivityRegistry
from paigeant.envelope import PlainEnvelope
from paigeant.errors import MessageTooLarge
from paigeant.forwarder import Forwarder
from paigeant.message import PaigeantMessage
from paigeant.slip import RoutingSlip, Step
from paigeant.stores.memory import MemoryStore
from paigeant.transport import Posting
from paigeant.transports.memory import MemoryTransport

_NAMES = st.text(st.sampled_from('aé"\\/ %😀'), min_size=1, max_size=200).filter(str.strip)


def _registry(topics: dict[str, str]) -> ActivityRegistry:
    """Activities of these names and topics; every other one can be undone."""
    registry = ActivityRegistry()
    for place, (name, topic) in enumerate(topics.items()):
        registry.execute(name=name, topic=topic)(lambda: None)
        if place % 2:
            registry.compensate(name)(lambda: None)
    return registry


@settings(max_examples=200)
@given(
    activities=st.lists(_NAMES, min_size=1, max_size=8),
    topics=st.dictionaries(_NAMES, _NAMES, max_size=4),
    run=_NAMES,
    payload=st.text(max_size=200),
    limit=st.integers(200, 60_000),
)
@example(activities=["a"] * 8, topics={}, run="r", payload="", limit=3_000)
@example(
    activities=["😀" * 200] * 3, topics={"😀" * 200: "😀" * 200}, run="😀" * 200, payload="", limit=9_000
)
def test_what_is_taken_at_a_glance_is_taken_when_it_is_counted(
    activities: list[str], topics: dict[str, str], run: str, payload: str, limit: int
) -> None:
    """Who counts the names of all steps finds room as well; the glance only spares that where there is plenty."""
    steps = [Step(name, id=f"{place}{name}"[:200]) for place, name in enumerate([*activities, *topics])]
    slip = RoutingSlip(itinerary=tuple(steps))
    message = PaigeantMessage(
        message_id="m", workflow_id=run, routing_slip=slip, payload={"given": payload}, workflow="chain"
    )
    envelope = PlainEnvelope(limit)
    forwarder = Forwarder(MemoryStore(), MemoryTransport(), _registry(topics), envelope=envelope)
    try:
        forwarder.check(message, Posting("topic", "m", envelope.seal(message, "topic")))
    except MessageTooLarge:
        return
    forwarder.check(message)
