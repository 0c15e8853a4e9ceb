"""`paigeant run`: a worker, or several worker processes."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.main import get_group

from paigeant import loops
from paigeant.cli import console, session
from paigeant.cli.opening import open_unless
from paigeant.cli.sight import observing
from paigeant.cli.stops import stop_signals
from paigeant.errors import ConfigurationError, HandlerError, PaigeantError, UnknownActivity
from paigeant.threads import THREAD_NAME

if TYPE_CHECKING:
    from paigeant.app import Paigeant
    from paigeant.loading import Handlers
    from paigeant.observers.logs import LogFile, LogObserver
    from paigeant.settings import Settings
    from paigeant.worker import ActivityWorker

__all__ = ["register"]

log = logging.getLogger("paigeant.worker")


def register(app: typer.Typer) -> None:
    """Add `run` to the program."""
    app.command(
        epilog=session.examples(
            "paigeant run handlers.py",
            "paigeant run shop.orders shop.billing --processes 4",
            "paigeant run handlers.py --topics charge_card --concurrency 10",
            "paigeant run handlers.py --until-idle",
        )
    )(run)


def run(
    handlers: Annotated[
        list[str] | None,
        typer.Argument(
            help="Files or modules that define activities; default: `handlers` of paigeant.yaml.",
            metavar="HANDLERS",
            autocompletion=session.complete("*.py"),
        ),
    ] = None,
    topics: Annotated[
        list[str] | None,
        typer.Option(
            help="Serve only these topics (several with commas, or the option again).", metavar="TOPIC"
        ),
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Steps at once in each process.", metavar="N")
    ] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Worker processes.", metavar="N")] = None,
    until_idle: Annotated[bool, typer.Option("--until-idle", help="End when no step is left to do.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse workflows with activities that no handler defines.")
    ] = False,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help="Serve /metrics, /live and /ready there, further processes behind it.",
            metavar="PORT",
        ),
    ] = None,
    supervised: Annotated[bool, typer.Option("--supervised", hidden=True)] = False,
) -> None:
    """Run a worker that does the steps of the activities in HANDLERS.

    Ctrl-C or SIGTERM lets running steps finish, then ends the worker.
    A second time ends it at once; what it was doing is free for other workers.
    While its database or broker is away it waits for it, by default without end, or not at all with --until-idle
    (setting start_timeout).
    """
    settings = session.read_settings(
        concurrency=concurrency,
        processes=processes,
        strict=strict or None,
        handlers=tuple(handlers or ()) or None,
        metrics_port=metrics_port,
    )
    if until_idle and settings.start_timeout is None:  # somebody waits for it to end
        settings = settings.model_copy(update={"start_timeout": 0.0})
    loaded = _loaded(settings)
    wanted = _wanted(topics)
    as_json = settings.log_format == "json" or (settings.log_format == "auto" and not sys.stderr.isatty())

    from paigeant.observers.logs import configure
    from paigeant.redaction import Redactor

    # What pydantic-ai greets with at a terminal has no place among log lines.
    os.environ.setdefault("PYDANTIC_AI_NO_BANNER", "1")
    logs = configure(
        level=settings.log_level,
        format="json" if as_json else "console",
        also=_file_of(settings),
        redactor=Redactor(settings.urls),
        kept=None if settings.log_sql == "off" else settings.log_sql,
        shared=supervised or settings.processes > 1,
    )
    if not supervised:
        _check(settings, loaded, wanted)
    with _told(as_json=as_json or settings.log_file is not None):
        if settings.processes > 1 and not supervised:
            from paigeant.cli.processes import supervise

            command = _command(settings, wanted, until_idle=until_idle)
            code = loops.run(supervise(command, settings, until_idle=until_idle))
        else:
            banner = None if supervised else _banner(as_json)
            beside = ThreadPoolExecutor(thread_name_prefix=THREAD_NAME)
            work = _work(settings, loaded, wanted, logs, until_idle, supervised, banner)
            loops.run(_in_threads(beside, work), settings.event_loop, leave=partial(_leave_work, beside))
            code = 0
    _leave(code)


@contextlib.contextmanager
def _told(*, as_json: bool) -> Any:
    """Has the log say why the process ends: what the command prints of it may be seen by nobody."""
    try:
        yield
    except Exception as exc:
        if as_json:
            unforeseen = None if isinstance(exc, PaigeantError) else exc
            log.error("worker.ended", extra={"error": f"{type(exc).__name__}: {exc}"}, exc_info=unforeseen)
        raise


def _file_of(settings: Settings) -> list[LogFile]:
    if settings.log_file is None:
        return []
    from paigeant.observers.logs import LogFile
    from paigeant.observers.logs.lines import level_number

    return [
        LogFile(
            settings.log_file,
            least=level_number(settings.log_level),
            most_bytes=settings.log_file_bytes,
            files=settings.log_files,
        )
    ]


def _loaded(settings: Settings) -> Handlers:
    if not settings.handlers:
        raise ConfigurationError(
            "no handlers are named; give a file or module (`paigeant run handlers.py`), "
            "or `handlers:` in paigeant.yaml; `paigeant init` makes an example of both"
        )
    try:
        loaded = session.handlers_of(settings, ())
    except HandlerError as exc:
        from paigeant.cli import runs

        first = settings.handlers[0]
        if first in get_group(runs.app).commands:
            raise HandlerError(f"{exc}; did you mean `paigeant runs {first}`?") from exc
        raise
    if not loaded.activities:
        raise ConfigurationError(
            f"{', '.join(loaded.names)} defines no activity, so that a worker has nothing to do; "
            "decorate functions with @activity.execute()"
        )
    return loaded


def _wanted(topics: Sequence[str] | None) -> list[str] | None:
    from paigeant.slip import check_name

    if topics is None:
        return None
    wanted = [topic.strip() for given in topics for topic in given.split(",") if topic.strip()]
    if not wanted:
        raise ConfigurationError("--topics names no topic; expected names with commas in between")
    for topic in wanted:
        check_name("a topic", topic)
    return list(dict.fromkeys(wanted))


def _check(settings: Settings, loaded: Handlers, wanted: list[str] | None) -> None:
    """Tell what can't be meant: steps that this worker can't do, or that go to topics which it doesn't serve."""
    from paigeant.errors import nearest
    from paigeant.loading import unknown_activities
    from paigeant.waits import WAITS

    workflows = {**settings.defined_workflows(), **{workflow.name: workflow for workflow in loaded.workflows}}
    for where, unknown in unknown_activities(workflows.values(), loaded.activities):
        if unknown.name in WAITS:
            continue  # steps that only wait: every worker knows them
        if settings.strict:
            raise UnknownActivity(unknown.name, loaded.activities)
        console.warn(f"{where}: {unknown}; another service may have it")
    activities = loaded.activities
    known = {activities.get(name).topic for name in activities} | set(activities)
    extra = {
        step.topic
        for workflow in workflows.values()
        for step in workflow.steps
        if step.topic is not None and step.activity not in WAITS
    }
    for topic in wanted or ():
        if topic not in known | extra:
            console.warn(f"no activity here has the topic '{topic}'; {nearest(topic, known | extra)}")
    for topic in sorted(extra - set(known if wanted is None else wanted)):
        if wanted is None:
            console.warn(
                f"some steps go to topic '{topic}', which this worker doesn't serve; --topics would name it"
            )


