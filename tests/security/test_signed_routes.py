"""One signed slip over several brokers: each partner has a key for its own topics, and one a key for something else."""

from __future__ import annotations

import secrets
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests.observers import Seen
from tests.patience import PATIENCE
from tests.security.signed import TRUST, message, put, required, sealing, serving, trusted

from paigeant import ActivityRegistry, Paigeant, RoutingSlip, Settings, Step, Workflow
from paigeant.errors import ConfigurationError
from paigeant.keyfiles import write_private
from paigeant.keys import Key, KeyRing
from paigeant.slip import RunStatus

STEPS = ["count", "double"] * 2


class Partners:
    """Two services on a broker each, and a stranger, whose key is trusted for topics of its own alone."""

    def __init__(self, here: str, there: str, store: str) -> None:
        self.here, self.there = here, there
        self.common = {
            "store_url": store,
            "namespace": f"signed-routes-{secrets.token_hex(4)}",
            "trust_file": str(TRUST),
        }
        self.our_key, self.their_key, self.strange_key = (Key.generate(now=float(n)) for n in range(3))
        trusted(
            (self.our_key, {"dispatch": ["w"], "run": ["our.*"]}),
            (self.their_key, {"run": ["partner.*"]}),
            (self.strange_key, {"dispatch": ["parcel"], "run": ["billing.*"]}),
        )
        self.ours, self.theirs = ActivityRegistry(), ActivityRegistry()
        self.calls: Counter[str] = Counter()
        self.ours.execute(topic="our.count", retries=0)(self.count)
        self.ours.compensate("count")(self.uncount)
        self.theirs.execute(topic="partner.double", retries=0)(self.double)

    async def count(self, n: int = 0) -> int:
        """A step of ours."""
        self.calls["count"] += 1
        return n + 1

    async def uncount(self, output: int) -> None:
        """Its undo."""
        self.calls["uncount"] += 1

    async def double(self, count: int, fail: bool = False) -> int:
        """A step of the partner's."""
        self.calls["double"] += 1
        if fail:
            raise ValueError("no")
        return count * 2

    def front(self) -> Settings:
        """Our settings: steps of the partner's go to the other broker."""
        return self._settings(self.our_key, self.here, {"partner.*": self.there})

    def partner(self, key: Key) -> Settings:
        """Those of who does the partner's steps, with this key."""
        return self._settings(key, self.there, {"our.*": self.here})

    def _settings(self, key: Key, url: str, routes: dict[str, str]) -> Settings:
        ring = Path(f"{key.kid}.json")
        if not ring.exists():
            write_private(ring, KeyRing((key,)).as_dict())
        return required(transport_url=url, routes=routes, keys_file=str(ring), **self.common)

    async def forge(self) -> int:
        """Publish messages with good signatures by keys that are for something else; gives their number."""
        cases = (
            (self.strange_key, "our.count", self.here),
            (self.their_key, "our.count", self.here),
            (self.strange_key, "partner.double", self.there),
        )
        for number, (key, topic, url) in enumerate(cases):
            step = topic.rpartition(".")[2]
            slip = RoutingSlip((Step(step, id=step),))
            sent = message(f"forged-{number}/{step}/do/0", workflow="w", routing_slip=slip)
            places: dict[str, Any] = {"transport_url": url, "namespace": self.common["namespace"]}
            await put(places, {sent.message_id: sealing(key).seal(sent, topic)}, topic)
        return len(cases)


@pytest.fixture(params=[("rabbitmq", "redis"), ("redis", "postgres"), ("postgres", "rabbitmq")], ids="-".join)
def partners(
    request: pytest.FixtureRequest, postgres_store_url: str, redis_url: str, rabbitmq_url: str
) -> Partners:
    """The partners on two kinds of broker, with the rows of their runs in one Postgres."""
    urls = {"postgres": postgres_store_url, "redis": redis_url, "rabbitmq": rabbitmq_url}
    one, other = request.param
    return Partners(urls[one], urls[other], postgres_store_url)


async def test_a_signed_slip_goes_to_and_fro_between_brokers(partners: Partners) -> None:
    """Runs end, and one is undone, over both brokers; what a good key of the wrong role has signed starts nothing."""
    seen = Seen()
    forged = await partners.forge()
    async with (
        serving(partners.front(), partners.ours, seen) as app,
        serving(partners.partner(partners.their_key), partners.theirs, seen) as partner,
    ):
        app.activities.adopt(partners.theirs)  # each has to know the topics of the other's steps
        partner.activities.adopt(partners.ours)
        good = [await app.dispatch(Workflow("w", STEPS)) for _ in range(20)]
        bad = await app.dispatch(Workflow("w", STEPS), {"fail": True})
        for run in good:
            result = await run.wait(PATIENCE)
            assert (result.status, result.outputs["double_2"]) == (RunStatus.COMPLETED, 2)
        assert (await bad.wait(PATIENCE)).status is RunStatus.COMPENSATED
        rows = [row for run in good for row in (await run.detail()).steps]
        await seen.wait_for("delivery.rejected", forged)
        letters = await app.store.list_dead_letters()
    assert {row.attempt for row in rows} == {1}
    assert partners.calls == {"count": 41, "double": 41, "uncount": 1}
    assert Counter((letter.topic, letter.reason) for letter in letters) == {
        ("our.count", "wrong_role"): 2,
        ("partner.double", "wrong_role"): 1,
    }


async def test_a_partner_with_the_wrong_key_holds_no_run_up(partners: Partners) -> None:
    """It may not dispatch. Steps that it does are recorded; what follows is sent by those who may."""
    stranger = partners.partner(partners.strange_key)
    async with Paigeant(stranger, activities=[partners.theirs, partners.ours]) as alone:
        with pytest.raises(ConfigurationError, match="may not start runs of workflow 'w'"):
            await alone.dispatch(Workflow("w", STEPS))
    seen = Seen()
    async with (
        serving(partners.front(), partners.ours, seen) as app,
        serving(stranger, partners.theirs, seen) as partner,
    ):
        app.activities.adopt(partners.theirs)
        partner.activities.adopt(partners.ours)
        runs = [await app.dispatch(Workflow("w", STEPS)) for _ in range(5)]
        ends = [await run.wait(PATIENCE) for run in runs]
        letters = await app.store.list_dead_letters()
    assert [end.outputs["double_2"] for end in ends] == [2] * 5
    assert partners.calls == {"count": 10, "double": 10}
    assert letters == []
