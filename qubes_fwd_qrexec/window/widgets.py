# SPDX-License-Identifier: GPL-2.0-or-later
"""Small widgets that all parts of the window use. Every text is set as text, never as markup."""

from collections.abc import Callable
from typing import TypeVar

from .garbage import collect
from .gtk import Gdk, GLib, Gtk, Pango

W = TypeVar("W", bound=Gtk.Widget)
ICON = "qubes-forward-manager"
GAP = 6
"""Pixels between widgets that belong together; twice that at the edge of a window."""


def introduce(app_id: str) -> None:
    """Tell the desktop what program this is: the class and the icon of its windows."""
    GLib.set_prgname(app_id)
    Gdk.set_program_class(app_id)
    Gtk.Window.set_default_icon_name(ICON)


def named(widget: W, name: str, description: str = "") -> W:
    """Give a widget the name that assistive technology reads out."""
    accessible = widget.get_accessible()
    accessible.set_name(name)
    accessible.set_description(description)
    return widget


def label(text: str = "", *, wraps: bool = False, is_selectable: bool = False, style: str = "") -> Gtk.Label:
    """A text that begins at the left. One that ``wraps`` does so between words, or within one that is too
    long; else it is shortened at its end. ``style`` names a class of `style`.
    """
    made = Gtk.Label(label=text, xalign=0, selectable=is_selectable)
    if wraps:
        made.set_line_wrap(True)
        made.set_line_wrap_mode(Pango.WrapMode.WORD_CHAR)
    else:
        made.set_ellipsize(Pango.EllipsizeMode.END)
    if style:
        made.get_style_context().add_class(style)
    return made


def button(mnemonic: str, clicked: Callable[[], object], *, style: str = "", tooltip: str = "") -> Gtk.Button:
    """A button; an underscore stands before the letter that Alt presses it with."""
    made = Gtk.Button.new_with_mnemonic(mnemonic)
    made.connect("clicked", lambda _: clicked())
    if style:
        made.get_style_context().add_class(style)
    if tooltip:
        made.set_tooltip_text(tooltip)
    return made


def column(*widgets: Gtk.Widget, gap: int = GAP, margin: int = 0) -> Gtk.Box:
    """Widgets below each other."""
    return _box(Gtk.Orientation.VERTICAL, widgets, gap, margin)


def row(*widgets: Gtk.Widget, gap: int = GAP, margin: int = 0) -> Gtk.Box:
    """Widgets beside each other."""
    return _box(Gtk.Orientation.HORIZONTAL, widgets, gap, margin)


def _box(orientation: Gtk.Orientation, widgets: tuple[Gtk.Widget, ...], gap: int, margin: int) -> Gtk.Box:
    made = Gtk.Box(orientation=orientation, spacing=gap, margin=margin)
    for widget in widgets:
        made.pack_start(widget, False, False, 0)
    return made


def scrolled(widget: Gtk.Widget) -> Gtk.ScrolledWindow:
    """A widget that may be higher than its place; what has the focus in it is scrolled to."""
    made = Gtk.ScrolledWindow(hscrollbar_policy=Gtk.PolicyType.NEVER)
    if isinstance(widget, Gtk.TreeView):
        made.add(widget)
        return made
    # GTK would add one by itself, and at the end only take the widget out of it, which then lives on with all
    # that it calls.
    port = Gtk.Viewport(shadow_type=Gtk.ShadowType.NONE)
    port.set_focus_vadjustment(made.get_vadjustment())
    port.add(widget)
    made.add(port)
    return made


def deliver(call: Callable[[], None]) -> None:
    """`worker.Deliver` of GTK's main loop. What a job leaves is looked for in the next turn."""

    def once() -> bool:
        call()
        GLib.idle_add(collect)
        return False

    GLib.idle_add(once)


def later(seconds: float, call: Callable[[], None]) -> Callable[[], None]:
    """`board.Later` of GTK's main loop."""
    sources: list[int] = []

    def once() -> bool:
        sources.clear()
        call()
        return False

    sources.append(GLib.timeout_add(int(seconds * 1000), once))

    def cancel() -> None:
        if sources:
            GLib.source_remove(sources.pop())

    return cancel
