"""The agent with DBOSDurability in a workflow of DBOS, `store` being its system database. In an environment of its own.

Client and worker are one process, as in `agents_paigeant.py`. `python -m benchmarks.agents_dbos '{...}'`, the same
arguments and the same figures.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import uvloop
from dbos import DBOS  # type: ignore[import-not-found]  # only in the peers' environment, which `make bench` makes
from pydantic_ai.durable_exec.dbos import DBOSDurability

from benchmarks.agents_workload import asked, checked, made, many, one_by_one, settled

plain = made("plain")
durable = made("durable", DBOSDurability())


@DBOS.workflow()  # type: ignore[untyped-decorator]
async def ask() -> tuple[str, float]:
    """The agent inside a workflow."""
    answer, ms = await asked(durable)
    return answer, ms


async def measure(*, store: str, runs: int, in_flight: int, alone: int) -> dict[str, Any]:
    """See `agents_paigeant.measure`: its `inside` is `agent.run` in a workflow, and `whole` the whole workflow."""
    DBOS(config={"name": "agents", "system_database_url": store, "log_level": "WARNING"})
    DBOS.launch()
    inside: list[float] = []

    async def alone_plain() -> None:
        checked((await asked(plain)).answer)

    async def in_workflow() -> str:
        handle = await DBOS.start_workflow_async(ask)
        answer, ms = await handle.get_result()
        checked(answer)
        inside.append(ms)
        return str(handle.get_workflow_id())

    units = await DBOS.list_workflow_steps_async(await in_workflow())
    settled()
    took, whole = await one_by_one([alone_plain, in_workflow], alone)
    found = {
        "plain": took,
        "inside": inside[-alone:],
        "whole": whole,
        "units": len(units),
        "many_plain": await many(alone_plain, runs, in_flight=in_flight),
        "many": await many(in_workflow, runs, in_flight=in_flight),
    }
    DBOS.destroy()
    return found


if __name__ == "__main__":
    print(json.dumps(uvloop.run(measure(**json.loads(sys.argv[1])))))
