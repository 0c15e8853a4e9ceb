"""What is secret in a URL is shown nowhere, and what it says of a server is read as those read it who connect to it."""

from __future__ import annotations

from ipaddress import ip_address
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict

from paigeant.databases.postgres import PostgresDatabase
from paigeant.errors import ConfigurationError
from paigeant.transports.rabbitmq.link import read_url
from paigeant.transports.redis.place import Place
from paigeant.urls import check_readable, is_encrypted, is_local, scrubbed, without_password


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sqlite:///paigeant.db", "sqlite:///paigeant.db"),
        ("redis://host:6379/0", "redis://host:6379/0"),
        ("redis://:pa55word@host", "redis://:***@host"),
        ("amqp://ann@host", "amqp://ann@host"),
        ("amqp://ann:p%40ss:w%2Frd@host/v", "amqp://ann:***@host/v"),
        ("amqp://ann:p%40ss:w/rd@host/v", "amqp://***"),
        ("amqps://ann:p@ss@host/v", "amqps://***"),
        ("amqps://ann:pa55", "amqps://***"),
        ("ann:p@ss@host/v", "***"),
        (
            "postgresql://a/b?user=x&password=pa55&sslmode=require",
            "postgresql://a/b?user=x&password=***&sslmode=require",
        ),
        ("postgresql://a/b?password=pa#55&ss=1&word", "postgresql://a/b?password=***&***&***"),
        ("postgresql:///b?host=@abstract&user=ann", "postgresql:///b?host=@abstract&user=ann"),
        ("postgresql://ann:pa?55@a:1,[::1]:2/b", "postgresql://ann:***@a:1,[::1]:2/b"),
        ("redis://h?auth_token=t&db=1&x=1", "redis://h?auth_token=***&db=1&***"),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    """User, host and known parameters stay, to tell which server is meant; nothing where they can't be told apart."""
    assert without_password(url) == shown


@pytest.mark.parametrize(
    "text",
    [
        "can't reach amqp://ann:p%40ss-word@host/: refused",
        "('amqp://ann:p@ss-word@host/',) is wrong",
        "login p@ss-word failed for ann, host",
        "no server at redis://host?password=p%40ss-word, host",
        "dsn: p%40ss-word, host",
    ],
)
def test_a_text_is_shown_without_passwords(text: str) -> None:
    """Neither as it stands in the URL nor as it is meant, wherever a library's error has it."""
    shown = scrubbed(text, ["amqp://ann:p%40ss-word@host/"])
    assert "ss-word" not in shown
    assert "***" in shown
    assert "host" in shown


def test_a_text_without_secrets_stays() -> None:
    """A short password is no reason to hide letters of words, and a user without a password is no secret."""
    text = "can't reach amqp://ann@host: a queue is full; mail bob@example.org at 10:30"
    assert scrubbed(text, ["redis://:a@host", "amqp://ann@host"]) == text
    said = "the broker refuses the user 'guest'"
    assert scrubbed(said, ["amqp://guest:guest@host"]) == said


# -- where a server is, and whether the way there is encrypted

