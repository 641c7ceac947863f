# SPDX-License-Identifier: GPL-2.0-or-later
"""The fields of Add and Edit, in the order in which one thinks of a forward: what, where, who, how long."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from qubes_fwd_qrexec.admin.inventory import Inventory

from .draft import Draft
from .fields import Changed, Field, Section
from .gtk import Gtk
from .judging import NOTHING, Judgement
from .moment import HowLong
from .sections import Further, Reachable, Remark, What, Who
from .widgets import GAP, column
from .words import _


class Form:
    """``draft`` is what the fields hold; ``changed`` is told of each change that the user makes."""

    def __init__(self, changed: Changed) -> None:
        self.draft = Draft()
        self._told = changed
        self._is_showing = True
        self._inventory: Inventory | None = None
        self._now = 0.0
        self._reachable, self._further = Reachable(self._changed), Further(self._changed)
        first = (What(self._changed), self._reachable, Who(self._changed), HowLong(self._changed))
        self._sections: tuple[Section, ...] = (*first, Remark(self._changed), self._further)
        self._fields: Mapping[str, Field] = {
            name: field for section in self._sections for name, field in section.fields.items()
        }
        self._expander = Gtk.Expander.new_with_mnemonic(_("_Further options"))
        self._expander.add(_grid(self._further))
        self.widget = column(_grid(*self._sections[:-1]), self._expander, gap=2 * GAP, margin=2 * GAP)
        self._fill(self.draft)

    def show(self, draft: Draft) -> None:
        """Show a draft, as if the user had filled it in."""
        self._fill(draft)
        # What is stored has a mode and a name, and both are seen elsewhere.
        if replace(self._further.read(Draft()), name="", mode=Draft().mode) != Draft():
            self._expander.set_expanded(True)
        self.draft = draft
        self._follow()
        self._told()

    def fit(self, inventory: Inventory, now: float) -> None:
        """Offer the qubes that there are."""
        self._inventory, self._now = inventory, now
        self._follow()

    def mark(self, judgement: Judgement, faults: Mapping[str, str] = NOTHING) -> None:
        """Show beside each field what is wrong with it; ``faults`` come first."""
        for name, field in self._fields.items():
            field.mark(faults.get(name) or judgement.faults.get(name, ""))
        if any(field.fault for field in self._further.fields.values()):
            self._expander.set_expanded(True)
        self._reachable.ask_bypass(judgement.asks_bypass)
        if judgement.named is not None:
            self._further.suggest(judgement.named.name)

    def titles(self, fields: Iterable[str]) -> list[str]:
        """What fields are called."""
        return [self._fields[field].name for field in fields]

    def focus(self, field: str) -> None:
        """Lead the user to a field."""
        if field in self._further.fields:
            self._expander.set_expanded(True)
        self._fields[field].focus()

    def _fill(self, draft: Draft) -> None:
        self._is_showing = True
        for section in self._sections:
            section.show(draft)
        self._is_showing = False

    def _changed(self) -> None:
        if self._is_showing:
            return
        draft = self.draft
        for section in self._sections:
            draft = section.read(draft)
        if draft != self.draft:
            self.draft = draft
            self._follow()
            self._told()

    def _follow(self) -> None:
        for section in self._sections:
            section.follow(self.draft, self._inventory, self._now)


def _grid(*sections: Section) -> Gtk.Grid:
    """Fields below each other, each with its label before it."""
    grid = Gtk.Grid(column_spacing=2 * GAP, row_spacing=GAP)
    for number, field in enumerate(field for section in sections for field in section.rows):
        grid.attach(field.label, 0, number, 1, 1)
        field.widget.set_hexpand(True)
        grid.attach(field.widget, 1, number, 1, 1)
    return grid
