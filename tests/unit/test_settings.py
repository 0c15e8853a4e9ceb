"""Where settings come from, what they may be, and what is said of those that can't be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paigeant import RetryPolicy, Settings, Step, Workflow
from paigeant.errors import ConfigurationError
from paigeant.identity import Issuer
from paigeant.keys import Key, KeyRing


def file(text: str) -> None:
    """Write paigeant.yaml in the working directory."""
    Path("paigeant.yaml").write_text(text)


def test_without_anything_one_file_is_transport_and_store() -> None:
    """No server is needed to begin with."""
    settings = Settings()
    assert (settings.transport_url, settings.store_url) == ("sqlite:///paigeant.db", "sqlite:///paigeant.db")


def test_the_file_stands_above_the_defaults() -> None:
    """paigeant.yaml in the working directory is read."""
    file("concurrency: 7\n")
    assert Settings().concurrency == 7


def test_the_environment_stands_above_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """PAIGEANT_* overrides the file."""
    file("concurrency: 7\n")
    monkeypatch.setenv("PAIGEANT_CONCURRENCY", "8")
    assert Settings().concurrency == 8


def test_the_constructor_stands_above_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """What code says overrides environment and file."""
    file("concurrency: 7\n")
    monkeypatch.setenv("PAIGEANT_CONCURRENCY", "8")
    assert Settings(concurrency=9).concurrency == 9


def test_an_empty_file_changes_nothing() -> None:
    """Neither nothing nor only comments are an error."""
    file("# nothing yet\n")
    assert Settings() == Settings(concurrency=100)


def test_one_handler_needs_no_list() -> None:
    """`handlers: handlers.py` is a list of one."""
    file("handlers: handlers.py\n")
    assert Settings().handlers == ("handlers.py",)


def test_handlers_in_the_environment_have_commas_between(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list is written there as one writes it by hand."""
    monkeypatch.setenv("PAIGEANT_HANDLERS", "a.py, b.py")
    assert Settings().handlers == ("a.py", "b.py")


def test_retries_are_further_attempts() -> None:
    """`retries: 2` is three attempts in all."""
    policy = Settings(retries=2, retry_base=1, retry_cap=5).retry_policy()
    assert policy == RetryPolicy(attempts=3, base=1, cap=5)


def test_workflows_in_the_file_are_those_of_code() -> None:
    """A workflow in the file has the fields it has in code; a list is short for its steps."""
    file(
        "workflows:\n"
        "  short: [a, b]\n"
        "  full:\n"
        "    deadline: 60\n"
        "    policy: {allowed: [a], max_added: 2}\n"
        "    on_compensation_failure: stop\n"
        "    steps:\n"
        "      - a\n"
        "      - {activity: b, id: second, args: {x: 1}, when: 'n > 1', retries: 5, timeout: 3.5, topic: gpu}\n"
        "      - {activity: c, retries: {attempts: 4, base: 60}}\n"
    )
    workflows = Settings().defined_workflows()
    assert [step.activity for step in workflows["short"].steps] == ["a", "b"]
    full = workflows["full"]
    assert (full.deadline, full.policy.allowed, full.policy.max_added, full.on_compensation_failure) == (
        60.0,
        ("a",),
        2,
        "stop",
    )
    assert full.steps[1] == Step(
        "b", id="second", args={"x": 1}, when="n > 1", retries=5, timeout=3.5, topic="gpu"
    )
    assert full.steps[2] == Step("c", id="c", retries=RetryPolicy(attempts=4, base=60))


def test_workflows_may_be_a_list_in_which_each_has_its_name() -> None:
    """The name is one of the fields that a workflow has in code; under its name it may be said again."""
    file("workflows:\n  - {name: a, steps: [x], deadline: 60}\n  - {name: b, steps: [x, y]}\n")
    listed = Settings().defined_workflows()
    assert listed == {"a": Workflow("a", ["x"], deadline=60), "b": Workflow("b", ["x", "y"])}
    file("workflows:\n  a: {name: a, steps: [x], deadline: 60}\n  b: [x, y]\n")
    assert Settings().defined_workflows() == listed


