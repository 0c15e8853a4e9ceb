"""A canary: the text of a token is sent down every path, and found nowhere but on the wire and in memory."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.test_waits import parked
from tests.integration.workers import working
from tests.security.authority import Authority
from tests.security.test_behalf import MAIL, Watcher, flow, settings_of

from paigeant import ActivityRegistry, Paigeant, RunStatus, SecretToken, Settings, StepContext
from paigeant.behalf import Behalf
from paigeant.observers.logs import configure

registry = ActivityRegistry()
TOKENS: list[str] = []
PATIENCE = 30.0


@registry.execute(scopes=["mail.send"], retries=0)
async def leak(how: str, context: StepContext) -> Any:
    """Tries to leave its token somewhere."""
    token = await context.token(audience=MAIL, scopes=["mail.send"])
    TOKENS.append(token.reveal())
    match how:
        case "error":
            raise RuntimeError(f"401 for Bearer {token.reveal()}")
        case "cause":
            try:
                raise ValueError(f"bad {token.reveal()}")
            except ValueError as exc:
                raise RuntimeError(f"the call failed: {exc!r}") from exc
        case "log":
            context.log.info("calling with %s and %r", token, {"token": token})
            return "logged"
        case "output":
            return {"answer": f"you sent {token.reveal()}"}
        case "variable":
            await context.save_variable("kept", token.reveal())
        case "once":
            return await context.once("call", lambda: token)
        case "wait":
            await context.wait_for("never")
    return None


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """All log lines of the process, down to the debug level."""
    own, root = logging.getLogger("paigeant"), logging.getLogger()
    before = [(one, list(one.handlers), one.level, one.propagate) for one in (own, root)]
    stream = io.StringIO()
    configure(level=logging.DEBUG, stream=stream)
    yield stream
    for one, handlers, level, propagate in before:
        one.handlers[:], one.level, one.propagate = handlers, level, propagate
        one.setLevel(level)


@pytest.mark.parametrize("transport", ["memory", "redis"])
async def test_a_token_is_found_nowhere(
    authority: Authority, lines: io.StringIO, transport: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Not in a row, a log line, an event, an error, a dead letter or in what commands print, whatever goes wrong."""
    TOKENS.clear()
    authority.now = time.time
    url = "memory://" if transport == "memory" else f"{request.getfixturevalue('redis_url')}"
    store = f"sqlite:///{tmp_path}/runs.db"
    settings = Settings(
        transport_url=url,
        store_url=store,
        namespace=f"canary-{tmp_path.name}-{time.time_ns()}",
        **settings_of(authority),
    )
    watcher = Watcher()
    token = authority.token("ann", "mail.send")
    ended = {}
    async with Paigeant(settings, activities=registry, observers=[watcher]) as app:
        app.dispatcher.behalf = Behalf()  # so that what is wrong with a token is found by the worker
        async with working(app.worker()):
            for how in ("log", "error", "cause", "output", "variable", "once"):
                run = await app.dispatch(flow("leak"), {"how": how}, on_behalf_of=token, workflow_id=how)
                ended[how] = (await run.wait(PATIENCE)).status
            bad = authority.token("ann", "mail.send", cnf={"jkt": "x"})
            run = await app.dispatch(flow("leak"), {"how": "log"}, on_behalf_of=bad, workflow_id="bad")
            ended["bad"] = (await run.wait(PATIENCE)).status
            run = await app.dispatch(flow("leak"), {"how": "wait"}, on_behalf_of=token, workflow_id="wait")
            await parked(run)
            stale = authority.token("ann", "mail.send", lifetime=-90)
            run = await app.dispatch(flow("leak"), {"how": "log"}, on_behalf_of=stale, workflow_id="stale")
            await parked(run)
            await run.grant(SecretToken(token))
            ended["stale"] = (await run.wait(PATIENCE)).status
        message = app.forwarder.letter(
            (await app.forwarder.renewed(_with_token(await _message(app, "wait"), token))), "nobody", epoch=7
        )
        await app.transport.publish("nobody", message.message)
        received = await anext(app.transport.subscribe("nobody"))
        assert received.headers["obo_token"] == token
        await app.transport.dead_letter(received.message_id, "unwanted: a message with a token")
        letters = await app.store.list_dead_letters()
        assert len(letters) == 1
        details = [repr(await app.run(name).detail()) for name in ended]
        letter = await app.store.load_dead_letter(letters[0].id)
    assert ended == {
        "log": RunStatus.COMPLETED,
        "error": RunStatus.FAILED,
        "cause": RunStatus.FAILED,
        "output": RunStatus.FAILED,
        "variable": RunStatus.FAILED,
        "once": RunStatus.FAILED,
        "bad": RunStatus.FAILED,
        "stale": RunStatus.COMPLETED,
    }
    assert letter is not None
    assert b"obo_token" not in letter.body, "it is cut off"
    secrets = [token, bad, stale, *TOKENS]
    signatures = [secret.rpartition(".")[2] for secret in secrets]
    files = b"".join(path.read_bytes() for path in tmp_path.iterdir() if path.is_file())  # noqa: ASYNC240
    places = {
        "rows": files.decode("latin-1"),
        "details": "".join(details),
        "logs": lines.getvalue(),
        "events": repr(watcher.events),
        "dead letter": repr(letter),
        "message": repr(received),
    }
    for place, text in places.items():
        assert text, place
        for secret in (*secrets, *signatures):
            assert secret not in text, place
    assert "401 for Bearer ***" in places["logs"], "the failure was logged, without the token"


def _with_token(message: Any, token: str) -> Any:
    return message.evolve(headers={**message.headers, "obo_token": token})


async def _message(app: Paigeant, run_id: str) -> Any:
    from paigeant.forwarder import message_of

    detail = await app.store.load_run(run_id)
    return message_of(detail, inline_bytes=0).evolve(message_id=f"{run_id}/leak/do/7")
