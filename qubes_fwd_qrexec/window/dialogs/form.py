# SPDX-License-Identifier: GPL-2.0-or-later
"""The fields of Add and Edit, in the order in which one thinks of a forward: what, where, who, how long."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from qubes_fwd_qrexec.admin.inventory import Inventory
from qubes_fwd_qrexec.window.gtk import Gtk
from qubes_fwd_qrexec.window.model.draft import Draft
from qubes_fwd_qrexec.window.model.judgement import NOTHING, Judgement
from qubes_fwd_qrexec.window.model.words import _
from qubes_fwd_qrexec.window.widgets import GAP, column

from .calendar import HowLong
from .fields import Changed, Field, Section
from .sections import Further, Reachable, Remark, What, Who

_SECTIONS: tuple[Callable[[Changed], Section], ...] = (What, Reachable, Who, HowLong, Remark, Further)


class Form:
    """``draft`` is what the fields hold; ``changed`` is told of each change that the user makes. All steps of
    `making` have to be taken first.
    """

    def __init__(self, changed: Changed) -> None:
        self.draft = Draft()
        self._told = changed
        self._is_showing = True
        self._inventory: Inventory | None = None
        self._now = 0.0
        self._sections: list[Section] = []
        self._fields: dict[str, Field] = {}
        self._further: Mapping[str, Field] = {}
        self._expander = Gtk.Expander.new_with_mnemonic(_("_Further options"))
        self._grid = Gtk.Grid(column_spacing=2 * GAP, row_spacing=GAP)
        self._further_grid = Gtk.Grid(column_spacing=2 * GAP, row_spacing=GAP)
        self._expander.add(self._further_grid)
        self.widget = column(self._grid, self._expander, gap=2 * GAP, margin=2 * GAP)

    def making(self) -> Iterator[None]:
        """Make it, in steps that take some milliseconds each."""
        for make in _SECTIONS:
            section = make(self._changed)
            self._sections.append(section)
            self._fields |= section.fields
            section.show(self.draft)
            yield
        *first, last = self._sections
        self._further = last.fields
        _attach(self._grid, [field for section in first for field in section.rows])
        _attach(self._further_grid, last.rows)
        self._is_showing = False
        yield

    def show(self, draft: Draft) -> None:
        """Show a draft, as if the user had filled it in."""
        self._fill(draft)
        # What is stored has a mode and a name, and both are seen elsewhere.
        others = self._sections[-1].read(Draft())
        if replace(others, name="", mode=Draft().mode) != Draft():
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
        if any(field.fault for field in self._further.values()):
            self._expander.set_expanded(True)
        for section in self._sections:
            section.learn(judgement)

    def titles(self, fields: Iterable[str]) -> list[str]:
        """What fields are called."""
        return [self._fields[field].name for field in fields]

    def focus(self, field: str) -> None:
        """Lead the user to a field."""
        if field in self._further:
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


def _attach(grid: Gtk.Grid, fields: Sequence[Field]) -> None:
    """Put fields below each other, each with its label before it."""
    # What is attached last is what assistive technology comes to first.
    for number, field in reversed(list(enumerate(fields))):
        field.widget.set_hexpand(True)
        grid.attach(field.widget, 1, number, 1, 1)
        grid.attach(field.label, 0, number, 1, 1)
