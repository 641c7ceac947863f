# SPDX-License-Identifier: GPL-2.0-or-later
"""A call for one connection as the agent starts it: with a program of its own, or handed over."""

import functools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from helpers import BOUND_S
from processes import until, with_constants

from qubes_fwd_qrexec.relay.callsigns import GREETING, clean_end
from qubes_fwd_qrexec.target.handover import SOCKET_VARIABLE

SOURCE = Path(__file__).parent.parent / "handover" / "qubes-forward-handover.c"
SIGNS = GREETING, clean_end(0).partition(" after ")[0]


@functools.cache
def handover_program() -> Path:
    """The program that hands calls over, compiled for this process's tests."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("the program 'cc' is missing")
    program = Path(tempfile.mkdtemp(prefix="qubes-forward-")) / SOURCE.stem
    strict = ("-std=gnu17", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror")
    subprocess.run([compiler, *strict, "-o", program, SOURCE], check=True)
    return program


def takes_calls(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        return probe.connect_ex(str(path)) == 0


class Called:
    """What the agent starts for a call: argv, and two sockets as stdin and stdout."""

    def __init__(self, program: Sequence[str | Path], arguments: Sequence[str]) -> None:
        self.stdin, child_in = socket.socketpair()
        self.stdout, child_out = socket.socketpair()
        with child_in, child_out:
            self.process = subprocess.Popen(
                [*program, *arguments],
                stdin=child_in,
                stdout=child_out,
                stderr=subprocess.PIPE,
            )
        self.stdin.settimeout(BOUND_S)
        self.stdout.settimeout(BOUND_S)

    def end(self) -> tuple[int, str]:
        """The exit status, and what was said on stderr beside `signs`."""
        _, stderr = self.process.communicate(timeout=BOUND_S)
        lines = stderr.decode().splitlines(keepends=True)
        self.signs = [line for line in lines if line.startswith(tuple(SIGNS))]
        return self.process.returncode, "".join(line for line in lines if line not in self.signs)

    def close(self) -> None:
        if self.stdin.fileno() < 0:
            return
        self.process.kill()
        self.process.communicate()
        self.stdin.close()
        self.stdout.close()


class ByProgram:
    """Each call is a program."""

    def __init__(self, undo: ExitStack) -> None:
        self._undo = undo

    def command(self, **constants: float) -> list[str | Path]:
        """What the agent starts, with constants as `with_constants` takes them."""
        return [*with_constants("service", **constants)]

    def call(self, *arguments: str, **constants: float) -> Called:
        called = Called(self.command(**constants), arguments)
        self._undo.callback(called.close)
        return called


class ByHandover(ByProgram):
    """All calls are one process's, which is started before the first of them."""

    def __init__(self, undo: ExitStack, directory: Path, patch: pytest.MonkeyPatch) -> None:
        super().__init__(undo)
        self.process: subprocess.Popen[bytes] | None = None
        self.path = directory / "service.socket"
        patch.setenv(SOCKET_VARIABLE, str(self.path))
        # What a call for which the process is not meant becomes.
        patch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))

    def command(self, **constants: float) -> list[str | Path]:
        program = handover_program()
        if self.process is None:
            service = [*with_constants("service", **constants), "--socket", str(self.path)]
            self.process = self._undo.enter_context(subprocess.Popen(service))
            self._undo.callback(self.process.kill)
            until(lambda: takes_calls(self.path))
        return [program]
