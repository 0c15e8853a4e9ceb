"""Who a step acts for."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SecurityContext"]


@dataclass(frozen=True, slots=True)
class SecurityContext:
    """On whose behalf a run was dispatched, and with which rights.

    `subject` is the stable id of the person or service, `scopes` are the rights that were granted, `issuer` names who
    says so. It holds no token: tokens are never stored.
    """

    subject: str
    scopes: tuple[str, ...] = ()
    issuer: str | None = None
