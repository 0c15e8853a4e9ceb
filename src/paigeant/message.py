"""PaigeantMessage, the envelope that travels: encode and decode, the one wire format (JSON, version 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple
from urllib.parse import quote, unquote

from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError

from paigeant.clock import LAST_INSTANT
from paigeant.codec import MAX_DEPTH, parse_strict
from paigeant.counts import LARGEST_COUNT, is_count
from paigeant.errors import InvalidDefinition, MessageInvalid, MessageTooLarge, UnsupportedVersion
from paigeant.slip import Compensation, Phase, RoutingSlip, Step, is_text
from paigeant.values import evolved

if TYPE_CHECKING:
    from pydantic import ConfigDict

__all__ = [
    "DEFAULT_LIMIT_BYTES",
    "JUST_BEGUN",
    "SENT_FROM",
    "SPEC_VERSION",
    "MessageId",
    "PaigeantMessage",
    "Seal",
    "decode",
    "encode",
]

SPEC_VERSION = "1.0"
"""What this code writes. A reader refuses fields that it does not know, so a new field is a new major."""

DEFAULT_LIMIT_BYTES = 1024 * 1024

SENT_FROM = "paigeant-sent-from"
"""A header of a message that is about to be sealed: the topic of the step that its sender has just recorded."""

JUST_BEGUN = "paigeant-just-begun"
"""A header of a message that was opened: it counts only as the first of its run, which it says of itself to be."""


@dataclass(frozen=True, slots=True)
class Seal:
    """What a signed message says of itself: for which deployment and topic it is, and from when to when it holds.

    The instants are whole seconds since 1970 (UTC) by the signer's clock. `sent_from`: the topic of the step that the
    one who signs has recorded. `obo_hash`: the SHA-256, in hexadecimal digits, of the token in front of the body.
    """

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}

    deployment: str
    topic: str
    issued_at: int
    expires_at: int
    sent_from: str | None = None
    obo_hash: str | None = None


@dataclass(frozen=True)
class PaigeantMessage:
    """A wake-up plus travel document: it says which step of which run is due, and carries what that step needs.

    Losing, doubling or reordering messages is harmless: the store decides what has happened. `payload` holds the run's
    input, variables and the outputs of its steps under their ids. `headers` are `traceparent`, and `obo_token` and
    `jws_signature`, which travel in front of the body. `seal` is what a signature vouches for besides.
    """

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}

    message_id: str
    workflow_id: str
    routing_slip: RoutingSlip
    payload: Mapping[str, Any] = field(default_factory=dict)
    workflow: str = ""
    correlation_id: str = ""
    trace_id: str = ""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)  # a token may be among them
    spec_version: str = SPEC_VERSION
    seal: Seal | None = None

    @property
    def due(self) -> Step | Compensation | None:
        """What this message wakes: the next step, or the next undo of a run that is being undone."""
        return self.routing_slip.next_step() or self.routing_slip.next_undo()

    @property
    def phase(self) -> Phase:
        """Whether the step is to be done or undone."""
        return Phase.DO if self.routing_slip.ending is None else Phase.UNDO

    @property
    def step_id(self) -> str:
        """The id of the step that is due; empty when none is."""
        match self.due:
            case Step(id=step_id) | Compensation(step_id=step_id):
                return step_id
            case None:
                return ""

    def evolve(self, **changes: Any) -> PaigeantMessage:
        """A copy with `changes`."""
        return evolved(self, **changes)


class MessageId(NamedTuple):
    """What the id of a message says: the run and step that it wakes, and the claim (epoch) that it was written after.

    The same message sent again has the same id, so that a transport which knows it needn't keep it twice.
    """

    workflow_id: str
    step: str
    phase: str
    epoch: int

    def __str__(self) -> str:
        return f"{quote(self.workflow_id, _PLAIN)}/{quote(self.step, _PLAIN)}/{self.phase}/{self.epoch}"

    @classmethod
    def read(cls, text: str) -> MessageId | None:
        """The parts of an id; None for one that wasn't made here."""
        match text.split("/"):
            case [workflow_id, step, phase, epoch] if _is_epoch(epoch):
                return cls(unquote(workflow_id), unquote(step), phase, int(epoch))
            case _:
                return None


