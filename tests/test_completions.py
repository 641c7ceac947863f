# SPDX-License-Identifier: GPL-2.0-or-later
"""Completion at a terminal: keys go to a real shell, and the programs say what they were given.

What is offered is the programs' own business: `admin/views/test_fitting.py`, `lab/test_fitting.py`.
"""

import fcntl
import os
import pty
import select
import shutil
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import BOUND_S

from qubes_fwd_qrexec.lab.blueprint import create_lab

ROOT = Path(__file__).parents[1]
# Asked for completions it is the program itself; else it only prints its arguments.
PROGRAM = """\
#!/bin/sh
[ "$1" != __complete ] || exec {python} -S -m {module} "$@"
printf '<%s>' "$@"
echo ' are given'
"""
MODULES = {
    "qvm-forward": "qubes_fwd_qrexec.admin.views.cli",
    "qvm-forward-lab": "qubes_fwd_qrexec.lab.cli",
}
SHELLS = {
    "bash": (
        ("bash", "--norc", "--noprofile", "-i"),
        f". {ROOT}/completions/qvm-forward.bash",
    ),
    "zsh": (
        ("zsh", "-f", "-i"),
        f"fpath=({ROOT}/completions $fpath); autoload -Uz compinit; compinit -u -D",
    ),
}
RULE = "action=forward mode=qrexec forwardtype=external proto=tcp srcports=80-80 dstports=80-80 srchosts=any"
# What is typed before Tab and Enter, and what the program is given then.
LINES = [
    ("qvm-forward rem", ["remove"]),
    ("qvm-forward disable work ", ["disable", "work", "web"]),
    ("qvm-forward set work web mode=q", ["set", "work", "web", "mode=qrexec"]),
    ("qvm-forward set work web on-e", ["set", "work", "web", "on-expire="]),
    ("qvm-forward set work web --expire=ne", ["set", "work", "web", "--expire=never"]),
    (
        "qvm-forward add work 80:8080 --comment 'a b' --mo",
        ["add", "work", "80:8080", "--comment", "a b", "--mode"],
    ),
    ("qvm-forward show a-f", ["show", "a-f"]),
    ("qvm-forward import a-f", ["import", "a-file"]),
    ("qvm-forward --lab=a-d", ["--lab=a-directory"]),
    ("qvm-forward-lab prefs work netvm sys-f", ["prefs", "work", "netvm", "sys-firewall"]),
    ("qvm-forward-lab run work -- a-f", ["run", "work", "--", "a-file"]),
]


class Terminal:
    """A shell at a terminal."""

    def __init__(self, command: tuple[str, ...], directory: Path, environ: dict[str, str]) -> None:
        self._ours, theirs = pty.openpty()
        self._shell = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=directory,
            env=environ,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)

    def close(self) -> None:
        self._shell.kill()
        self._shell.wait()
        os.close(self._ours)

    def type(self, keys: str, until: str) -> str:
        """What stands before a text at the end of a line that the terminal shows after these keys."""
        os.write(self._ours, keys.encode())
        shown, ends_at = "", time.monotonic() + BOUND_S
        while f"{until}\r\n" not in shown:
            ready, _, _ = select.select([self._ours], [], [], max(0.0, ends_at - time.monotonic()))
            assert ready, f"there is no {until!r} in {shown!r}"
            shown += os.read(self._ours, 4096).decode()
        return shown.partition(f"{until}\r\n")[0].splitlines()[-1]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A lab with one rule, both programs, a file and a directory."""
    create_lab(tmp_path / "lab").set_feature(
        "work", "forward.web", f"{RULE} owner=work path=sys-firewall,sys-net"
    )
    (tmp_path / "bin").mkdir()
    for name, module in MODULES.items():
        program = tmp_path / "bin" / name
        program.write_text(PROGRAM.format(python=sys.executable, module=module))
        program.chmod(0o755)
    (tmp_path / "a-file").touch()
    (tmp_path / "a-directory").mkdir()
    return tmp_path


@pytest.fixture(params=SHELLS)
def terminal(request: pytest.FixtureRequest, directory: Path) -> Iterator[Terminal]:
    command, start = SHELLS[request.param]
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    environ = {
        "PATH": f"{directory / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "QVM_FORWARD_LAB": str(directory / "lab"),
        "HOME": str(directory),
        "TERM": "dumb",
        "LC_ALL": "C",
    }
    made = Terminal(command, directory, environ)
    try:
        # The quotes keep the typed line from being taken for what it prints.
        made.type(f"{start}; echo it is rea''dy\n", " is ready")
        yield made
    finally:
        made.close()


def test_tab_completes_what_the_program_offers_and_files_only_where_they_fit(terminal: Terminal) -> None:
    given = {}
    for line, _ in LINES:
        given[line] = terminal.type(f"{line}\t\n", " are given").strip("<>").split("><")
    # bash marks a directory as one.
    given = {line: [word.rstrip("/") for word in words] for line, words in given.items()}
    assert given == dict(LINES)
