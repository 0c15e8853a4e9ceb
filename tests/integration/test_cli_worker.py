"""Workers as processes: how they start, stop, are supervised, and what a shell sees of the program."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests.integration.processes import PAIGEANT, Command, call, call_afresh, shown
from tests.patience import PATIENCE

from paigeant import Paigeant, Workflow
from paigeant.cli.processes import _Supervisor, pause_before

HANDLERS = """
import asyncio, os, pathlib, signal, time
from paigeant import ActivityRegistry, StepContext, Workflow
activity = ActivityRegistry()

@activity.execute()
async def hold(ctx: StepContext) -> str:
    ctx.log.info("holding")
    while not pathlib.Path("go").exists():
        await asyncio.sleep(0.01)
    return "gone"

@activity.execute()
def block(ctx: StepContext) -> None:
    ctx.log.info("blocking")
    time.sleep(600)

@activity.execute()
async def insist(ctx: StepContext) -> None:
    ctx.log.info("insisting")
    while True:
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            pass

@activity.execute(retries=0, timeout=0.1)
async def strand(ctx: StepContext) -> None:
    await asyncio.to_thread(time.sleep, 600)

@activity.execute()
async def where() -> str:
    return type(asyncio.get_running_loop()).__module__.split(".")[0]

@activity.execute()
def end() -> int:
    ready, tell = os.pipe()
    child = os.fork()
    if not child:
        os.write(tell, b".")
        time.sleep(60)  # it is ended before, or the test fails by its exit code
        os._exit(0)
    os.read(ready, 1)
    os.kill(child, signal.SIGTERM)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

