# SPDX-License-Identifier: GPL-2.0-or-later
"""What is to be seen of widgets, and keys for them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from screen import settle, until

from qubes_fwd_qrexec.window.gtk import Gdk, Gtk

W = TypeVar("W", bound=Gtk.Widget)
NONE, CONTROL = Gdk.ModifierType(0), Gdk.ModifierType.CONTROL_MASK


def inside(widget: Gtk.Widget, kind: type[W]) -> Iterator[W]:
    """Those of a kind that are visible, in their order."""
    if not widget.get_visible():
        return
    if isinstance(widget, kind):
        yield widget
    if isinstance(widget, Gtk.Stack):
        yield from inside(widget.get_visible_child(), kind)
    elif isinstance(widget, Gtk.Container):
        for child in widget.get_children():
            yield from inside(child, kind)


def texts(widget: Gtk.Widget) -> list[str]:
    """All labels, those of buttons too."""
    return [label.get_text() for label in inside(widget, Gtk.Label)]


def pressable(widget: Gtk.Widget, text: str) -> Gtk.Button:
    """The button that says this."""
    (found,) = (button for button in inside(widget, Gtk.Button) if text in texts(button))
    return found


def focused(window: Gtk.Window) -> None:
    """Let the keyboard work in a window that is shown, without a window manager."""
    settle()
    window.get_window().focus(Gdk.CURRENT_TIME)
    until(window.has_toplevel_focus)


@contextmanager
def dark_theme() -> Iterator[None]:
    """Meanwhile everything is written with white on black."""
    provider, screen = Gtk.CssProvider(), Gdk.Screen.get_default()
    provider.load_from_data(b"@define-color theme_bg_color #000; * { color: #fff; }")
    Gtk.StyleContext.add_provider_for_screen(screen, provider, Gtk.STYLE_PROVIDER_PRIORITY_SETTINGS)
    yield
    Gtk.StyleContext.remove_provider_for_screen(screen, provider)


def press(widget: Gtk.Widget, key: int, modifiers: Gdk.ModifierType = NONE) -> None:
    """As the window takes a key while the focus is in that widget."""
    window = widget.get_toplevel()
    event = Gdk.Event.new(Gdk.EventType.KEY_PRESS)
    event.window, event.keyval, event.state, event.send_event = window.get_window(), key, modifiers, True
    found, keys = Gdk.Keymap.get_for_display(Gdk.Display.get_default()).get_entries_for_keyval(key)
    assert found
    event.hardware_keycode = keys[0].keycode
    event.set_device(Gdk.Display.get_default().get_default_seat().get_keyboard())
    widget.grab_focus()
    window.event(event)
    settle()
