# SPDX-License-Identifier: GPL-2.0-or-later
"""`qvm-forward watch` as a program over a lab: each test waits for what it says, and for nothing else."""

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from bounds import BOUND_S
from worlds import ADD, Command

from qubes_fwd_qrexec.admin import policy
from qubes_fwd_qrexec.lab.directory import LabDirectory

ROOT = Path(__file__).parents[2]
CONFIG = "vm-config.fwd.work.web"


class Program:
    """The program, with its output line by line, and what it tells the service manager."""

    def __init__(self, lab: LabDirectory, home: Path) -> None:
        self._manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._manager.bind(str(home / f"notify-{time.monotonic_ns()}"))
        self._manager.settimeout(BOUND_S)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "qubes_fwd_qrexec.admin.views.cli", "--lab", str(lab.root), "watch"],
            env=os.environ | {"PYTHONPATH": str(ROOT), "NOTIFY_SOCKET": self._manager.getsockname()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._text = ""
        # Twice: at the start, and when the news of changes stands.
        for _ in range(2):
            assert self.told().startswith("READY=1\n")

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate(timeout=BOUND_S)
        self._manager.close()

    def told(self) -> str:
        return self._manager.recv(65536).decode()

    def told_since(self) -> int:
        """How many times it has told since, without waiting for more."""
        count = 0
        while select.select([self._manager], [], [], 0)[0]:
            self.told()
            count += 1
        return count

    def line(self, start: str) -> str:
        """Wait for a line that begins so."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + BOUND_S
        while True:
            *lines, self._text = self._text.split("\n")
            for number, line in enumerate(lines):
                if line.startswith(start):
                    self._text = "\n".join((*lines[number + 1 :], self._text))
                    return line
            left_s = deadline - time.monotonic()
            assert select.select([self.process.stdout], [], [], max(0.0, left_s))[0], f"no line {start!r}"
            data = os.read(self.process.stdout.fileno(), 65536)
            assert data, "it ended"
            self._text += data.decode()

    def end(self, number: signal.Signals) -> tuple[int, str]:
        self.process.send_signal(number)
        _, stderr = self.process.communicate(timeout=BOUND_S)
        return self.process.returncode, stderr.decode()


@pytest.fixture
def watched() -> None:
    """The program itself does."""


@pytest.fixture
def start(lab: LabDirectory, forward: Command, tmp_path: Path) -> Iterator[Callable[[], Program]]:
    """Start it, with one forward that is open; it is killed at the end of the test."""
    assert forward(*ADD, now=time.time()).status == 0
    with ExitStack() as stack:
        yield lambda: stack.enter_context(Program(lab, tmp_path))


def is_open(lab: LabDirectory) -> bool:
    text = (lab.policy_dir / f"{policy.NAME}.policy").read_text()
    is_allowed = bool(policy.allowing(text))
    assert is_allowed == (CONFIG in lab.features("sys-net"))
    return is_allowed


def cut_off(lab: LabDirectory) -> None:
    lab.write_qube(replace(lab.qube("work"), netvm=None))


def test_a_netvm_that_changes_closes_the_forward(lab: LabDirectory, start: Callable[[], Program]) -> None:
    program = start()
    assert is_open(lab)
    cut_off(lab)
    program.line("work web was active and is suspended.")
    program.line("policy: no longer qubes.ForwardTCP +8080+mux sys-net work allow")
    program.line("sys-net: stop listening for fwd.work.web")
    assert not is_open(lab)


def test_a_burst_is_few_reconciliations(lab: LabDirectory, start: Callable[[], Program]) -> None:
    program = start()
    # However slow the machine is, the changes come faster than it looks: it is stopped meanwhile.
    program.process.send_signal(signal.SIGSTOP)
    os.waitpid(program.process.pid, os.WUNTRACED)
    for number in range(50):
        lab.set_feature("personal", "forward.tunnel", str(number))
    cut_off(lab)
    program.process.send_signal(signal.SIGCONT)
    program.line("sys-net: stop listening for fwd.work.web")
    assert program.told_since() <= 2


def test_a_rule_that_ends_is_closed(
    lab: LabDirectory, forward: Command, start: Callable[[], Program]
) -> None:
    program = start()
    # Without applying it: that would be the other program's work.
    assert forward("set", "work", "web", "expire=+1", "--no-apply", now=time.time()).status == 0
    program.line("work web was active and is expired.")
    program.line("sys-net: stop listening for fwd.work.web")
    assert not is_open(lab)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_status_0(start: Callable[[], Program], number: signal.Signals) -> None:
    program = start()
    assert program.end(number) == (0, "")
    assert program.told() == "STOPPING=1"


def test_what_changed_while_it_was_dead_is_mended_when_it_starts_again(
    lab: LabDirectory, start: Callable[[], Program]
) -> None:
    assert start().end(signal.SIGKILL)[0] == -signal.SIGKILL
    cut_off(lab)
    assert is_open(lab)
    program = start()
    program.line("sys-net: stop listening for fwd.work.web")
    assert not is_open(lab)


def test_a_lab_that_goes_is_waited_for(
    lab: LabDirectory, start: Callable[[], Program], tmp_path: Path
) -> None:
    program = start()
    lab.root.rename(tmp_path / "away")
    assert program.told().endswith(": it was moved or removed")
    (tmp_path / "away").rename(lab.root)
    cut_off(lab)
    program.line("sys-net: stop listening for fwd.work.web")
    assert not is_open(lab)
    status, stderr = program.end(signal.SIGTERM)
    assert status == 0
    assert "lab: it was moved or removed" in stderr
    assert "Traceback" not in stderr
