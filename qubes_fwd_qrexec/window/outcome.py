# SPDX-License-Identifier: GPL-2.0-or-later
"""The outcome of a change, in a bar that stays until it is closed, and therefore says when that was."""

import time
from collections.abc import Callable

from qubes_fwd_qrexec.admin.views.tables import shortened

from .gtk import Atk, Gtk
from .model.actions import Done, error_lines
from .model.words import _, ngettext
from .widgets import column, label, named, scrolled

_HEIGHT_MAX = 180
LINES_MAX = 20
"""Of hundreds of rules that were removed at once; the others are counted."""
_LINE_MAX = 800


class Outcome:
    """``widget`` is hidden while there is nothing to say."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._head = label(wraps=True)
        self._text = label(wraps=True, is_selectable=True)
        place = scrolled(self._text)
        place.set_propagate_natural_height(True)
        place.set_max_content_height(_HEIGHT_MAX)
        close = Gtk.Button.new_from_icon_name("window-close-symbolic", Gtk.IconSize.BUTTON)
        named(close, _("Close this message"))
        self.widget = Gtk.InfoBar()
        # As of a cancel, so that Escape does the same.
        self.widget.add_action_widget(close, Gtk.ResponseType.CANCEL)
        self.widget.set_no_show_all(True)
        self.widget.get_content_area().pack_start(column(self._head, place), True, True, 0)
        self.widget.connect("response", lambda *_: self.hide())
        # A screen reader reads an alert out when it shows up.
        self.widget.get_accessible().set_role(Atk.Role.ALERT)

    def show(self, done: Done) -> None:
        """Show what a change did."""
        kind = Gtk.MessageType.INFO if done.is_well else Gtk.MessageType.WARNING
        head = _("✓ Done.") if done.is_well else _("! Not everything went well.")
        self._show(kind, head, (*done.warnings, *done.lines))

    def show_error(self, error: Exception) -> None:
        """Show why nothing was done."""
        self._show(Gtk.MessageType.ERROR, _("✖ Not done."), error_lines(error))

    def hide(self) -> None:
        """Take it away."""
        self.widget.hide()

    def _show(self, kind: Gtk.MessageType, head: str, found: tuple[str, ...]) -> None:
        lines = [shortened(line, _LINE_MAX) for line in found[:LINES_MAX]]
        if (more := len(found) - LINES_MAX) > 0:
            lines.append(ngettext("and {count} more", "and {count} more", more).format(count=more))
        head = f"{head} ({time.strftime('%H:%M', time.localtime(self._clock()))})"
        self.widget.hide()
        self.widget.set_message_type(kind)
        self._head.set_text(head)
        self._text.set_text("\n".join(lines))
        named(self.widget, " ".join((head, *lines)))
        for child in self.widget.get_children():
            child.show_all()
        self.widget.show()
