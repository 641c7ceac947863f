# SPDX-License-Identifier: GPL-2.0-or-later
"""Close everything: asked once, done by a process that nothing holds up, and told as it comes."""

import json
import os
import select
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from faulty import is_held
from helpers import BOUND_S
from screen import settle, until
from test_window_panic import CLOSED, OPEN
from worlds import ADD, Command, content

from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.store import LabStore
from qubes_fwd_qrexec.window.dialogs.closing import LINES_MAX, Closing
from qubes_fwd_qrexec.window.gtk import Gtk, Pango

W = TypeVar("W", bound=Gtk.Widget)
DONE = "✓ Everything is closed and held"
NOT_DONE = "✖ NOT EVERYTHING IS CLOSED"
UNKNOWN = "✖ IT IS UNKNOWN WHETHER EVERYTHING IS CLOSED"
SAYS = """
import os, subprocess, sys
def says(text): os.write(2, text.encode())
def reports(text): os.write(1, text.encode())
"""


def walk(widget: Gtk.Widget) -> Iterator[Gtk.Widget]:
    yield widget
    if isinstance(widget, Gtk.Container):
        for child in widget.get_children():
            yield from walk(child)


class Shown:
    """A dialog as a user sees it."""

    def __init__(self, closing: Closing) -> None:
        self.closing = closing
        self.dialog = closing.widget

    def of(self, kind: type[W]) -> list[W]:
        return [each for each in walk(self.dialog) if isinstance(each, kind) and each.get_mapped()]

    @property
    def head(self) -> str:
        (bar,) = self.of(Gtk.InfoBar)
        return next(each.get_text() for each in walk(bar) if isinstance(each, Gtk.Label))

    @property
    def kind(self) -> str:
        (bar,) = self.of(Gtk.InfoBar)
        return bar.get_message_type().value_nick

    @property
    def text(self) -> str:
        return "\n".join(each.get_text() for each in self.of(Gtk.Label))

    @property
    def report(self) -> list[str]:
        (view,) = self.of(Gtk.TextView)
        buffer = view.get_buffer()
        return buffer.get_text(*buffer.get_bounds(), True).splitlines()

    @property
    def buttons(self) -> list[str]:
        return [each.get_label().replace("_", "") for each in self.of(Gtk.Button)]

    def press(self, text: str) -> None:
        (found,) = (each for each in self.of(Gtk.Button) if each.get_label().replace("_", "") == text)
        found.clicked()
        settle()


Open = Callable[..., Shown]


@pytest.fixture
def open_dialog() -> Iterator[Open]:
    made: list[Closing] = []

    def opened(lab: str | None = None, script: str | None = None, **more: object) -> Shown:
        words = None if script is None else [sys.executable, "-c", SAYS + script]
        closing = Closing(lab, words=words, **more)  # type: ignore[arg-type]
        made.append(closing)
        closing.open(None)
        settle()
        return Shown(closing)

    yield opened
    for closing in made:
        closing.widget.destroy()
    settle()


@pytest.fixture
def open_lab(lab: LabDirectory, over: Command) -> LabDirectory:
    """A lab with a forward: the process works on a lab alone."""
    assert over(LabStore(lab), *ADD).status == 0
    return lab


def report_of(document: object, status: int) -> str:
    return f"reports({json.dumps(document)!r})\nsys.exit({status})\n"


def test_nothing_is_done_before_it_is_agreed_to(open_dialog: Open, open_lab: LabDirectory) -> None:
    before = content(open_lab)
    shown = open_dialog(str(open_lab.root))
    assert (shown.head, shown.kind, shown.buttons) == (
        "Close everything?",
        "question",
        ["Cancel", "Close everything"],
    )
    shown.press("Cancel")
    assert not shown.dialog.get_visible()
    assert content(open_lab) == before


