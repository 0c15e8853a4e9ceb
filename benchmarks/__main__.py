"""`python -m benchmarks [name ...] [--quick] [--json]`: run benchmarks and print their figures.

Exit 0 when all were measured, whatever the figures say (a bound that is missed is marked); 2 when one could not be.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.bench import ROOT, Bench, NotMeasured
from benchmarks.report import as_json, lines, machine

__all__ = ["NAMES", "main"]

NAMES = (
    *("throughput", "latency", "peer", "growth", "memory", "startup", "cost", "floor", "signing"),
    *("servers", "server_peers", "server_floor", "commits", "drivers", "agents", "observers", "logs"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what `arguments` name; gives the exit code."""
    options = _options(arguments)
    bench = Bench(options.folder, options.quick)
    where = machine()
    found: dict[str, Any] = {}
    missing = False
    if not options.json:
        print("  ".join(f"{key} {value}" for key, value in where.items()))
    for name in options.names or NAMES:
        module = importlib.import_module(f"benchmarks.{name}")
        if not options.json:
            print(f"\n{name}: {(module.__doc__ or '').splitlines()[0]}", flush=True)
        try:
            figures = module.run(bench)
        except NotMeasured as exc:
            missing = True
            print(f"{name} was not measured: {exc}", file=sys.stderr)
            continue
        found[name] = as_json(figures)
        if not options.json:
            print("\n".join(lines(figures)), flush=True)
    if options.json:
        print(json.dumps({"machine": where, "servers": bench.conditions, "figures": found}, indent=2))
    elif bench.conditions:
        print("\n" + "\n".join(f"{key}: {value}" for key, value in bench.conditions.items()))
    return 2 if missing else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"{', '.join(NAMES)}; all without one")
    parser.add_argument("--quick", action="store_true", help="the smallest form, to see that all of it works")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / ".bench", help="where the database files are made (%(default)s)"
    )
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in NAMES:
            parser.error(f"there is no benchmark '{name}'; there is {', '.join(NAMES)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
