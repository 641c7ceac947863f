# SPDX-License-Identifier: GPL-2.0-or-later
"""How long a forward is to be open: a span of time, until a time that is typed or found in a calendar, or
until the user removes it. The clock and the time zone are the user's.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime

from qubes_fwd_qrexec.admin.inventory import Inventory
from qubes_fwd_qrexec.admin.views.times import parse_expire, print_expire
from qubes_fwd_qrexec.common.errors import TextError
from qubes_fwd_qrexec.window.gtk import Gtk
from qubes_fwd_qrexec.window.kept import Text
from qubes_fwd_qrexec.window.model.draft import Draft, Ends, clock_text
from qubes_fwd_qrexec.window.model.words import _
from qubes_fwd_qrexec.window.widgets import GAP, column, label, named, row

from .fields import Changed, Radios, Section, TextField


class HowLong(Section):
    """A span, a time, or no end."""

    def __init__(self, changed: Changed) -> None:
        self._changed = changed
        self._calendar = Calendar(self._take)
        self._until = TextField(
            _("Until"),
            "",
            self._typed,
            hint=_("18:00, tomorrow 8:00, 2030-01-31 18:00"),
            width=34,
            beside=(self._calendar.widget,),
        )
        self._resolved = Text(style="faint")
        words: dict[str, str] = {
            Ends.MINUTES_5: _("_5 minutes"),
            Ends.HOUR: _("_1 hour"),
            Ends.HOURS_8: _("_8 hours"),
            Ends.UNTIL: _("_Until:"),
            Ends.NEVER: _("Until I _remove it"),
        }
        self._ends = Radios(_("How long"), _("How long:"), changed, words, self._placed)
        self.rows = (self._ends,)
        self.fields = {"expire": self._until}

    def _placed(self, buttons: Mapping[str, Gtk.RadioButton]) -> Gtk.Widget:
        spans = (buttons[ends] for ends in (Ends.MINUTES_5, Ends.HOUR, Ends.HOURS_8))
        until = row(buttons[Ends.UNTIL], self._until.widget)
        spans_row, resolved = row(*spans, gap=2 * GAP), self._resolved.widget
        return column(spans_row, until, resolved, buttons[Ends.NEVER], gap=0)

    def show(self, draft: Draft) -> None:
        self._until.text = draft.until
        self._ends.text = draft.ends

    def read(self, draft: Draft) -> Draft:
        return replace(draft, ends=Ends(self._ends.text), until=self._until.text)

    def follow(self, draft: Draft, inventory: Inventory | None, now: float) -> None:
        """Say which time it is that was typed, and how far off."""
        end = None
        if draft.ends is Ends.UNTIL:
            try:
                end = parse_expire(draft.until.strip(), now)
            except TextError:
                end = None
        self._resolved.show("" if end is None else print_expire(end, now))
        self._calendar.begin_at(now if end is None else end)

    def _take(self, seconds: int) -> None:
        self._until.text = clock_text(seconds)

    def _typed(self) -> None:
        if self._until.text:
            self._ends.text = Ends.UNTIL
        self._changed()


class Calendar:
    """A button that opens a calendar and a clock; ``chosen`` is told each time that the user sets there, in
    UNIX seconds.
    """

    def __init__(self, chosen: Callable[[int], object]) -> None:
        self._chosen = chosen
        self._begin = 0.0
        self._is_showing = False
        self._day = named(Gtk.Calendar(), _("Day"))
        self._hour = _spin(_("Hour"), 23, 1)
        self._minute = _spin(_("Minute"), 59, 5)
        self._day.connect("day-selected", self._set)
        for spin in (self._hour, self._minute):
            spin.connect("value-changed", self._set)
        clock = row(self._hour, label(":"), self._minute)
        clock.set_halign(Gtk.Align.CENTER)
        content = column(self._day, clock, margin=GAP)
        content.show_all()
        self._popover = Gtk.Popover()
        self._popover.add(content)
        self._popover.connect("show", self._shown)
        self.widget = Gtk.MenuButton(label=_("Calendar…"), popover=self._popover)
        named(self.widget, _("Choose the day and the time"))
        # It outlives the button otherwise, and keeps all that it calls.
        self.widget.connect("destroy", lambda _: self._popover.destroy())

    def begin_at(self, seconds: float) -> None:
        """Show this time when it is opened next."""
        self._begin = seconds

    def _shown(self, _popover: Gtk.Popover) -> None:
        at = datetime.fromtimestamp(self._begin)
        self._is_showing = True
        self._day.select_month(at.month - 1, at.year)
        self._day.select_day(at.day)
        self._hour.set_value(at.hour)
        self._minute.set_value(at.minute)
        self._is_showing = False

    def _set(self, _widget: Gtk.Widget) -> None:
        if self._is_showing:
            return
        year, month, day = self._day.get_date()
        try:
            at = datetime(
                year, month + 1, day, self._hour.get_value_as_int(), self._minute.get_value_as_int()
            )
            seconds = int(at.timestamp())
        except (ValueError, OverflowError, OSError):
            return  # no day, such as 31 of a month that has 30, or none that a clock knows
        self._chosen(seconds)


def _spin(name: str, most: int, step: int) -> Gtk.SpinButton:
    made = Gtk.SpinButton.new_with_range(0, most, step)
    made.set_wrap(True)
    made.set_orientation(Gtk.Orientation.HORIZONTAL)
    return named(made, name)
