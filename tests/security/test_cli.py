"""The commands on runs that act for people, and on what that needs."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.commands import as_json, as_the_process_was, paigeant, refused
from tests.security.authority import Authority
from tests.security.desk import flow, settings_of

from paigeant import GrantHandle, Paigeant
from paigeant.cli import session
from paigeant.cli.behalf import read_given
from paigeant.errors import InputInvalid


@pytest.fixture(autouse=True)
def _process_as_it_was() -> Iterator[None]:
    with as_the_process_was():
        yield


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
    Path("input.json").write_text("{}")
    for command in (("runs", "grant", "r"), ("dispatch", "look", "input.json", "--on-behalf-of")):
        said = refused(*command, authority.token("ann"))
        assert "standard input" in said
        assert "eyJ" not in said


def test_a_run_is_dispatched_with_a_token(
    authority: Authority, monkeypatch: pytest.MonkeyPatch, redis_url: str
) -> None:
    """It comes from a file, a variable or standard input, travels with the messages, and is recorded nowhere."""
    authority.now = time.time
    Path("handlers.py").write_text(HANDLERS)
    Path("input.json").write_text("{}")
    place = {"transport_url": redis_url, "namespace": f"behalf-{time.time_ns()}"}
    configure(monkeypatch, {**settings_of(authority), **place})
    tokens = [authority.token("ann", "mail.read", jti=str(n)) for n in range(3)]
    private("token", f"{tokens[0]}\n")
    monkeypatch.setenv("OBO_TOKEN", tokens[1])
    command = ("dispatch", "look", "input.json", "--handlers", "handlers.py", "--on-behalf-of")
    assert as_json(*command, "token", "--id", "file") == {"id": "file"}
    assert as_json(*command, "env:OBO_TOKEN", "--id", "variable") == {"id": "variable"}
    assert as_json(*command, "-", "--id", "input", input=f" {tokens[2]}\n") == {"id": "input"}
    paigeant("run", "handlers.py", "--until-idle")
    for run in ("file", "variable", "input"):
        found = as_json("runs", "show", run)
        assert (found["output"], found["on_behalf_of"]["handle"]) == ("ann", None)
    recorded = b"".join(path.read_bytes() for path in Path().glob("paigeant.db*"))
    assert all(token.encode() not in recorded for token in tokens)


def test_a_run_is_dispatched_with_a_grant(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grant is given in JSON, as `runs show` tells it, to `dispatch` and to `runs grant`."""
    authority.now = time.time
    Path("handlers.py").write_text(HANDLERS)
    configure(monkeypatch, settings_of(authority))
    Path("input.json").write_text("{}")
    about = {"subject": "ann", "issuer": authority.url, "scopes": ["mail.read"]}
    private("grant.json", json.dumps({"handle": "over", **about}))
    command = ("dispatch", "look", "input.json", "--handlers", "handlers.py", "--id", "r", "--on-behalf-of")
    assert as_json(*command, "grant.json") == {"id": "r"}
    assert as_json(*command, "grant.json") == {"id": "r"}, "the same once more is the same run"
    paigeant("run", "handlers.py", "--until-idle")
    found = as_json("runs", "show", "r")
    assert (found["status"], found["on_behalf_of"]) == ("waiting", {"handle": "over", **about})
    fresh = {**found["on_behalf_of"], "handle": authority.grant("ann", "mail.read", workflow_id="r")}
    assert as_json("runs", "grant", "r", "-", input=json.dumps(fresh))["id"] == "r"
    paigeant("run", "handlers.py", "--until-idle")
    assert as_json("runs", "show", "r")["output"] == "ann"


def test_who_cannot_be_asked_and_what_is_no_proof(
    authority: Authority, monkeypatch: pytest.MonkeyPatch, redis_url: str
) -> None:
    """A token that proves nothing is wrong use (2), a key set out of reach a server that can't be reached (3)."""
    authority.now = time.time
    Path("handlers.py").write_text(HANDLERS)
    Path("input.json").write_text("{}")
    place = {"transport_url": redis_url, "namespace": f"behalf-{time.time_ns()}"}
    configure(monkeypatch, {**settings_of(authority), **place})
    command = ("dispatch", "look", "input.json", "--handlers", "handlers.py", "--on-behalf-of", "-")
    for token, code, says in (
        (authority.token("ann", "mail.read", aud="https://other.example"), 2, "audience"),
        (authority.token("ann", "mail.read", lifetime=-90), 2, "expired"),
        (authority.token("ann", "mail.read"), 3, "can't be asked"),
    ):
        authority.status = 500 if code == 3 else None
        said = refused(*command, input=token, code=code)
        assert says in said
        assert "eyJ" not in said
    assert as_json("runs", "list") == []


def private(name: str, text: str) -> None:
    """Write a file that only its owner can read."""
    Path(name).write_text(text)
    Path(name).chmod(0o600)


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


def test_config_check_fetches_the_key_set_of_the_trust_file(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that can't be fetched is told of here, and not first when somebody's messages are refused."""
    paigeant("keys", "generate")
    trust = {"version": 1, "keys": [], "jwks": {"url": authority.jwks_url, "run": ["*"]}}
    Path("trust.json").write_text(json.dumps(trust))
    monkeypatch.setenv("PAIGEANT_SIGNING", "sign")
    monkeypatch.setenv("PAIGEANT_TRUST_FILE", "trust.json")
    found = {part["part"]: (part["ok"], part["message"]) for part in as_json("config", "check")}
    assert found[f"trusted keys {authority.jwks_url}"] == (True, "its keys are there")
    authority.status = 500
    assert "can't be asked" in paigeant("config", "check", code=3).stdout
    Path("trust.json").write_text("{}")
    assert "trusted keys" not in paigeant("config", "check", code=2).stdout


def test_bytes_that_are_no_text_show_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a secret comes from, an error says that it is no text, and not what it is."""

    class Terminal:
        def isatty(self) -> bool:
            return True

    with monkeypatch.context() as patch:
        patch.setattr("sys.stdin", Terminal())
        patch.setattr("getpass.getpass", lambda _: "canary\udcff")
        with pytest.raises(InputInvalid, match="it is no text") as caught:
            read_given("-")
    assert caught.value.__context__ is None
    configure(monkeypatch, {"client_id": "desk", "token_url": "https://idp.example/token"})
    monkeypatch.setenv("PAIGEANT_CLIENT_SECRET", "canary\udcff")
    said = paigeant("config", "check", code=2).output
    assert "the secret of client 'desk' is no text in UTF-8" in said
    assert "canary" not in said


def test_only_an_argument_that_is_no_text_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """What else can't be written in UTF-8 may be a key from the environment."""

    def fail(text: str) -> None:
        text.encode()

    monkeypatch.setattr(session, "read_settings", lambda: fail("canary\udcff"))
    assert "canary" not in refused("runs", "list")
    monkeypatch.setattr(session, "read_settings", lambda: fail("order\udcff"))
    assert "'order\\udcff' is not a text in UTF-8" in refused("runs", "show", "order\udcff")
