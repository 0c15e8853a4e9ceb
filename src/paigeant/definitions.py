"""Workflows and issuers as `paigeant.yaml` describes them: what may stand there, and what is made of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from paigeant.errors import ConfigurationError, nearest
from paigeant.https import check_url
from paigeant.identity import ALGORITHMS, Issuer
from paigeant.policy import ItineraryPolicy
from paigeant.retry import RetryPolicy
from paigeant.slip import Step
from paigeant.waits import Sleep, WaitFor
from paigeant.workflow import Workflow

__all__ = ["check_keys", "issuer_from", "workflow_from"]


def workflow_from(name: str, fields: Any) -> Workflow:
    """The workflow that a file describes: a list of steps, or the fields of `Workflow`.

    Raises ConfigurationError, InvalidDefinition.
    """
    if isinstance(fields, list):
        fields = {"steps": fields}
    if not isinstance(fields, Mapping):
        raise ConfigurationError(
            f"workflow '{name}' is a list of steps or a mapping with `steps`, found {fields!r}"
        )
    known = ("name", "steps", "deadline", "policy", "on_compensation_failure", "description")
    check_keys(fields, known, f"workflow '{name}' has")
    values = dict(fields)
    if values.pop("name", name) != name:
        raise ConfigurationError(f"workflow '{name}' has the name {fields['name']!r}; expected one of them")
    steps = values.get("steps") or ()
    values["steps"] = [_step_from(name, step) for step in steps] if isinstance(steps, list) else steps
    if values.get("policy") is not None:
        if not isinstance(values["policy"], Mapping):
            raise ConfigurationError(
                f"the policy of workflow '{name}' is a mapping with fields such as `allowed` or `max_added`, "
                f"found {values['policy']!r}"
            )
        limits = [limit.name for limit in dataclasses.fields(ItineraryPolicy)]
        check_keys(values["policy"], limits, f"the policy of workflow '{name}' has")
        values["policy"] = ItineraryPolicy(**values["policy"])
    return Workflow(name, **values)


def _step_from(workflow: str, fields: Any) -> str | Step:
    if isinstance(fields, str):
        return fields
    kinds = [kind for kind in _STEPS if isinstance(fields, Mapping) and kind in fields]
    if len(kinds) != 1:
        raise ConfigurationError(
            f"a step of workflow '{workflow}' is an activity's name or a mapping with one of "
            f"{', '.join(f'`{kind}`' for kind in _STEPS)}, found {fields!r}"
        )
    made, known = _STEPS[kinds[0]]
    values = dict(fields)
    first = values.pop(kinds[0])
    check_keys(values, (kinds[0], *known), f"a step of workflow '{workflow}' has")
    if isinstance(values.get("retries"), Mapping):
        policies = [field.name for field in dataclasses.fields(RetryPolicy)]
        check_keys(values["retries"], policies, f"the retries of a step of workflow '{workflow}' have")
        values["retries"] = RetryPolicy(**values["retries"])
    return made(first, **values)


_STEPS: Mapping[str, tuple[Callable[..., Step], tuple[str, ...]]] = {
    "activity": (Step, ("id", "args", "when", "retries", "timeout", "topic")),
    "sleep": (Sleep, ("id", "when")),
    "wait_for": (WaitFor, ("timeout", "default", "id", "when")),
}
"""What a step of a file is made by, and its other fields, for each key that says what it is."""


def issuer_from(name: str, fields: Any) -> Issuer:
    """The issuer that a file describes: the URL of its keys, or the fields of `Issuer`. Raises ConfigurationError."""
    if isinstance(fields, str):
        fields = {"jwks_url": fields}
    where = f"issuer '{name}'"
    if not isinstance(fields, Mapping) or not isinstance(fields.get("jwks_url"), str):
        raise ConfigurationError(f"{where} is the URL of its keys, or a mapping with `jwks_url`")
    check_keys(fields, ("jwks_url", "algorithms", "token_type"), f"{where} has")
    values = dict(fields)
    check_url(values["jwks_url"], f"jwks_url of {where}")
    if "algorithms" in values:
        listed = values["algorithms"]
        unknown = [one for one in listed if one not in ALGORITHMS] if isinstance(listed, list) else [listed]
        if unknown or not listed:
            raise ConfigurationError(
                f"algorithms of {where} are some of {', '.join(ALGORITHMS)}, found {listed!r}"
            )
        values["algorithms"] = tuple(listed)
    if not isinstance(values.get("token_type", ""), (str, type(None))):
        raise ConfigurationError(f"token_type of {where} is a text such as at+jwt, or null")
    return Issuer(name, **values)


def check_keys(values: Mapping[str, Any], known: Any, where: str) -> None:
    """Raise ConfigurationError for a key that isn't `known`, with the nearest that is. `where` begins the sentence."""
    for key in values:
        if key not in known:
            raise ConfigurationError(f"{where} an unknown key '{key}'; {nearest(str(key), known)}")
