"""The commands on runs that act for people, and on what that needs."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest
from tests.integration.test_cli import _process_as_it_was, as_json, paigeant, refused
from tests.security.authority import Authority
from tests.security.test_behalf import flow, settings_of

from paigeant import GrantHandle, Paigeant

__all__ = ["_process_as_it_was"]

pytestmark = pytest.mark.usefixtures("_process_as_it_was")


def configure(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    """Put settings into the environment."""
    for name, value in settings.items():
        shown = json.dumps(value) if isinstance(value, dict) else str(value)
        monkeypatch.setenv(f"PAIGEANT_{name.upper()}", shown)


HANDLERS = """
from paigeant import ActivityRegistry, StepContext, Workflow
activity = ActivityRegistry()

@activity.execute(scopes=["mail.read"], retries=0)
async def read(context: StepContext) -> str:
    return context.identity.subject

look = Workflow("look", ["read"])
"""


def test_a_grant_from_the_command_line(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    """`runs show` says for whom a run acts and that it waits for a grant; `runs grant` lets it go on."""
    authority.now = time.time
    Path("handlers.py").write_text(HANDLERS)
    configure(monkeypatch, settings_of(authority))

    async def start() -> None:
        async with Paigeant() as app:
            grant = GrantHandle("over", "ann", authority.url, ("mail.read",))
            await app.dispatch(flow("read"), on_behalf_of=grant, workflow_id="r")

    asyncio.run(start())
    paigeant("run", "handlers.py", "--until-idle")
    shown = paigeant("runs", "show", "r").output
    assert "a fresh grant" in shown
    assert "ann" in shown
    found = as_json("runs", "show", "r")
    assert found["status"] == "waiting"
    assert found["steps"][0]["waits_for"] == ["paigeant.grant"]
    assert found["on_behalf_of"] == {
        "subject": "ann",
        "issuer": authority.url,
        "scopes": ["mail.read"],
        "handle": "over",
    }
    handle = authority.grant("ann", "mail.read", workflow_id="r")
    assert as_json("runs", "grant", "r", handle)["id"] == "r"
    paigeant("run", "handlers.py", "--until-idle")
    assert as_json("runs", "show", "r")["output"] == "ann"


def test_a_token_in_a_command_is_refused(authority: Authority) -> None:
    """A token as an argument is refused without being used, for the list of processes has shown it."""
    said = refused("runs", "grant", "r", authority.token("ann"))
    assert "standard input" in said
    assert "eyJ" not in said


def test_config_check_looks_at_issuers_and_client(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fetches the keys of each issuer, and says what a client lacks."""
    configure(monkeypatch, settings_of(authority))
    found = {part["part"]: (part["ok"], part["message"]) for part in as_json("config", "check")}
    assert found["client"] == (True, f"desk at {authority.token_url}")
    assert found[f"issuer {authority.url}"] == (True, "its keys are there")
    authority.status = 500
    assert "can't be asked" in paigeant("config", "check", code=3).stdout
    authority.status = None
    monkeypatch.delenv("PAIGEANT_CLIENT_SECRET")
    assert "token_url needs client_id" in paigeant("config", "check", code=2).stdout
    monkeypatch.setenv("PAIGEANT_CLIENT_KEY", "garbage")
    said = paigeant("config", "check", code=2).stdout
    assert "the key of client 'desk' can't sign with ES256" in said
    assert "garbage" not in said