def test_what_is_merged_may_be_changed() -> None:
    """A mapping may take over another one and say some of its keys anew: none of them stands twice."""
    file(
        "workflows:\n"
        "  a: &common {deadline: 60, steps: [a]}\n"
        "  b: &other {<<: *common, deadline: 30}\n"
        "  c: {<<: *other, steps: [c]}\n"
    )
    workflows = Settings().defined_workflows()
    assert [workflow.deadline for workflow in workflows.values()] == [60, 30, 30]
    assert [workflow.steps[0].activity for workflow in workflows.values()] == ["a", "a", "c"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("concurency: 5", "paigeant.yaml has an unknown key 'concurency'; did you mean 'concurrency'?"),
        ("concurrency: [", "paigeant.yaml, line 1 is not YAML"),
        ("concurrency: 5\n\tlease: 3", "paigeant.yaml, line 2 is not YAML"),
        (
            "lease: 9\nlease: 9",
            "paigeant.yaml, line 2 is not YAML: the key 'lease' occurs twice in one mapping",
        ),
        (
            "workflows: {v: [a]}\nconcurrency: 5\nworkflows: {w: [b]}",
            "line 3 is not YAML: the key 'workflows' occurs twice in one mapping",
        ),
        ("workflows:\n  w: [a]\n  w: [b]", "line 3 is not YAML: the key 'w' occurs twice in one mapping"),
        ("timeout: 5\0", "paigeant.yaml is not YAML: unacceptable character #x0000"),
        (
            "workflows: {w: [{activity: a, retries: {attempt: 3}}]}",
            "the retries of a step of workflow 'w' have an unknown key 'attempt'; did you mean 'attempts'?",
        ),
        ("workflows: {w: [{activity: a, retries: {attempts: 0}}]}", "a RetryPolicy needs attempts from 1"),
        ("- a\n- b", "paigeant.yaml holds a list; expected `key: value` lines"),
        ("just text", "paigeant.yaml holds a str"),
        ("concurrency: many", "in paigeant.yaml, concurrency: Input should be a valid integer"),
        ("concurrency: 0", "concurrency: Input should be greater than or equal to 1, found 0"),
        ("lease: -1", "lease: Input should be greater than 0"),
        ("log_level: loud", "log_level: Input should be 'debug', 'info', 'warning' or 'error', found 'loud'"),
        (
            "store_url: paigeant.db",
            "store_url: found 'paigeant.db', expected a URL that starts with one of memory://",
        ),
        ("store_url: mysql://x", "found 'mysql://...', expected a URL"),
        ("1: 2", "paigeant.yaml has an unknown key '1'"),
        ("workflows: {w: 5}", "workflow 'w' is a list of steps or a mapping with `steps`, found 5"),
        ("workflows: {w: {name: v, steps: [a]}}", "workflow 'w' has the name 'v'; expected one of them"),
        ("workflows: [{steps: [a]}]", "each workflow of a list has a `name`, found {'steps': ['a']}"),
        ("workflows: [[a, b]]", "each workflow of a list has a `name`, found ['a', 'b']"),
        ("workflows: [{name: w, steps: [a]}, {name: w}]", "workflow 'w' occurs twice"),
        ("workflows: {w: {stps: []}}", "workflow 'w' has an unknown key 'stps'; did you mean 'steps'?"),
        ("workflows: {w: [{activty: a}]}", "a step of workflow 'w' is an activity's name or a mapping"),
        ("workflows: {w: [{activity: a, timeut: 1}]}", "unknown key 'timeut'; did you mean 'timeout'?"),
        ("workflows: {w: [{activity: a, when: 'n >'}]}", "when='n >' is not a CEL expression"),
        (
            "workflows: {w: [{activity: a, sleep: 1}]}",
            "a mapping with one of `activity`, `sleep`, `wait_for`, found {'activity': 'a', 'sleep': 1}",
        ),
        ("workflows: {w: [{sleep: 1, id: a, topic: t}]}", "unknown key 'topic'; known: id, sleep, when"),
        (
            "workflows: {w: [{sleep: soon}]}",
            "a number of seconds above 0 and below 100 years, or a timedelta, found 'soon'",
        ),
        (
            "workflows: {w: [{sleep: }]}",
            "a number of seconds above 0 and below 100 years, or a timedelta, found None",
        ),
        ("workflows: {w: [{wait_for: 5}]}", "the name of a signal is a non-empty text"),
        ("workflows: {w: [{wait_for: a, default: 1}]}", "WaitFor('a') has a default, but no timeout"),
        (
            "workflows: {w: [{wait_for: a, timeout: -1}]}",
            "a timeout is a number of seconds above 0 and below 100 years",
        ),
        ("workflows: {w: [{wait_for: a, timout: 1}]}", "unknown key 'timout'; did you mean 'timeout'?"),
        (
            "workflows: {w: {steps: [a], policy: {max: 1}}}",
            "the policy of workflow 'w' has an unknown key 'max'",
        ),
        ("workflows: {w: {steps: [a], policy: 5}}", "the policy of workflow 'w'"),
        ("workflows: {w: {steps: 5}}", "workflow 'w'"),
        (
            "workflows: {w: {steps: [a], deadline: -1}}",
            "deadline of workflow 'w' is in seconds, above 0 and below 100 years",
        ),
        (
            "workflows: {w: {steps: [a], on_compensation_failure: never}}",
            "is 'continue' or 'stop', found 'never'",
        ),
        ("workflows: {w: {steps: [a], policy: {max_added: many}}}", "max_added is"),
        ("workflows: {w: {steps: abc}}", "steps of workflow 'w' are a list, found 'abc'"),
        ("workflows: {w: [[a]]}", "a step of workflow 'w' is an activity's name or a mapping"),
        ("namespace: a.b", "found 'a.b', expected up to 100 letters, digits and -_"),
        ("handlers: 5", "handlers: Input should be a valid tuple, found 5"),
        ("workflows: a", "workflows: Input should be a valid dictionary"),
    ],
)
def test_a_file_that_cannot_be_is_refused(text: str, said: str) -> None:
    """Each is told on one line, with what was found and what is expected."""
    file(text)
    with pytest.raises(ConfigurationError) as error:
        Settings()
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("setting", "last"), [("store_url", "postgresql"), ("transport_url", "amqps")])
def test_a_url_of_an_unknown_kind_is_told_those_that_the_setting_takes(setting: str, last: str) -> None:
    """A store isn't told to be a broker, which would be refused in turn."""
    with pytest.raises(ConfigurationError, match=f"one of memory://, sqlite://, .*{last}://$"):
        Settings(**{setting: "mysql://x"})


