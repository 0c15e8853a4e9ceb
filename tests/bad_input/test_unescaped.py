"""URLs in which a password has characters that aren't escaped: they are refused, and no part of it is shown."""

from __future__ import annotations

import traceback
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tests.bad_input.bench import HANDLERS, call, put

from paigeant import Paigeant, Settings
from paigeant.databases import open_database
from paigeant.databases.postgres import PostgresDatabase
from paigeant.errors import ConfigurationError
from paigeant.stores import open_store
from paigeant.transports import open_transport
from paigeant.transports.rabbitmq import RabbitMQTransport
from paigeant.transports.rabbitmq.link import read_url
from paigeant.transports.redis.place import Place
from paigeant.urls import without_password

SURFACE = "configuration"

DATABASES = [
    "postgresql://user:100%S3CRET@127.0.0.1/x",
    "postgresql://127.0.0.1/x?password=S3CRET%zz",
    "postgresql://user:pre@S3CRET@127.0.0.1/x?sslmode=require",
    "postgresql://user:pre/S3CRET@127.0.0.1",
    "postgresql://user:12/S3CRET@127.0.0.1",
    "postgresql://user:pre/a?S3CRET=x@127.0.0.1/x",
    "postgresql://user:pre/a?user=S3CRET@127.0.0.1/x",
    "postgresql://user:pre S3CRET@127.0.0.1/x",
    "postgresql://user:S3CRET/x",
    "postgresql://user:%FFS3CRET@127.0.0.1/x",
    "postgresql://user:%00S3CRET@127.0.0.1/x",
]
BROKERS = [
    "redis://user:12?S3CRET=x@127.0.0.1",
    "redis://user:12#S3CRET@127.0.0.1",
    "redis://user:pre@S3CRET@127.0.0.1",
    "redis://user:[S3CRET]@127.0.0.1",
    "redis://[S3CRET]",
    "rediss://127.0.0.1/0?password=pre#S3CRET",
    "redis://user:100%S3CRET@127.0.0.1",
    "amqp://user:pre@S3CRET/x@127.0.0.1",
    "amqp://user:pre/S3CRET@127.0.0.1",
    "amqps://user:100%S3CRET@127.0.0.1",
    "amqp://user:S3CRET",
]
NO_SERVERS = ["user:S3CRET@127.0.0.1", "mysql://user:S3CRET", "mysql://user:pre@S3CRET@127.0.0.1/x"]
UNKNOWN_TO_THE_DRIVER = [
    "postgresql://127.0.0.1/x?password=pre&S3CRET=x",
    "postgresql://127.0.0.1/x?password=pre&S3CRET",
    "postgresql://127.0.0.1/x?S3CRET=x",
    "redis://127.0.0.1/0?password=pre&S3CRET=x",
    "redis://127.0.0.1/0?password=pre&S3CRET",
    "redis://127.0.0.1/0?S3CRET=x",
]
WRONG_VALUES = [
    "redis://127.0.0.1/0?db=S3CRET",
    "rediss://127.0.0.1/0?ssl_cert_reqs=S3CRET",
    "amqp://127.0.0.1/?heartbeat=S3CRET",
]
COMMANDS = [
    ("config", "check"),
    ("config", "show"),
    ("runs", "list"),
    ("topics", "list"),
    ("db", "current"),
    ("db", "upgrade"),
    ("dispatch", "order", "input.json", "--handlers", "handlers.py"),
    ("run", "handlers.py", "--until-idle"),
]