def _is_epoch(text: str) -> bool:
    # Anybody may write an id, and a database's whole numbers end at 63 bits.
    return text.isascii() and text.isdecimal() and len(text) <= 18


_PLAIN = ":@+ "
"""Stay readable in an id; a slash in a run's or step's own id doesn't."""


_AROUND = 4
"""How deep a value stands in a message at most: the arguments of a step in the itinerary of the slip."""


@cache
def _adapter() -> TypeAdapter[PaigeantMessage]:
    return TypeAdapter(PaigeantMessage)


def encode(message: PaigeantMessage, *, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> bytes:
    """The body of `message`. Raises MessageTooLarge, or MessageInvalid for a value that isn't JSON."""
    try:
        body = _adapter().dump_json(message, exclude_defaults=True)
    except (PydanticSerializationError, ValueError) as exc:
        raise MessageInvalid("not_json", " ".join(str(exc).split())) from exc
    if message.spec_version == SPEC_VERSION:  # a default is left out above; this one a reader always needs
        body = b'{"spec_version":"%s",%s' % (SPEC_VERSION.encode(), body[1:])
    if len(body) > limit_bytes:
        raise MessageTooLarge(len(body), limit_bytes)
    return body


def decode(body: bytes, *, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> PaigeantMessage:
    """The message in `body`, checked in this order: size, strict JSON, version, every field.

    Raises MessageInvalid; its `reason` is too_large, not_utf8, not_json, duplicate_key, not_a_number,
    number_out_of_range, lone_surrogate, too_deep, unsupported_version or wrong_shape.
    """
    if len(body) > limit_bytes:
        raise MessageTooLarge(len(body), limit_bytes)
    value = parse_strict(body, max_depth=MAX_DEPTH + _AROUND)
    if not isinstance(value, dict):
        raise MessageInvalid("wrong_shape", f"a message is an object, found {type(value).__name__}")
    version = value.get("spec_version")
    major = version.split(".")[0] if isinstance(version, str) else None
    if major != SPEC_VERSION.split(".")[0]:
        raise UnsupportedVersion(version, SPEC_VERSION)
    try:
        message = _adapter().validate_json(body, strict=True)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "message"
        raise MessageInvalid("wrong_shape", f"{place}: {first['msg']}") from exc
    except InvalidDefinition as exc:
        raise MessageInvalid("wrong_shape", str(exc)) from exc
    _check_texts(message)
    _check_numbers(message.routing_slip)
    return message


def _check_texts(message: PaigeantMessage) -> None:
    """Raise MessageInvalid for an id or a name that not every database can hold."""
    slip = message.routing_slip
    texts = [
        message.message_id,
        message.workflow_id,
        message.workflow,
        message.correlation_id,
        message.trace_id,
    ]
    for entry in slip.executed:
        texts += (entry.step_id, entry.activity)
    for undo in slip.compensations:
        texts += (undo.step_id, undo.activity, undo.topic)
    texts += (*slip.undone, *slip.not_undone)
    if not is_text("".join(texts)):
        unfit = next((text for text in texts if not is_text(text)), "")
        raise MessageInvalid(
            "wrong_shape", f"an id or a name has control characters or half a character: {unfit[:100]!r}"
        )


def _check_numbers(slip: RoutingSlip) -> None:
    """Raise MessageInvalid for a count or an instant that no sender of ours writes, and no database takes."""
    if slip.deadline is not None and not 0 <= slip.deadline <= LAST_INSTANT:
        raise MessageInvalid(
            "number_out_of_range",
            f"routing_slip.deadline: {slip.deadline!r} is no second up to the year 9999",
        )
    depths = [step.depth for step in slip.itinerary]
    for what, counts in (("added", [slip.added]), ("depth of a step", depths)):
        if counts and not 0 <= min(counts) <= max(counts) <= LARGEST_COUNT:
            unfit = next(count for count in counts if not is_count(count, 0))
            raise MessageInvalid(
                "number_out_of_range", f"routing_slip: {what} is {unfit}, expected 0 to {LARGEST_COUNT}"
            )
