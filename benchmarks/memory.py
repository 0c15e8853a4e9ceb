"""The most memory that a worker process takes while it works off a long queue."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.bench import ROOT, Bench, NotMeasured, environment
from benchmarks.chain import chain, connected
from benchmarks.report import Figure
from benchmarks.workload import STEPS, order
from paigeant import loops

__all__ = ["dispatch", "run"]

_STATUS = Path("/proc/self/status")


def run(bench: Bench) -> list[Figure]:
    """Megabytes that `paigeant run` takes at the most, with everything dispatched before by another process."""
    if not _STATUS.exists():
        raise NotMeasured("the peak of a process's memory is read from /proc, which this system doesn't have")
    runs = bench.many(10_000, 100)
    with bench.file() as file:
        bench.fresh("benchmarks.memory", store=f"sqlite:///{file}", runs=runs)
        peak, seconds = _worked_off(file)
    return [
        Figure(f"peak of a worker with {runs:,} runs queued", peak, "MB", most=120),
        Figure("steps while it worked them off", STEPS * runs / seconds, "steps/s"),
    ]


def _worked_off(file: Path) -> tuple[float, float]:
    """The peak of a worker's resident memory, and the seconds that it took to find nothing left."""
    url = f"sqlite:///{file}"
    command = [sys.executable, "-m", "paigeant.cli", "run", "benchmarks.chain", "--until-idle"]
    peak = 0.0
    began = time.perf_counter()
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(PAIGEANT_STORE_URL=url, PAIGEANT_TRANSPORT_URL=url, PAIGEANT_LOG_LEVEL="warning"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        # The peak of the kernel's own counting never falls: reading it now and then misses nothing but the very end.
        while process.poll() is None:
            peak = max(peak, _peak(process.pid))
            time.sleep(0.01)
        errors = process.stderr.read() if process.stderr is not None else ""
    if process.returncode:
        raise RuntimeError(f"the worker ended with {process.returncode}:\n{errors[-4000:]}")
    return peak, time.perf_counter() - began


def _peak(pid: int) -> float:
    """Megabytes (of 1024 x 1024 bytes) that the process took at the most so far."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    found = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(found[0].split()[1]) / 1024 if found else 0.0


async def dispatch(*, store: str, runs: int) -> None:
    """Dispatch so many runs, and do none of them."""
    async with connected(store) as app:
        for _ in range(0, runs, 100):
            await asyncio.gather(*(app.dispatch(chain, {"order": order()}) for _ in range(min(100, runs))))


if __name__ == "__main__":
    print(json.dumps(loops.run(dispatch(**json.loads(sys.argv[1])))))
