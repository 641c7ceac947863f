# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether a window is seen, as X tells it."""

import shutil
import subprocess
from collections.abc import Iterator

import pytest
from bounds import BOUND_S
from screen import settle, until

from qubes_fwd_qrexec.window.gtk import Gdk, Gtk
from qubes_fwd_qrexec.window.visibility import Visibility


@pytest.fixture
def window() -> Iterator[Gtk.Window]:
    made = Gtk.Window()
    made.move(0, 0)
    made.resize(200, 200)
    yield made
    made.destroy()
    settle()


def test_it_is_seen_while_it_is_mapped(window: Gtk.Window) -> None:
    told: list[bool] = []
    Visibility(window, told.append)
    settle()
    assert told == []
    window.show()
    until(lambda: told == [True])
    window.hide()
    until(lambda: told == [True, False])
    window.show()
    until(lambda: told == [True, False, True])


def test_it_is_not_seen_on_another_workspace(window: Gtk.Window) -> None:
    """A window manager takes it away there, without a word to the program. Here another program does so."""
    if shutil.which("xdotool") is None:
        pytest.skip("there is no xdotool (Debian: xdotool)")
    told: list[bool] = []
    Visibility(window, told.append)
    window.show()
    until(lambda: told == [True])
    number = str(window.get_window().get_xid())
    subprocess.run(["xdotool", "windowunmap", number], check=True, timeout=BOUND_S)
    until(lambda: told == [True, False])
    subprocess.run(["xdotool", "windowmap", number], check=True, timeout=BOUND_S)
    until(lambda: told == [True, False, True])


def test_it_is_not_seen_behind_another_window(window: Gtk.Window) -> None:
    told: list[bool] = []
    Visibility(window, told.append)
    window.show()
    until(lambda: told == [True])
    other = Gtk.Window()
    other.move(0, 0)
    other.resize(600, 600)
    other.show()
    other.get_window().raise_()
    until(lambda: told == [True, False])
    other.destroy()
    until(lambda: told == [True, False, True])


def test_it_is_not_seen_while_it_is_minimized(window: Gtk.Window) -> None:
    """There is no window manager here that would minimize it, so what GTK hears of one is given to it."""
    told: list[bool] = []
    Visibility(window, told.append)
    window.show()
    until(lambda: told == [True])
    for state in (Gdk.WindowState.ICONIFIED, Gdk.WindowState(0)):
        event = Gdk.Event.new(Gdk.EventType.WINDOW_STATE)
        event.window_state.window, event.window_state.new_window_state = window.get_window(), state
        event.window_state.changed_mask = Gdk.WindowState.ICONIFIED
        window.event(event)
    assert told == [True, False, True]
