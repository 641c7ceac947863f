# SPDX-License-Identifier: GPL-2.0-or-later
"""The pane shown while a whole group is chosen in the list: a target, or the rules that have ended."""

from collections.abc import Callable

from .gtk import Gtk
from .model.rows import ENDED, Group
from .model.words import _, ngettext
from .widgets import GAP, button, column, label


class GroupPane:
    """``add`` makes a forward of the group's qube, ``remove_all`` removes all that have ended."""

    def __init__(self, add: Callable[[], object], remove_all: Callable[[], object]) -> None:
        self._title, self._text = label(wraps=True, style="title"), label(wraps=True)
        self._add = button(_("Add a _forward to this qube…"), add)
        self._remove = button(_("Re_move all…"), remove_all)
        self.buttons = (self._add, self._remove)
        for each in self.buttons:
            each.set_halign(Gtk.Align.START)
            each.set_no_show_all(True)
        self.widget = column(self._title, self._text, *self.buttons, gap=2 * GAP, margin=2 * GAP)

    def show(self, group: Group) -> None:
        count, is_ended = len(group.rows), group.qube == ENDED
        self._add.set_visible(not is_ended)
        self._remove.set_visible(is_ended)
        if is_ended:
            self._title.set_text(
                ngettext("{count} forward has ended", "{count} forwards have ended", count).format(
                    count=count
                )
            )
            self._text.set_text(_("They are closed. Their rules are kept, and can be extended or removed."))
        else:
            self._title.set_text(group.qube)
            self._text.set_text(_("Netvms: {netvms}").format(netvms=group.netvms or _("none")))

    def focus(self) -> None:
        """Let the keyboard work here."""
        next(each for each in self.buttons if each.get_visible()).grab_focus()
