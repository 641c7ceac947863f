# SPDX-License-Identifier: GPL-2.0-or-later
"""What would become of a draft, shown below the fields of Add and Edit, with buttons for its mends."""

from collections.abc import Callable, Iterable, Sequence

from qubes_fwd_qrexec.window.gtk import Atk, Gtk
from qubes_fwd_qrexec.window.kept import Text
from qubes_fwd_qrexec.window.model.judgement import Judgement
from qubes_fwd_qrexec.window.model.mends import Mend
from qubes_fwd_qrexec.window.model.words import _
from qubes_fwd_qrexec.window.widgets import GAP, button, column, named


class Verdict:
    """``take`` is told which of the mends the user chose."""

    def __init__(self, take: Callable[[Mend], object]) -> None:
        self._take = take
        self._shown: tuple[Mend, ...] = ()
        self._error = Text(style="bad")
        self._headline = Text(style="title")
        self._text = Text()
        self._notes = Text(style="faint")
        self._mends = column()
        named(self._mends, _("What would help"))
        self._error.widget.get_accessible().set_role(Atk.Role.ALERT)
        texts = (self._error.widget, self._headline.widget, self._text.widget)
        self.widget = named(
            column(*texts, self._mends, self._notes.widget, margin=2 * GAP), _("What would happen")
        )

    def show(self, judgement: Judgement, lines: Iterable[str] = ()) -> None:
        """Show what was found, with more lines."""
        self.say(judgement.headline, (*judgement.lines, *lines))
        self._notes.show("\n".join(judgement.notes))
        self._offer(tuple(dict.fromkeys(judgement.mends)))

    def say(self, headline: str, lines: Iterable[str] = ()) -> None:
        """Show this alone."""
        self._headline.show(headline)
        self._text.show("\n".join(lines))
        self._notes.show("")
        self._offer(())

    def fail(self, lines: Sequence[str]) -> None:
        """Show above all why a change was not made; nothing of that if there are no lines."""
        self._error.show("\n".join(lines))

    def _offer(self, mends: tuple[Mend, ...]) -> None:
        if mends == self._shown:
            return
        self._shown = mends
        for child in self._mends.get_children():
            child.destroy()
        for mend in mends:
            self._mends.pack_start(self._button(mend), False, False, 0)

    def _button(self, mend: Mend) -> Gtk.Button:
        made = button(mend.label.replace("_", "__"), lambda: self._take(mend))
        made.set_halign(Gtk.Align.START)
        made.show()
        return made
