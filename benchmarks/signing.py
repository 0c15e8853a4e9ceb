"""What a signature costs a message that crosses: sealing and opening it signed, against doing so in plain.

Steps that continue locally send no message, so they pay nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial

from benchmarks.bench import Bench
from benchmarks.report import Figure, of
from benchmarks.workload import STEPS
from paigeant.envelope import Envelope, PlainEnvelope
from paigeant.keyfiles import FileKeys
from paigeant.keys import ALGORITHMS, Algorithm, Key, KeyRing
from paigeant.message import PaigeantMessage
from paigeant.signing import SignedEnvelope
from paigeant.slip import RoutingSlip, Step

__all__ = ["run"]

_TOPIC = "charge"


def run(bench: Bench) -> list[Figure]:
    """Microseconds a hop, for each algorithm, rounds in turn; what the signature adds is told of the default one."""
    return asyncio.run(_run(bench.many(7, 1), bench.many(300, 5)))


async def _run(rounds: int, hops: int) -> list[Figure]:
    signed = {algorithm: _envelope(algorithm) for algorithm in ALGORITHMS}
    plain: list[float] = []
    found: dict[str, list[float]] = {algorithm: [] for algorithm in ALGORITHMS}
    for _ in range(rounds):
        plain.append(await _micros(partial(_hop, PlainEnvelope()), hops))
        for algorithm, envelope in signed.items():
            found[algorithm].append(await _micros(partial(_hop, envelope), hops))
    added = [with_it - without for with_it, without in zip(found["Ed25519"], plain, strict=True)]
    return [
        of("plain: seal and open", plain, "us"),
        *(of(f"{algorithm}: seal and open", found[algorithm], "us") for algorithm in ALGORITHMS),
        of("a signature adds to a hop", [micros / 1000 for micros in added], "ms", most=0.4),
    ]


async def _hop(envelope: Envelope) -> None:
    await envelope.open(_TOPIC, envelope.seal(_MESSAGE, _TOPIC))


async def _micros(work: Callable[[], Awaitable[None]], times: int) -> float:
    await work()
    began = time.process_time()  # what it takes of the processor, whoever else is on the machine
    for _ in range(times):
        await work()
    return (time.process_time() - began) / times * 1e6


def _envelope(algorithm: Algorithm) -> SignedEnvelope:
    ring = KeyRing((Key.generate(now=time.time(), algorithm=algorithm),))
    return SignedEnvelope(
        FileKeys.of(ring), deployment="bench", requires=True, lifetime=3600.0, clock=time.time
    )


_MESSAGE = PaigeantMessage(
    "run-1/charge/do/0",
    "run-1",
    RoutingSlip(tuple(Step(f"step_{n}", id=f"step_{n}") for n in range(STEPS))).mark_complete(),
    payload={"order": {"n": 1, "lines": [{"sku": f"A-{n}", "count": n} for n in range(10)]}},
    workflow="chain",
    correlation_id="run-1",
    headers={"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"},
)
