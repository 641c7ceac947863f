# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures for tests that work whole programs from outside.

Whatever a program that was shown said on stderr fails its test: it is a warning of GTK's, or a traceback.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
from desktop import Desktop, end, missing, open_desktop
from helpers import STANDING, children
from systems import QUBES
from worlds import NOW

from qubes_fwd_qrexec.lab.directory import LabDirectory

if TYPE_CHECKING:
    from reader import Reader


class Shown(NamedTuple):
    """A program, and the file with what it says on stderr."""

    process: "subprocess.Popen[bytes]"
    said: Path

    def why_not(self) -> str:
        """Why nothing more is to be expected of it; empty if it runs and has not complained."""
        status, said = self.process.poll(), self.said.read_text()
        return f"status {status}: {said}" if said or status is not None else ""


Show = Callable[[Sequence[str], Mapping[str, str]], Shown]
TITLE = "Qubes Port Forwards"
MANAGER = "import sys; from qubes_fwd_qrexec.window import program; sys.exit(program.manager())"
PLAYED = Path(__file__).parent / "playeddom0"


@pytest.fixture(scope="session")
def desktop() -> Iterator[Desktop]:
    if why := missing():
        pytest.skip(why)
    before = {*children()}
    with open_desktop() as made:
        STANDING.update({*children()} - before)
        yield made


@pytest.fixture(scope="session")
def reader(desktop: Desktop) -> "Reader":
    """It skips where there is no GTK."""
    from reader import Reader

    return Reader(desktop)


class Machine:
    """Where a program runs: on a lab, or in the dom0 of a Qubes system; with a clock that stands still."""

    def __init__(self, lab: LabDirectory, kind: str) -> None:
        self.clock = lab.root.parent / "clock"
        self.set_clock(NOW)
        system = "PLAYED_DOM0" if kind == QUBES else "QVM_FORWARD_LAB"
        self.environ = {
            system: str(lab.root),
            "PLAYED_CLOCK": str(self.clock),
            "PYTHONPATH": str(PLAYED),
            # A bug of ours has its traceback on stderr, which fails the test.
            "QVM_FORWARD_TRACE": "1",
        }

        self._answers = lab.root.parent / "answers"

    def answer(self, qube: str, service: str, said: bytes) -> None:
        """In a Qubes system: what a qube says from now on, when that service is called."""
        path = self._answers / qube / service
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(said)

    def set_clock(self, now: float) -> None:
        """Make it that time, in UNIX seconds."""
        new = self.clock.with_suffix(".new")
        new.write_text(str(now))
        new.rename(self.clock)


@pytest.fixture
def machine(lab: LabDirectory, kind: str) -> Machine:
    return Machine(lab, kind)


@pytest.fixture
def show(desktop: Desktop, tmp_path: Path) -> Iterator[Show]:
    """Starts a program of Python's, by ``-m MODULE`` or its file, with a `Machine.environ`."""
    started: list[Shown] = []

    def start(words: Sequence[str], environ: Mapping[str, str]) -> Shown:
        said = tmp_path / f"stderr-{len(started)}"
        started.append(Shown(desktop.start([sys.executable, *words], environ, said), said))
        return started[-1]

    yield start
    for shown in started:
        end(shown.process)
    assert [shown.said.read_text() for shown in started] == [""] * len(started)


@pytest.fixture
def window(reader: "Reader", show: Show, machine: Machine) -> Iterator[Callable[[], "Reader"]]:
    """Starts the window, and returns who reads it once it is there. Asked to end, it does without a word."""
    started: list[Shown] = []

    def start() -> "Reader":
        started.append(show(["-P", "-c", MANAGER], machine.environ))
        reader.why_in_vain = started[-1].why_not
        reader.until(lambda: reader.seen(TITLE), "the window is there")
        return reader

    yield start
    reader.why_in_vain = str
    for shown in started:
        end(shown.process)
    assert [shown.process.returncode for shown in started] == [0] * len(started)
