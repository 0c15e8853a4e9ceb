"""Says which servers the tests have here, and on Debian or Ubuntu as root installs those that are missing."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.services import docker
from tests.services.programs import PROGRAMS, Kind, ServerMissing, find, is_installed, program
from tests.services.shared import VARIABLES

PACKAGES = {
    "postgres": "postgresql",
    "redis": "redis-server",
    "rabbitmq": "rabbitmq-server",
}
TOOLS = {"ip": "iproute2", "pgbouncer": "pgbouncer"}
"""Programs that are no servers for tests to share, and the packages that have them."""
UNITS = ["postgresql", "redis-server", "rabbitmq-server", "pgbouncer"]
FORBIDS_STARTS = Path("/usr/sbin/policy-rc.d")


def main() -> int:
    """Install what is missing and may be installed. The exit code says whether the tests will have all servers."""
    missing = [kind for kind in PROGRAMS if not is_installed(kind)]
    packages = [PACKAGES[kind] for kind in missing]
    if shutil.which("apt-get") and os.geteuid() == 0:
        packages += [package for name, package in TOOLS.items() if find(name) is None]
        if packages:
            say(f"installing {', '.join(packages)}")
            try:
                install(packages)
            except subprocess.CalledProcessError as error:
                say(f"{error}\n{error.stdout}\n{error.stderr}")  # there may be another way to have them
    return max([report(kind) for kind in PROGRAMS])


def report(kind: Kind) -> int:
    """Say where servers of this kind come from; 1 when they are not to be had."""
    if is_installed(kind):
        say(f"{kind}: {program(PROGRAMS[kind][0])}")
    elif docker.is_there():
        say(f"{kind}: docker compose (what starts servers of its own fails)")
    elif VARIABLES[kind] in os.environ:
        say(f"{kind}: {VARIABLES[kind]} (what starts servers of its own fails)")
    else:
        say(str(ServerMissing(kind)))
        return 1
    return 0


def install(packages: Sequence[str]) -> None:
    """Install Debian packages, and leave no service of theirs running or enabled: the tests start their own."""
    with _no_starts():
        _apt("update")
        if "postgresql" in packages:
            _apt("install", "postgresql-common")
            _make_no_cluster()
        _apt("install", *packages)
    if shutil.which("systemctl"):
        for unit in set(UNITS) & set(packages):
            subprocess.run(["systemctl", "--quiet", "disable", unit], check=False)


@contextlib.contextmanager
def _no_starts() -> Iterator[None]:
    """What the packages ask before they start a service says no; afterwards it is as it was."""
    before = FORBIDS_STARTS.read_bytes() if FORBIDS_STARTS.exists() else None
    FORBIDS_STARTS.write_text("#!/bin/sh\nexit 101\n")
    FORBIDS_STARTS.chmod(0o755)
    try:
        yield
    finally:
        if before is None:
            FORBIDS_STARTS.unlink()
        else:
            FORBIDS_STARTS.write_bytes(before)


def _make_no_cluster() -> None:
    """The package postgresql makes a cluster that nobody needs, unless its settings say no."""
    file = Path("/etc/postgresql-common/createcluster.conf")
    lines = file.read_text().splitlines() if file.exists() else []
    kept = [line for line in lines if not line.strip().startswith("create_main_cluster")]
    file.write_text("\n".join([*kept, "create_main_cluster = false", ""]))


def _apt(action: str, *packages: str) -> None:
    command = [
        "apt-get",
        "-q",
        "-y",
        "-o",
        "Dpkg::Use-Pty=0",
        "-o",
        "DPkg::Lock::Timeout=300",
        action,
        *packages,
    ]
    if packages:
        command.insert(1, "--no-install-recommends")
    subprocess.run(
        command,
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )


def say(text: str) -> None:
    """Tell who has called us."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
