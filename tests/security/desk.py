"""A service that acts for people: what it is told of the authority, and its workflows."""

from __future__ import annotations

from typing import Any

from tests.security.authority import Authority

from paigeant import Workflow

__all__ = ["MAIL", "flow", "settings_of"]

MAIL = "https://mail.example"
SECRET = "client-secret-of-the-tests"


def settings_of(authority: Authority) -> dict[str, Any]:
    """What a service is told of the authority."""
    authority.clients["desk"] = SECRET
    return {
        "token_issuers": {authority.url: {"jwks_url": authority.jwks_url}},
        "token_audience": authority.own_audience,
        "token_url": authority.token_url,
        "client_id": "desk",
        "client_secret": SECRET,
        "retry_base": 0.1,
    }


def flow(*steps: str) -> Workflow:
    """A workflow of these activities."""
    return Workflow("flow", list(steps))
