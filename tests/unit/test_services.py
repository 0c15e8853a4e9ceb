"""What docker compose says of a service becomes the url that tests use."""

from __future__ import annotations

from typing import Any

import pytest
from tests.services.docker import url_of
from tests.services.programs import Kind


@pytest.mark.parametrize(
    ("kind", "service", "url"),
    [
        (
            "postgres",
            {
                "environment": {"POSTGRES_PASSWORD": "secret", "POSTGRES_USER": "u", "POSTGRES_DB": "d"},
                "ports": [{"target": 5432, "published": "15432", "protocol": "tcp"}],
            },
            "postgresql://u:secret@127.0.0.1:15432/d",
        ),
        (
            "postgres",
            {"environment": {"POSTGRES_HOST_AUTH_METHOD": "trust"}},
            "postgresql://postgres@127.0.0.1:5432/postgres",
        ),
        ("redis", {"environment": None}, "redis://127.0.0.1:6379/0"),
        (
            "rabbitmq",
            {
                "environment": {"RABBITMQ_DEFAULT_USER": "u", "RABBITMQ_DEFAULT_PASS": "p"},
                "ports": [{"target": 15672, "published": "1"}, {"target": 5672, "published": "2"}],
            },
            "amqp://u:p@127.0.0.1:2/",
        ),
        ("rabbitmq", {}, "amqp://guest:guest@127.0.0.1:5672/"),
    ],
)
def test_the_url_of_a_service_of_docker_compose(kind: Kind, service: dict[str, Any], url: str) -> None:
    """Its published port and its account are in it, or what the images have by default."""
    assert url_of(kind, service) == url
