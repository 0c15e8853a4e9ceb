"""Due: the steps and runs that a sweep has to look at, and what is open in each topic."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, and_, case, func, literal_column, or_, select

from paigeant.ledger import MOST_GRACES
from paigeant.rows import KEY
from paigeant.slip import RunStatus, StepStatus
from paigeant.store import OpenTopic
from paigeant.tables import step_executions, workers, workflow_runs

__all__ = ["due_steps", "is_in", "late_runs", "open_topics", "orphan_steps", "waiting_steps"]

# The later of the two: `StepRecord.due_at`.
_due_at = case(
    (step_executions.c.not_before > step_executions.c.created_at, step_executions.c.not_before),
    else_=step_executions.c.created_at,
)


def is_in(status: StepStatus) -> ColumnElement[bool]:
    """Whether a step is in this state, written out, so that it fits the partial indexes of ready and running steps."""
    return step_executions.c.status == literal_column(f"'{status.value}'")


def waiting_steps(now: float) -> Select[Any]:
    """The waiting steps whose time has come."""
    return select(*KEY).where(is_in(StepStatus.WAITING), step_executions.c.wake_at <= now)


def orphan_steps() -> Select[Any]:
    """The running steps of workers that aren't there any more."""
    alive = select(workers.c.id)
    return select(*KEY).where(is_in(StepStatus.RUNNING), step_executions.c.worker.not_in(alive))


def due_steps(
    now: float,
    overdue_since: float | None = None,
    empty: Collection[str] = (),
    *,
    topics: Collection[str] | None = None,
    grace: float = 0.0,
) -> Select[Any]:
    """The ready steps that should have been claimed by now, the longest due first, and since when they are due.

    `overdue_since`: also those that were due then, whenever their message was sent last. `empty`: in these topics also
    those that `ledger.is_resendable`, which stands here once more. `topics`: none of others.
    """
    steps = step_executions.c
    query = select(*KEY, steps.epoch, _due_at.label("due_at")).where(is_in(StepStatus.READY))
    wanted = [steps.wake_at <= now]
    if overdue_since is not None:
        wanted.append(_due_at <= overdue_since)
    if empty:
        may = and_(
            steps.wake_at <= now + (MOST_GRACES - 1) * grace, steps.wake_at + _due_at <= 2 * (now - grace)
        )
        wanted.append(and_(steps.topic.in_(sorted(empty)), may))
    if topics is not None:
        query = query.where(steps.topic.in_(sorted(topics)))
    return query.where(or_(*wanted)).order_by(steps.wake_at if len(wanted) == 1 else _due_at)


def open_topics(connection: Connection, now: float) -> list[OpenTopic]:
    """What is open in each topic that has open steps."""
    steps = step_executions.c
    ready = (
        select(
            steps.topic,
            func.count(),
            func.sum(case((_due_at <= now, 1), else_=0)),
            func.min(case((_due_at <= now, _due_at))),
        )
        .where(is_in(StepStatus.READY))
        .group_by(steps.topic)
    )
    running = select(steps.topic, func.count()).where(is_in(StepStatus.RUNNING)).group_by(steps.topic)
    busy: dict[str, int] = {row[0]: row[1] for row in connection.execute(running)}
    found = {topic: OpenTopic(topic, 0, 0, count, None) for topic, count in busy.items()}
    for topic, count, due, since in connection.execute(ready):
        oldest = None if since is None else now - since
        found[topic] = OpenTopic(topic, due, count - due, busy.get(topic, 0), oldest)
    return [found[topic] for topic in sorted(found)]


def late_runs(now: float) -> Select[Any]:
    """The open runs that are over their deadline."""
    return select(workflow_runs.c.id).where(
        workflow_runs.c.deadline.is_not(None),
        workflow_runs.c.completed_at.is_(None),
        workflow_runs.c.deadline <= now,
        workflow_runs.c.status != RunStatus.COMPENSATING,
    )
