# SPDX-License-Identifier: GPL-2.0-or-later
"""Finds the controls of a window by what they are called, and works them as a user would."""

from collections.abc import Iterator
from typing import TypeVar

import screen  # noqa: F401  # it skips where GTK is missing

from qubes_fwd_qrexec.window.gtk import Gtk

W = TypeVar("W", bound=Gtk.Widget)
FOCUSABLE = (Gtk.Entry, Gtk.Button, Gtk.ComboBox, Gtk.Expander, Gtk.Calendar)


def walk(root: Gtk.Widget) -> list[Gtk.Widget]:
    """A widget and all that is in it."""
    return list(dict.fromkeys(_walk(root)))  # a combo box has its entry twice


def _walk(root: Gtk.Widget) -> Iterator[Gtk.Widget]:
    yield root
    if isinstance(root, Gtk.Container):
        inner: list[Gtk.Widget] = []
        root.forall(inner.append)
        for child in inner:
            yield from _walk(child)


def shown(root: Gtk.Widget) -> Iterator[Gtk.Widget]:
    """What of it can be seen, with what stands where it must be scrolled to."""
    return (widget for widget in walk(root) if widget.get_mapped())


def find(root: Gtk.Widget, kind: type[W], name: str) -> W:
    """The only control of a kind with this accessible name."""
    found = [each for each in walk(root) if isinstance(each, kind) and called(each) == name]
    assert len(found) == 1, f"{len(found)} of {kind.__name__} are called {name!r}"
    return found[0]


def called(widget: Gtk.Widget) -> str:
    """What assistive technology reads out; of a button without a name of its own, its text."""
    return widget.get_accessible().get_name() or ""


def texts(root: Gtk.Widget) -> list[str]:
    """All texts that are shown, none of them empty."""
    labels = (widget for widget in walk(root) if isinstance(widget, Gtk.Label) and widget.get_visible())
    return [text for label in labels if (text := label.get_text())]
