"""examples/order_saga.py, in one process and as services."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.integration.processes import Command, call, shown

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "order_saga.py")


def order(address: str, id: str) -> Any:
    """The run of an order to this address, once two workers with a part of the topics each have done it."""
    Path("order.json").write_text(
        json.dumps({"sku": "A-1", "quantity": 2, "card": "4242", "address": address})
    )
    with (
        Command("run", EXAMPLE, "--topics", "reserve_stock") as stock,
        Command("run", EXAMPLE, "--topics", "charge_card,ship") as rest,
    ):
        for worker in (stock, rest):
            worker.until("worker.started")
        call(
            "dispatch",
            "order_saga",
            "order.json",
            "--handlers",
            EXAMPLE,
            "--id",
            id,
            "--wait",
            "--timeout",
            "60",
        )
        for worker in (stock, rest):
            worker.signal(signal.SIGTERM)
            assert worker.end() == 0
    return shown(id)


def test_an_order_goes_through_two_services() -> None:
    """An order that can be shipped is completed."""
    run = order("1 Main Street", "o-1")
    assert (run["status"], run["output"]) == ("completed", "on its way to 1 Main Street")


def test_an_order_that_cannot_be_shipped_is_undone() -> None:
    """The card is refunded first, then the stock released, each by the service that has it."""
    run = order("Sea of Tranquility, Moon", "o-1")
    assert run["status"] == "compensated"
    assert [(undo["id"], undo["status"]) for undo in run["compensations"]] == [
        ("charge_card", "compensated"),
        ("reserve_stock", "compensated"),
    ]


def test_the_example_runs_in_one_process() -> None:
    """`python examples/order_saga.py` shows both endings."""
    result = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, check=True)
    assert [line.split(": ", 1)[1].split(",")[0] for line in result.stdout.splitlines()] == [
        "completed",
        "compensated",
    ]
