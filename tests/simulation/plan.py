"""What a seed plays: the runs, how their steps behave, and which faults may hit."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from paigeant.retry import RetryPolicy
from paigeant.slip import RunStatus, Step
from paigeant.workflow import Workflow

__all__ = ["Behaviour", "Faults", "Plan", "RunPlan", "plan"]


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How a step behaves. `fails`: so many executions fail first; `undo_fails` likewise for its undo, -1 for all."""

    kind: str
    attempts: int
    fails: int = 0
    undo_fails: int = 0
    skipped: bool = False

    @property
    def compensable(self) -> bool:
        """Whether its activity has a compensation."""
        return self.kind in ("work", "flaky", "strict", "reviser", "slow", "waiter")


@dataclass(frozen=True, slots=True)
class RunPlan:
    """A run: when it is dispatched, what is asked of it later, and how its steps behave, by step id.

    It is cancelled so many seconds after its start, or while the step `cancelled_in` is executed. `retried`: an
    operator takes it up again when it ended badly.
    """

    id: str
    workflow: Workflow
    steps: dict[str, Behaviour]
    begins: float
    cancelled_after: float | None = None
    cancelled_in: str | None = None
    retried: bool = False

    @property
    def signals(self) -> list[str]:
        """The names of the signals that its steps wait for."""
        return [f"go {step}" for step, behaviour in self.steps.items() if behaviour.kind == "waiter"]

    @property
    def predictable(self) -> bool:
        """Whether the plan alone says how the run ends when no fault hits."""
        return not self.cancelled and self.workflow.deadline is None

    @property
    def cancelled(self) -> bool:
        """Whether somebody cancels it, sooner or later."""
        return self.cancelled_after is not None or self.cancelled_in is not None

    def ends(self) -> RunStatus:
        """How it ends when no fault hits a worker or the store."""
        to_undo: list[Behaviour] = []
        for step in self.steps.values():
            if step.skipped:
                continue
            if step.kind == "ender":
                break
            if step.kind == "doomed" or step.fails >= step.attempts:
                if not to_undo:
                    return RunStatus.FAILED
                broken = any(not 0 <= entry.undo_fails < UNDO_ATTEMPTS for entry in to_undo)
                return RunStatus.COMPENSATION_FAILED if broken else RunStatus.COMPENSATED
            if step.compensable:
                to_undo.append(step)
        return RunStatus.COMPLETED


UNDO_ATTEMPTS = 4


@dataclass(frozen=True, slots=True)
class Faults:
    """How likely each fault is: at each adapter call for the first ones, each second for the others."""

    crash: float = 0.0
    pause: float = 0.0
    refuse: float = 0.0
    lose_answer: float = 0.0
    drop: float = 0.0
    twice: float = 0.0
    delay: float = 0.5
    replay: float = 0.0
    wipe: float = 0.0
    redeliver: float = 0.0
    restart: float = 0.0
    kill: float = 0.0

    @property
    def calm(self) -> bool:
        """Whether neither workers nor the store are hit: then nothing may run twice, and no attempt is lost."""
        return not (self.crash or self.pause or self.refuse or self.lose_answer or self.kill)


@dataclass(frozen=True, slots=True)
class Plan:
    """All of a seed."""

    runs: tuple[RunPlan, ...]
    faults: Faults
    workers: int
    concurrency: int
    local_steps: int
    inline_bytes: int
    faulty_for: float
    garbage: bool = field(default=False)


def plan(rng: random.Random) -> Plan:
    """What the seed of `rng` plays."""
    calm = rng.random() < 0.3
    faults = Faults(
        crash=0.0 if calm else rng.choice((0.0, 0.01, 0.03)),
        pause=0.0 if calm else rng.choice((0.0, 0.005, 0.03)),
        refuse=0.0 if calm else rng.choice((0.0, 0.02)),
        lose_answer=0.0 if calm else rng.choice((0.0, 0.02)),
        drop=rng.choice((0.0, 0.1, 0.3)),
        twice=rng.choice((0.0, 0.1)),
        delay=rng.choice((0.2, 0.5)),
        replay=rng.choice((0.0, 0.5)),
        wipe=rng.choice((0.0, 0.1)),
        redeliver=rng.choice((0.0, 0.5)),
        restart=rng.choice((0.0, 0.0, 0.1, 0.4)),
        kill=0.0 if calm else rng.choice((0.0, 0.2)),
    )
    return Plan(
        runs=tuple(_run(rng, number) for number in range(rng.choice((1, 2, 2, 3)))),
        faults=faults,
        workers=rng.choice((1, 2, 3)),
        concurrency=rng.choice((1, 3)),
        local_steps=rng.choice((1, 2, 50)),
        inline_bytes=rng.choice((0, 65536)),
        faulty_for=rng.uniform(3.0, 10.0),
        garbage=rng.random() < 0.1,
    )


KINDS = (
    *("work", "work", "work", "bare", "flaky", "strict", "bounded", "reviser", "slow", "doomed", "ender"),
    *("waiter", "waiter", "sleeper"),
)


def _run(rng: random.Random, number: int) -> RunPlan:
    kinds = [rng.choice(KINDS) for _ in range(rng.randint(1, 5))]
    undos: tuple[int, ...] = (0, 0, 0, 1, 2, -1)
    ways = rng.random()
    cancelled_in = rng.choice(range(len(kinds))) if rng.random() < 0.1 else None
    retried = rng.random() < 0.6
    # Two kinds of runs of which chance alone makes few: cancelled just when they fail; taken up again when neither
    # they nor their undos could be done.
    if ways < 0.1:
        kinds = ["work", "doomed"]
        cancelled_in = 1
    elif ways < 0.2:
        kinds, undos = ["work", "flaky", "work", "doomed"], (0, -1)
        cancelled_in, retried = None, True
    steps: dict[str, Behaviour] = {}
    entries = []
    for position, kind in enumerate(kinds):
        attempts = rng.choice((1, 3, 6))
        fails = rng.randint(0, attempts) if kind in ("flaky", "slow") else 0
        when = rng.choice((None, None, None, "go", "!go")) if position and ways >= 0.2 else None
        step_id = f"s{position}"
        steps[step_id] = Behaviour(kind, attempts, fails, rng.choice(undos), skipped=when == "!go")
        retries = RetryPolicy(attempts=attempts, base=0.2, cap=0.8)
        entries.append(Step(kind, id=step_id, when=when, retries=retries))
    workflow = Workflow(
        "played",
        entries,
        deadline=rng.uniform(0.5, 8.0) if rng.random() < 0.12 else None,
        on_compensation_failure=rng.choice(("continue", "continue", "stop")),
    )
    return RunPlan(
        f"run{number}",
        workflow,
        steps,
        rng.uniform(0.0, 1.0),
        cancelled_after=rng.uniform(0.0, 4.0) if rng.random() < 0.1 else None,
        cancelled_in=None if cancelled_in is None else f"s{cancelled_in}",
        retried=retried,
    )
