"""The public names, and what importing them costs."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pkgutil import resolve_name

import pytest

import paigeant

CONTRACT = [
    "ActivityRegistry",
    "StepContext",
    "Workflow",
    "Step",
    "Paigeant",
    "Settings",
    "Run",
    "RunResult",
    "ActivityWorker",
    "RetryPolicy",
    "ItineraryPolicy",
    "NonRetryableError",
    "PaigeantError",
    "PaigeantMessage",
    "RoutingSlip",
    "SecurityContext",
    "Transport",
    "Store",
]

# What stands by position in a call of the contract, and what by name; a name with `=` may be left out.
CALLS = [
    ("Step", "activity", "id= args= when= retries= timeout= topic="),
    ("Workflow", "name steps", ""),
    ("ActivityRegistry.execute", "self", "name= topic= retries= timeout= strict_fencing= scopes="),
    ("ActivityRegistry.compensate", "self activity", "retries= timeout="),
    ("ActivityRegistry.agent", "self agent", "prompt= may_add="),
    ("Paigeant", "settings", ""),
    ("Paigeant.dispatch", "self workflow input", "workflow_id="),
    ("Paigeant.run", "self workflow_id", ""),
    ("Paigeant.worker", "self activities", "concurrency="),
    ("ActivityWorker.run", "self", ""),
    ("ActivityWorker.stop", "self grace", ""),
    ("Run.status", "self", ""),
    ("Run.wait", "self timeout", ""),
    ("Run.cancel", "self", ""),
    ("Run.retry", "self", ""),
    ("Run.signal", "self name value", ""),
    ("StepContext.save_variable", "self key value", ""),
    ("StepContext.load_variable", "self key", ""),
    ("StepContext.once", "self name function args", ""),
    ("StepContext.insert", "self steps", ""),
    ("StepContext.append", "self steps", ""),
    ("StepContext.replace", "self steps", ""),
    ("StepContext.terminate", "self", ""),
    ("RoutingSlip", "", "itinerary= executed= compensations="),
    ("RoutingSlip.next_step", "self", ""),
    ("RoutingSlip.mark_complete", "self", ""),
    (
        "PaigeantMessage",
        "",
        "message_id workflow_id routing_slip correlation_id= trace_id= headers= payload= spec_version=",
    ),
    ("ItineraryPolicy", "", "allowed= max_added="),
    *(
        (f"{transport}.{method}", f"self {given}".strip(), named)
        for transport in (
            "Transport",
            ".transports.memory:MemoryTransport",
            ".transports.sqlite:SqliteTransport",
            ".transports.postgres:PostgresTransport",
            ".transports.redis:RedisStreamTransport",
            ".transports.rabbitmq:RabbitMQTransport",
        )
        for method, given, named in (
            ("connect", "", ""),
            ("close", "", ""),
            ("publish", "topic message", "delay="),
            ("subscribe", "topic", "prefetch="),
            ("ack", "message_id", ""),
            ("nack", "message_id", "delay="),
            ("dead_letter", "message_id reason", ""),
        )
    ),
]


def run(code: str) -> str:
    """What `code` prints in a new process."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("name", sorted({*CONTRACT, *paigeant.__all__}))
def test_a_public_name_is_there(name: str) -> None:
    """Every name of the contract, and every one that is listed, can be imported from the package."""
    assert name in paigeant.__all__
    assert getattr(paigeant, name).__name__ == name
    assert name in dir(paigeant)


@pytest.mark.parametrize(("name", "positional", "named"), CALLS, ids=[name for name, *_ in CALLS])
def test_a_call_of_the_contract_is_as_it_says(name: str, positional: str, named: str) -> None:
    """What is given by position comes first and in that order, the rest is taken by name, and no more is needed."""
    signature = inspect.signature(resolve_name(f"paigeant{name if ':' in name else f':{name}'}"))
    assert list(signature.parameters)[: len(positional.split())] == positional.split()
    signature.bind(*positional.split(), **{word.rstrip("="): None for word in named.split()})
    signature.bind(*positional.split(), **{word: None for word in named.split() if word[-1] != "="})


def test_states_have_the_words_of_the_contract() -> None:
    """They are texts, so that they compare with what tables and commands say."""
    runs = "pending running waiting compensating completed failed compensated compensation_failed cancelled"
    steps = "ready running waiting completed skipped failed compensated compensation_failed"
    assert list(paigeant.RunStatus) == runs.split()
    assert list(paigeant.StepStatus) == steps.split()


def test_an_unknown_name_is_an_attribute_error() -> None:
    """As with any module."""
    with pytest.raises(AttributeError, match="no attribute 'Workfow'"):
        _ = paigeant.Workfow  # type: ignore[attr-defined]  # nor does a type checker let it through


def test_importing_the_package_loads_no_library() -> None:
    """Neither a broker, nor a database, nor an agent library, nor a settings library is loaded by it."""
    heavy = [
        "sqlalchemy",
        "pydantic",
        "pydantic_ai",
        "pydantic_settings",
        "alembic",
        "typer",
        "structlog",
        "cel",
    ]
    code = f"import paigeant, sys; print([name for name in {heavy!r} if name in sys.modules])"
    assert run(code) == "[]"


def test_defining_workflows_loads_no_adapter() -> None:
    """What a handler module needs loads neither a database nor an agent library, nor the settings'."""
    heavy = ["sqlalchemy", "pydantic_ai", "pydantic_settings", "alembic", "cel"]
    code = (
        "from paigeant import ActivityRegistry, StepContext, Workflow, Step, RetryPolicy; import sys;"
        f"Workflow('w', ['a']); print([name for name in {heavy!r} if name in sys.modules])"
    )
    assert run(code) == "[]"


def test_a_condition_loads_no_command_line_but_our_own() -> None:
    """The library of conditions comes without its own; who wants that can have it afterwards."""
    code = (
        "from paigeant import condition; import sys;"
        "print(condition.evaluate('a > 1', {'a': 2}), 'prompt_toolkit' in sys.modules);"
        "import cel.cli; print(cel.cli.app.__class__.__name__)"
    )
    assert run(code).split() == ["True", "False", "Typer"]


def test_importing_does_nothing_else() -> None:
    """It registers nothing, configures no logs and starts no thread."""
    code = (
        "import logging, threading; before = logging.root.handlers[:], threading.active_count();"
        "import paigeant; print((logging.root.handlers[:], threading.active_count()) == before)"
    )
    assert run(code) == "True"


@pytest.mark.parametrize("name", ["memory", "sqlite"])
def test_our_transports_are_transports(name: str) -> None:
    """Each has all methods of the contract."""
    from paigeant.transports import open_transport

    url = "memory://" if name == "memory" else "sqlite:///x.db"
    assert isinstance(open_transport(url), paigeant.Transport)


def test_our_stores_are_stores() -> None:
    """Each has all methods of the contract."""
    from paigeant.stores import open_store

    assert isinstance(open_store("memory://"), paigeant.Store)
    assert isinstance(open_store("sqlite:///x.db"), paigeant.Store)
