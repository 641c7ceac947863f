# SPDX-License-Identifier: GPL-2.0-or-later
"""The main window: what is open at the top, the list of rules, and beside it or below all about one."""

from collections.abc import Callable, Iterator, Sequence

from qubes_fwd_qrexec.admin.seen import Seen
from qubes_fwd_qrexec.admin.states import Key
from qubes_fwd_qrexec.admin.watch import next_end

from . import style
from .bars import AlertBars, SummaryBar
from .detail import Detail
from .filters import Filters
from .grouppane import GroupPane
from .gtk import Gdk, Gtk
from .model import alerts, rows
from .model.board import TICK_S, Board
from .model.commands import Commands
from .model.figures import leftovers
from .model.look import Look
from .model.rowmenu import menu_items
from .model.rows import ENDED, SOON_S, Filter, Group, Item, Show
from .model.summary import Tone, summary
from .model.words import _
from .outcome import Outcome
from .placeholder import Lack, Placeholder
from .portions import Portions
from .rulelist import RuleList
from .widgets import GAP, button, column, deliver, row

WIDE = 1000
"""Pixels from which on the details stand beside the list; in a narrower window they are below it."""
_SIZE = (1180, 720)
_SHARES = {Gtk.Orientation.HORIZONTAL: 0.6, Gtk.Orientation.VERTICAL: 0.42}
"""How much of the place is the list's."""


