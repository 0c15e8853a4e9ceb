"""Claim: a step that is this worker's, and the settings that hold for it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from paigeant.activity import Activity
from paigeant.message import PaigeantMessage
from paigeant.observer import Work, quick
from paigeant.retry import RetryPolicy
from paigeant.slip import Phase, Step
from paigeant.store import Grant, StepKey
from paigeant.values import value

__all__ = ["Claim", "Limits"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What holds for steps whose activity and itinerary don't say otherwise.

    `local_steps`: how many steps of one run are done in a row before others have their turn. `inline_bytes`: outputs
    above it don't travel. `persist`: seconds for which a result that can't be recorded is kept and tried again.
    """

    retry: RetryPolicy = field(default_factory=RetryPolicy)
    timeout: float | None = None
    local_steps: int = 50
    inline_bytes: int = 65536
    persist: float = 30.0


@value
class Claim:
    """A step that is this worker's: the store's grant, the message it belongs to, and its activity."""

    key: StepKey
    grant: Grant
    message: PaigeantMessage
    activity: Activity
    claimed_at: float
    local: int = 0
    resumed: bool = False
    """Whether this very claim has been begun before: what it waited for came while it was being parked."""
    bound: asyncio.Semaphore | None = None
    """The activity's own bound, taken for this step already; None where it has none."""

    @property
    def work(self) -> Activity:
        """What is to be called: the activity, or its compensation."""
        if self.message.phase is Phase.DO:
            return self.activity
        assert self.activity.compensation is not None, "a worker without it doesn't take the undo"
        return self.activity.compensation

    @property
    def step(self) -> Step | None:
        """The step to do; None for an undo."""
        return self.message.routing_slip.next_step()

    @property
    def topic(self) -> str:
        """Where its message waits: that of a step, and that of its undo as well, so that whoever did it can undo it."""
        due = self.message.due
        return (None if due is None else due.topic) or self.activity.topic

    @property
    def now(self) -> float:
        """The store's time by this process's steady clock."""
        return self.grant.now + time.monotonic() - self.claimed_at

    def retry(self, limits: Limits) -> RetryPolicy:
        """The step's setting over the activity's over the default.

        A number says how often it is tried, and leaves how long to wait in between to what it stands above.
        """
        policy, step = _over(limits.retry, self.work.retries), self.step
        return policy if step is None else _over(policy, step.retries)

    def timeout(self, limits: Limits) -> float | None:
        """Seconds for this attempt: by the settings, and never beyond the run's deadline."""
        step = self.step
        own = step.timeout if step is not None else None
        timeout = own or self.work.timeout or limits.timeout
        deadline = self.message.routing_slip.deadline
        if step is None or deadline is None:
            return timeout  # a deadline bounds what is done, not what is undone
        left = max(deadline - self.now, 0.0)
        return left if timeout is None else min(timeout, left)

    def described(self, worker_id: str) -> Work:
        """What the observers around it are told of it."""
        message, key, grant = self.message, self.key, self.grant
        headers = message.headers
        return quick(
            Work,
            (
                "do" if key.phase is Phase.DO else "undo",
                message.workflow_id,
                message.workflow,
                key.step,
                self.activity.name,
                self.topic,
                grant.attempt,
                message.correlation_id,
                worker_id,
                "" if self.local else message.message_id,
                grant.queued,
                headers.get("traceparent", ""),
                headers.get("tracestate", ""),
            ),
        )

    def ids(self, worker_id: str) -> dict[str, Any]:
        """What logs and observers are told of it."""
        message = self.message
        return {
            "workflow_id": message.workflow_id,
            "workflow": message.workflow,
            "step": self.key.step,
            "activity": self.activity.name,
            "attempt": self.grant.attempt,
            "trace_id": message.trace_id,
            "correlation_id": message.correlation_id,
            "worker": worker_id,
        }


def _over(policy: RetryPolicy, retries: int | RetryPolicy | None) -> RetryPolicy:
    if retries is None:
        return policy
    return retries if isinstance(retries, RetryPolicy) else _counted(policy, retries)


@lru_cache(maxsize=256)  # a process has few of them, and asks at each claim
def _counted(policy: RetryPolicy, retries: int) -> RetryPolicy:
    return replace(policy, attempts=retries + 1)
