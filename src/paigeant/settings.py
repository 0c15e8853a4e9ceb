"""Settings: the one reader of environment and file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)

from paigeant.codec import parse_strict
from paigeant.definitions import check_keys, issuer_from, workflow_from
from paigeant.errors import ConfigurationError, MessageInvalid, PaigeantError, nearest
from paigeant.https import check_url
from paigeant.identity import Issuer
from paigeant.keys import KeyRing
from paigeant.loops import EventLoop
from paigeant.retry import RetryPolicy
from paigeant.urls import (
    begin_of,
    check_readable,
    is_encrypted,
    is_local,
    is_namespace,
    scrubbed,
    without_password,
)
from paigeant.workflow import Workflow

__all__ = ["CONFIG_FILE", "Settings", "is_in_environment"]

CONFIG_FILE = "paigeant.yaml"
_PREFIX = "PAIGEANT_"
_ONLY_ENVIRONMENT = ("client_secret", "client_key", "signing_keys")
_MAY_BE_SECRET = (*_ONLY_ENVIRONMENT, "transport_url", "store_url", "routes")
_STORE_SCHEMES = ("memory", "sqlite", "postgresql")
_KNOWN_SCHEMES = (*_STORE_SCHEMES, "redis", "rediss", "amqp", "amqps")


class Settings(BaseSettings):
    """What an application is told from outside: constructor over `PAIGEANT_*` over `paigeant.yaml` over defaults.

    Times are in seconds. Raises ConfigurationError for an unknown key, with the nearest known one, and for a value
    that can't be.
    """

    model_config = SettingsConfigDict(env_prefix=_PREFIX, extra="forbid", allow_inf_nan=False)

    transport_url: str = Field("sqlite:///paigeant.db", description="where messages travel")
    store_url: str = Field("sqlite:///paigeant.db", description="where runs are recorded")
    routes: Annotated[dict[str, str], NoDecode] = Field(
        default_factory=dict, description="other brokers by patterns of topics, the first that fits counts"
    )
    namespace: str = Field(
        "paigeant", description="begins the names of queues and keys on a broker that others use, too"
    )
    rabbitmq_queue_type: Literal["quorum", "classic"] = Field(
        "quorum", description="quorum queues are replicated in a cluster"
    )
    handlers: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="handler files or modules, for `run` and `dispatch`"
    )
    workflows: dict[str, Any] = Field(
        default_factory=dict, description="workflows by name, same fields as in code"
    )

    concurrency: int = Field(100, ge=1, description="steps at once in one worker process")
    processes: int = Field(1, ge=1, description="worker processes that `paigeant run` starts")
    event_loop: EventLoop = Field("uvloop", description="of `paigeant run`; `asyncio` is Python's own")
    retries: int = Field(3, ge=0, description="further attempts after the first")
    retry_base: float = Field(0.5, ge=0, description="wait before the first further attempt; it doubles")
    retry_cap: float = Field(60.0, ge=0, description="longest wait between attempts")
    timeout: float | None = Field(None, gt=0, description="for each attempt; none by default")

    lease: float = Field(30.0, gt=0, description="how long a silent worker keeps its steps")
    heartbeat: float = Field(5.0, gt=0, description="how often a worker renews its lease")
    sweep_interval: float = Field(
        1.0, gt=0, description="how often a worker looks for what others left behind"
    )
    grace: float = Field(10.0, gt=0, description="how long a sent message has before it is sent again")
    shutdown_grace: float = Field(30.0, ge=0, description="how long running steps may finish at a shutdown")
    start_timeout: float | None = Field(
        None, ge=0, description="how long a worker waits at its start for servers; without end by default"
    )
    local_steps: int = Field(50, ge=1, description="steps of one run in a row before others have their turn")

    adopt: bool = Field(False, description="take over runs that the store has never seen from their messages")

    signing: Literal["off", "sign", "require"] | None = Field(
        None, description="of messages; by default off where no message leaves this host"
    )
    deployment: str = Field(
        "default", min_length=1, max_length=100, description="messages signed for another one are refused"
    )
    keys_file: str = Field("paigeant-keys.json", description="the key ring, see `paigeant keys`")
    signing_keys: SecretStr | None = Field(
        None, description="the key ring itself, instead of its file; only from the environment or in code"
    )
    trust_file: str | None = Field(
        None, description="whose signatures count, and for what; by default those of the key ring for all"
    )
    message_lifetime: float = Field(86400.0, ge=60, description="how long a signed message holds")
    allow_plaintext: bool = Field(
        False,
        description="let messages and runs travel to other hosts without TLS, where others may read them",
    )

    max_message_bytes: int = Field(1024 * 1024, ge=1024, description="largest message")
    inline_bytes: int = Field(65536, ge=0, description="outputs above it stay in the store and don't travel")

    token_issuers: dict[str, Any] = Field(
        default_factory=dict, description="whose tokens of people are accepted, by their exact `iss`"
    )
    token_audience: str | None = Field(
        None, description="this service, as the `aud` of those tokens names it"
    )
    token_url: str | None = Field(None, description="where tokens are exchanged for those of other audiences")
    token_form: Literal["token-exchange", "jwt-bearer"] = Field(
        "token-exchange", description="how: by RFC 8693, or by the jwt-bearer form on behalf of a user"
    )
    token_actor: bool = Field(False, description="send the service's own token along with an exchange")
    grant_url: str | None = Field(
        None, description="where a grant handle is worth a token; `token_url` by default"
    )
    client_id: str | None = Field(None, description="who this service is to the authorization server")
    client_secret: SecretStr | None = Field(
        None, description="proves it; only from the environment or in code"
    )
    client_key: SecretStr | None = Field(
        None, description="or a private key as PEM does; only from the environment or in code"
    )
    client_key_algorithm: Literal["ES256", "RS256", "PS256", "EdDSA", "Ed25519"] = Field(
        "ES256", description="what that key signs with"
    )

    strict: bool = Field(
        False,
        description="refuse workflows, and may_add of agents, with activities that no loaded registry knows",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least level of log lines"
    )
    log_format: Literal["auto", "console", "json"] = Field("auto", description="auto: console on a terminal")
    traces: bool = Field(False, description="send traces to an OpenTelemetry collector")
    otel_metrics: bool = Field(False, description="send metrics to an OpenTelemetry collector")
    metrics_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="where each worker serves metrics and its health; nowhere by default",
    )
    metrics_host: str = Field(
        "127.0.0.1", min_length=1, description="the address of this machine that they are served at"
    )  # an empty one would be all addresses

    log_file: str | None = Field(None, description="a file for the log lines of `run`, as JSON")
    log_file_bytes: int = Field(16 * 1024 * 1024, ge=4096, description="a log file of this size is put aside")
    log_files: int = Field(5, ge=2, description="log files that are kept, the current one with them")
    log_sql: Literal["off", "debug", "info", "warning", "error"] = Field(
        "off", description="least level of log lines that are kept in the store, for `logs`"
    )

    _file: ClassVar[Path | None] = None

    def __init__(self, **values: Any) -> None:
        check_keys(values, type(self).model_fields, "the settings have")
        if isinstance(values.get("routes"), Mapping):
            # Else it would be mixed with those of environment and file, and theirs would come first.
            values["routes"] = tuple(values["routes"].items())
        _check_environment(type(self).model_fields)
        try:
            super().__init__(**values)
        except ValidationError as exc:
            # Its text has the values, such as a URL.
            raise ConfigurationError(_explain(exc, given=values)) from None
        except SettingsError as exc:
            raise ConfigurationError(_explain_variable(exc)) from None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Constructor, environment, file, in this order."""
        path = Path(CONFIG_FILE)
        if not path.is_file():
            return init_settings, env_settings
        check_file(path)
        return init_settings, env_settings, YamlConfigSettingsSource(settings_cls, yaml_file=path)

    @field_validator("transport_url")
    @classmethod
    def _known_transport(cls, url: str) -> str:
        return cls._known_scheme(url, _KNOWN_SCHEMES)

    @field_validator("store_url")
    @classmethod
    def _known_store(cls, url: str) -> str:
        return cls._known_scheme(url, _STORE_SCHEMES)

    @classmethod
    def _known_scheme(cls, url: str, expected: tuple[str, ...]) -> str:
        scheme, found, _ = url.partition("://")
        if not found or scheme not in _KNOWN_SCHEMES:  # which of these is no store, `open_store` tells
            shown = ", ".join(f"{name}://" for name in expected)
            raise ValueError(f"found {_named(url)}, expected a URL that starts with one of {shown}")
        try:
            check_readable(url)
        except ConfigurationError as exc:
            raise ValueError(str(exc)) from None
        return url

    @field_validator("token_url", "grant_url")
    @classmethod
    def _may_be_asked(cls, url: str | None) -> str | None:
        try:
            return None if url is None else check_url(url, "it")
        except ConfigurationError as exc:
            raise ValueError(str(exc)) from exc

    @field_validator("log_sql", mode="before")
    @classmethod
    def _on_or_off(cls, value: Any) -> Any:
        # YAML reads `off` and `on` as truth values.
        return {False: "off", True: "info"}[value] if isinstance(value, bool) else value

    @field_validator("signing", mode="before")
    @classmethod
    def _off_in_yaml(cls, value: Any) -> Any:
        return "off" if value is False else value  # what YAML makes of a bare `off`

    @field_validator("namespace")
    @classmethod
    def _fits_every_broker(cls, name: str) -> str:
        if not is_namespace(name):
            raise ValueError(f"found {name!r}, expected up to 100 letters, digits and -_, and not amq")
        return name

    @field_validator("routes", mode="before")
    @classmethod
    def _in_order(cls, value: Any) -> Any:
        example = 'expected {"partner.*": "amqp://host"}'
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError as exc:
                raise ValueError(f"found a text that is not JSON: {exc}; {example}") from exc
        if isinstance(value, tuple):
            value = dict(value)
        if not isinstance(value, Mapping):
            raise ValueError(f"found {type(value).__name__}, {example}")
        for pattern, url in value.items():
            if not isinstance(pattern, str) or not isinstance(url, str) or not pattern:
                found = (
                    f"{type(pattern).__name__} and {type(url).__name__}" if pattern else "an empty pattern"
                )
                raise ValueError(f"found {found}, {example}")
        return value

    @field_validator("routes")
    @classmethod
    def _known_routes(cls, routes: dict[str, str]) -> dict[str, str]:
        for pattern, url in routes.items():
            try:
                cls._known_scheme(url, _KNOWN_SCHEMES)
            except ValueError as exc:
                raise ValueError(f"{pattern}: {exc}") from exc
            if url.startswith("memory:"):
                raise ValueError(
                    f"{pattern}: found memory://, in which no other process would see a message; expected a broker"
                )
        return routes

    @field_validator("handlers", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        # In the environment, where a list can't be written otherwise, commas separate.
        return (
            [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
        )

    @field_validator("workflows", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        # A list of them, as code may have it: each says what it is called.
        if not isinstance(value, list):
            return value
        named: dict[str, Any] = {}
        for fields in value:
            name = fields.get("name") if isinstance(fields, Mapping) else None
            if not isinstance(name, str):
                raise ValueError(f"each workflow of a list has a `name`, found {fields!r}")
            if name in named:
                raise ValueError(f"workflow '{name}' occurs twice")
            named[name] = fields
        return named

    @field_validator("workflows")
    @classmethod
    def _are_workflows(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name, fields in value.items():
            try:
                workflow_from(name, fields)
            except PaigeantError as exc:
                where = f"workflow '{name}'"
                raise ValueError(str(exc) if where in str(exc) else f"{where}: {exc}") from exc
        return value

    @model_validator(mode="after")
    def _beats_in_time(self) -> Self:
        if self.heartbeat >= self.lease:
            raise ValueError(
                f"found heartbeat={self.heartbeat:g} and lease={self.lease:g}; a worker must beat more often than "
                "its lease ends, best at least three times"
            )
        return self

    @field_validator("token_issuers")
    @classmethod
    def _are_issuers(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name, fields in value.items():
            try:
                issuer_from(name, fields)
            except PaigeantError as exc:
                raise ValueError(str(exc)) from exc
        return value

    @model_validator(mode="after")
    def _can_act(self) -> Self:
        if bool(self.token_issuers) != (self.token_audience is not None):
            raise ValueError(
                "found only one of token_issuers and token_audience; a token is accepted from an issuer, and for this "
                "service: set both"
            )
        if self.client_secret is not None and self.client_key is not None:
            raise ValueError("found client_secret and client_key; a service proves by one of them who it is")
        return self

    def issuers(self) -> dict[str, Issuer]:
        """Those whose tokens are accepted, by their names."""
        return {name: issuer_from(name, fields) for name, fields in self.token_issuers.items()}

    def retry_policy(self) -> RetryPolicy:
        """How often and how long in between, for steps that don't say."""
        return RetryPolicy(attempts=self.retries + 1, base=self.retry_base, cap=self.retry_cap)

    def defined_workflows(self) -> dict[str, Workflow]:
        """The workflows that the file defines, by name."""
        return {name: workflow_from(name, fields) for name, fields in self.workflows.items()}

    def check_exposure(self) -> None:
        """Raise ConfigurationError for another host without TLS, and for a broker there without a word on signing.

        Both may be meant, and then have to be said.
        """
        brokers = (("transport_url", self.transport_url), *self.routes.items())
        for name, url in brokers:
            if self.signing is None and not is_local(url, os.environ):
                raise ConfigurationError(
                    f"{name} is {_told(url)}, and `signing` isn't set: unsigned, whoever can write there could start "
                    "any activity. Set `signing: require` (`paigeant keys generate` makes the key), or `signing: off`"
                )
        for name, url in (*brokers, ("store_url", self.store_url)):
            self.check_encrypted(name, url)

    def check_encrypted(self, name: str, url: str) -> None:
        """Raise ConfigurationError where what is sent to `url`, the setting `name`, can be read under way."""
        if self.allow_plaintext or is_local(url, os.environ) or is_encrypted(url, os.environ):
            return
        if name == "store_url" and not url.startswith("postgresql:"):
            return  # it is no store at all, which is told where it would be opened
        what = "runs" if name == "store_url" else "messages"
        raise ConfigurationError(
            f"{name} is {_told(url)}, where {what} would travel in plain text; use {_encrypted(url)}; "
            "or set `allow_plaintext: true` in your own network"
        )

    def key_ring(self) -> Path | KeyRing:
        """The file of the key ring, or the ring that the settings hold. Raises ConfigurationError for what is none."""
        if self.signing_keys is None:
            return Path(self.keys_file)
        # A variable of the environment may hold bytes that are no text; it is the strict parse that says so.
        body = self.signing_keys.get_secret_value().encode("utf-8", "surrogateescape")
        try:
            return KeyRing.from_dict(parse_strict(body))
        except (MessageInvalid, ConfigurationError) as exc:
            reason = str(exc).removeprefix(f"{getattr(exc, 'reason', '')}: ")
            raise ConfigurationError(
                f"signing_keys is no key ring: {reason}; expected the whole content of a file that "
                "`paigeant keys generate` has made"
            ) from None

    def trusted(self) -> Path | None:
        """The trust file."""
        return None if self.trust_file is None else Path(self.trust_file)

    def shown(self) -> dict[str, Any]:
        """All values as they may be printed: without passwords."""
        values = self.model_dump(mode="json")
        for name in ("transport_url", "store_url"):
            values[name] = without_password(values[name])
        values["routes"] = {pattern: without_password(url) for pattern, url in values["routes"].items()}
        return values

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        # A traceback or a debugger shows this, and nobody has asked for passwords.
        yield from self.shown().items()

    @property
    def urls(self) -> tuple[str, ...]:
        """All URLs that may hold a password."""
        return (self.transport_url, self.store_url, *self.routes.values())

    def scrubbed(self, text: str) -> str:
        """`text` without the passwords that the settings hold, such as a library's error that may have one."""
        return scrubbed(text, self.urls)


class _OneOfEach(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping, as YAML itself does: what came first would be gone unseen."""

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if (key.tag, key.value) in seen:
                twice = f"the key {key.value!r} occurs twice in one mapping"
                raise yaml.MarkedYAMLError(problem=twice, problem_mark=key.start_mark)
            seen.add((key.tag, key.value))
        return node


def check_file(path: Path) -> dict[str, Any]:
    """The values in the configuration file. Raises ConfigurationError for what isn't YAML or has an unknown key."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_OneOfEach)
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark is not None else ""
        reason = " ".join(str(getattr(exc, "problem", exc)).split())
        raise ConfigurationError(f"{path}{place} is not YAML: {reason}") from exc
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigurationError(f"can't read {path}: {exc}") from exc
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path} holds a {type(values).__name__}; expected `key: value` lines")
    check_keys(values, Settings.model_fields, f"{path} has")
    for name in _ONLY_ENVIRONMENT:
        if name in values:
            raise ConfigurationError(
                f"{path} holds {name}, and a file is copied and shown; put it into the environment as "
                f"{_PREFIX}{name.upper()}"
            )
    return values


def _check_environment(known: Mapping[str, Any]) -> None:
    for variable in os.environ:
        if variable.upper().startswith(_PREFIX):
            key = variable[len(_PREFIX) :].lower()
            if key not in known:
                raise ConfigurationError(
                    f"the environment has {variable}, which is no setting; {nearest(key, known)}"
                )


def _explain(exc: ValidationError, given: Mapping[str, Any]) -> str:
    first = exc.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or "settings"
    if first["loc"] and (setting := str(first["loc"][0])) not in given:
        place = f"in {_source(setting)}, {place}"
    if first["type"] == "value_error":  # one of ours, which says what was found
        return f"{place}: {first['msg'].removeprefix('Value error, ')}"
    # Whatever stands where a secret belongs may be one, however it is wrong.
    found = (
        type(first["input"]).__name__
        if first["loc"][:1] and first["loc"][0] in _MAY_BE_SECRET
        else _scrubbed(first["input"])
    )
    return f"{place}: {first['msg']}, found {found}"


def _source(setting: str) -> str:
    """Where the value of a setting stands that nobody gave to the constructor."""
    return "the environment" if is_in_environment(setting) else CONFIG_FILE


def is_in_environment(setting: str) -> bool:
    """Whether a variable says what the setting is, in whichever case it is written."""
    variable = f"{_PREFIX}{setting.upper()}"
    return any(name.upper() == variable for name in os.environ)


def _explain_variable(exc: SettingsError) -> str:
    name = next(iter(re.findall(r'field "(\w+)"', str(exc))), "")
    reason = f": {exc.__cause__}" if exc.__cause__ is not None else ""
    return (
        f"the environment has {_PREFIX}{name.upper()}, which is not JSON{reason}; expected JSON such as {{}}"
    )


def _named(url: str) -> str:
    """What may be shown of a text that is no URL of ours: its scheme, or all of what looks like no URL of a server."""
    if begin := begin_of(url):
        return f"'{begin}...'"
    return "a text without a scheme" if re.search("[:@?&=]", url) else repr(url)


def _told(url: str) -> str:
    shown = without_password(url)
    if is_local(url):  # then it is the environment that leads elsewhere
        return f"{shown} with the environment's PGHOST, PGHOSTADDR or PGSERVICE"
    return shown


def _encrypted(url: str) -> str:
    """How the same server is named for TLS."""
    scheme = url.partition("://")[0]
    return "sslmode=verify-full in its parameters" if scheme == "postgresql" else f"{scheme}s://"


def _scrubbed(value: Any) -> str:
    return scrubbed(repr(value))