def test_everything_is_closed_and_each_step_is_shown(open_dialog: Open, open_lab: LabDirectory) -> None:
    resumed: list[int] = []
    shown = open_dialog(str(open_lab.root), resume=lambda: resumed.append(1))
    shown.press("Close everything")
    until(lambda: shown.head == DONE)
    assert is_held(open_lab)
    assert "sys-net: stop listening for fwd.work.web" in shown.report
    assert "writes dom0's policy" in shown.report[shown.report.index("What was done, in order:") :]
    assert (shown.kind, shown.buttons) == ("info", ["Resume…", "Close"])
    shown.press("Resume…")
    assert (resumed, shown.dialog.get_visible()) == ([1], False)


def test_that_not_everything_is_closed_cannot_be_missed(open_dialog: Open, open_lab: LabDirectory) -> None:
    mine = open_lab.policy_dir / "20-mine.policy"
    mine.write_text("qubes.ForwardTCP  +8080+mux  sys-net  work  allow\n")
    shown = open_dialog(str(open_lab.root), resume=lambda: None)
    shown.press("Close everything")
    until(lambda: shown.head == NOT_DONE)
    assert (shown.kind, shown.buttons) == ("error", ["Close", "Try again"])
    assert "Something may still be reachable" in shown.text
    assert shown.report[0].startswith(
        "✖ Still open: policy: another file than 30-forward.policy allows calls"
    )
    (view,) = shown.of(Gtk.TextView)
    start = view.get_buffer().get_start_iter()
    assert [tag.get_property("weight") for tag in start.get_tags()] == [Pango.Weight.BOLD]
    assert view.get_buffer().get_iter_at_line(1).get_tags() == []
    mine.unlink()
    shown.press("Try again")
    until(lambda: shown.head == DONE)
    assert not any(line.startswith("✖") for line in shown.report)


def test_it_gets_on_while_another_command_holds_the_lock(open_dialog: Open, open_lab: LabDirectory) -> None:
    shown = open_dialog(str(open_lab.root))
    with LabStore(open_lab).locked():
        shown.press("Close everything")
        until(lambda: "waits for another qvm-forward, which is changing something" in shown.report)
        assert is_held(open_lab)
    until(lambda: shown.head == DONE)


def test_lines_are_shown_when_they_are_said_and_as_they_are(open_dialog: Open, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "go")
    shown = open_dialog(
        script=f"says('qvm-forward: <b>&amp;\\x1b\\nhalf a ')\nopen({str(tmp_path / 'go')!r}).read()\n"
        f"says('line\\nno end')\n{report_of(CLOSED | {'notes': ['<i>']}, 0)}"
    )
    shown.press("Close everything")
    until(lambda: shown.report == ["<b>&amp;\\x1b"])
    assert (shown.head, shown.kind, shown.buttons) == ("Closing everything…", "info", ["Hide"])
    (tmp_path / "go").write_text("")
    until(lambda: shown.head == DONE)
    assert shown.report[0] == "Note: <i>"
    assert shown.report[-3:] == ["<b>&amp;\\x1b", "half a line", "no end"]


def test_at_its_end_it_comes_again_if_it_was_hidden(open_dialog: Open, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "go")
    shown = open_dialog(script=f"open({str(tmp_path / 'go')!r}).read()\n{report_of(OPEN, 1)}")
    shown.press("Close everything")
    shown.press("Hide")
    assert not shown.dialog.get_visible()
    shown.closing.open(None)
    settle()
    assert shown.head == "Closing everything…"
    shown.dialog.close()
    until(lambda: not shown.dialog.get_visible())
    (tmp_path / "go").write_text("")
    until(lambda: shown.dialog.get_visible() and shown.of(Gtk.InfoBar))
    assert shown.head == NOT_DONE
    shown.press("Close")
    shown.closing.open(None)
    settle()
    assert (shown.head, shown.of(Gtk.TextView)) == ("Close everything?", [])


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("os.kill(os.getpid(), 9)", "It was killed by signal 9 before it could report."),
        (report_of(CLOSED, 3), "It ended with status 3, and its report cannot be read."),
        (
            "says('qvm-forward panic: no\\n')\nsys.exit(1)",
            "It ended with status 1, and its report cannot be read.",
        ),
    ],
)
def test_what_ends_without_a_report_leaves_it_unknown(open_dialog: Open, script: str, says: str) -> None:
    shown = open_dialog("/a lab", script=script)
    shown.press("Close everything")
    until(lambda: shown.head == UNKNOWN)
    assert shown.kind == "error"
    assert shown.report[0] == f"✖ {says}"
    assert shown.report[2] == "✖ Try again, or type in a terminal: qvm-forward --lab '/a lab' panic"
    assert "Try again" in shown.buttons