class MainWindow:
    """``widget`` is the window. `show` has it show what is on the board."""

    def __init__(self, board: Board, commands: Commands, close: Callable[[], object]) -> None:
        self._board, self._commands = board, commands
        self._groups: tuple[Group, ...] = ()
        self._is_divided = False
        self._portions = Portions()
        self._listed: tuple[Look | None, Filter, int] | None = None
        self.widget = Gtk.Window(title=_("Qubes Port Forwards"))
        self.widget.set_default_size(*_SIZE)
        style.apply(self.widget)
        self._filters = Filters(self.show)
        self._add = button(_("_Add…"), commands.add, tooltip=_("A new forward (Ctrl+N)"))
        self._close = button(_("_Close everything…"), commands.close_everything, style="destructive-action")
        self._summary = SummaryBar(lambda: self._filters.ask_for(Filter(Show.WAITING_FOR_YOU)))
        self._alerts = AlertBars(self._take)
        self.outcome = Outcome()
        self._list = RuleList(self._picked, self._open, self._menu, Portions())
        self._placeholder = Placeholder(commands.add, board.refresh, lambda: self._filters.ask_for(Filter()))
        self._detail = Detail(board, commands)
        self._group = GroupPane(self._add_there, self._remove_ended)
        changing = (self._add, self._placeholder.add, *self._group.buttons)
        self._changing = {each: each.get_tooltip_text() for each in changing}
        self._left, self._right, self._paned = Gtk.Stack(), Gtk.Stack(), Gtk.Paned()
        self._lay_out()
        self._add_keys(close)
        self.show()

    def _lay_out(self) -> None:
        tools = row(self._add, self._filters.widget, self._close)
        tools.set_child_packing(self._filters.widget, True, True, GAP, Gtk.PackType.START)
        for stack, pages in (
            (self._left, (self._list.widget, self._placeholder.widget)),
            (self._right, (self._detail.widget, self._group.widget)),
        ):
            for page in pages:
                stack.add(page)
        self._paned.pack1(self._left, True, False)
        self._paned.pack2(self._right, True, False)
        above = column(tools, self._summary.widget, margin=GAP)
        whole = column(above, self._alerts.widget, self.outcome.widget, self._paned, gap=0)
        whole.set_child_packing(self._paned, True, True, 0, Gtk.PackType.START)
        self.widget.add(whole)
        whole.show_all()
        self.widget.connect("destroy", lambda _: self._portions.stop())
        self.widget.connect("size-allocate", lambda _, size: self._turn(size.width))
        self._paned.connect("size-allocate", lambda _, place: self._divide(place))

    def _turn(self, width: int) -> None:
        """The details stand beside the list where there is room, else below it."""
        wanted = Gtk.Orientation.HORIZONTAL if width >= WIDE else Gtk.Orientation.VERTICAL

        def turn() -> None:
            # Being turned, `Gtk.Paned` would scale its position from the one side to the other.
            if wanted is not self._paned.get_orientation():
                self._paned.set_orientation(wanted)
                self._detail.be_below(is_below=wanted is Gtk.Orientation.VERTICAL)
                self._is_divided = False

        if wanted is not self._paned.get_orientation():
            # A widget must not change while it is being given its place.
            deliver(turn)

    def _divide(self, place: Gdk.Rectangle) -> None:
        if not self._is_divided and self._right.get_visible():
            self._is_divided = True
            orientation = self._paned.get_orientation()
            room = place.width if orientation is Gtk.Orientation.HORIZONTAL else place.height
            deliver(lambda: self._paned.set_position(int(_SHARES[orientation] * room)))

    def _add_keys(self, close: Callable[[], object]) -> None:
        keys = Gtk.AccelGroup()
        control, none = Gdk.ModifierType.CONTROL_MASK, Gdk.ModifierType(0)
        for key, modifier, act in (
            (Gdk.KEY_f, control, self._filters.search.grab_focus),
            (Gdk.KEY_q, control, close),
            (Gdk.KEY_F5, none, self._board.refresh),
        ):
            keys.connect(key, modifier, Gtk.AccelFlags.VISIBLE, lambda *_, act=act: act() or True)
        self._add.add_accelerator("clicked", keys, Gdk.KEY_n, control, Gtk.AccelFlags.VISIBLE)
        self.widget.add_accel_group(keys)
        self._filters.search.connect("stop-search", lambda _: self._leave_search())
        self._list.view.connect("key-press-event", lambda _, event: self._pressed(event))

    def be_busy(self, *, is_busy: bool) -> None:
        """Say whether a change is being made, which may wait for others."""
        self._summary.be_busy(is_busy=is_busy)

    def show(self) -> None:
        """Show what is on the board, as far as the filters let it through, a part in each turn."""
        self._portions.run(self._parts())

    def _parts(self) -> Iterator[None]:
        board, look = self._board, self._board.look
        self._summary.show(summary(look, board.trouble))
        yield
        left = () if look is None else leftovers(look, board.figures)
        self._alerts.show(alerts.alerts(look, left, board.trouble))
        self._allow(None if look is None else look.read_only)
        yield
        # Figures come each few seconds, and change nothing here.
        listed = look, self._filters.filter, self._moment()
        if listed != self._listed:
            groups = []
            for group in () if look is None else rows.groups(look, self._filters.filter, board.now):
                groups.append(group)
                yield
            self._groups = tuple(groups)
            self._list.show(self._groups)
            self._listed = listed
        yield
        self._replace(self._lack(left))
        yield
        yield from self._filters.offer([] if look is None else rows.qubes(look))

    def _moment(self) -> int:
        """What of the time is told: minutes, or seconds where something ends soon."""
        look, now = self._board.look, self._board.now
        end = None if look is None else next_end(look.plan, now)
        return int(now) if end is not None and end <= now + SOON_S else int(now // TICK_S)

    def _allow(self, read_only: str | None) -> None:
        """Let the user change something, unless there is a reason why not, which the buttons tell."""
        for each, tooltip in self._changing.items():
            each.set_sensitive(read_only is None)
            each.set_tooltip_text(read_only or tooltip)

    def _replace(self, lack: Lack | None) -> None:
        """Show the list, or what stands in its place."""
        if lack is not None:
            self._placeholder.show(lack, self._board.trouble or "")
        had_focus = self._list.view.is_focus()
        self._left.set_visible_child(self._list.widget if lack is None else self._placeholder.widget)
        self._right.set_visible(lack in (None, Lack.NONE_FITS))
        self._show_group()
        focus = self.widget.get_focus()
        if lack is None and focus in (None, self._add):
            # Where the window opens, no key does anything but in the list.
            self._list.view.grab_focus()
        elif lack is not None and (focus is None or had_focus):
            self._placeholder.focus()

    def _lack(self, left: Sequence[str]) -> Lack | None:
        """Why there is nothing to list; None if there is something. ``left`` is what goes on all the same."""
        look, trouble = self._board.look, self._board.trouble
        if look is None:
            return Lack.NOT_LOOKED if trouble is None else Lack.CANNOT_LOOK
        if not look.entries.rules:
            is_closed = not left and summary(look, trouble).tone in (Tone.CLOSED, Tone.HELD)
            return Lack.NO_RULES if is_closed else Lack.NO_RULES_YET_OPEN
        return None if self._groups else Lack.NONE_FITS

    def seen(self, key: Key) -> Seen | None:
        """What is shown of a rule beside the list; None if that is about another one."""
        return self._detail.seen(key)

    def choose(self, key: Key) -> None:
        """Show a rule, whatever the filters are."""
        self._filters.ask_for(Filter())
        self._list.choose(key)

    def _picked(self) -> None:
        item = self._list.chosen
        self._detail.show(item if isinstance(item, tuple) else None)
        self._show_group()

    def _show_group(self) -> None:
        group = self._chosen_group()
        if group is not None:
            self._group.show(group)
        self._right.set_visible_child(self._detail.widget if group is None else self._group.widget)

    def _chosen_group(self) -> Group | None:
        chosen = self._list.chosen
        return next((group for group in self._groups if group.qube == chosen), None)

    def _open(self) -> None:
        """Enter in the list goes to what stands beside it, and changes nothing."""
        (self._detail if self._chosen_group() is None else self._group).focus()

    def _add_there(self) -> None:
        if (group := self._chosen_group()) is not None:
            self._commands.add(group.qube)

    def _ended(self) -> tuple[Key, ...]:
        return tuple(row.key for group in self._groups if group.qube == ENDED for row in group.rows)

    def _remove_ended(self) -> None:
        self._commands.remove(self._ended())

    def _menu(self, item: Item) -> Gtk.Menu:
        menu, look = Gtk.Menu(), self._board.look
        for found in () if look is None else menu_items(item, look, self._ended(), self._commands):
            made = Gtk.MenuItem.new_with_mnemonic(found.mnemonic)
            made.connect("activate", lambda _, act=found.act: act())
            if found.is_change and look is not None and look.read_only is not None:
                made.set_sensitive(False)
                made.set_tooltip_text(look.read_only)
            menu.append(made)
        return menu

    def _pressed(self, event: Gdk.EventKey) -> bool:
        """Delete asks whether to remove what is chosen."""
        item, look = self._list.chosen, self._board.look
        if event.keyval != Gdk.KEY_Delete or look is None or look.read_only is not None:
            return False
        if isinstance(item, tuple):
            self._commands.remove([item])
        elif item == ENDED:
            self._remove_ended()
        return True

    def _leave_search(self) -> None:
        self._filters.ask_for(self._filters.filter._replace(text=""))
        self._list.view.grab_focus()

    def _take(self, way: alerts.Way) -> None:
        {
            alerts.Way.LOOK: self._board.refresh,
            alerts.Way.RESUME: self._commands.resume,
            alerts.Way.APPLY: self._commands.apply,
        }[way]()