HERE = [
    "memory://",
    "sqlite:///paigeant.db",
    "sqlite:////mnt/db.example/paigeant.db",
    *(
        f"{scheme}://{host}"
        for scheme in ("redis", "rediss", "amqp", "amqps")
        for host in (
            "localhost",
            "LocalHost:1",
            "127.0.0.1",
            "127.9.8.7:1/0",
            "[::1]",
            "[::1]:1/0",
            "u:p@localhost/v",
            "u:db.example@[::1]:1",
        )
    ),
    "redis://localhost?cluster=false",
    "postgresql://",
    "postgresql:///app",
    "postgresql://ann@/app",
    "postgresql://:5432/app",
    "postgresql://localhost/app",
    "postgresql://127.0.0.2:5432/app",
    "postgresql://[::1]:5432/app",
    "postgresql://127.0.0.1,localhost:5433,[::1]/app",
    "postgresql://%2Fvar%2Frun%2Fpostgresql/app",
    "postgresql:///app?host=/var/run/postgresql",
    "postgresql:///app?host=/run/a,/run/b",
    "postgresql:///app?host=@abstract",
    "postgresql:///app?host=::1&port=5433",
    "postgresql:///app?hostaddr=127.0.0.1",
    "postgresql://localhost/app?hostaddr=127.0.0.1",
    "postgresql://localhost/app?application_name=db.example",
]
ELSEWHERE = [
    *(
        f"{scheme}://{host}"
        for scheme in ("redis", "rediss", "amqp", "amqps")
        for host in (
            "broker.example",
            "10.0.0.9:1/0",
            "[2001:db8::1]",
            "[::2]:1",
            "u:localhost@broker.example",
            "localhost@broker.example",
            "localhost.example",
            "127.0.0.1.example",
            "127.0.0.1:1,broker.example:1",
            "0.0.0.0",
            "[::ffff:10.0.0.9]",
        )
    ),
    "redis://localhost:26379/0?sentinel=main",
    "rediss://localhost:26379/0?sentinel=main",
    "redis://127.0.0.1:6379?cluster=true",
    "redis://127.0.0.1:6379?namespace=a&cluster=1",
    "postgresql://db.example/app",
    "postgresql://10.0.0.9/app",
    "postgresql://[2001:db8::1]:5432/app",
    "postgresql://localhost,db.example/app",
    "postgresql://,db.example/app",
    "postgresql:///app?host=db.example",
    "postgresql:///app?host=/tmp,db.example",
    "postgresql:///app?host=::2",
    "postgresql:///app?h%6Fst=db.example",
    "postgresql://%2Ftmp%2Cdb.example/app",
    "postgresql://localhost/app?host=db.example",
    "postgresql:///app?hostaddr=10.0.0.9",
    "postgresql:///app?hostaddr=127.0.0.1,10.0.0.9",
    "postgresql:///app?hostaddr=::ffff:10.0.0.9",
    "postgresql://localhost/app?hostaddr=10.0.0.9",
    "postgresql:///app?application_name=a#&hostaddr=10.0.0.9",
    "postgresql://:pass?word@db.example/app",
    "postgresql://localhost?@db.example/app",
    "postgresql:///app?service=orders",
]


@pytest.mark.parametrize("url", HERE)
def test_what_does_not_leave_this_host(url: str) -> None:
    """Files, memory, sockets and loopback addresses, all of them where several are named."""
    assert is_local(url)


@pytest.mark.parametrize("url", ELSEWHERE)
def test_what_leaves_this_host(url: str) -> None:
    """One server elsewhere is enough, wherever it stands; so is one that a sentinel, a node or a service file names."""
    assert not is_local(url)


@pytest.mark.parametrize(
    ("url", "encrypted"),
    [
        ("redis://h", False),
        ("rediss://h", True),
        ("amqp://h", False),
        ("amqps://h", True),
        ("postgresql://h/x", False),
        ("postgresql://h/x?sslmode=disable", False),
        ("postgresql://h/x?sslmode=allow", False),
        ("postgresql://h/x?sslmode=prefer", False),
        ("postgresql://h/x?sslmode=require", True),
        ("postgresql://h/x?sslmode=verify-ca", True),
        ("postgresql://h/x?sslmode=verify-full&target_session_attrs=any", True),
        ("postgresql://h,i/x?ssl=true", True),
        ("postgresql://h/x?ssl=false", False),
        ("postgresql://h/x?sslmode=Require", False),
        ("postgresql://h/x?sslmode=require&sslmode=prefer", False),
        ("postgresql://h/x?sslmode=require&sslmode=", False),
        ("postgresql://h/x?sslmode=prefer&sslmode=require", True),
        ("postgresql://u:p?sslmode=require&a=@h/x", False),
    ],
)
def test_what_is_encrypted(url: str, encrypted: bool) -> None:
    """TLS by its scheme for brokers; for Postgres a mode that doesn't go on without TLS, the last one that is named."""
    assert is_encrypted(url) is encrypted


@pytest.mark.parametrize(
    ("url", "variables", "here", "encrypted"),
    [
        ("postgresql:///x", {"PGHOST": "db.example"}, False, False),
        ("postgresql:///x", {"PGHOST": "localhost"}, True, False),
        ("postgresql:///x", {"PGHOST": "/run/postgresql"}, True, False),
        ("postgresql://localhost/x", {"PGHOST": "db.example"}, True, False),
        ("postgresql://localhost/x", {"PGHOSTADDR": "10.0.0.9"}, False, False),
        ("postgresql:///x?hostaddr=127.0.0.1", {"PGHOSTADDR": "10.0.0.9"}, True, False),
        ("postgresql:///x", {"PGSERVICE": "orders"}, False, False),
        ("postgresql://h/x", {"PGSSLMODE": "verify-full"}, False, True),
        ("postgresql://h/x?sslmode=prefer", {"PGSSLMODE": "verify-full"}, False, False),
        ("postgresql://h/x?service=s", {"PGSSLMODE": "verify-full"}, False, False),
        ("postgresql://h/x?service=s&sslmode=require", {}, False, True),
        ("redis://localhost", {"PGHOST": "db.example"}, True, False),
    ],
)
def test_what_the_environment_says_of_postgres(
    url: str, variables: dict[str, str], here: bool, encrypted: bool
) -> None:
    """What libpq takes from variables counts where the URL leaves it open; a service file stands above them."""
    assert is_local(url, variables) is here
    assert is_encrypted(url, variables) is encrypted


