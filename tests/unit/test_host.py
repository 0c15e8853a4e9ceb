"""Whether a process of this host is still there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import weakref

import pytest

from paigeant import host


@pytest.fixture
def child():
    """A process that waits until it is ended, with its name."""
    code = "import sys; from paigeant import host; print(host.process_id(), flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    yield process, process.stdout.readline().strip()
    process.kill()
    process.communicate()


def test_a_living_process_is_not_gone(child) -> None:
    """Neither this one nor another."""
    _, name = child
    assert not host.is_gone(host.process_id())
    assert not host.is_gone(name)


def test_a_dead_process_is_gone(child) -> None:
    """Once it has ended and its parent knows."""
    process, name = child
    process.kill()
    process.wait()
    assert host.is_gone(name)


def test_a_zombie_is_gone(child) -> None:
    """A process that was killed and that its parent hasn't asked about does nothing more."""
    process, name = child
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays a zombie
    assert host.is_gone(name)


def test_a_number_that_was_used_again_is_another_process() -> None:
    """A process that got the number of a dead one is not taken for it."""
    number, _, started = host.process_id().partition("@")
    assert host.is_gone(f"{number}@{int(started) - 1}")


def test_a_stopped_process_is_not_gone(child) -> None:
    """One that is only suspended may go on."""
    process, name = child
    process.send_signal(signal.SIGSTOP)
    assert not host.is_gone(name)
    process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("name", ["", "x", "@", "x@1", "-1@5", "1.5@2"])
def test_a_name_that_says_nothing_is_not_gone(name: str) -> None:
    """Only what has ended for certain is gone."""
    assert not host.is_gone(name)


def test_another_user_s_process_is_not_gone() -> None:
    """A process that can't be signalled is there."""
    assert not host.is_gone("1@")


def test_the_host_has_one_name() -> None:
    """All processes of this host call it the same."""
    code = "from paigeant import host; print(host.host_id())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == host.host_id()


def test_what_is_to_begin_anew_in_a_child_does_while_it_is_there() -> None:
    """In the order in which it came; what nobody has any more isn't kept for it."""

    class Part:
        def __init__(self, name: bytes, told: int) -> None:
            self.name, self.told = name, told
            host.at_fork(self.begin)

        def begin(self) -> None:
            os.write(self.told, self.name)

    told, tells = os.pipe()
    first, gone, last = (Part(name, tells) for name in (b"1", b"2", b"3"))
    known = weakref.ref(gone)
    del gone
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.close(tells)
    with os.fdopen(told, "rb") as read:
        assert read.read() == first.name + last.name
    assert os.waitpid(pid, 0) == (pid, 0)
    assert known() is None
