"""How a user gets what an extra brings, as Paigeant was installed."""

from __future__ import annotations

from typing import Any

import pytest

from paigeant.extras import _command


@pytest.mark.parametrize(
    ("origin", "said"),
    [
        ({}, "pip install 'paigeant[redis]'"),
        ({"url": "https://host/paigeant.whl", "archive_info": {}}, "pip install 'paigeant[redis]'"),
        ({"url": "file:///src/paigeant", "dir_info": {}}, "pip install '/src/paigeant[redis]'"),
        (
            {"url": "file:///my%20src/p", "dir_info": {"editable": True}},
            "pip install -e '/my src/p[redis]'",
        ),
    ],
    ids=["index", "archive", "folder", "editable"],
)
def test_an_extra_comes_from_where_the_package_came_from(origin: dict[str, Any], said: str) -> None:
    """From the index, or from the checkout: there another release would take its place."""
    assert _command("redis", origin) == said
