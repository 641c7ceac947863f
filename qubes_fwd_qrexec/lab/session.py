# SPDX-License-Identifier: GPL-2.0-or-later
"""A lab that lives as long as one command: made in a temporary directory, brought up, filled with programs.

`demo` and ``relay`` use the same programs as everybody else, each in a process of its own; whatever
happens, all of them and the lab are gone in the end.
"""

import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from qubes_fwd_qrexec.common.errors import ForwardError, StoreError
from qubes_fwd_qrexec.system.unixsockets import SOCKET_PATH_MAX

from . import asking, daemon, units
from .blueprint import create_lab
from .directory import LabDirectory
from .interrupts import deferred_signals, ignore_signals
from .knobs import PATIENCE_MAX, Knobs

# Far more than a busy machine takes, and than any command waits by itself.
_COMMAND_TIMEOUT_S = 120.0
_END_TIMEOUT_S = 5.0


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
        return bool(asking.ask(self.lab, {"do": "status"})["network"] == "namespaces")

    @property
    def has_ip(self) -> bool:
        """Whether the qubes are joined by IP, and each has a firewall."""
        return asking.ask(self.lab, {"do": "status"})["why_no_ip"] is None

    def command(self, program: str, *words: str) -> list[str]:
        """One of this project's programs, by its module, as a command line."""
        return [*units.module_words(program), *words]

    def in_qube(self, qube: str, *words: str) -> list[str]:
        """A program run in a qube, or on the LAN."""
        return units.in_qube(self.lab, qube, *words)

    def lab_command(self, *words: str) -> str:
        """Run ``qvm-forward-lab`` on this lab and return what it says. Raises `SessionError` if it fails."""
        return output_of(self.command("lab.cli", "--lab", str(self.lab.root), *words))

    def forward(self, *words: str) -> str:
        """Run ``qvm-forward`` on this lab and return what it says. Raises `SessionError` if it fails."""
        return output_of(self.command("admin.views.cli", "--lab", str(self.lab.root), *words))

    def start(self, words: Sequence[str], **options: object) -> "subprocess.Popen[bytes]":
        """Start a program that is ended with the session."""
        with deferred_signals():
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, **options)  # type: ignore[call-overload]
            self._started.callback(_end, process)
        return process  # type: ignore[no-any-return]

    def start_listener(self, qube: str, *options: str) -> "subprocess.Popen[bytes]":
        """Start a qube's listener; it listens when this returns, or `SessionError` is raised."""
        words = [*units.listener_words(self.lab, qube), *options]
        with units.notified() as (sock, address):
            process = self.start(words, env=os.environ | {"NOTIFY_SOCKET": address})
            problem = units.why_not_ready(sock, process)
        if problem is not None:
            raise SessionError(f"the listener {problem}; what it said stands above")
        return process


@contextmanager
def open_session(network: daemon.Network) -> Iterator[LabSession]:
    """A lab in a temporary directory, up until the block is left."""
    # The programs are started so that no module of the working directory is taken for one of Python's.
    os.environ["PYTHONPATH"] = units.search_path()
    with tempfile.TemporaryDirectory(prefix="qvm-forward-lab-") as directory, ExitStack() as started:
        lab = _create(Path(directory) / "lab")
        # What is shown does not depend on how busy the machine is.
        lab.write_knobs(Knobs(patience=PATIENCE_MAX))
        started.callback(daemon.stop, lab)
        daemon.start(lab, network)
        try:
            yield LabSession(lab, started)
        finally:
            ignore_signals()


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


def output_of(words: Sequence[str]) -> str:
    """Run a command to its end and return its output. Raises `SessionError` if it fails or takes too long."""
    with ExitStack() as started:
        with deferred_signals():
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            # What still ran would write into a lab that is being removed.
            started.callback(_kill, process)
        try:
            output, errors = process.communicate(timeout=_COMMAND_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise SessionError(
                f"{shlex.join(words)}: did not finish within {_COMMAND_TIMEOUT_S:g} s"
            ) from error
    if process.returncode != 0:
        raise SessionError(f"{shlex.join(words)}: exit status {process.returncode}: {errors.strip()}")
    return output + errors


def _kill(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.communicate()


def _end(process: "subprocess.Popen[bytes]") -> None:
    for ask in (process.terminate, process.kill):
        ask()
        try:
            process.wait(_END_TIMEOUT_S)
            return
        except subprocess.TimeoutExpired:
            continue
