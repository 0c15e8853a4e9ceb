"""The W3C trace context of a run: what callers hand on of theirs, and what travels in its messages' headers.

Source: W3C Trace Context, https://www.w3.org/TR/trace-context-2/
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

__all__ = ["MOST_STATE", "begun", "put", "taken", "trace_id"]

MOST_STATE = 512
"""Characters of a tracestate that travel; the standard asks for no more. Each message of the run has them."""

_MOST_ENTRIES = 32
_TRACEPARENT = re.compile(
    r"(?P<version>(?!ff)[0-9a-f]{2})-(?P<trace>(?!0{32})[0-9a-f]{32})-(?P<span>(?!0{16})[0-9a-f]{16})"
    r"-(?P<flags>[0-9a-f]{2})(?P<more>-.*)?"
)
_STATE_ENTRY = re.compile(
    r"(?:[a-z][a-z0-9_*/-]{0,255}|[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13})"
    r"=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
)


def taken(headers: Mapping[str, str]) -> tuple[str, str]:
    """The traceparent and the tracestate among the headers that a caller hands on; empty for what is none.

    Callers hand on what a request of theirs had, which may be anything. What belongs to no trace, or to one that isn't
    taken over, counts for nothing.
    """
    parent = _traceparent(headers.get("traceparent", ""))
    return parent, _tracestate(headers["tracestate"]) if parent and "tracestate" in headers else ""


def begun() -> str:
    """The traceparent of a new trace."""
    # Random as the standard asks, and not from `random`: a program that sets the seed of that would have the ids of the
    # runs that it has started before.
    found = os.urandom(24).hex()
    return f"00-{found[:32]}-{found[32:]}-01"


def trace_id(traceparent: str) -> str:
    """The id of its trace."""
    return traceparent.split("-")[1]


def put(headers: dict[str, str], traceparent: str, tracestate: str) -> dict[str, str]:
    """`headers`, which now have this trace context and no other."""
    headers["traceparent"] = traceparent
    if tracestate:
        headers["tracestate"] = tracestate
    else:
        headers.pop("tracestate", None)
    return headers


def _traceparent(given: str) -> str:
    """A traceparent as this version of the standard writes it; empty for what is none, which starts a new trace."""
    found = _TRACEPARENT.fullmatch(given.strip().lower())
    if found is None or (found["version"] == "00" and found["more"]):
        return ""
    return f"00-{found['trace']}-{found['span']}-{found['flags']}"


def _tracestate(given: str) -> str:
    """A tracestate as it travels: without what is too long of it; empty for what is none.

    Entries are left out in the order of section 3.3: those of more than 128 characters first, then the last ones.
    """
    entries = [entry for each in given.split(",", 2 * _MOST_ENTRIES) if (entry := each.strip(" \t"))]
    if len(entries) > _MOST_ENTRIES or not all(map(_STATE_ENTRY.fullmatch, entries)):
        return ""
    if len({entry.partition("=")[0] for entry in entries}) < len(entries):
        return ""
    while sum(map(len, entries)) + len(entries) - 1 > MOST_STATE:
        long = [number for number, entry in enumerate(entries) if len(entry) > 128]
        del entries[long[-1] if long else -1]
    return ",".join(entries)
