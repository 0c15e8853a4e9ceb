"""The workload on dramatiq: a pipeline of five messages, the results in Redis. Nothing of it is recorded durably.

Runs in a virtual environment of its own; the worker is `python -m dramatiq benchmarks.chain_dramatiq`. Both find the
broker and the results by the variables BENCH_BROKER and BENCH_RESULTS.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import dramatiq  # type: ignore[import-not-found]  # only in the peers' environment, which `make bench` makes
from dramatiq.brokers.rabbitmq import RabbitmqBroker  # type: ignore[import-not-found]
from dramatiq.brokers.redis import RedisBroker  # type: ignore[import-not-found]
from dramatiq.results import Results  # type: ignore[import-not-found]
from dramatiq.results.backends import RedisBackend  # type: ignore[import-not-found]

from benchmarks.workload import STEPS, WARM_UP, Order, order, raised

_BROKER = os.environ["BENCH_BROKER"]
_LONGEST_MS = 120_000

broker = (
    RedisBroker(url=_BROKER)
    if _BROKER.startswith("redis")
    else RabbitmqBroker(url=_BROKER, confirm_delivery=True)
)
broker.add_middleware(Results(backend=RedisBackend(url=os.environ["BENCH_RESULTS"])))
dramatiq.set_broker(broker)


@dramatiq.actor(store_results=True)  # type: ignore[untyped-decorator]
def step(order: Order) -> Order:
    """Each of the five steps."""
    return raised(order)


def started() -> Any:
    """A run whose first message is sent."""
    return dramatiq.pipeline([step.message(order()), *(step.message() for _ in range(STEPS - 1))]).run()


def check(run: Any) -> None:
    """Wait for the run's result."""
    result = run.get_result(block=True, timeout=_LONGEST_MS)
    if result != {**order(), "n": STEPS}:
        raise AssertionError(f"a run gave {result!r}")


def measure(*, runs: int, alone: int) -> dict[str, Any]:
    """Steps a second of `runs` runs that are all sent before, then the milliseconds of `alone` runs one by one."""
    all_at_once(WARM_UP)
    steps = STEPS * runs / all_at_once(runs)
    took = []
    for _ in range(alone):
        began = time.perf_counter()
        check(started())
        took.append((time.perf_counter() - began) * 1000)
    return {"steps": steps, "ms": took}


def all_at_once(runs: int) -> float:
    """Seconds that so many runs take."""
    began = time.perf_counter()
    for run in [started() for _ in range(runs)]:
        check(run)
    return time.perf_counter() - began


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