def test_a_file_that_is_no_text_is_refused() -> None:
    """Bytes that aren't UTF-8 are told of."""
    Path("paigeant.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(ConfigurationError, match=r"can't read paigeant\.yaml|is not YAML"):
        Settings()


def test_an_unknown_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped name in the environment would otherwise be ignored in silence."""
    monkeypatch.setenv("PAIGEANT_STORE", "sqlite:///x.db")
    with pytest.raises(
        ConfigurationError, match="PAIGEANT_STORE, which is no setting; did you mean 'store_url'"
    ):
        Settings()


def test_a_variable_that_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value in the environment is checked like one in the file, and said to stand there; it may hide that one."""
    Path("paigeant.yaml").write_text("concurrency: 5\n")
    monkeypatch.setenv("PAIGEANT_CONCURRENCY", "many")
    with pytest.raises(
        ConfigurationError, match=r"^in the environment, concurrency: Input should be a valid int"
    ):
        Settings()
    with pytest.raises(ConfigurationError, match=r"^concurrency: Input should be greater than or equal to 1"):
        Settings(concurrency=0)


def test_metrics_are_served_at_all_addresses_only_where_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty variable, as of another one that isn't set, isn't a word on that."""
    monkeypatch.setenv("PAIGEANT_METRICS_HOST", "")
    with pytest.raises(
        ConfigurationError, match="metrics_host: String should have at least 1 character, found ''"
    ):
        Settings()


def test_workflows_in_the_environment_that_are_not_json_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare word where JSON is expected is an error of the settings, not a traceback."""
    monkeypatch.setenv("PAIGEANT_WORKFLOWS", "order")
    with pytest.raises(ConfigurationError, match="PAIGEANT_WORKFLOWS, which is not JSON"):
        Settings()


def test_an_unknown_argument_is_refused() -> None:
    """A mistyped argument is answered with the nearest setting."""
    with pytest.raises(ConfigurationError, match="unknown key 'concurency'; did you mean 'concurrency'"):
        Settings(concurency=5)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://ada:secret@db/app", "postgresql://ada:***@db/app"),
        ("postgresql://ada@db/app", "postgresql://ada@db/app"),
        ("redis://:secret@cache:6379/0", "redis://:***@cache:6379/0"),
        ("amqps://ada:p%40ss:word@mq", "amqps://ada:***@mq"),
        (
            "postgresql://db/app?user=ada&password=secret&sslmode=require",
            "postgresql://db/app?user=ada&password=***&sslmode=require",
        ),
        ("sqlite:///paigeant.db", "sqlite:///paigeant.db"),
    ],
)
def test_passwords_are_not_shown(url: str, shown: str) -> None:
    """What is printed has no password, wherever in the URL it stands."""
    assert Settings(store_url=url).shown()["store_url"] == shown


