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
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from pathlib import Path

from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.system.lockfile import hold

from .directory import LabDirectory
from .inhabitants import VARIABLE, inhabitants, setting
from .interrupts import deferred_signals, ignore_signals

READY_TIMEOUT_S = 60.0
_LOCK = "units.lock"
_LOCK_TIMEOUT_S = 2 * READY_TIMEOUT_S
# Says of a process which unit it belongs to.
_VARIABLE = "QUBES_LAB_UNIT"
_LINES_TOLD = 3
_END_TIMEOUT_S = 5.0


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


def start(lab: LabDirectory, wanted: Iterable[tuple[str, Unit]]) -> set[tuple[str, Unit]]:
    """Start those of these units of qubes that do not run, at once, and return them when all are ready.

    Blocks for `READY_TIMEOUT_S`. Raises `StoreError`; then none of them runs.
    """
    with ExitStack() as stack:
        stack.enter_context(_starting(lab))
        begun = [
            (qube, unit, *_begin(lab, qube, unit, stack))
            for qube, unit in wanted
            if unit not in running(lab, qube)
        ]
        for qube, unit, sock, process in begun:
            problem = why_not_ready(sock, process)
            if problem is not None:
                log_file = _log_file(lab, qube, unit)
                said = log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-_LINES_TOLD:]
                raise StoreError(f"{qube}: {unit.what} {problem}: {' '.join(said) or 'it said nothing'}")
        for *_, process in begun:
            # It lives on without us; Popen would warn about that.
            process.returncode = 0
    return {(qube, unit) for qube, unit, *_ in begun}


def _begin(
    lab: LabDirectory, qube: str, unit: Unit, stack: ExitStack
) -> "tuple[socket.socket, subprocess.Popen[bytes]]":
    """Start one, which says at this socket that it is ready. It ends with the stack, unless it is let go."""
    place = lab.qube_dir(qube)
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
    sock, address = stack.enter_context(notified())
    log_file = _log_file(lab, qube, unit)
    log_file.parent.mkdir(exist_ok=True)
    with open(log_file, "wb") as log, deferred_signals():
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd="/",
            env=os.environ
            | {
                "NOTIFY_SOCKET": address,
                "PYTHONPATH": search_path(),
                # It lives in the qube from its first moment.
                VARIABLE: str(place.root),
                _VARIABLE: unit,
            },
        )
        stack.callback(_end_unless_let_go, process)
    return sock, process


def _end_unless_let_go(process: "subprocess.Popen[bytes]") -> None:
    if process.returncode is not None:
        return
    ignore_signals()
    process.terminate()
    try:
        process.wait(_END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _log_file(lab: LabDirectory, qube: str, unit: Unit) -> Path:
    return lab.qube_dir(qube).root / "run" / f"{unit}.log"


@contextmanager
def _starting(lab: LabDirectory) -> Iterator[None]:
    """While this is held, nobody else starts a unit."""
    with hold(lab.run_dir / _LOCK, _LOCK_TIMEOUT_S, "another program starts something in this lab"):
        yield


@contextmanager
def notified() -> Iterator[tuple[socket.socket, str]]:
    """A socket for one program's READY=1, and its address for NOTIFY_SOCKET."""
    with (
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
