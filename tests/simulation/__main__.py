"""Play seeds again: `python -m tests.simulation 4711` tells all that happens; `0-100000` looks for violations."""

from __future__ import annotations

import sys
import time

from tests.simulation.world import play


def _show(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def main(arguments: list[str]) -> int:
    """Play what the arguments name; 1 when a seed ends in a violation."""
    violations = 0
    for argument in arguments:
        first, _, last = argument.partition("-")
        if not last:
            found = play(int(first), trace=_show)
            sys.stdout.write(f"seed {first}: {found or 'no violation'}\n")
            violations += found is not None
            continue
        began = time.process_time()
        for seed in range(int(first), int(last)):
            found = play(seed)
            if found is not None:
                violations += 1
                sys.stdout.write(f"seed {seed}: {type(found).__name__} {found}\n")
        seconds = time.process_time() - began
        sys.stdout.write(f"{int(last) - int(first)} seeds, {violations} violations, {seconds:.1f} s of CPU\n")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