def test_a_wrong_url_does_not_show_its_password() -> None:
    """Not even in an error."""
    with pytest.raises(ConfigurationError) as error:
        Settings(store_url="postgres://ada:secret@db/app")
    assert "secret" not in str(error.value)


# -- routes


def test_routes_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first pattern that fits counts, so the order of the file, or of the JSON in the environment, stays."""
    file("routes:\n  b.x: redis://one\n  b.*: amqp://two\n  '*': sqlite:///a.db\n")
    assert list(Settings().routes) == ["b.x", "b.*", "*"]
    monkeypatch.setenv("PAIGEANT_ROUTES", '{"z": "redis://one", "a": "redis://two"}')
    assert list(Settings().routes) == ["z", "a"]


def test_routes_are_not_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The highest place that has routes has all of them: mixed, a pattern of the file could stand before them."""
    file("routes: {'*': redis://file}\n")
    monkeypatch.setenv("PAIGEANT_ROUTES", '{"a": "redis://environment"}')
    assert Settings().routes == {"a": "redis://environment"}
    assert Settings(routes={"b": "redis://code"}).routes == {"b": "redis://code"}
    assert Settings(routes={}).routes == {}


@pytest.mark.parametrize(
    ("routes", "said"),
    [
        ("amqp://ann:secret@host", "not JSON"),
        ('["amqp://ann:secret@host"]', "found list, expected"),
        ('{"a": 5}', "found str and int, expected"),
        ('{"": "amqp://ann:secret@host"}', "found an empty pattern, expected"),
        ('{"a": "http://ann:secret@host"}', "a: found 'http://...', expected a URL"),
        ('{"a": "memory://"}', "in which no other process would see"),
    ],
)
def test_a_route_that_cannot_be_is_refused(routes: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the pattern, shows an example, and no password."""
    monkeypatch.setenv("PAIGEANT_ROUTES", routes)
    with pytest.raises(ConfigurationError, match="routes") as caught:
        Settings()
    assert said in str(caught.value)
    assert "secret" not in str(caught.value)


def test_no_value_shows_a_password() -> None:
    """Neither what is shown of good settings nor what is said of bad ones."""
    settings = Settings(
        transport_url="amqp://a:s3cret@h", routes={"p": "redis://:s3cret@h?auth_token=s3cret"}
    )
    assert settings.shown()["routes"] == {"p": "redis://:***@h?auth_token=***"}
    assert "s3cret" not in str(settings.shown())
    assert (
        settings.scrubbed("login s3cret failed at amqp://a:other@h") == "login *** failed at amqp://a:***@h"
    )
    with pytest.raises(ConfigurationError) as caught:
        Settings(transport_url=["amqp://a:s3cret@h"])
    assert "s3cret" not in str(caught.value)


# -- what travels to other hosts


@pytest.mark.parametrize(
    ("setting", "url", "instead"),
    [
        ("transport_url", "amqp://ann:s3cret@broker.example/v", "amqps://"),
        ("transport_url", "redis://:s3cret@broker.example:6379/0", "rediss://"),
        ("transport_url", "redis://localhost:26379/0?sentinel=main&sentinel_password=s3cret", "rediss://"),
        *(
            (setting, f"postgresql://ann:s3cret@{place}", "sslmode=verify-full")
            for setting in ("transport_url", "store_url")
            for place in (
                "db.example/x",
                "db.example/x?sslmode=disable",
                "db.example/x?sslmode=allow",
                "db.example/x?sslmode=prefer",
                "localhost,db.example/x",
                "/x?host=db.example",
                "/x?hostaddr=10.0.0.9",
            )
        ),
        ("routes", "amqp://ann:s3cret@broker.example/v", "amqps://"),
    ],
)
def test_plain_text_to_another_host_needs_a_word(setting: str, url: str, instead: str) -> None:
    """Broker, route or store: it is refused with what to write instead, without its password, unless it is allowed."""
    values = {setting: {"p.*": url} if setting == "routes" else url}
    settings = Settings(signing="off", **values)
    with pytest.raises(ConfigurationError, match="would travel in plain text; use") as caught:
        settings.check_exposure()
    said = str(caught.value)
    assert instead in said
    assert said.startswith("p.* is " if setting == "routes" else f"{setting} is ")
    assert "s3cret" not in said
    Settings(signing="off", allow_plaintext=True, **values).check_exposure()


@pytest.mark.parametrize(
    "url",
    [
        "amqps://broker.example",
        "rediss://broker.example/0",
        *(f"postgresql://db.example/x?sslmode={mode}" for mode in ("require", "verify-ca", "verify-full")),
        "amqp://127.0.0.1",
        "redis://[::1]:6379/0",
        "postgresql:///x?host=/run/postgresql",
    ],
)
def test_what_nobody_reads_on_the_way_needs_none(url: str) -> None:
    """TLS, and what stays on this host."""
    Settings(transport_url=url, signing="off").check_exposure()


@pytest.mark.parametrize("scheme", ["amqps", "rediss", "postgresql"])
def test_a_broker_elsewhere_needs_a_word_on_signing(scheme: str) -> None:
    """TLS doesn't say who may write there, nor does a word on plain text; a store isn't a broker."""
    url = f"{scheme}://broker.example/0?sslmode=verify-full"
    for settings in (Settings(transport_url=url), Settings(transport_url=url, allow_plaintext=True)):
        with pytest.raises(ConfigurationError, match="`signing` isn't set"):
            settings.check_exposure()
    Settings(store_url="postgresql://db.example/x?sslmode=verify-full").check_exposure()


@pytest.mark.parametrize("variable", ["PGHOST", "PGHOSTADDR", "PGSERVICE"])
def test_a_variable_of_libpq_leads_elsewhere(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the URL names no host, the environment may; the error says so, as the URL doesn't show it."""
    settings = Settings(store_url="postgresql:///x")
    settings.check_exposure()
    monkeypatch.setenv(variable, "10.0.0.9")
    with pytest.raises(ConfigurationError, match=r"postgresql:///x with the environment's PGHOST"):
        settings.check_exposure()
    monkeypatch.setenv("PGSSLMODE", "verify-full")
    if variable != "PGSERVICE":  # the file of which may say otherwise
        settings.check_exposure()


# -- keys from the environment

RING = KeyRing((Key.generate(now=1.0),)).as_dict()
PRIVATE = RING["keys"][0]["jwk"]["d"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("/run/secrets/keys.json", "Expecting value at line 1, column 1"),
        ("", "Expecting value at line 1, column 1"),
        (json.dumps(RING).replace('"kid"', '"\udcff"'), "is not UTF-8"),
        (json.dumps(RING)[:-3], "at line 1, column"),
        (json.dumps(RING["keys"]), 'a key ring is {"version": 1, "keys": [...]}'),
        (json.dumps(RING["keys"][0]["jwk"]), 'a key ring is {"version": 1, "keys": [...]}'),
        (json.dumps(RING).replace('"created_at": 1.0, ', ""), "has no instant created_at"),
        (json.dumps(RING).replace('"d"', '"e"'), "has no private part"),
        (json.dumps(RING).replace(PRIVATE, PRIVATE[:-4]), "this is no key"),
        (json.dumps(RING).replace('"d"', '"d": "a", "d"'), "the key 'd' occurs twice"),
        ("{" + json.dumps(RING)[1:-1] + f', "x": {PRIVATE}' + "}", "at line 1, column"),
    ],
)
def test_keys_in_the_environment_that_are_none(text: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told what was found, what is expected, and what makes it; nothing of the key itself."""
    monkeypatch.setenv("PAIGEANT_SIGNING_KEYS", text)
    with pytest.raises(ConfigurationError) as caught:
        Settings().key_ring()
    told = str(caught.value)
    assert told.startswith("signing_keys is no key ring: ")
    assert said in told
    assert "the whole content of a file that `paigeant keys generate` has made" in told
    assert PRIVATE[:8] not in told
    assert "\n" not in told


def test_keys_in_the_environment_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Good ones are a ring, and are printed with no setting."""
    monkeypatch.setenv("PAIGEANT_SIGNING_KEYS", json.dumps(RING))
    settings = Settings()
    assert settings.key_ring() == KeyRing.from_dict(RING)
    assert PRIVATE not in f"{settings!r} {settings.shown()} {settings.key_ring()!r}"


def test_keys_stand_in_no_configuration_file() -> None:
    """A file that is copied and shown is refused with private keys in it, as a mapping or as a text."""
    for value in (RING, json.dumps(RING)):
        file(json.dumps({"signing_keys": value}))
        with pytest.raises(ConfigurationError, match="PAIGEANT_SIGNING_KEYS") as caught:
            Settings()
        assert PRIVATE not in str(caught.value)


@pytest.mark.parametrize("name", ["signing_keys", "client_secret", "client_key"])
def test_a_secret_of_a_wrong_type_is_not_shown(name: str) -> None:
    """Code that gives a value instead of its text is told the type alone."""
    with pytest.raises(ConfigurationError, match=f"{name}: Input should be a valid string, found dict$"):
        Settings(**{name: RING})


# -- on behalf of people


def test_issuers_are_read() -> None:
    """By the URL of their keys alone, or with algorithms and the type of their tokens."""
    file(
        "token_audience: https://me.example\n"
        "token_issuers:\n"
        "  https://a.example: https://a.example/jwks\n"
        "  https://b.example: {jwks_url: 'https://b.example/k', algorithms: [PS256], token_type: null}\n"
    )
    assert Settings().issuers() == {
        "https://a.example": Issuer("https://a.example", "https://a.example/jwks"),
        "https://b.example": Issuer("https://b.example", "https://b.example/k", ("PS256",), None),
    }


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "the URL of its keys"),
        (7, "the URL of its keys"),
        ("http://idp.example/jwks", "an https:// URL"),
        ({"jwks_url": "https://i/k", "algorithm": "ES256"}, "did you mean 'algorithms'"),
        ({"jwks_url": "https://i/k", "algorithms": ["HS256"]}, r"found \['HS256'\]"),
        ({"jwks_url": "https://i/k", "algorithms": ["none"]}, r"found \['none'\]"),
        ({"jwks_url": "https://i/k", "algorithms": []}, r"found \[\]"),
        ({"jwks_url": "https://i/k", "algorithms": "ES256"}, "found 'ES256'"),
        ({"jwks_url": "https://i/k", "token_type": 1}, "token_type"),
    ],
)
def test_issuers_that_can_t_be(fields: object, said: str) -> None:
    """What is wrong with an issuer is said at the start."""
    with pytest.raises(ConfigurationError, match=said):
        Settings(token_issuers={"https://i": fields}, token_audience="me")