def _command(settings: Settings, wanted: list[str] | None, *, until_idle: bool) -> list[str]:
    """The command line of one of several worker processes."""
    # -P: a file of the working directory must not stand in for a module of ours.
    command = [sys.executable, "-P", "-m", "paigeant.cli", "run", *settings.handlers, "--supervised"]
    command += ["--processes", "1", "--concurrency", str(settings.concurrency)]
    command += ["--topics", ",".join(wanted)] if wanted is not None else []
    return command + ["--until-idle"] * until_idle


async def _work(
    settings: Settings,
    loaded: Handlers,
    wanted: list[str] | None,
    logs: LogObserver,
    until_idle: bool,
    supervised: bool,
    banner: Callable[[Paigeant, ActivityWorker], None] | None,
) -> None:
    with observing(settings, loaded) as sight:
        app = session.application(settings, loaded, makes=True, observers=[logs, *sight.observers])
        sight.tell_lost([*logs.destinations, *getattr(app.log_handler, "destinations", ())])
        worker, stopped = app.worker(topics=wanted), asyncio.Event()
        async with contextlib.AsyncExitStack() as stack, sight.of(worker):
            with (
                _stopping(worker, stopped),
                _parent(worker, stopped) if supervised else contextlib.nullcontext(),
            ):
                if not await open_unless(stopped, app, seconds=settings.start_timeout, waits=sight.waits):
                    return
                stack.push_async_exit(app)  # closed when nobody asks any more how its worker is
                if banner is not None:
                    banner(app, worker)
                _settle_memory()
                with _kept(app):
                    await worker.run(until_idle=until_idle)


