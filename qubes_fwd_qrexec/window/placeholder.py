# SPDX-License-Identifier: GPL-2.0-or-later
"""What is shown in place of an empty list: why it is empty, and what helps."""

from collections.abc import Callable
from enum import Enum, auto

from .gtk import Gtk
from .model.words import _
from .widgets import GAP, button, column, label


class Lack(Enum):
    """Why there is no list."""

    NOT_LOOKED = auto()
    CANNOT_LOOK = auto()
    NO_RULES = auto()
    NO_RULES_YET_OPEN = auto()
    NONE_FITS = auto()


class Placeholder:
    """A title, a text and a button, in the middle."""

    def __init__(
        self, add: Callable[[], object], look: Callable[[], object], show_all: Callable[[], object]
    ) -> None:
        self._shown: tuple[Lack, str] | None = None
        self._title, self._text = label(wraps=True, style="title"), label(wraps=True, is_selectable=True)
        self.add = button(_("Add a _forward…"), add, style="suggested-action")
        self._buttons = {
            Lack.NO_RULES: self.add,
            Lack.NO_RULES_YET_OPEN: self.add,
            Lack.CANNOT_LOOK: button(_("Re_load"), look),
            Lack.NONE_FITS: button(_("Sh_ow all"), show_all),
        }
        self._spinner = Gtk.Spinner()
        buttons = dict.fromkeys(self._buttons.values())
        self.widget = column(self._spinner, self._title, self._text, *buttons, gap=2 * GAP)
        self.widget.set_valign(Gtk.Align.CENTER)
        self.widget.set_halign(Gtk.Align.CENTER)
        self.widget.set_border_width(4 * GAP)
        for text in (self._title, self._text):
            text.set_xalign(0.5)
            text.set_justify(Gtk.Justification.CENTER)
            text.set_max_width_chars(60)
        for each in (self._spinner, self._text, *buttons):
            each.set_no_show_all(True)
            each.set_halign(Gtk.Align.CENTER)

    def show(self, lack: Lack, trouble: str = "") -> None:
        """``trouble`` says why one cannot look."""
        if (lack, trouble) == self._shown:
            return
        self._shown = lack, trouble
        title, words = {
            Lack.NOT_LOOKED: (_("Reading the qubes…"), ""),
            Lack.CANNOT_LOOK: (_("What is open is unknown"), trouble),
            Lack.NO_RULES: (
                _("Nothing on this machine can be reached"),
                _("A forward lets others reach a server in one of your qubes."),
            ),
            Lack.NO_RULES_YET_OPEN: (
                _("There are no rules"),
                _("Something is open all the same, or may be: see above."),
            ),
            Lack.NONE_FITS: (_("No forward matches the filter"), ""),
        }[lack]
        self._title.set_text(title)
        self._text.set_text(words)
        self._text.set_visible(bool(words))
        for each in self._buttons.values():
            each.set_visible(each is self._buttons.get(lack))
        self._spinner.set_visible(lack is Lack.NOT_LOOKED)
        self._spinner.props.active = lack is Lack.NOT_LOOKED

    def focus(self) -> None:
        """Let the keyboard work here, at the button that is shown, if there is one."""
        for each in self._buttons.values():
            if each.get_visible():
                each.grab_focus()
