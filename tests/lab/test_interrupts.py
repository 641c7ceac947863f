# SPDX-License-Identifier: GPL-2.0-or-later
"""Whatever ends a command of the lab, and when: it leaves no process, port or directory."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from qubes_fwd_qrexec.lab import daemon, units
from qubes_fwd_qrexec.lab.blueprint import create_lab
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.inhabitants import inhabitants
from qubes_fwd_qrexec.lab.interrupts import deferred_signals, ended_by_signals, ignore_signals

from .lab_up import BOUND_S, becomes
from .test_commands import bounded, processes_that_name

LAB = (sys.executable, "-m", "qubes_fwd_qrexec.lab.cli")
ENDINGS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, "closed terminal"]
# Python reads it when it starts. A program of which it finds this word goes on when somebody opens the pipe.
STUCK = """\
import sys
if any({word!r} in word for word in sys.orig_argv):
    open({fifo!r}).close()
"""


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[LabDirectory]:
    made = create_lab(tmp_path / "lab")
    yield made
    daemon.stop(made)


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, words: list[str], **environment: str) -> None:
        self._master, slave = os.openpty()
        self.process = subprocess.Popen(
            # The terminal tells the session that it is closed, also where nohup(1) runs the tests.
            ["env", "--default-signal=HUP", "setsid", "--ctty", *words],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=os.environ | environment,
        )
        os.close(slave)

    def read_until(self, text: str) -> None:
        said = b""
        while text.encode() not in said:
            said += os.read(self._master, 4096)

    def end(self, how: "signal.Signals | str") -> None:
        if isinstance(how, signal.Signals):
            self.process.send_signal(how)
        else:
            self.close()

    def close(self) -> None:
        with suppress(OSError):
            os.close(self._master)
        self._master = -1


@contextmanager
def in_terminal(*words: str, **environment: str) -> Iterator[Terminal]:
    terminal = Terminal(list(words), **environment)
    with bounded(terminal.process):  # type: ignore[arg-type]
        yield terminal
    terminal.process.wait()
    terminal.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_first_signal_is_raised_and_no_other_interrupts_the_cleaning_up(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    cleaned = []

    def command() -> None:
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(number)
            cleaned.append(True)

    with pytest.raises(KeyboardInterrupt), ended_by_signals():
        command()
    assert cleaned
    assert signal.getsignal(number) is before


def test_signal_that_comes_while_a_program_is_started_is_raised_when_that_is_known() -> None:
    known = []

    def start() -> None:
        with deferred_signals():
            signal.raise_signal(signal.SIGTERM)
            known.append(True)

    with pytest.raises(KeyboardInterrupt), ended_by_signals():
        start()
    assert known


def test_cleaning_up_for_another_reason_is_not_interrupted_either() -> None:
    with ended_by_signals():
        ignore_signals()
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), ended_by_signals():
        signal.raise_signal(signal.SIGTERM)


def test_demo_leaves_nothing_when_its_terminal_is_closed(tmp_path: Path) -> None:
    with in_terminal(*LAB, "demo", "--no-netns", TMPDIR=str(tmp_path)) as terminal:
        terminal.read_until("In dom0, one command")
        terminal.close()
        # A terminal that closes sends more than one signal, and none may interrupt the cleaning up.
        terminal.process.send_signal(signal.SIGHUP)
        terminal.process.wait(BOUND_S)
    assert list(tmp_path.iterdir()) == []
    assert processes_that_name(tmp_path) == []


def stuck(tmp_path: Path, word: str) -> dict[str, str]:
    """The environment in which a program with this word in its command line does not go on."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    place = tmp_path / "site"
    place.mkdir()
    (place / "sitecustomize.py").write_text(STUCK.format(word=word, fifo=str(fifo)), encoding="utf-8")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    return {"PYTHONPATH": f"{place}", "TMPDIR": str(temporary)}


@pytest.mark.parametrize("how", ENDINGS, ids=str)
def test_up_that_is_ended_before_the_lab_is_up_leaves_it_down(
    how: "signal.Signals | str", tmp_path: Path, lab: LabDirectory
) -> None:
    environment = stuck(tmp_path, "lab.daemon")
    with in_terminal(*LAB, "--lab", str(lab.root), "up", "--no-netns", **environment) as terminal:
        becomes(lambda: any("lab.daemon" in one for one in processes_that_name(lab.root)))
        terminal.end(how)
        assert terminal.process.wait(BOUND_S) == 130
    assert processes_that_name(lab.root) == []
    assert daemon.broker_pid(lab) is None


@pytest.mark.parametrize("how", ENDINGS, ids=str)
def test_listen_that_is_ended_before_all_is_ready_leaves_nothing(
    how: "signal.Signals | str", tmp_path: Path, lab: LabDirectory
) -> None:
    daemon.start(lab, daemon.Network.LOOPBACK)
    environment = stuck(tmp_path, "fwd_qrexec.listener")
    with in_terminal(*LAB, "--lab", str(lab.root), "listen", "sys-net", **environment) as terminal:
        becomes(lambda: units.running(lab, "sys-net") != set())
        terminal.end(how)
        assert terminal.process.wait(BOUND_S) == 130
    assert units.running(lab, "sys-net") == set()
    assert list((tmp_path / "tmp").iterdir()) == []


def test_program_in_a_qube_ends_with_the_terminal_that_it_was_started_in(lab: LabDirectory) -> None:
    daemon.start(lab, daemon.Network.LOOPBACK)
    words = ("run", "work", "--", "sh", "-c", "echo begun; exec sleep 1000")
    with in_terminal(*LAB, "--lab", str(lab.root), *words) as terminal:
        terminal.read_until("begun")
        terminal.close()
        assert terminal.process.wait(BOUND_S) == -signal.SIGHUP
    becomes(lambda: inhabitants(lab.qube_dir("work").root) == [])
