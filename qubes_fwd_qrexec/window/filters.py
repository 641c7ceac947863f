# SPDX-License-Identifier: GPL-2.0-or-later
"""Which rules the list shows: by state, by a qube that they pass, and by what they say."""

from collections.abc import Callable, Iterator, Sequence

from qubes_fwd_qrexec.common.values import QubeName

from .gtk import Gtk
from .model.rows import Filter, Show
from .model.words import _
from .widgets import GAP, named, row

# Pixels beside the name with the most letters, which need not be the widest; half as many above and below.
_PADDING = 12


class Filters:
    """``changed`` is called when the user has chosen another `filter`."""

    def __init__(self, changed: Callable[[], object]) -> None:
        self.filter = Filter()
        self._changed = changed
        self._offered: list[QubeName] = []
        self._is_filling = False
        self._show = Gtk.ComboBoxText()
        for show, text in _shows().items():
            self._show.append(show.name, text)
        self._qube = Gtk.ComboBoxText()
        self._qube.append("", _("any"))
        self._qube.connect("style-updated", lambda _: self._make_room())
        self.search = named(Gtk.SearchEntry(width_chars=8, hexpand=True), _("Search"))
        self.search.set_placeholder_text(_("Search"))
        self._fill()
        for signal, widget in (("changed", self._show), ("changed", self._qube)):
            widget.connect(signal, lambda _: self._chose())
        self.search.connect("search-changed", lambda _: self._chose())
        self.widget = row(
            _named_by(_("_Show:"), self._show), self._show, _named_by(_("_Qube:"), self._qube), self._qube
        )
        self.widget.pack_start(self.search, True, True, GAP)

    def offer(self, qubes: Sequence[QubeName]) -> Iterator[None]:
        """The qubes to choose from, a step for each that goes or comes.

        The one that is chosen stays, even if nothing passes it any more.
        """
        chosen = self.filter.qube
        wanted = sorted({*qubes} if chosen is None else {*qubes, chosen})
        known = {*wanted}
        for place, name in reversed([*enumerate(self._offered)]):
            if name not in known:
                self._qube.remove(place + 1)
                del self._offered[place]
                yield
        for place, name in enumerate(wanted):
            if place == len(self._offered) or self._offered[place] != name:
                self._qube.insert(place + 1, name, name)
                self._offered.insert(place, name)
                yield
        self._make_room()

    def _make_room(self) -> None:
        """Say how large each name may be, or GTK measures all of them whenever it lays out the window."""
        (cell,) = self._qube.get_cells()
        longest = max((_("any"), *self._offered), key=len)
        width, height = self._qube.create_pango_layout(longest).get_pixel_size()
        cell.set_fixed_size(width + _PADDING, height + _PADDING // 2)

    def ask_for(self, wanted: Filter) -> None:
        """Choose that."""
        before, self.filter = self.filter, wanted
        self._fill()
        if wanted != before:
            self._changed()

    def _fill(self) -> None:
        """Have the widgets say what the filter is."""
        filter_ = self.filter
        self._is_filling = True
        self._show.set_active_id(filter_.show.name)
        self._qube.set_active_id(filter_.qube or "")
        self.search.set_text(filter_.text)
        self._is_filling = False

    def _chose(self) -> None:
        if self._is_filling:
            return
        qube = self._qube.get_active_id()
        show = Show[self._show.get_active_id() or Show.ALL.name]
        wanted = Filter(show, QubeName(qube) if qube else None, self.search.get_text().strip())
        if wanted != self.filter:
            self.filter = wanted
            self._changed()


def _shows() -> dict[Show, str]:
    return {
        Show.ALL: _("All"),
        Show.OPEN: _("Open"),
        Show.WAITING_FOR_YOU: _("Waiting for you"),
        Show.CLOSED: _("Closed"),
    }


def _named_by(mnemonic: str, widget: Gtk.Widget) -> Gtk.Label:
    made = Gtk.Label.new_with_mnemonic(mnemonic)
    made.set_mnemonic_widget(widget)
    return made
