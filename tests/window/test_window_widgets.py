# SPDX-License-Identifier: GPL-2.0-or-later
"""The small widgets, on a screen."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers import BOUND_S
from onscreen import dark_theme
from screen import settle, until

from qubes_fwd_qrexec.window import style
from qubes_fwd_qrexec.window.gtk import Gtk
from qubes_fwd_qrexec.window.widgets import button, column, deliver, label, later, named, row, scrolled

PROBE = "<b>&amp; <i>"
# In processes of their own, as what they do is for the whole of a process.
_INTRODUCED = """\
import debiangi
assert debiangi.offer() is None
from qubes_fwd_qrexec.window.gtk import Gdk, GLib, Gtk
from qubes_fwd_qrexec.window.widgets import introduce
introduce("org.example")
print(GLib.get_prgname(), Gdk.get_program_class(), Gtk.Window.get_default_icon_name())
"""
_GARBAGE = """\
import threading
import debiangi
assert debiangi.offer() is None
from qubes_fwd_qrexec.window import garbage
from qubes_fwd_qrexec.window.gtk import GLib, Gtk
from qubes_fwd_qrexec.window.widgets import deliver
from qubes_fwd_qrexec.window.model.worker import Worker

ended = []

class Ring:
    def __init__(self):
        self.itself, self.button = self, Gtk.Button()
        self.button.connect("destroy", lambda _: ended.append(threading.current_thread()))

def make_much(backend):
    for _ in range(3):
        [[] for _ in range(100_000)]

garbage.begin()
Ring()
worker = Worker(lambda: "backend", deliver)
worker.do(make_much, print, print)
while not ended:
    GLib.MainContext.default().iteration(True)
worker.close()
assert ended == [threading.main_thread()], ended
"""


def test_no_text_is_markup() -> None:
    assert label(PROBE, wraps=True).get_text() == PROBE
    assert label(PROBE).get_label() == PROBE
    assert not label(PROBE).get_use_markup()
    assert button(PROBE, lambda: None, tooltip=PROBE).get_tooltip_text() == PROBE


def test_a_widget_has_the_name_that_it_is_given() -> None:
    entry = named(Gtk.Entry(), "Port", "from 1 to 65535")
    assert entry.get_accessible().get_name() == "Port"
    assert entry.get_accessible().get_description() == "from 1 to 65535"


def test_a_button_does_what_it_says_and_has_its_letter() -> None:
    clicked: list[str] = []
    made = button("_Open", lambda: clicked.append("open"), style="anybody")
    made.clicked()
    assert clicked == ["open"]
    assert made.get_label() == "_Open"
    assert made.get_use_underline()
    assert made.get_style_context().has_class("anybody")


def test_boxes_hold_what_is_given_in_its_order() -> None:
    one, other = label("one"), label("other")
    inner = row(one, other)
    outer = column(inner)
    assert (outer.get_children(), inner.get_children()) == ([inner], [one, other])


@pytest.mark.parametrize(
    "name", ["open", "anybody", "bad", "asks", "note", "faint", "title", "invalid_entry"]
)
def test_the_style_is_taken_without_complaint(name: str) -> None:
    window = Gtk.Window()
    window.add(scrolled(label("text", style=name)))
    style.apply(window)
    window.show_all()
    settle()
    window.destroy()


def test_the_style_follows_the_theme() -> None:
    window, text = Gtk.Window(), label("text", style="bad")
    window.add(text)
    style.apply(window)
    window.show_all()

    def colour() -> str:
        return text.get_style_context().get_color(Gtk.StateFlags.NORMAL).to_string()

    settle()
    light = colour()
    with dark_theme():
        until(lambda: colour() not in (light, "rgb(255,255,255)"))
    until(lambda: colour() == light)
    window.destroy()
    assert colour() != light, "what was styled with it is not any more"


def test_a_program_is_introduced_to_the_desktop() -> None:
    done = in_a_process(_INTRODUCED)
    assert done.stdout == "org.example org.example qubes-forward-manager\n"


def test_what_another_thread_delivers_runs_in_the_main_one_and_once() -> None:
    found: list[int] = []
    thread = threading.Thread(target=lambda: deliver(lambda: found.append(threading.get_ident())))
    thread.start()
    until(lambda: found)
    thread.join()
    settle()
    assert found == [threading.get_ident()]


def test_a_timer_comes_once_and_can_be_cancelled() -> None:
    found: list[str] = []
    cancel = later(0.0, lambda: found.append("cancelled"))
    cancel()
    cancel()
    done = later(0.0, lambda: found.append("once"))
    until(lambda: found)
    settle()
    done()
    assert found == ["once"]


def test_what_is_scrolled_ends_with_its_window() -> None:
    ended: list[str] = []
    window, content = Gtk.Window(), column(label("text"))
    content.connect("destroy", lambda _: ended.append("content"))
    window.add(scrolled(content))
    window.destroy()
    assert ended == ["content"]


def test_a_list_scrolls_itself() -> None:
    view = Gtk.TreeView()
    assert scrolled(view).get_child() is view


def in_a_process(program: str) -> "subprocess.CompletedProcess[str]":
    """Run a program that succeeds without a warning."""
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environ,
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done


def test_no_widget_is_destroyed_in_another_thread_than_the_main_one() -> None:
    """Python looks for garbage wherever something is made."""
    in_a_process(_GARBAGE)
