"""Paigeant: durable routing-slip workflows for pydantic-ai agents. The public names, and nothing else."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paigeant.activity import ActivityRegistry
    from paigeant.agents.plans import Handoff
    from paigeant.app import Paigeant
    from paigeant.context import StepContext
    from paigeant.errors import (
        NonRetryableError,
        PaigeantError,
        RunConflict,
        RunNotFound,
        RunTimeout,
        UnknownActivity,
        UnknownWorkflow,
        WaitTimeout,
    )
    from paigeant.identity import GrantHandle, SecurityContext
    from paigeant.message import PaigeantMessage
    from paigeant.policy import ItineraryPolicy
    from paigeant.retry import RetryPolicy
    from paigeant.run import Run, RunResult
    from paigeant.secret import SecretToken
    from paigeant.settings import Settings
    from paigeant.slip import RoutingSlip, RunStatus, Step, StepStatus
    from paigeant.store import Store
    from paigeant.transport import Transport
    from paigeant.waits import Sleep, WaitFor
    from paigeant.worker import ActivityWorker
    from paigeant.workflow import Workflow

__all__ = [
    "ActivityRegistry",
    "ActivityWorker",
    "GrantHandle",
    "Handoff",
    "ItineraryPolicy",
    "NonRetryableError",
    "Paigeant",
    "PaigeantError",
    "PaigeantMessage",
    "RetryPolicy",
    "RoutingSlip",
    "Run",
    "RunConflict",
    "RunNotFound",
    "RunResult",
    "RunStatus",
    "RunTimeout",
    "SecretToken",
    "SecurityContext",
    "Settings",
    "Sleep",
    "Step",
    "StepContext",
    "StepStatus",
    "Store",
    "Transport",
    "UnknownActivity",
    "UnknownWorkflow",
    "WaitFor",
    "WaitTimeout",
    "Workflow",
]

_MODULES = {
    "activity": ("ActivityRegistry",),
    "agents.plans": ("Handoff",),
    "app": ("Paigeant",),
    "context": ("StepContext",),
    "errors": (
        "NonRetryableError",
        "PaigeantError",
        "RunConflict",
        "RunNotFound",
        "RunTimeout",
        "UnknownActivity",
        "UnknownWorkflow",
        "WaitTimeout",
    ),
    "identity": ("GrantHandle", "SecurityContext"),
    "message": ("PaigeantMessage",),
    "policy": ("ItineraryPolicy",),
    "retry": ("RetryPolicy",),
    "run": ("Run", "RunResult"),
    "secret": ("SecretToken",),
    "settings": ("Settings",),
    "slip": ("RoutingSlip", "RunStatus", "Step", "StepStatus"),
    "store": ("Store",),
    "transport": ("Transport",),
    "waits": ("Sleep", "WaitFor"),
    "worker": ("ActivityWorker",),
    "workflow": ("Workflow",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


if not TYPE_CHECKING:  # which would take any name for one that is here

    def __getattr__(name: str) -> Any:
        """Load a public name when it is first used, so that importing the package stays quick."""
        if name not in _HOME:
            raise AttributeError(f"module 'paigeant' has no attribute {name!r}")
        value = getattr(import_module(f"paigeant.{_HOME[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
