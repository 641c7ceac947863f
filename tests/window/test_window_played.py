# SPDX-License-Identifier: GPL-2.0-or-later
"""A program in a process of its own finds the system that the test has, with its events and its time."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from helpers import BOUND_S
from stages import set_netvm
from stories import Machine
from systems import QUBES
from worlds import ADD, NOW, Command

from qubes_fwd_qrexec.lab.directory import LabDirectory

FOLLOW = """\
import os
from qubes_fwd_qrexec.admin.views.locate import open_backend
backend = open_backend(None, os.environ)
with backend.changes() as changes:
    while True:
        print(changes.wait(None), backend.inventory().qubes["work"].netvm, flush=True)
"""
ASK = """\
import os
from qubes_fwd_qrexec.admin.views.locate import open_backend
print(open_backend(None, os.environ).ask("sys-net", "qubes.ForwardStatus+clients", 99))
"""


@contextmanager
def program(machine: Machine, words: Sequence[str]) -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen(
        [sys.executable, *words], env=dict(machine.environ), stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


def test_a_command_works_on_the_same_system_at_the_time_of_the_test(
    machine: Machine, forward: Command
) -> None:
    machine.set_clock(NOW + 60)
    assert forward(*ADD, "--expire", "+1h").status == 0
    with program(machine, ["-m", "qubes_fwd_qrexec.admin.views.cli", "list"]) as process:
        said = process.communicate(timeout=BOUND_S)[0]
    assert "in 59 min" in said


def test_a_program_hears_of_changes(machine: Machine, lab: LabDirectory) -> None:
    with program(machine, ["-c", FOLLOW]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True sys-firewall\n"
        set_netvm(lab, "sys-net")
        assert process.stdout.readline() == "True sys-net\n"


def test_what_a_qube_answers_lies_in_a_file(lab: LabDirectory) -> None:
    machine = Machine(lab, QUBES)
    machine.answer("sys-net", "qubes.ForwardStatus+clients", b"what it likes")
    with program(machine, ["-c", ASK]) as process:
        assert process.communicate(timeout=BOUND_S)[0] == "b'what it likes'\n"
