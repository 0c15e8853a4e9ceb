"""The one tree of errors.

A message says what was found, what was expected and what to do; the parts stay attributes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ActivityRejected",
    "ArgumentError",
    "AuthorityUnavailable",
    "ConfigurationError",
    "DuplicateActivity",
    "ExchangeRefused",
    "GrantInvalid",
    "HandlerError",
    "InputInvalid",
    "InvalidCondition",
    "InvalidDefinition",
    "InvalidTransition",
    "KeyUnknown",
    "KeysUnavailable",
    "MessageInvalid",
    "MessageTooLarge",
    "NonRetryableError",
    "NotAdopted",
    "OutcomeUnknown",
    "OutputInvalid",
    "OutsideStep",
    "PaigeantError",
    "PolicyViolation",
    "RequestDenied",
    "RequestNotFound",
    "RunConflict",
    "RunNotFound",
    "RunTimeout",
    "SchemaMismatch",
    "ScopeMissing",
    "StoreDamaged",
    "StoreRefused",
    "StoreUnavailable",
    "TokenExpired",
    "TokenRejected",
    "TopicUnavailable",
    "TransportUnavailable",
    "UnitUnreadable",
    "UnknownActivity",
    "UnknownWorkflow",
    "UnsupportedVersion",
    "WaitTimeout",
    "nearest",
]


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message that helps with a mistyped `name`: the closest known names, or all of them."""
    names = sorted(known)
    if not names:
        return "none is known"
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"did you mean '{close[0]}'? known: {shown}" if close else f"known: {shown}"


class PaigeantError(Exception):
    """Anything that Paigeant itself reports."""


class ConfigurationError(PaigeantError):
    """A setting is unknown, misspelt or has a value it can't have."""


class HandlerError(PaigeantError):
    """A handler module can't be found or doesn't load."""


class InvalidDefinition(PaigeantError):
    """A workflow, step or activity is defined in a way that can't work."""


class DuplicateActivity(InvalidDefinition):
    """Two activities, or two compensations of one activity, have the same name."""


class InvalidCondition(InvalidDefinition):
    """A `when` expression doesn't compile, fails, or gives something other than true or false."""


class UnknownWorkflow(PaigeantError):
    """No loaded workflow has this name."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        self.name = name
        names = list(known)
        none = "none is known: dispatch the Workflow itself, or give it to Paigeant(workflows=[...])"
        super().__init__(f"no workflow '{name}' is defined here; {nearest(name, names) if names else none}")


class UnknownActivity(PaigeantError):
    """No registry at hand knows an activity of this name."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        self.name = name
        super().__init__(f"no activity '{name}' is registered here; {nearest(name, known)}")


class InputInvalid(PaigeantError):
    """The input of a run isn't what its workflow takes, or isn't JSON."""


class NonRetryableError(PaigeantError):
    """Raised by an activity: this attempt failed and no further one can help."""


class ActivityRejected(NonRetryableError):
    """A step fails for good for a reason that Paigeant found itself."""


class ArgumentError(ActivityRejected):
    """A parameter of an activity can't be resolved or doesn't fit its annotation."""


class OutputInvalid(ActivityRejected):
    """What an activity returned can't be written as JSON."""


class OutcomeUnknown(ActivityRejected):
    """Something that may be done at most once was begun, and whether it took effect isn't known."""


class UnitUnreadable(ActivityRejected):
    """What was recorded of a unit of a step can't be read by the code that is there now."""


class PolicyViolation(ActivityRejected):
    """A revision of the itinerary goes beyond what the policy of the run allows."""


class TokenRejected(ActivityRejected):
    """A token isn't one that is accepted here, and never will be. `reason` is one of a fixed set of words."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        super().__init__(f"{reason}: the token isn't accepted: {detail}")


class ScopeMissing(ActivityRejected):
    """A step needs a right that the person for whom its run acts has not granted."""


class ExchangeRefused(ActivityRejected):
    """An authorization server won't give the token that was asked for, however often it is asked."""


class TokenExpired(PaigeantError):
    """A token was good and isn't any more, or a message that should carry one has none."""


class GrantInvalid(PaigeantError):
    """A grant is over, was taken back, or belongs to another run."""


class OutsideStep(PaigeantError):
    """Something was asked for that only a step has, and no step is being done."""


