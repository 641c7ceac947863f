# SPDX-License-Identifier: GPL-2.0-or-later
"""What the units of a qube run, started in a lab's qube: in the background, until the qube or the lab ends.

There is no service manager: what ends is not started again.
"""

import os
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.system.lockfile import hold

from .directory import LabDirectory
from .inhabitants import inhabitants, setting

READY_TIMEOUT_S = 20.0
_LOCK = "units.lock"
_LOCK_TIMEOUT_S = 2 * READY_TIMEOUT_S
# Says of a process which unit it belongs to.
_VARIABLE = "QUBES_LAB_UNIT"
_LINES_TOLD = 3


class Unit(StrEnum):
    """The units of an exposed qube."""

    LISTENER = "listener"
    FIREWALL = "firewall"

    @property
    def what(self) -> str:
        return "the listener" if self is Unit.LISTENER else "the firewall helper"


def listener_words(lab: LabDirectory, qube: str) -> list[str]:
    """The listener of a qube, as a command line to which options are added."""
    place = lab.qube_dir(qube)
    client = [str(lab.client_program), f"--agent-socket={place.agent_socket}"]
    options = (
        f"--config={place.vm_config}",
        f"--qrexec-client={shlex.join(client)}",
        f"--status-dir={place.listener_run}",
    )
    return in_qube(lab, qube, *module_words("listener"), *options)


def module_words(module: str) -> list[str]:
    """A program of this package, by its module, as a command line."""
    return [sys.executable, "-P", "-m", f"qubes_fwd_qrexec.{module}"]


def in_qube(lab: LabDirectory, qube: str, *words: str) -> list[str]:
    """A command line that runs another one in a qube."""
    return [*module_words("lab.cli"), "--lab", str(lab.root), "run", qube, "--", *words]


def search_path() -> str:
    """PYTHONPATH for a program of this package: of the same version as the one that starts it."""
    inherited = os.environ.get("PYTHONPATH")
    parts = [str(Path(__file__).parent.parent.parent), *([inherited] if inherited else [])]
    return os.pathsep.join(parts)


def running(lab: LabDirectory, qube: str) -> set[Unit]:
    """The units of which a process runs in a qube."""
    found = {setting(pid, _VARIABLE) for pid in inhabitants(lab.qube_dir(qube).root)}
    return {unit for unit in Unit if unit in found}


def start(lab: LabDirectory, qube: str, units: Iterable[Unit]) -> list[Unit]:
    """Start those units of a qube that do not run, and return them once they are ready.

    Blocks for at most `READY_TIMEOUT_S` for each. Raises `StoreError`.
    """
    started = []
    for unit in units:
        with notified(lab) as (sock, address):
            if unit not in running(lab, qube):
                _start(lab, qube, unit, sock, address)
                started.append(unit)
    return started


def _start(lab: LabDirectory, qube: str, unit: Unit, sock: socket.socket, address: str) -> None:
    place = lab.qube_dir(qube)
    log_file = place.root / "run" / f"{unit}.log"
    log_file.parent.mkdir(exist_ok=True)
    if unit is Unit.LISTENER:
        words = listener_words(lab, qube)
    else:
        place.firewall_run.mkdir(parents=True, exist_ok=True)
        program = [*module_words("firewall.keeper"), f"--config={place.vm_config}"]
        # Its state goes where the agent of this qube looks for it. In a lab everybody is the same user.
        words = in_qube(
            lab,
            qube,
            *("env", f"RUNTIME_DIRECTORY={place.firewall_run}", *program, f"--listener-uid={os.getuid()}"),
        )
    with open(log_file, "wb") as log:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd="/",
            env=os.environ | {"NOTIFY_SOCKET": address, "PYTHONPATH": search_path(), _VARIABLE: unit},
        )
    problem = why_not_ready(sock, process)
    if problem is not None:
        process.kill()
        process.wait()
        said = log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-_LINES_TOLD:]
        raise StoreError(f"{qube}: {unit.what} {problem}: {' '.join(said) or 'it said nothing'}")
    # It lives on without us; Popen would warn about that.
    process.returncode = 0


@contextmanager
def notified(lab: LabDirectory) -> Iterator[tuple[socket.socket, str]]:
    """A socket for one program's READY=1, and its address for NOTIFY_SOCKET. Raises `StoreError`."""
    with (
        hold(lab.run_dir / _LOCK, _LOCK_TIMEOUT_S, "another program starts something in this lab"),
        # A lab's own path may be too long for an address.
        tempfile.TemporaryDirectory(prefix="qvm-forward-lab-") as directory,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock,
    ):
        address = os.path.join(directory, "notify")
        sock.bind(address)
        yield sock, address


def why_not_ready(sock: socket.socket, process: "subprocess.Popen[bytes]") -> str | None:
    """Wait until the program says that it is ready; or what it does instead."""
    sock.settimeout(0.1)
    waited_s = 0.0
    while process.poll() is None and waited_s < READY_TIMEOUT_S:
        try:
            if b"READY=1" in sock.recv(4096).splitlines():
                return None
        except TimeoutError:
            waited_s += 0.1
    status = process.poll()
    return "is not ready" if status is None else f"ended with exit status {status}"
