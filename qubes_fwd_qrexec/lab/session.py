# SPDX-License-Identifier: GPL-2.0-or-later
"""A lab that lives as long as one command: made in a temporary directory, brought up, filled with programs.

`demo` and ``relay`` use the same programs as everybody else, each in a process of its own; whatever
happens, all of them and the lab are gone in the end.
"""

import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from qubes_fwd_qrexec.common.errors import ForwardError, StoreError
from qubes_fwd_qrexec.system.unixsockets import SOCKET_PATH_MAX

from . import control, daemon
from .blueprint import create_lab
from .directory import LabDirectory

_READY_TIMEOUT_S = 20.0
_COMMAND_TIMEOUT_S = 30.0
_END_TIMEOUT_S = 5.0
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class SessionError(ForwardError):
    """A step did not go as it should; the text says which and how."""


class LabSession:
    """Made by `open_session`. Programs are started in it and ended with it."""

    def __init__(self, lab: LabDirectory, started: ExitStack) -> None:
        self.lab = lab
        self._started = started

    @property
    def has_namespaces(self) -> bool:
        """Whether each qube has a network of its own."""
        return bool(control.ask(self.lab, {"do": "status"})["network"] == "namespaces")

    def command(self, program: str, *words: str) -> list[str]:
        """One of this project's programs, by its module, as a command line."""
        return [sys.executable, "-P", "-m", f"qubes_fwd_qrexec.{program}", *words]

    def in_qube(self, qube: str, *words: str) -> list[str]:
        """A program run in a qube, or on the LAN."""
        return self.command("lab.cli", "--lab", str(self.lab.root), "run", qube, "--", *words)

    def forward(self, *words: str) -> str:
        """Run ``qvm-forward`` on this lab and return what it says. Raises `SessionError` if it fails."""
        return output_of(self.command("admin.views.cli", "--lab", str(self.lab.root), *words))

    def start(self, words: Sequence[str], **options: object) -> "subprocess.Popen[bytes]":
        """Start a program that is ended with the session."""
        with _interruption.deferred():
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, **options)  # type: ignore[call-overload]
            self._started.callback(_end, process)
        return process  # type: ignore[no-any-return]

    def start_listener(self, qube: str, *options: str) -> "subprocess.Popen[bytes]":
        """Start a qube's listener; it listens when this returns, or `SessionError` is raised."""
        place = self.lab.qube_dir(qube)
        client = [str(self.lab.client_program), f"--agent-socket={place.agent_socket}"]
        words = self.in_qube(
            qube,
            *self.command(
                "listener",
                f"--config={place.vm_config}",
                f"--qrexec-client={shlex.join(client)}",
                f"--status-dir={place.listener_run}",
            ),
            *options,
        )
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
            address = self.lab.run_dir / "notify"
            notified.bind(str(address))
            try:
                process = self.start(words, env=os.environ | {"NOTIFY_SOCKET": str(address)})
                _wait_until_ready(notified, process)
            finally:
                address.unlink()
        return process


@contextmanager
def open_session(network: daemon.Network) -> Iterator[LabSession]:
    """A lab in a temporary directory, up until the block is left."""
    # The programs are started so that no module of the working directory is taken for one of Python's.
    os.environ["PYTHONPATH"] = daemon.search_path()
    with tempfile.TemporaryDirectory(prefix="qvm-forward-lab-") as directory, ExitStack() as started:
        lab = _create(Path(directory) / "lab")
        started.callback(daemon.stop, lab)
        daemon.start(lab, network)
        yield LabSession(lab, started)


def _create(root: Path) -> LabDirectory:
    """Raises `StoreError` that names TMPDIR, where the lab cannot be there."""
    length = len(os.fsencode(root / "run" / "notify"))
    if length > SOCKET_PATH_MAX:
        problem = f"its sockets would have paths of {length} bytes, and {SOCKET_PATH_MAX} is the most"
    else:
        try:
            return create_lab(root)
        except StoreError as error:
            problem = str(error)
    raise StoreError(
        f"no lab in {tempfile.gettempdir()}: {problem}; set TMPDIR to another directory, such as /var/tmp"
    )


class _Interruption:
    """Signals as KeyboardInterrupt, but not while a program is being started: nobody would end it then."""

    def __init__(self) -> None:
        self._is_deferred = False
        self._is_due = False

    def signalled(self, _number: int, _frame: object) -> None:
        if not self._is_deferred:
            raise KeyboardInterrupt
        self._is_due = True

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within the block no interrupt is raised; one that came is raised at its end."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False
        if self._is_due:
            self._is_due = False
            raise KeyboardInterrupt


_interruption = _Interruption()


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Turn the signals that end a program into KeyboardInterrupt, so that this process can clean up.

    SIGINT too: a shell that starts a program in the background has it ignore that one.
    """
    before = {number: signal.signal(number, _interruption.signalled) for number in _ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def output_of(words: Sequence[str]) -> str:
    """Run a command to its end and return its output. Raises `SessionError` if it fails or takes too long."""
    with ExitStack() as started:
        with _interruption.deferred():
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            # What still ran would write into a lab that is being removed.
            started.callback(_kill, process)
        try:
            output, errors = process.communicate(timeout=_COMMAND_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise SessionError(f"{shlex.join(words)}: no end after {_COMMAND_TIMEOUT_S:g} s") from error
    if process.returncode != 0:
        raise SessionError(f"{shlex.join(words)}: exit status {process.returncode}: {errors.strip()}")
    return output + errors


def _kill(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.communicate()


def _wait_until_ready(notified: socket.socket, process: "subprocess.Popen[bytes]") -> None:
    notified.settimeout(0.1)
    waited_s = 0.0
    while process.poll() is None and waited_s < _READY_TIMEOUT_S:
        try:
            if b"READY=1" in notified.recv(4096).splitlines():
                return
        except TimeoutError:
            waited_s += 0.1
    status = process.poll()
    state = "is not ready" if status is None else f"ended with exit status {status}"
    raise SessionError(f"the listener {state}; what it said stands above")


def _end(process: "subprocess.Popen[bytes]") -> None:
    for ask in (process.terminate, process.kill):
        ask()
        try:
            process.wait(_END_TIMEOUT_S)
            return
        except subprocess.TimeoutExpired:
            continue
