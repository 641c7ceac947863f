# SPDX-License-Identifier: GPL-2.0-or-later
"""What a program of the window says where it cannot start."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from qubes_fwd_qrexec import __version__
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.window.program import run

NAME = "qubes-forward-manager"
_RUN = f"import sys; from qubes_fwd_qrexec.window.program import run; sys.exit(run({NAME!r}, 'x', 'app'))"


def test_it_says_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(NAME, "a window", "app", ["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"{NAME} {__version__}\n"


@pytest.mark.parametrize("words", [["--lab"], ["--wrong"], ["more"]])
def test_a_wrong_command_line_has_status_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(NAME, "a window", "app", words)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"usage: {NAME}")


def test_a_lab_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(NAME, "a window", "app", ["--lab", str(tmp_path / "gone")]) == 1
    assert str(tmp_path / "gone") in capsys.readouterr().err


def ended(lab: LabDirectory, **environ: str) -> tuple[int, str]:
    """The status and what is on stderr of a program on a lab."""
    found = subprocess.run(
        [sys.executable, "-c", _RUN, "--lab", str(lab.root)],
        env={"PATH": os.environ["PATH"], **environ},
        check=False,
        capture_output=True,
        text=True,
    )
    return found.returncode, found.stderr


def test_without_gtk_it_names_the_packages(lab: LabDirectory, tmp_path: Path) -> None:
    """This Python may have GTK, so one that is broken stands before it."""
    (tmp_path / "gi.py").write_text("raise ImportError('no gi')\n")
    status, said = ended(lab, PYTHONPATH=str(tmp_path))
    assert status == 1
    assert said.startswith(f"{NAME}: this program needs GTK 3 for Python; install python3-gobject and gtk3 ")
    assert "Traceback" not in said


def test_without_a_display_it_says_so(lab: LabDirectory, tmp_path: Path) -> None:
    (tmp_path / "gi").mkdir()
    (tmp_path / "gi/__init__.py").write_text("def require_version(*_): pass\n")
    names = ("Atk", "Gdk", "GdkPixbuf", "Gio", "GLib", "GObject", "Pango")
    text = "class Gtk:\n    def init_check(): return False, []\n"
    (tmp_path / "gi/repository.py").write_text(text + "".join(f"{name} = None\n" for name in names))
    assert ended(lab, PYTHONPATH=str(tmp_path)) == (
        1,
        f"{NAME}: there is no display; start it in a graphical session\n",
    )


class Dialogs:
    """GTK where nobody closes a dialog: what was shown."""

    def __init__(self) -> None:
        self.shown: list[dict[str, object]] = []
        self.MessageType = self.ButtonsType = self
        self.ERROR = self.CLOSE = "error"
        self.init_check = lambda: (True, [])

    def MessageDialog(self, **properties: object) -> "Dialogs":  # noqa: N802
        self.shown.append(properties)
        return self

    def run(self) -> None: ...

    def destroy(self) -> None: ...


@pytest.mark.parametrize(
    ("is_terminal", "shows_errors", "count"), [(False, True, 1), (True, True, 0), (False, False, 0)]
)
def test_an_error_is_shown_where_nobody_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_terminal: bool, shows_errors: bool, count: int
) -> None:
    """The window started from a menu; the indicator shows nothing before the panel is there."""
    dialogs = Dialogs()
    monkeypatch.setitem(sys.modules, gtk := "qubes_fwd_qrexec.window.gtk", ModuleType(gtk))
    monkeypatch.setattr(sys.modules[gtk], "Gtk", dialogs, raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    assert run(NAME, "a window", "app", ["--lab", str(tmp_path / "gone")], shows_errors=shows_errors) == 1
    assert len(dialogs.shown) == count
    assert all("gone" in str(shown["secondary_text"]) for shown in dialogs.shown)
