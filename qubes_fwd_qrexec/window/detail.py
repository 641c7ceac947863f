# SPDX-License-Identifier: GPL-2.0-or-later
"""The pane of one rule: what it is, why it is so, who is connected, and what can be done.

What is shown is computed by a worker after each look and figures. Widgets stay, so that focus and place do.
"""

from collections.abc import Iterator
from functools import partial

from qubes_fwd_qrexec.admin.seen import Seen
from qubes_fwd_qrexec.admin.states import Key

from . import cells
from .buttons import COLUMNS, COLUMNS_BELOW, Buttons
from .checklist import CheckList
from .clientlist import ClientList
from .gtk import Gdk, GLib, Gtk
from .kept import Lines, Text
from .model.about import About, about
from .model.actions import error_lines
from .model.board import Board
from .model.commands import Commands
from .model.words import _
from .portions import Portions
from .widgets import GAP, column, named, row, scrolled

_PROBE = "0" * 40


class Detail:
    """``widget`` is the pane."""

    def __init__(self, board: Board, commands: Commands) -> None:
        self._board = board
        self._key: Key | None = None
        self._about: About | None = None
        self._portions = Portions()
        self._is_drawing = False
        self._width = 0
        self._icon, self._icon_of = Gtk.Image(), ("", "")
        self._title, self._state = Text(wraps=False, style="title"), Text(is_selectable=False)
        self._sentence, self._picture = Text(), Text(wraps=False, style="monospace")
        self._note, self._goes_on, self._figures = Text(style="note"), Text(style="note"), Text()
        self._buttons = Buttons(commands)
        self._checks = CheckList(commands)
        self._clients = ClientList(commands)
        self._rule = Lines(is_monospace=True)
        self._more = Gtk.Expander.new_with_mnemonic(_("R_ule and policy"))
        self._more.add(self._rule.widget)
        named(self._rule.widget, _("Rule and policy"))
        named(self._picture.widget, _("Diagram of the forward"))
        self._content = column(
            row(self._icon, self._title.widget, self._state.widget, gap=2 * GAP),
            self._note.widget,
            self._sentence.widget,
            self._buttons.widget,
            self._goes_on.widget,
            self._picture.widget,
            self._checks.widget,
            self._figures.widget,
            self._clients.widget,
            self._more,
            gap=2 * GAP,
        )
        self._content.show_all()
        self._content.set_no_show_all(True)
        self._content.hide()
        self._nothing = Text(is_selectable=False, style="faint")
        self.widget = scrolled(column(self._nothing.widget, self._content, margin=2 * GAP))
        self.widget.connect("size-allocate", self._allocated)
        self.widget.connect("destroy", self._ended)
        self._end = board.subscribe(self._follow)
        self._show(None, None)

    def show(self, key: Key | None) -> None:
        """Show another rule, or nothing."""
        if key != self._key:
            self._key = key
            # Until its own is here, nothing can be done with what is shown of another.
            self._content.set_sensitive(False)
            self.widget.get_vadjustment().set_value(0)
        self._follow()

    def seen(self, key: Key) -> Seen | None:
        """What is shown of a rule; None if it shows another one, or nothing."""
        return self._about.seen if self._about is not None and self._about.key == key else None

    def be_below(self, *, is_below: bool) -> None:
        """Take as little height as there is where the pane stands below the list."""
        self._buttons.stand_in(COLUMNS_BELOW if is_below else COLUMNS)

    def focus(self) -> None:
        """Give the focus to what can be done."""
        self._buttons.focus()

    def _ended(self, _widget: Gtk.Widget) -> None:
        self._end()
        self._key = self._about = None
        self._portions.stop()

    def _follow(self) -> None:
        look, figures, key, now = self._board.look, self._board.figures, self._key, self._board.now
        if look is None or key is None:
            self._show(None, None)
            return
        show, failed = partial(self._show, key), partial(self._failed, key)
        self._board.compute(lambda: about(look, figures, key, now), show, failed, kind="detail")

    def _failed(self, key: Key, error: Exception) -> None:
        if key == self._key:
            self._show(key, None)
            self._nothing.show("\n".join(error_lines(error)))

    def _show(self, key: Key | None, found: About | None) -> None:
        if key != self._key:
            return
        self._about = found
        self._nothing.show(_("Choose a forward to see its details.") if found is None else "")
        self._content.set_visible(found is not None)
        if found is not None:
            self._content.set_sensitive(True)
            self._portions.run(self._steps(found))

    def _steps(self, found: About) -> Iterator[None]:
        """Show all of it. What buttons do is in the first step, so that they are about what is said above."""
        look = self._board.look
        can_change = look is not None and look.read_only is None
        self._buttons.show(found, read_only=None if look is None else look.read_only)
        self._title.show(found.title)
        sign, style = cells.SIGNS[found.state]
        self._state.show(f"{sign} {found.mark}", style)
        self._note.show(found.note)
        self._sentence.show(found.sentence)
        yield
        if self._icon_of != (found.icon, found.label):
            self._icon_of = found.icon, found.label
            icon = cells.icon(found.icon, found.label)
            self._icon.set_visible(icon is not None)
            if icon is not None:
                self._icon.set_from_gicon(icon, Gtk.IconSize.LARGE_TOOLBAR)
            named(self._icon, _("label {label}").format(label=found.label))
        self._goes_on.show("\n".join(found.goes_on))
        self._figures.show("\n".join(found.figures))
        self._rule.show(found.text)
        self._draw()
        yield
        yield from self._checks.show(found.checks)
        yield from self._clients.show(found.key, found.clients, can_cut=can_change)

    def _allocated(self, _widget: Gtk.Widget, place: Gdk.Rectangle) -> None:
        """Draw the picture anew for another width, once that is settled."""
        if place.width != self._width:
            self._width = place.width
            if not self._is_drawing:
                self._is_drawing = True
                GLib.idle_add(self._redraw)

    def _redraw(self) -> bool:
        self._is_drawing = False
        self._draw()
        return False

    def _draw(self) -> None:
        if self._about is not None:
            pixels = self._picture.widget.create_pango_layout(_PROBE).get_pixel_size()[0]
            columns = int((self._width - 6 * GAP) * len(_PROBE) / pixels)
            self._picture.show(self._about.picture(columns).rstrip("\n"))
