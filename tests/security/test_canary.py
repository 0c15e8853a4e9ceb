"""A canary: the text of a token is sent down every path, and found nowhere but on the wire and in memory."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from pydantic import BaseModel, BeforeValidator
from pydantic_ai import Agent
from pydantic_ai.models.test import TestModel
from tests.integration.collector import Collector
from tests.integration.processes import call
from tests.integration.test_waits import parked
from tests.integration.workers import working
from tests.observers import Seen
from tests.patience import PATIENCE
from tests.security.authority import Authority
from tests.security.desk import MAIL, flow, settings_of

from paigeant import (
    ActivityRegistry,
    Paigeant,
    RunStatus,
    SecretToken,
    Settings,
    Step,
    StepContext,
    Workflow,
)
from paigeant.behalf import Behalf
from paigeant.errors import InputInvalid
from paigeant.observers.logs import LogObserver, configure
from paigeant.observers.metrics import MetricsObserver
from paigeant.observers.otlp import QuickProvider, send_traces
from paigeant.observers.traces import TraceObserver

registry = ActivityRegistry()
TOKENS: list[str] = []
TRACERS: list[trace.Tracer] = []


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
        case "span":
            with TRACERS[-1].start_as_current_span("inside", attributes={"sent": [token.reveal()]}) as span:
                span.add_event(f"asked with {token.reveal()}", {"how": f"as {token.reveal()}"})
                raise RuntimeError(f"403 for Bearer {token.reveal()}")
        case "current span":
            trace.get_current_span().set_attribute("sent", token.reveal())
            trace.get_current_span().record_exception(RuntimeError(f"404 for Bearer {token.reveal()}"))
            trace.get_current_span().set_status(trace.StatusCode.ERROR, f"404 with {token.reveal()}")
            return "traced"
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


@pytest.fixture
def collector() -> Iterator[Collector]:
    """Takes what is sent over OTLP."""
    with Collector() as collector:
        yield collector


@pytest.fixture
def sending(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> tuple[TraceObserver, Callable[[], None]]:
    """The spans of runs and of activities on the way to `collector`, as `paigeant run` sends them; and its end."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    # As in a process in which nobody has set a provider up; the one of this process isn't ours to set.
    monkeypatch.setattr(trace, "get_tracer_provider", trace.ProxyTracerProvider)
    monkeypatch.setattr(trace, "set_tracer_provider", lambda _: None)
    provider, end = send_traces()
    assert isinstance(provider, QuickProvider)
    TRACERS.append(provider.provider.get_tracer("shop"))
    return TraceObserver(provider), end


