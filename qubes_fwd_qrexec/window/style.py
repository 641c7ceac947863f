# SPDX-License-Identifier: GPL-2.0-or-later
"""The few colours of the window, on light themes and dark ones. Each stands beside a word that says the same.

Which of both sets fits is found by comparing text and background, as Qubes' own tools do
(qubes-desktop-linux-manager, gtk_utils.py).
"""

from .gtk import Gdk, Gtk

_RULES = """
.open {{ color: {open}; font-weight: bold; }}
.anybody, .bad {{ color: {bad}; font-weight: bold; }}
.note {{ color: {note}; font-weight: bold; }}
.faint {{ color: {faint}; }}
.title {{ font-weight: bold; font-size: 120%; }}
button:disabled, button:disabled label {{ color: {faint}; font-weight: normal; }}
.invalid_entry {{ border-color: {bad}; box-shadow: inset 0 0 0 1px {bad}; }}
"""
_LIGHT = {"open": "#0d6b2f", "bad": "#b0101e", "note": "#7a4a00", "faint": "#5c5c5c"}
_DARK = {"open": "#6bd68a", "bad": "#ff8d8d", "note": "#f2b65c", "faint": "#b0b0b0"}
# Qubes' labels, qubes-core-admin qubes/app.py.
LABELS = {
    "red": "#cc0000",
    "orange": "#f57900",
    "yellow": "#edd400",
    "green": "#73d216",
    "gray": "#555753",
    "blue": "#3465a4",
    "purple": "#75507b",
    "black": "#000000",
}


def is_dark(widget: Gtk.Widget) -> bool:
    """Whether the theme writes with light on dark."""
    context = widget.get_style_context()
    text = context.get_color(Gtk.StateFlags.NORMAL)
    found, ground = context.lookup_color("theme_bg_color")
    return found and _brightness(text) > _brightness(ground)


def _brightness(colour: Gdk.RGBA) -> float:
    return float(0.299 * colour.red + 0.587 * colour.green + 0.114 * colour.blue)


def colours(widget: Gtk.Widget) -> dict[str, str]:
    """The colours for a theme by the names of their classes."""
    return _DARK if is_dark(widget) else _LIGHT


def apply(window: Gtk.Window) -> None:
    """Style a window and all that is in it, and each other window of this program, also in another theme."""
    provider = Gtk.CssProvider()
    shown: list[dict[str, str]] = []

    def follow(*_: object) -> None:
        found = colours(window)
        # To load is itself an update of the style.
        if shown != [found]:
            shown[:] = [found]
            provider.load_from_data(_RULES.format(**found).encode())

    follow()
    screen, context = window.get_screen(), Gtk.StyleContext
    context.add_provider_for_screen(screen, provider, Gtk.STYLE_PROVIDER_PRIORITY_APPLICATION)
    window.connect("style-updated", follow)
    window.connect("destroy", lambda _: context.remove_provider_for_screen(screen, provider))
