"""Adoption: a run that this store has never seen goes on here, from what its message tells.

It is for messages that come from another system with a store of its own. From then on the run is this store's alone:
nothing of it goes back. A message is believed, so who may publish to the topics of a worker that adopts may start runs.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

from paigeant import codec, folding
from paigeant.errors import NotAdopted, TokenRejected
from paigeant.forwarder import STORED_PAYLOAD, Forwarder
from paigeant.identity import Mandate
from paigeant.message import JUST_BEGUN, MessageId, PaigeantMessage
from paigeant.observer import Event, Observers
from paigeant.secret import OBO_TOKEN
from paigeant.slip import Executed, Phase, RoutingSlip, RunStatus, Step, StepStatus
from paigeant.store import RunRecord, StepKey, StepRecord, Store

__all__ = ["Adoption"]

_NOT_KEPT = frozenset({STORED_PAYLOAD, JUST_BEGUN, OBO_TOKEN, "jws_signature"})
"""Headers that say something of one message, or hold what no row may."""


class Adoption:
    """Takes over runs for one worker."""

    def __init__(self, store: Store, forwarder: Forwarder, observers: Observers, worker_id: str) -> None:
        self.store = store
        self.forwarder = forwarder
        self.observers = observers
        self.worker_id = worker_id

    async def adopt(self, message: PaigeantMessage) -> None:
        """Record the run of `message`, which the store doesn't know, unless another worker has done so meanwhile.

        Raises NotAdopted for a run of which a part stayed in the store where it began, or whose sender may not start
        any such; StoreUnavailable.
        """
        if not await self.forwarder.envelope.may_start(message):
            reason = f"who signed its message may not start runs of workflow '{message.workflow}'"
            raise NotAdopted(message.workflow_id, reason, stayed=False)
        run, steps, variables = self.records(message)
        if await self.store.adopt_run(run, steps, variables):
            self.observers.observe(
                Event(
                    "run.adopted",
                    run.id,
                    run.workflow,
                    message.step_id,
                    trace_id=run.trace_id,
                    correlation_id=run.correlation_id,
                    worker=self.worker_id,
                )
            )

    def records(self, message: PaigeantMessage) -> tuple[RunRecord, tuple[StepRecord, ...], dict[str, bytes]]:
        """The rows that stand for the run as `message` has it: folded they give its slip and payload again."""
        _check(message)
        slip, payload = message.routing_slip, dict(message.payload)
        done = {entry.step_id for entry in slip.executed if entry.status is not StepStatus.SKIPPED}
        outputs = {name: codec.dump(payload.pop(name)) for name in done & payload.keys()}
        # What is left is the run's input, and variables that its steps have set: a message doesn't say which is which.
        variables = {name: codec.dump(value) for name, value in payload.items()} if slip.executed else {}
        text = codec.dump_sorted(payload)
        run = RunRecord(
            id=message.workflow_id,
            workflow=message.workflow,
            status=RunStatus.RUNNING if slip.ending is None else RunStatus.COMPENSATING,
            input=text,
            input_hash=hashlib.sha256(text).hexdigest(),
            slip=folding.pack_slip(_plan(slip)),
            correlation_id=message.correlation_id,
            trace_id=message.trace_id,
            headers={name: value for name, value in message.headers.items() if name not in _NOT_KEPT},
            ending=slip.ending,
            deadline=slip.deadline,
        )
        return run, (*_recorded(message, outputs), self._due(message)), variables

    def _due(self, message: PaigeantMessage) -> StepRecord:
        due = self.forwarder.next_step(message.workflow_id, message.routing_slip)
        assert due is not None, "a message for which nothing is due was dropped"
        written = MessageId.read(message.message_id)
        slip = message.routing_slip
        return StepRecord(
            *due.key,
            seq=len(slip.executed) + len(slip.undone) + len(slip.not_undone),
            activity=due.activity,
            topic=due.topic,
            status=StepStatus.READY,
            epoch=0 if written is None else written.epoch,
        )


def _check(message: PaigeantMessage) -> None:
    if message.headers.get(STORED_PAYLOAD) == "stored":
        raise NotAdopted(message.workflow_id, "its payload is too large to travel")
    for entry in message.routing_slip.executed:
        if entry.stored:
            raise NotAdopted(
                message.workflow_id, f"the output of step '{entry.step_id}' is too large to travel"
            )
    if not _is_sound(message):
        reason = "its slip doesn't say clearly what there is to do: something has no name, or occurs twice"
        raise NotAdopted(message.workflow_id, reason, stayed=False)
    try:
        Mandate.read(message.headers)
    except TokenRejected as exc:  # recorded, nobody could even look at the run
        raise NotAdopted(message.workflow_id, "for whom it acts can't be read", stayed=False) from exc


def _is_sound(message: PaigeantMessage) -> bool:
    """Whether each step can be a row of its own, and what is to be undone was done and isn't undone yet."""
    slip = message.routing_slip
    done = [entry.step_id for entry in slip.executed]
    steps = [*done, *(step.id for step in slip.itinerary)]
    undos = [undo.step_id for undo in slip.compensations]
    names = [message.workflow_id, *steps, *(entry.activity for entry in slip.executed)]
    names += [name for undo in slip.compensations for name in (undo.activity, undo.topic)]
    return (
        all(names)
        and len(set(steps)) == len(steps)
        and len(set(undos)) == len(undos)
        and set(undos) <= set(done)
        and set(undos).isdisjoint((*slip.undone, *slip.not_undone))
    )


def _plan(slip: RoutingSlip) -> RoutingSlip:
    """The slip from which the recorded steps lead to `slip`."""
    args = {undo.step_id: undo.args for undo in slip.compensations}
    begun = tuple(
        Step(entry.activity, id=entry.step_id, args=args.get(entry.step_id, {})) for entry in slip.executed
    )
    return replace(
        slip,
        itinerary=(*begun, *slip.itinerary),
        executed=(),
        compensations=(),
        ending=None,
        undone=(),
        not_undone=(),
    )


def _recorded(message: PaigeantMessage, outputs: dict[str, bytes]) -> list[StepRecord]:
    """The rows of what was done, and undone, elsewhere."""
    slip = message.routing_slip
    topics = {undo.step_id: undo.topic for undo in slip.compensations}
    rows = [
        StepRecord(
            *StepKey(message.workflow_id, entry.step_id),
            seq=place,
            activity=entry.activity,
            topic=entry.activity,
            status=_status(slip, entry),
            output=outputs.get(entry.step_id),
            undo_topic=topics.get(entry.step_id, entry.activity if _is_settled(slip, entry) else None),
        )
        for place, entry in enumerate(slip.executed)
    ]
    for entry in reversed(slip.executed):
        if _is_settled(slip, entry):
            rows.append(
                StepRecord(
                    *StepKey(message.workflow_id, entry.step_id, Phase.UNDO),
                    seq=len(rows),
                    activity=entry.activity,
                    topic=entry.activity,
                    status=_status(slip, entry),
                )
            )
    return rows


def _is_settled(slip: RoutingSlip, entry: Executed) -> bool:
    return entry.step_id in slip.undone or entry.step_id in slip.not_undone


def _status(slip: RoutingSlip, entry: Executed) -> StepStatus:
    if entry.step_id in slip.undone:
        return StepStatus.COMPENSATED
    return StepStatus.COMPENSATION_FAILED if entry.step_id in slip.not_undone else entry.status
