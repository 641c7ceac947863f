# SPDX-License-Identifier: GPL-2.0-or-later
"""What a user sees in a terminal of some width: the screens of tmux, with the program itself in them."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bounds import BOUND_S
from worlds import Command

from qubes_fwd_qrexec.lab.directory import LabDirectory

ROOT = Path(__file__).parents[3]
RULES = (
    (
        *("work", "80:8080", "--from", "192.168.0.0/16,10.0.0.0/8"),
        *("--comment", "demo for the office"),
    ),
    ("work", "443:8443", "--from", "any", "--name", "web-secure"),
    ("work", "22", "--from", "192.168.1.7", "--comment", "backups, from the machine in the cellar alone"),
    ("personal", "5000-5010", "--from", "10.0.0.0/8"),
    ("personal", "8080", "--from", "fd00::/8", "--disabled", "--name", "old"),
)
# What the list of these rules looks like, by the number of columns.
SCREENS = Path(__file__).with_name("screens.txt").read_text(encoding="ascii").split("== ")[1:]


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
def test_a_list_fills_the_width_that_there_is(forward: Command, lab: LabDirectory, tmp_path: Path) -> None:
    for rule in RULES:
        assert forward("add", *rule).status == 0
    for screen in SCREENS:
        columns, _, expected = screen.partition(" columns\n")
        assert _screen(("--lab", str(lab.root), "list"), tmp_path, columns) == expected


def _screen(argv: tuple[str, ...], place: Path, width: str) -> str:
    """What stands on a screen of some width when the program has ended."""
    program = shlex.join((sys.executable, "-m", "qubes_fwd_qrexec.admin.views.cli", *argv))
    tmux = ("tmux", "-f", os.devnull, "-S", str(place / f"tmux-{width}"))

    def run(*more: str) -> str:
        done = subprocess.run(
            (*tmux, *more), env=environ, capture_output=True, text=True, check=True, timeout=BOUND_S
        )
        return done.stdout

    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "TERM": "screen", "NO_COLOR": "1"}
    # The shell stays, as tmux keeps the screen of a living program alone.
    shown = f"{program}; {shlex.join((*tmux, 'wait-for', '-S', 'shown'))}; exec cat"
    run("new-session", "-d", "-x", width, "-y", "24", shown)
    try:
        run("wait-for", "shown")
        return run("capture-pane", "-p").rstrip("\n") + "\n"
    finally:
        run("kill-server")