@pytest.fixture(autouse=True)
def _anything_may_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a URL isn't refused for where it leads."""
    monkeypatch.setenv("PAIGEANT_SIGNING", "off")
    monkeypatch.setenv("PAIGEANT_ALLOW_PLAINTEXT", "true")
    put({"handlers.py": HANDLERS, "input.json": '{"sku": "A-1"}'})


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("url", [*DATABASES, *BROKERS, *NO_SERVERS])
def test_no_command_shows_what_is_not_escaped(
    command: tuple[str, ...], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each refuses the URL, and says how it is written."""
    monkeypatch.setenv(f"PAIGEANT_{'TRANSPORT' if url in BROKERS else 'STORE'}_URL", url)
    result = call(*command)
    assert result.exit_code == 2
    assert "s3cret" not in (result.stdout + result.stderr).lower()
    assert url in NO_SERVERS or "%40 for @" in result.stderr


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("url", UNKNOWN_TO_THE_DRIVER)
def test_no_command_shows_a_parameter_that_nobody_knows(
    command: tuple[str, ...], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be a part of a password."""
    monkeypatch.setenv("PAIGEANT_TRANSPORT_URL", url)
    if url.startswith("postgresql"):
        monkeypatch.setenv("PAIGEANT_STORE_URL", url)
    result = call(*command)
    assert "s3cret" not in (result.stdout + result.stderr).lower()
    opens = command[0] in ("dispatch", "run") or command == ("config", "check")
    if opens or (url.startswith("postgresql") and command[0] != "config"):
        assert result.exit_code == 2


def whole(url: str) -> Paigeant:
    """An application with this transport."""
    return Paigeant(Settings(transport_url=url))


OPENERS: list[Callable[[str], object]] = [
    whole,
    lambda url: Settings(store_url=url),
    lambda url: Settings(routes={"a": url}),
    open_transport,
    open_store,
    open_database,
    PostgresDatabase,
    Place.read,
    RabbitMQTransport,
]


@pytest.mark.parametrize("opens", OPENERS)
@pytest.mark.parametrize("url", [*DATABASES, *BROKERS, *NO_SERVERS])
def test_no_error_of_python_shows_what_is_not_escaped(opens: Callable[[str], object], url: str) -> None:
    """Neither its text nor that of its causes, as a traceback has them."""
    with pytest.raises(ConfigurationError) as caught:
        opens(url)
    error = caught.value
    said = [line for line in traceback.format_exception(error) if "S3CRET" in line]
    assert said == []
    assert error.__cause__ is None


@pytest.mark.parametrize("url", [*UNKNOWN_TO_THE_DRIVER, *WRONG_VALUES])
def test_no_error_of_python_shows_a_parameter_that_nobody_knows(url: str) -> None:
    """The driver's text would quote it, or its value."""
    with pytest.raises(ConfigurationError) as caught:
        open_transport(url)
    assert "S3CRET" not in "".join(traceback.format_exception(caught.value))


def read(scheme: str, url: str) -> tuple[str, str]:
    """What is shown of a server, and the password for it."""
    match scheme:
        case "postgresql":
            database = PostgresDatabase(url)
            return database.place, database._parameters["password"]
        case "redis":
            place = Place.read(url)
            return place.where, place.options["password"]
        case _:
            broker, _ = read_url(url)
            return f"{broker.host}{broker.path}{broker.query}", broker.password or ""


ANYTHING = st.text(st.sampled_from("@/?#%:&=[],;+ 1a4\t\u2100é"), max_size=6)


@given(
    st.sampled_from(["postgresql", "redis", "amqp"]),
    ANYTHING,
    ANYTHING,
    st.sampled_from(["", "/0", "/0?user=a"]),
)
@example("postgresql", "?", "", "/0")
@example("postgresql", "12/", "?user=", "/0")
@example("redis", "12?db=", "", "/0")
@example("amqp", "12?", "@", "/0")
def test_a_password_is_refused_or_read_as_a_whole(scheme: str, before: str, after: str, rest: str) -> None:
    """Whatever it has around its secret part: none of it becomes a host, a path or a parameter."""
    url = f"{scheme}://user:{before}S3CRET{after}@127.0.0.1{rest}"
    assert "S3CRET" not in without_password(url)
    try:
        shown, password = read(scheme, url)
    except ConfigurationError as exc:
        shown, password = "".join(traceback.format_exception(exc)), "S3CRET"
    assert "S3CRET" in password
    assert "S3CRET" not in shown