def test_what_cannot_be_started_leaves_it_unknown(open_dialog: Open) -> None:
    shown = Shown(Closing(None, words=["/nowhere/python"]))
    shown.closing.open(None)
    settle()
    shown.press("Close everything")
    assert shown.head == UNKNOWN
    assert shown.report[0] == "✖ It could not be started: No such file or directory."
    shown.dialog.destroy()


def test_what_the_process_has_started_does_not_hold_it_up(open_dialog: Open, tmp_path: Path) -> None:
    """As a call of a qube that hangs does, when panic is killed."""
    os.mkfifo(tmp_path / "go")
    waits = f"open({str(tmp_path / 'go')!r}).read()"
    shown = open_dialog(
        script=f"subprocess.Popen([sys.executable, '-c', {waits!r}])\nsays('no end')\n{report_of(CLOSED, 0)}"
    )
    shown.press("Close everything")
    until(lambda: shown.head == DONE)
    assert shown.report[-1] == "no end"
    (tmp_path / "go").write_text("")


def test_it_goes_on_when_the_dialog_is_gone(open_dialog: Open, tmp_path: Path) -> None:
    for name in ("pid", "go"):
        os.mkfifo(tmp_path / name)
    script = "open('pid', 'w').write(str(os.getpid()))\nopen('go').read()\nsays('on\\n')\nopen('done', 'x')\n"
    shown = open_dialog(script=f"os.chdir({str(tmp_path)!r})\n{script}")
    shown.press("Close everything")
    process = os.pidfd_open(int((tmp_path / "pid").read_text()))
    shown.dialog.destroy()
    (tmp_path / "go").write_text("")
    assert select.select([process], [], [], BOUND_S)[0]
    os.close(process)
    settle()
    assert (tmp_path / "done").exists()
    assert not shown.dialog.get_visible()


def test_it_has_a_session_of_its_own_and_no_input(open_dialog: Open) -> None:
    shown = open_dialog(script="says(f'{os.getsid(0) == os.getpid()} {sys.stdin.read()!r}')")
    shown.press("Close everything")
    until(lambda: shown.head == UNKNOWN)
    assert shown.report[-1] == "True ''"


def test_of_many_lines_the_last_ones_are_shown(open_dialog: Open) -> None:
    shown = open_dialog(script=f"for n in range({3 * LINES_MAX}): says(f'{{n}}\\n')\n{report_of(CLOSED, 0)}")
    shown.press("Close everything")
    until(lambda: shown.head == DONE)
    said = shown.report[shown.report.index("What was done, in order:") + 1 :]
    assert said == [str(number) for number in range(2 * LINES_MAX, 3 * LINES_MAX)]


def test_a_report_that_no_pipe_holds_at_once_is_read(open_dialog: Open) -> None:
    script = f"import json\nreports(json.dumps({CLOSED!r} | {{'notes': ['x' * 100] * 10_000}}))\n"
    shown = open_dialog(script=script)
    shown.press("Close everything")
    until(lambda: shown.head == DONE)
    assert shown.report.count(f"Note: {'x' * 100}") == 10_000