hold_on = Workflow("hold_on", ["hold"])
end_all = Workflow("end_all", ["end"])
block_all = Workflow("block_all", ["block"])
where_is = Workflow("where_is", ["where"])
strand_all = Workflow("strand_all", ["strand"])
insist_on = Workflow("insist_on", ["insist"])
"""


@pytest.fixture(autouse=True)
def _project() -> None:
    Path("paigeant.yaml").write_text("handlers: handlers.py\n")
    Path("handlers.py").write_text(HANDLERS)


def dispatch(workflow: str, *ids: str) -> None:
    """Start runs of one step, without input."""

    async def start() -> None:
        async with Paigeant() as app:
            for id in ids:
                await app.dispatch(Workflow(workflow, [workflow.split("_")[0]]), workflow_id=id)

    asyncio.run(start())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_running_step_finish(number: signal.Signals) -> None:
    """A worker that is told to stop ends with 0 once its step is done and recorded."""
    dispatch("hold_on", "h-1")
    with Command("run") as worker:
        worker.until("holding")
        worker.signal(number)
        worker.until("worker.stopping")
        Path("go").touch()
        assert worker.end() == 0
    assert shown("h-1")["output"] == "gone"


@pytest.mark.parametrize("handling", ["SIG_DFL", "SIG_IGN"])
def test_a_closed_terminal_stops_a_worker_unless_that_is_ignored(handling: str) -> None:
    """As SIGTERM does. Were it heard under `nohup`, the next signal would have the step given back at once."""
    dispatch("hold_on", "h-1")
    begins = (
        f"import os, signal, sys; signal.signal(signal.SIGHUP, signal.{handling}); "
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    with Command("run", program=[sys.executable, "-c", begins, *PAIGEANT[1:]]) as worker:
        worker.until("holding")
        worker.signal(signal.SIGHUP)
        if handling == "SIG_IGN":
            worker.signal(signal.SIGTERM)
        worker.until("worker.stopping")
        Path("go").touch()
        assert worker.end() == 0
    assert shown("h-1")["output"] == "gone"


@pytest.mark.parametrize("workflow", ["hold_on", "block_all"])
def test_a_second_signal_ends_the_worker_at_once(workflow: str) -> None:
    """Ctrl-C twice: the step is given back with its attempt uncounted, even when its thread can't be interrupted."""
    dispatch(workflow, "h-1")
    with Command("run") as worker:
        worker.until(lambda line: line["event"] in ("holding", "blocking"))
        worker.signal(signal.SIGINT)
        worker.until("worker.stopping")
        worker.signal(signal.SIGINT)
        worker.until("step.released")
        assert worker.end() == 0
    (step,) = shown("h-1")["steps"]
    assert (step["status"], step["attempts"]) == ("ready", 0)


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_a_signal_to_a_process_that_an_activity_forked_is_its_own(
    loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`multiprocessing` ends its pools so: the worker isn't told to stop, and the process ends at once."""
    monkeypatch.setenv("PAIGEANT_EVENT_LOOP", loop)
    dispatch("end_all", "e-1", "e-2", "e-3")
    said = call_afresh("run", "--until-idle", "--concurrency", "1").stderr
    assert [shown(id)["output"] for id in ("e-1", "e-2", "e-3")] == [-signal.SIGTERM] * 3
    assert "worker.stopping" not in said


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_worker_that_takes_unsigned_messages_says_so(processes: str) -> None:
    """On loopback `signing` is off by default: the first line of the command tells, with several processes as well."""
    said = call_afresh("run", "--processes", processes, "--until-idle").stderr
    first = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
    assert first["event"] == ("worker.serving" if processes == "1" else "supervisor.started")
    assert first["signing"] == "off: no message leaves this host"


def test_a_killed_process_is_replaced() -> None:
    """With --processes, the parent starts another worker, and a signal to it ends all of them gracefully."""
    with Command("run", "--processes", "2") as parent:
        pids = [parent.until("process.started")["pid"] for _ in range(2)]
        parent.until("worker.started")
        os.kill(pids[0], signal.SIGKILL)
        assert parent.until("process.ended")["how"] == "SIGKILL"
        pids.append(parent.until("process.started")["pid"])
        parent.until("worker.started")
        parent.signal(signal.SIGTERM)
        assert parent.end() == 0
    assert len(set(pids)) == 3


def test_a_second_signal_reaches_all_processes() -> None:
    """The parent hands a second signal on: what its workers were doing is given back at once."""
    dispatch("hold_on", "h-1")
    with Command("run", "--processes", "2") as parent:
        parent.until("holding")
        parent.signal(signal.SIGINT)
        parent.until("worker.stopping")
        parent.signal(signal.SIGINT)
        parent.until("step.released")
        assert parent.end() == 0


def test_workers_end_with_their_parent() -> None:
    """When the parent is killed, its workers stop by themselves."""
    with Command("run", "--processes", "2") as parent:
        for _ in range(2):
            parent.until("worker.started")
        parent.signal(signal.SIGKILL)
        for _ in range(2):
            parent.until("worker.stopped")
        assert parent.end() == -signal.SIGKILL


def test_several_processes_end_when_idle() -> None:
    """--until-idle with --processes: the parent ends with 0 when all have ended."""
    Path("go").touch()
    dispatch("hold_on", *(f"h-{number}" for number in range(6)))
    assert call_afresh("run", "--processes", "2", "--until-idle").returncode == 0
    runs = json.loads(call_afresh("runs", "list", "--json").stdout)
    assert [run["status"] for run in runs] == ["completed"] * 6


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.parametrize("loop", ["uvloop", "asyncio", "no uvloop"])
def test_workers_run_on_uvloop_where_it_is_installed_and_wanted(
    loop: str, processes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a worker, and without it what supervises several, is in asyncio's own and does the same."""
    if loop == "no uvloop":
        first = tmp_path / "first"
        first.mkdir()
        (first / "uvloop.py").write_text("raise ImportError('it is not installed')")
        monkeypatch.setenv("PYTHONPATH", str(first), prepend=os.pathsep)
    elif loop == "asyncio":
        monkeypatch.setenv("PAIGEANT_EVENT_LOOP", "asyncio")
    dispatch("where_is", "w-1")
    assert call_afresh("run", "--processes", processes, "--until-idle").returncode == 0
    assert shown("w-1")["output"] == ("uvloop" if loop == "uvloop" else "asyncio")


def test_a_process_that_has_just_ended_keeps_no_signal_from_the_others() -> None:
    """Until its parent has looked, it is among those that run; what tells them then finds no such process."""

    class Process:
        def __init__(self, *, is_gone: bool) -> None:
            self.is_gone = is_gone
            self.told: list[int] = []

        def send_signal(self, number: int) -> None:
            if self.is_gone:
                raise ProcessLookupError
            self.told.append(number)

    supervisor: Any = _Supervisor([], until_idle=False, metrics_port=None, final=())
    supervisor._running = [Process(is_gone=True), running := Process(is_gone=False)]
    supervisor.stop(signal.SIGTERM)
    assert running.told == [signal.SIGTERM]


def test_a_parent_tells_wrong_handlers_once() -> None:
    """What is wrong with the handlers is found before any process is started."""
    Path("handlers.py").write_text("1 / 0")
    result = call_afresh("run", "--processes", "2")
    assert (result.returncode, result.stderr) == (
        2,
        "error: handlers.py, line 1: ZeroDivisionError: division by zero\n",
    )


def test_pauses_before_a_new_start_grow() -> None:
    """A worker that dies again and again is started ever more rarely, at least twice a minute."""
    assert [pause_before(deaths) for deaths in (1, 2, 3, 7, 100)] == [0.5, 1.0, 2.0, 30.0, 30.0]


def test_who_stops_waiting_does_not_stop_the_run() -> None:
    """Ctrl-C in `dispatch --wait` says that the run goes on."""
    Path("in.json").write_text("{}")
    with Command("dispatch", "hold_on", "in.json", "--id", "h-1", "--wait") as waiting:
        for line in waiting.lines():
            if "no worker is running" in line:
                break
        waiting.signal(signal.SIGINT)
        assert waiting.end() == 130
    assert waiting.said[-1] == "waits no longer; run 'h-1' goes on: `paigeant runs show h-1`\n"


def test_help_loads_nothing_heavy() -> None:
    """`paigeant --help` answers at once because it leaves databases, agents, logs and settings alone."""
    program = (
        "import sys\nfrom paigeant.cli.program import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'sqlalchemy', 'pydantic', 'pydantic_ai', 'structlog', 'pydantic_settings', 'alembic'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ("Usage: " in result.stdout, result.stderr) == (True, "[]\n")


def test_a_command_ends_without_a_last_look_for_garbage() -> None:
    """All objects are out of the garbage collector's sight by then: to look at them would take longer than to end."""
    program = (
        "import atexit, gc, sys\nfrom paigeant.cli import main\n"
        "atexit.register(lambda: print(gc.get_freeze_count() > 10_000, file=sys.stderr))\n"
        "sys.argv = ['paigeant', '--version']\nmain()\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stderr == "True\n"


def test_the_shell_completes_commands() -> None:
    """What bash asks for is answered with the commands that begin so."""
    env = {
        **os.environ,
        "_PAIGEANT_COMPLETE": "complete_bash",
        "COMP_WORDS": "paigeant ru",
        "COMP_CWORD": "1",
    }
    result = subprocess.run(PAIGEANT, env=env, capture_output=True, text=True, check=False)
    assert result.stdout.split() == ["run", "runs"]


def test_the_shell_completes_handler_files() -> None:
    """`paigeant run <TAB>` offers Python files."""
    env = {
        **os.environ,
        "_PAIGEANT_COMPLETE": "complete_bash",
        "COMP_WORDS": "paigeant run h",
        "COMP_CWORD": "2",
    }
    result = subprocess.run(PAIGEANT, env=env, capture_output=True, text=True, check=False)
    assert result.stdout.split() == ["handlers.py"]


def test_a_worker_ends_without_a_task_that_takes_no_notice() -> None:
    """One that catches its cancellation and goes on: its step is given back, and the process doesn't wait for it."""
    Path("handlers.py").write_text(HANDLERS)
    call("dispatch", "insist_on", "-", "--handlers", "handlers.py", "--id", "r", input="{}")
    with Command("run", "handlers.py", program=PAIGEANT) as worker:
        worker.until("insisting")
        worker.signal(signal.SIGTERM)
        worker.until("worker.stopping")
        worker.signal(signal.SIGTERM)
        worker.until("worker.stopped")
        assert worker.process.wait() == 0
    [step] = shown("r")["steps"]
    assert (step["status"], step["attempts"]) == ("ready", 0)


def test_a_worker_ends_without_what_an_activity_has_left_in_a_thread() -> None:
    """By `asyncio.to_thread`, which can't be interrupted either."""
    Path("handlers.py").write_text(HANDLERS)
    call("dispatch", "strand_all", "-", "--handlers", "handlers.py", "--id", "r", input="{}")
    with Command("run", "handlers.py", "--until-idle", program=PAIGEANT) as worker:
        worker.until("worker.stopped")
        assert worker.process.wait() == 0
    assert "TimeoutError" in shown("r")["error"]


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_process_without_standard_streams_works(closed: str) -> None:
    """As a supervisor may start it: nobody hears it, and it does its work."""
    Path("handlers.py").write_text(HANDLERS)

    def mutely(*args: str) -> int:
        command = ["sh", "-c", f'exec "$@" {closed}', "sh", *PAIGEANT, *args]
        return subprocess.run(command, check=False, capture_output=True, input="{}", text=True).returncode

    Path("input.json").write_text("{}")
    assert mutely("dispatch", "where_is", "input.json", "--handlers", "handlers.py", "--id", "r") == 0
    assert mutely("run", "handlers.py", "--until-idle") == 0
    assert mutely("runs", "list") == 0
    assert mutely("runs", "show", "none") == 2
    assert shown("r")["status"] == "completed"


@pytest.mark.parametrize("command", ["runs list --json", "config show"])
def test_a_reader_that_goes_away_is_no_trouble(command: str) -> None:
    """`paigeant runs list | head -1`: no traceback when nobody reads on, and no failure of a run."""
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(
        [*PAIGEANT, *command.split()], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert (result.returncode, "Traceback" in result.stderr) == (141, False)


def test_a_reader_of_messages_that_goes_away_changes_nothing() -> None:
    """`paigeant runs list 2> >(head -0)`: the results are there, and the exit code says how it went."""
    read, write = os.pipe()
    os.close(read)
    listed, shown = (
        subprocess.run(
            [*PAIGEANT, "runs", *command.split()],
            stdout=subprocess.PIPE,
            stderr=write,
            text=True,
            check=False,
        )
        for command in ("list --json", "show none")
    )
    os.close(write)
    assert (listed.returncode, listed.stdout, shown.returncode) == (0, "[]\n", 2)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_may_lack_the_signs_that_a_run_has(encoding: str) -> None:
    """What the encoding has no sign for is written out, as in JSON; the command says all that there is to say."""
    Path("handlers.py").write_text(HANDLERS)
    call("dispatch", "where_is", "-", "--handlers", "handlers.py", "--id", "r", input='{"name": "Zoë 漢"}')
    environ = {**os.environ, "PYTHONUTF8": "0", "PYTHONIOENCODING": encoding}
    written = "Zoë 漢".encode(encoding, "backslashreplace").decode(encoding)
    for more, name in ([], written), (["--json"], "Zoë 漢" if encoding == "utf-8" else "Zo\\u00eb \\u6f22"):
        command = [*PAIGEANT, "runs", "show", "r", *more]
        result = subprocess.run(command, capture_output=True, env=environ, check=True)
        assert f'"name": "{name}"' in result.stdout.decode(encoding)


def test_the_module_is_the_program() -> None:
    """`python -m paigeant` does what `paigeant` does, for whoever doesn't have it on the path."""
    command = [sys.executable, "-P", "-m", "paigeant", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith(
        "paigeant 0."
    )


POISON = """
import ctypes, os, resource, signal
from paigeant import ActivityRegistry, StepContext
activity = ActivityRegistry()

@activity.execute()
async def reserve() -> str:
    return "reserved"

@activity.compensate("reserve")
async def release(ctx: StepContext, output: str) -> None:
    ctx.log.info("released")

@activity.execute(retries=1)
async def die(ctx: StepContext, how: str) -> str:
    ctx.log.info("dying", how=how)
    match how:
        case "exit":
            os._exit(7)
        case "segfault":
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            ctypes.string_at(0)
        case "killed":  # as when the system has no memory left
            os.kill(os.getpid(), signal.SIGKILL)
        case "memory":
            bytearray(1 << 60)
    return "alive"
"""
DEATHS = {"exit": "exit code 7", "segfault": "SIGSEGV", "killed": "SIGKILL"}


@pytest.mark.slow
async def test_what_kills_its_process_is_undone_after_all_its_attempts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it does: it has two attempts, no other step loses one by that, and the parent of the workers lives on."""
    (tmp_path / "handlers.py").write_text(POISON)
    short = {"lease": 20, "heartbeat": 0.2, "sweep_interval": 0.1, "retry_base": 0, "concurrency": 1}
    for name, value in short.items():
        monkeypatch.setenv(f"PAIGEANT_{name.upper()}", str(value))
    hows = [*DEATHS, "memory", "no", "nothing"]
    workflow = Workflow("w", ["reserve", "die"])
    async with Paigeant() as app:
        with Command("run", "--processes", "2") as parent:
            runs = [await app.dispatch(workflow, {"how": how}, workflow_id=how) for how in hows]
            results = {run.id: await run.wait(PATIENCE) for run in runs}
            details = [await run.detail() for run in runs]
            parent.signal(signal.SIGTERM)
            assert await asyncio.to_thread(parent.end) == 0
    told = [json.loads(line) for line in parent.said if line.startswith("{")]
    assert {id: str(result.status) for id, result in results.items()} == {
        how: "completed" if how.startswith("no") else "compensated" for how in hows
    }
    died = Counter(line["how"] for line in told if line["event"] == "process.ended")
    assert died == dict.fromkeys(DEATHS.values(), 2)
    attempts = Counter(line["workflow_id"] for line in told if line["event"] == "dying")
    assert attempts == {how: 1 if how.startswith("no") else 2 for how in hows}
    assert {step.attempt for detail in details for step in detail.steps if step.key.step == "reserve"} == {1}
