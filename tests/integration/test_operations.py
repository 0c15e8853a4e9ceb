"""What the operations guide shows for servers holds on servers."""

from __future__ import annotations

import psycopg
import pytest
import yaml
from tests.unit.test_docs import Fence, fences

from paigeant import ActivityRegistry, Paigeant, Settings, Workflow


@pytest.mark.parametrize("fence", fences("postgresql"), ids=lambda fence: f"{fence.page}:{fence.line}")
async def test_queries_work_on_postgres(fence: Fence, postgres_store_url: str) -> None:
    """A query that is shown for Postgres runs over the real tables."""
    activity = ActivityRegistry()

    @activity.execute(retries=0)
    async def divide(by: int) -> float:
        return 1 / by

    settings = Settings(store_url=postgres_store_url, transport_url=postgres_store_url)
    async with Paigeant(settings, activities=activity) as app:
        await app.dispatch(Workflow("share", ["divide"]), {"by": 2}, workflow_id="good")
        await app.worker().run(until_idle=True)
        await app.dispatch(Workflow("share", ["divide"]), {"by": 3}, workflow_id="new")
    with psycopg.connect(postgres_store_url) as connection:
        for query in fence.text.split(";\n"):
            if query.strip():
                assert connection.execute(query.encode()).description


@pytest.mark.parametrize("fence", fences("yml"), ids=lambda fence: f"{fence.page}:{fence.line}")
def test_manifests_are_well_formed(fence: Fence) -> None:
    """A manifest names its kind, and only variables that are settings."""
    manifest = yaml.safe_load(fence.text)
    assert {"apiVersion", "kind", "metadata", "spec"} <= set(manifest)
    variables = {word.strip("},") for word in fence.text.split() if word.startswith("PAIGEANT_")}
    assert {name.removeprefix("PAIGEANT_").lower() for name in variables} <= set(Settings.model_fields)