@contextlib.contextmanager
def _kept(app: Paigeant) -> Any:
    """What activities log by loggers of their own goes to the store as well, if lines are kept there."""
    handler, root = app.log_handler, logging.getLogger()
    if handler is not None:
        root.addHandler(handler)
    try:
        yield
    finally:
        if handler is not None:
            root.removeHandler(handler)


_NEW_OBJECTS = 10_000
"""How many new objects there are before the garbage collector looks at them: by default 700."""


def _settle_memory() -> None:
    """Take what is loaded out of the garbage collector's sight: it stays, and looking at it takes 50 ms each time.

    What steps leave behind hardly ever refers to itself, so it is looked at more seldom than by default: that took an
    eighth of the processor with many steps at once.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_NEW_OBJECTS)


@contextlib.contextmanager
def _stopping(worker: ActivityWorker, stopped: asyncio.Event) -> Any:
    """A first signal stops the worker gracefully, a second one at once. Either sets `stopped`."""
    loop = asyncio.get_running_loop()
    stops: set[asyncio.Task[None]] = set()

    def stop() -> None:
        stopped.set()
        stops.add(asyncio.create_task(worker.stop(grace=0 if stops else None)))

    numbers = stop_signals()
    for number in numbers:
        loop.add_signal_handler(number, stop)
    children = contextlib.ExitStack()  # what each of them does first; nothing any more once this has ended
    children.callback(_forget_stopping)
    os.register_at_fork(after_in_child=children.close)
    try:
        yield
    finally:
        children.pop_all()
        for number in numbers:
            loop.remove_signal_handler(number)


def _forget_stopping() -> None:
    """In a process that an activity has forked off: what it is told is no word for the worker.

    It has inherited the socket by which signals come to the event loop, so that a pool of `multiprocessing`, which is
    ended by SIGTERM, would stop the worker. Ctrl-C goes on to mean nothing to it: the step that it is for may end.
    """
    signal.set_wakeup_fd(-1)
    for number in stop_signals():
        if number is not signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def _parent(worker: ActivityWorker, stopped: asyncio.Event) -> Any:
    """Stops the worker when its standard input ends: then the process that supervises it is gone."""
    loop = asyncio.get_running_loop()
    stops: set[asyncio.Task[None]] = set()

    def read() -> None:
        if not os.read(0, 1024):
            loop.remove_reader(0)
            stopped.set()
            stops.add(asyncio.create_task(worker.stop()))

    loop.add_reader(0, read)
    try:
        yield
    finally:
        loop.remove_reader(0)


def _banner(as_json: bool) -> Callable[[Paigeant, ActivityWorker], None]:
    def tell(app: Paigeant, worker: ActivityWorker) -> None:
        shown = app.settings.shown()
        facts = {
            "activities": ", ".join(sorted(app.activities)),
            "topics": ", ".join(worker.topics),
            "transport": shown["transport_url"],
            "store": shown["store_url"],
            "signing": app.forwarder.envelope.told,
        }
        if as_json:
            log.info("worker.serving", extra={**facts, "worker": worker.id})
            return
        if facts["topics"] == facts["activities"]:
            del facts["topics"]
        found = {"worker": worker.id, **facts}
        console.errors().print(console.facts({name: console.plain(value) for name, value in found.items()}))
        console.note("[dim]Ctrl-C lets running steps finish and ends the worker; twice: at once[/]\n")

    return tell


def _leave(code: int) -> None:
    """End the process, even while a plain function that can't be interrupted still runs in a thread.

    Its step has been given back, and nothing that it does from now on is recorded. Python itself would wait for it.
    """
    for thread in threading.enumerate():
        if thread.name.startswith(THREAD_NAME):
            thread.join(0.2)
            if thread.is_alive():
                _end(code)
    if code:
        raise typer.Exit(code)


async def _in_threads(threads: ThreadPoolExecutor, work: Coroutine[Any, Any, None]) -> None:
    """Do `work`; what activities give to `asyncio.to_thread` is done in these threads."""
    asyncio.get_running_loop().set_default_executor(threads)
    await work


def _leave_work(threads: ThreadPoolExecutor, tasks: int) -> None:
    """The same for what activities have left behind: so many tasks that catch their cancellation, or these threads."""
    threads.shutdown(wait=False, cancel_futures=True)
    if tasks:
        log.error("%d tasks go on although they were cancelled: the process ends without them", tasks)
        _end(0)
    _leave(0)


def _end(code: int) -> None:
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