@pytest.mark.parametrize("transport", ["memory", "redis"])
async def test_a_token_is_found_nowhere(
    authority: Authority,
    lines: io.StringIO,
    collector: Collector,
    sending: tuple[TraceObserver, Callable[[], None]],
    transport: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not in a row, a log line, an event, a span, a metric, an error, a dead letter or in what commands print.

    Whatever goes wrong with it. Where it may be is on the wire between workers, and there in its header alone.
    """
    TOKENS.clear()
    authority.now = time.time
    url = "memory://" if transport == "memory" else f"{request.getfixturevalue('redis_url')}"
    store = f"sqlite:///{tmp_path}/runs.db"
    settings = Settings(
        transport_url=url,
        store_url=store,
        namespace=f"canary-{tmp_path.name}-{time.time_ns()}",
        log_sql="debug",
        **settings_of(authority),
    )
    watcher = Seen()
    traces, send = sending
    metrics = MetricsObserver(activities=["leak"], workflows=["flow"], topics=["leak"])
    reader = InMemoryMetricReader()
    metrics.meter(MeterProvider([reader]).get_meter("paigeant"))
    token = authority.token("ann", "mail.send")
    ended = {}
    async with Paigeant(
        settings,
        activities=registry,
        observers=[watcher, LogObserver(level="debug", stream=lines), traces, metrics],
    ) as app:
        app.dispatcher.behalf = Behalf()  # so that what is wrong with a token is found by the worker
        async with working(app.worker()):
            for how in ("log", "error", "cause", "span", "current span", "output", "variable", "once"):
                run = await app.dispatch(
                    flow("leak"), {"how": how}, on_behalf_of=token, workflow_id=how.replace(" ", "-")
                )
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
        details = [repr(await app.run(name.replace(" ", "-")).detail()) for name in ended]
        letter = await app.store.load_dead_letter(letters[0].id)
    send()
    monkeypatch.setenv("PAIGEANT_STORE_URL", store)
    printed = ""
    for command in (
        *(("runs", "list"), ("runs", "show", "span"), ("runs", "show", "error"), ("requests", "list")),
        *(("logs",), ("dead-letters", "list"), ("dead-letters", "show", letters[0].id)),
    ):
        done = await asyncio.to_thread(call, *command, "--json")
        assert done.returncode == 0, done.stderr
        printed += done.stdout + done.stderr
    assert ended == {
        "log": RunStatus.COMPLETED,
        "error": RunStatus.FAILED,
        "cause": RunStatus.FAILED,
        "span": RunStatus.FAILED,
        "current span": RunStatus.COMPLETED,
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
        "OTLP": collector.bytes.decode("latin-1"),
        "/metrics": metrics.exposition()[0].decode(),
        "OpenTelemetry's metrics": str(reader.get_metrics_data()),
        "--json": printed,
    }
    for place, text in places.items():
        assert text, place
        for secret in (*secrets, *signatures):
            assert secret not in text, place
    assert "401 for Bearer ***" in places["logs"], "the failure was logged, without the token"
    assert {"step leak", "inside"} <= {span.name for span in collector.spans}
    for said in ("RuntimeError: 403 for Bearer ***", "asked with ***", "404 with ***", "404 for Bearer ***"):
        assert said in places["OTLP"]
    assert "401 for Bearer ***" in printed


def _with_token(message: Any, token: str) -> Any:
    return message.evolve(headers={**message.headers, "obo_token": token})


async def _message(app: Paigeant, run_id: str) -> Any:
    from paigeant.forwarder import message_of

    detail = await app.store.load_run(run_id)
    return message_of(detail, inline_bytes=0).evolve(message_id=f"{run_id}/leak/do/7")


CANARY = "hush-4111-hush"
HALF = CANARY[:6]
"""Nor may a part of it be anywhere."""


def _number(value: Any) -> int:
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"{value} is no number") from None


class Login(BaseModel):
    """What a run may take, or an agent's deps be made of. What checks it says what it found."""

    user: str
    password: Annotated[int, BeforeValidator(_number)]


class Plain(BaseModel):
    """The same, checked by pydantic alone."""

    password: int


secretive = ActivityRegistry()
secretive.agent(Agent(TestModel(), name="asker", deps_type=Login), prompt="Hello", deps=Login)
secretive.agent(Agent(TestModel(), name="teller"), prompt="{login.password.first}")


@secretive.execute(retries=0)
async def begin() -> None:
    """So that what is wrong with the others is found by the worker."""


@secretive.execute(retries=0)
async def enter(password: int) -> None:
    """Takes a secret that no type tells."""


@secretive.execute(retries=0)
async def enter_as(login: Login) -> None:
    """The same, within something."""


@secretive.execute(retries=0)
async def read_itself(login: dict[str, Any]) -> None:
    """Looks at what it gets itself."""
    Plain.model_validate(login)


@secretive.execute(retries=0)
async def give() -> Login:
    """Gives back what it doesn't say."""
    return Login.model_construct(user="u" * 45, password=CANARY)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ("enter", "'password' of activity 'enter' doesn't fit: Input should be a valid integer"),
        ("enter_as", "found {'user': 'ada', 'password': '***'}"),
        ("read_itself", "input_value=***"),
        ("give", "returned Login(user="),
        ("asker", "can't be made from the payload: password: *** error, *** is no number"),
        ("teller", "'login.password' has no 'first': it is ***"),
        (Step("begin", id="again", when="password"), "when='password' gives '***'"),
    ],
)
async def test_what_a_name_says_is_secret_is_quoted_nowhere(
    lines: io.StringIO, step: str | Step, said: str
) -> None:
    """A value that is wrong, under the name of a secret, stands in its run's input, and in no line, event or error."""
    watcher = Seen()
    urls = {"transport_url": "memory://", "store_url": "memory://"}
    payload = {"user": "ada", "password": CANARY, "login": {"user": "ada", "password": CANARY}}
    async with Paigeant(
        Settings(**urls), activities=secretive, observers=[watcher, LogObserver(level="debug", stream=lines)]
    ) as app:
        run = await app.dispatch(Workflow("w", ["begin", step]), payload)
        await app.worker().run(until_idle=True)
        detail = await run.detail()
    assert detail.run.status is RunStatus.FAILED
    assert said in (detail.run.error or "")
    errors = [detail.run.error, *(row.error for row in detail.steps)]
    for text in (lines.getvalue(), repr(watcher.events), repr(errors)):
        assert HALF not in text
    told = [line for line in lines.getvalue().splitlines() if said in line]
    assert [json.loads(line)["event"] for line in told if '"error"' in line] == ["step.failed", "run.failed"]


async def test_an_input_that_does_not_fit_is_not_quoted() -> None:
    """Neither in the error that whoever dispatches gets, nor in its traceback."""
    urls = {"transport_url": "memory://", "store_url": "memory://"}
    workflow = Workflow("w", ["begin"], input_model=Login)
    async with Paigeant(Settings(**urls), activities=secretive) as app:
        with pytest.raises(
            InputInvalid, match=r"'w' doesn't fit: password: Value error, \*\*\* is"
        ) as caught:
            await app.dispatch(workflow, {"user": "ada", "password": CANARY})
    told = "".join(traceback.format_exception(caught.value))
    assert HALF not in told