@pytest.mark.parametrize(
    "values",
    [
        {"token_audience": "me"},
        {"token_issuers": {"https://i": "https://i/k"}},
        {"token_url": "http://idp.example/token"},
        {"grant_url": "https://user:word@idp.example/token"},
        {"client_secret": "one", "client_key": "other"},
    ],
)
def test_half_of_what_is_needed(values: dict[str, object]) -> None:
    """An issuer without an audience, an URL that mustn't get secrets, two proofs; the error shows none of them."""
    with pytest.raises(ConfigurationError) as caught:
        Settings(**values)
    assert "word" not in str(caught.value).replace("password", "")


def test_secrets_stand_in_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is refused that has one; from the environment it is taken, and not shown."""
    monkeypatch.setenv("PAIGEANT_CLIENT_SECRET", "canary")
    settings = Settings()
    assert settings.client_secret is not None
    assert settings.client_secret.get_secret_value() == "canary"
    assert "canary" not in f"{settings!r} {settings.shown()}"
    file("client_secret: canary\n")
    with pytest.raises(ConfigurationError, match="PAIGEANT_CLIENT_SECRET") as caught:
        Settings()
    assert "canary" not in str(caught.value)


def test_settings_show_no_password() -> None:
    """Wherever they are printed: in a traceback, a debugger, a log line of the user's own."""
    settings = Settings(
        store_url="postgresql://u:S3CRET1@127.0.0.1/x",
        transport_url="redis://:S3CRET2@127.0.0.1/0",
        routes={"a.*": "amqp://u:S3CRET3@127.0.0.1/"},
        client_secret="S3CRET4",
    )
    for text in (repr(settings), str(settings), f"{settings}", f"{settings!r}"):
        assert "S3CRET" not in text
        assert "127.0.0.1" in text
    assert "S3CRET1" in settings.store_url
