# SPDX-License-Identifier: GPL-2.0-or-later
"""The bars above the list: how many ports are open and to whom, and a bar for each `Alert`."""

from collections.abc import Callable, Iterable

from .gtk import Atk, Gtk
from .kept import Rows, Text
from .model.alerts import Alert, Way
from .model.summary import Summary, Tone
from .model.words import _
from .widgets import GAP, button, column, deliver, row

# A sign besides colour and words.
_SIGNS = {
    Tone.CLOSED: ("○", ""),
    Tone.OPEN: ("●", "open"),
    Tone.ANYBODY: ("▲", "anybody"),
    Tone.HELD: ("■", "note"),
    Tone.UNKNOWN: ("?", "note"),
}
_HEIGHT_MAX = 170
"""Pixels, of all alerts; in a small window the list needs its place, too."""


class SummaryBar:
    """How many ports are open and to whom. ``show_asking`` shows the rules that wait for the user's word."""

    def __init__(self, show_asking: Callable[[], object]) -> None:
        self._sign = Text(wraps=False, is_selectable=False)
        self._text = Text(is_selectable=False)
        self._button = button(_("S_how"), show_asking, tooltip=_("Show the forwards that need your decision"))
        self._button.set_no_show_all(True)
        self.widget = row(self._sign.widget, gap=2 * GAP)
        self.widget.pack_start(self._text.widget, True, True, 0)
        self._spinner, self._busy = Gtk.Spinner(no_show_all=True), Text(is_selectable=False, wraps=False)
        self.widget.pack_start(self._busy.widget, False, False, 0)
        self.widget.pack_start(self._spinner, False, False, 0)
        self.widget.pack_start(self._button, False, False, 0)

    def show(self, summary: Summary) -> None:
        sign, style = _SIGNS[summary.tone]
        self._sign.show(sign, style)
        self._text.show(summary.text, style)
        self._button.set_visible(summary.asks > 0)

    def be_busy(self, *, is_busy: bool) -> None:
        """Say whether a change is being made."""
        self._busy.show(_("Working…") if is_busy else "")
        self._spinner.set_visible(is_busy)
        self._spinner.props.active = is_busy


class AlertBars:
    """A bar for each alert; ``take`` goes the way that its button is for."""

    def __init__(self, take: Callable[[Way], object]) -> None:
        self._rows: Rows[str, Alert] = Rows(lambda _: _Bar(take))
        self._shown: list[Alert] = []
        self._width = 0
        self.widget = Gtk.ScrolledWindow(hscrollbar_policy=Gtk.PolicyType.NEVER)
        self.widget.set_no_show_all(True)
        self._rows.widget.set_spacing(0)
        self.widget.add(self._rows.widget)
        self._rows.widget.show()
        self.widget.connect("size-allocate", lambda _, place: self._resized(place.width))

    def show(self, alerts: Iterable[Alert]) -> None:
        """Show these, in this order."""
        wanted = [*alerts]
        if wanted != self._shown:
            self._shown = wanted
            for _ in self._rows.show({alert.kind: alert for alert in wanted}):
                pass
            self.widget.set_visible(bool(wanted))
            self._fit()

    def _resized(self, width: int) -> None:
        if width != self._width:
            self._width = width
            # A widget must not change while it is being given its place.
            deliver(self._fit)

    def _fit(self) -> None:
        """Be as high as the texts are in this width: what scrolls asks for the height in its least one."""
        height = self._rows.widget.get_preferred_height_for_width(self._width)[1]
        self.widget.set_size_request(-1, min(height, _HEIGHT_MAX))


class _Bar:
    """``widget`` shows one alert."""

    def __init__(self, take: Callable[[Way], object]) -> None:
        self._take, self._way = take, Way.LOOK
        self._text, self._lines = Text(), Text()
        self._button = button("", lambda: self._take(self._way))
        self._button.set_no_show_all(True)
        self.widget = Gtk.InfoBar()
        self.widget.get_content_area().pack_start(
            column(self._text.widget, self._lines.widget, gap=2), True, True, 0
        )
        self.widget.get_action_area().pack_start(self._button, False, False, 0)
        # A screen reader reads an alert out when it shows up.
        self.widget.get_accessible().set_role(Atk.Role.ALERT)

    def show(self, alert: Alert) -> None:
        kinds = Gtk.MessageType
        if alert.is_bad:
            self.widget.set_message_type(kinds.ERROR)
        else:
            self.widget.set_message_type(kinds.INFO if alert.way is None else kinds.WARNING)
        self._text.show(alert.text)
        self._lines.show("\n".join(alert.lines))
        self._button.set_visible(alert.way is not None)
        if alert.way is not None:
            self._way = alert.way
            self._button.set_label(alert.label)