def is_on_this_host(name: str) -> bool:
    """What a resolver says of a host or a socket."""
    if name in ("", "localhost") or name[0] in "/@":
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False


PIECES = st.sampled_from([
    "localhost", "127.0.0.1", "[::1]", "db", "10.0.0.9", "%2Ftmp", "@", ":", ",", "/", "?", "&", "#", "%2C", "u",
    "5432", "", "host=", "hostaddr=", "sslmode=", "require", "prefer", "ssl=true", "x=",
])  # fmt: skip


@given(st.lists(PIECES, max_size=12).map("".join))
@example("localhost?@db/x")
@example("/x?hostaddr=10.0.0.9")
@example("u:p?sslmode=require&x=@db/x")
def test_a_url_is_read_as_libpq_reads_it(rest: str) -> None:
    """Whatever libpq takes for a URL: what counts as local or encrypted here is so there."""
    url = f"postgresql://{rest}"
    try:
        told = conninfo_to_dict(url)
    except ProgrammingError:
        return
    named = [str(told.get(name, "")).split(",") for name in ("host", "hostaddr")]
    assert is_local(url) == all(is_on_this_host(name) for names in named for name in names)
    assert is_encrypted(url) == (told.get("sslmode") == "require")


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=8)
HOSTS = st.sampled_from(["localhost", "db.example", "127.0.0.1", "[::1]", "%2Ftmp", "h-1"])


@given(TEXTS, TEXTS, TEXTS, st.lists(st.tuples(HOSTS, st.sampled_from(["", ":5432"])), max_size=3))
def test_what_is_escaped_is_read_by_libpq(
    user: str, password: str, name: str, servers: list[tuple[str, str]]
) -> None:
    """Whatever user, password, database and a parameter are, with one server, several or none."""
    login, path = f"{quote(user, safe='')}:{quote(password, safe='')}", quote(name, safe="")
    place = ",".join(host + port for host, port in servers)
    url = f"postgresql://{login}@{place}/{path}?application_name={path}&sslpassword={path}"
    told = PostgresDatabase(url)._parameters
    assert (told["user"], told["password"], told["dbname"]) == (user, password, name)
    assert told["application_name"] == told["sslpassword"] == name
    assert without_password(url) == (
        f"postgresql://{quote(user, safe='')}:***@{place}/{path}?application_name={path}&sslpassword=***"
    )


@given(TEXTS, TEXTS, TEXTS)
def test_what_is_escaped_is_read_by_the_clients_of_brokers(user: str, password: str, name: str) -> None:
    """Whatever user, password and parameters are, redis-py and yarl give them back."""
    login, value = f"{quote(user, safe='')}:{quote(password, safe='')}", quote(name, safe="")
    place = Place.read(
        f"redis://{login}@a:1,[::1]:2/0?sentinel=main&sentinel_password={value}&client_name={value}"
    )
    assert (place.options["username"], place.options["password"]) == (user, password)
    assert place.options["client_name"] == place.sentinel_options["password"] == name
    assert place.nodes == (("a", 1), ("::1", 2))
    url, _ = read_url(f"amqps://{login}@[::1]:1/{value}?name={value}")
    assert (url.user, url.password, url.host, url.query["name"]) == (user, password, "::1", name)


@pytest.mark.parametrize(
    "url", [url for url in (*HERE, *ELSEWHERE) if "//localhost?@" not in url and "h%6Fst" not in url]
)
def test_a_right_url_is_not_refused(url: str) -> None:
    """Sockets, several servers, addresses of IPv6, and an @ where neither login nor server could be meant."""
    check_readable(url)
    if url.startswith("postgresql"):
        PostgresDatabase(url)


@pytest.mark.parametrize("url", [url for url in (*HERE, *ELSEWHERE) if url.startswith(("redis", "amqp"))])
def test_a_url_is_read_as_the_clients_of_brokers_read_it(url: str) -> None:
    """Where redis-py and aio-pika would connect to another host, a URL never counts as local."""
    try:
        if url.startswith("redis"):
            hosts = [host for host, _ in Place.read(url).nodes]
        else:
            hosts = [read_url(url)[0].host or ""]
    except ConfigurationError:
        return
    assert all(map(is_on_this_host, hosts)) or not is_local(url)