class RunConflict(PaigeantError):
    """A run of this id exists and was started with another workflow or input."""

    def __init__(self, workflow_id: str, found: str) -> None:
        self.workflow_id = workflow_id
        super().__init__(
            f"run '{workflow_id}' already exists with {found}; "
            "dispatch the same workflow and input again to get that run, or choose another id"
        )


class RunNotFound(PaigeantError):
    """The store knows no run of this id."""

    def __init__(self, workflow_id: str) -> None:
        self.workflow_id = workflow_id
        super().__init__(f"no run '{workflow_id}' in this store; `paigeant runs list` shows what is there")


class RequestNotFound(PaigeantError):
    """There is no request of this id."""

    def __init__(self, request_id: str) -> None:
        super().__init__(f"no request '{request_id}'; `paigeant requests list` shows those that wait")
        self.request_id = request_id


class RequestDenied(NonRetryableError):
    """Somebody has said that there will be no answer to what a step asked."""


class WaitTimeout(NonRetryableError, TimeoutError):
    """What a step waited for has not come in time. That is recorded, so that no further attempt waits again."""


class NotAdopted(PaigeantError):
    """A run that began in another store can't go on in this one."""

    def __init__(self, workflow_id: str, reason: str, *, stayed: bool = True) -> None:
        self.workflow_id = workflow_id
        end = ", and stayed in the store where the run began" if stayed else ""
        super().__init__(f"not_adopted: run '{workflow_id}' is unknown here, and {reason}{end}")


class InvalidTransition(PaigeantError):
    """A run can't be cancelled, retried or signalled in the state that it is in."""


class RunTimeout(PaigeantError, TimeoutError):
    """The run didn't end within the time that the caller wanted to wait; it goes on."""


class MessageInvalid(PaigeantError):
    """A body is not a message in the one wire format. `reason` is one of a fixed set of words."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        super().__init__(f"{reason}: {detail}")


class UnsupportedVersion(MessageInvalid):
    """A message of a major version that this code doesn't speak."""

    def __init__(self, found: object, spoken: str) -> None:
        super().__init__(
            "unsupported_version", f"spec_version is {repr(found)[:100]}, this worker speaks {spoken}"
        )


class MessageTooLarge(MessageInvalid):
    """A message is larger than the limit allows."""

    def __init__(self, size: int, limit: int) -> None:
        self.size, self.limit = size, limit
        super().__init__(
            "too_large",
            f"the message has {size:,} bytes, the limit is {limit:,}; "
            "pass a reference instead of the data, or raise max_message_bytes",
        )


class StoreUnavailable(PaigeantError):
    """The store can't be reached, or can't write now."""


class StoreDamaged(StoreUnavailable):
    """What the store has on its disk can't be read; waiting mends nothing."""


class StoreRefused(StoreUnavailable):
    """The store, used before, now refuses what is asked of it: a password, right or table was changed meanwhile."""


class TransportUnavailable(PaigeantError):
    """The transport can't be reached, or can't take a message now."""


class TopicUnavailable(TransportUnavailable):
    """The broker is there and takes no message for this topic now; for others it may."""


class AuthorityUnavailable(PaigeantError):
    """A server that issues tokens or publishes keys can't be reached, or answers with something else."""

    def __init__(self, url: str, reason: str) -> None:
        self.url, self.reason = url, reason
        super().__init__(f"{url} can't be asked: {reason}")


class KeysUnavailable(AuthorityUnavailable):
    """There are no public keys to verify with, or those that there were are too old to be trusted."""

    def __init__(self, url: str) -> None:
        super().__init__(url, "there are no keys from there that are less than a day old")


class KeyUnknown(AuthorityUnavailable):
    """A set of public keys doesn't have one, or not yet.

    The set was fetched `age` seconds ago, and is asked for again in `again_in` seconds at the earliest. `is_away`: it
    couldn't be had the last time.
    """

    def __init__(self, url: str, kid: str, *, age: float, again_in: float, is_away: bool) -> None:
        self.kid, self.age, self.again_in, self.is_away = kid, age, again_in, is_away
        super().__init__(url, f"it publishes no key '{kid[:100]}', or not yet")


class SchemaMismatch(PaigeantError):
    """The tables of a database don't fit this version of the code."""
