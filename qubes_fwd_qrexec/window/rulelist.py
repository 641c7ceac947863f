# SPDX-License-Identifier: GPL-2.0-or-later
"""The list of rules by target. What the user has chosen and folded stays so while the rules change.

It is filled in portions, so that the main loop has its turn in between however many rules there are.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

from qubes_fwd_qrexec.admin.states import Key

from . import style
from .columns import Column, titles
from .gtk import Gdk, Gtk
from .model.rows import ENDED, Group, Item
from .model.words import _
from .portions import Portions
from .rowstore import RowStore
from .widgets import deliver, named

_PERHAPS = ("mode", "ends", "comment", "role")
"""Columns that are shown only where they say something; the mode only where it is not the same for all."""
_LEAVING = ("mode", "comment", "to")
"""Those that go first where there is no room for all."""


class RuleList:
    """``picked`` is called when what is chosen changes, ``opened`` when the user asks for the details of it,
    and ``menu`` makes what can be done with it. ``is_filling``: not all is shown yet.
    """

    def __init__(
        self,
        picked: Callable[[], object],
        opened: Callable[[], object],
        menu: Callable[[Item], Gtk.Menu],
        portions: Portions,
    ) -> None:
        self.is_filling = False
        self._picked, self._opened, self._menu, self._portions = picked, opened, menu, portions
        self._rows = RowStore()
        self._choice: Item | None = None
        self._told: Item | None = None
        self._folded: set[Item] = {ENDED}
        self._is_changing = False
        self._groups: Sequence[Group] = ()
        self._colours: Mapping[str, str] | None = None
        self._silent: set[str] = {*_PERHAPS}
        self._room, self._font = 0, ""
        self._popped: Gtk.Menu | None = None
        self.view = Gtk.TreeView(model=self._rows.tree, enable_search=False, has_tooltip=True)
        named(self.view, _("Forwards by target"))
        self.view.set_fixed_height_mode(True)
        self.view.set_level_indentation(-10)
        self._columns = {field: Column(self.view, field, title) for field, title in titles().items()}
        self.widget = Gtk.ScrolledWindow()
        self.widget.add(self.view)
        self.widget.connect("size-allocate", lambda _, place: self._resized(place.width))
        self.view.get_selection().connect("changed", lambda _: self._selected())
        self.view.connect("row-activated", lambda *_: self._opened())
        self.view.connect("row-collapsed", lambda _, __, path: self._fold(path, is_folded=True))
        self.view.connect("row-expanded", lambda _, __, path: self._fold(path, is_folded=False))
        self.view.connect("key-press-event", lambda _, event: self._pressed(event))
        self.view.connect("button-press-event", lambda _, event: self._clicked(event))
        self.view.connect("popup-menu", lambda _: self._pop_up(None))
        self.view.connect("style-updated", lambda _: self._restyle())
        self.view.connect("query-tooltip", lambda _, *where: self._explain(*where))
        self.view.connect("destroy", lambda _: self._stop())
        self._rows.tree.connect("row-has-child-toggled", lambda _, path, __: self._unfold(path))

    @property
    def chosen(self) -> Item | None:
        """The rule or the group that the user has chosen, as far as it is shown."""
        return None if self._choice is None or self._rows.find(self._choice) is None else self._choice

    def show(self, groups: Sequence[Group]) -> None:
        """Show these groups, the first rows of them at once."""
        rows = [row for group in groups for row in group.rows]
        said = {field: {getattr(row, field) for row in rows} for field in _PERHAPS}
        self._silent = {field for field, texts in said.items() if texts <= {""}}
        if len(said["mode"] - {""}) < 2:
            self._silent.add("mode")
        self._groups = groups
        self.is_filling = True
        self._fit()
        self._portions.run(self._fill(groups))

    def focus(self) -> None:
        """Let the keyboard work here."""
        self.view.grab_focus()

    def choose(self, key: Key) -> None:
        """Choose a rule, now or as soon as it is shown, and bring it into view."""
        self._choice = key
        if (path := self._rows.find(key)) is not None:
            self.view.expand_to_path(path)
        self._settle()

    def _fill(self, groups: Sequence[Group]) -> Iterator[None]:
        """Look at one row in each step."""
        self._is_changing = True
        self._colours = style.colours(self.view)
        for item in self._rows.changes(groups, self._colours):
            if item is not None:
                self._changed(item)
            self._is_changing = False
            yield
            self._is_changing = True
        self._is_changing = self.is_filling = False
        self._fit()
        self._settle()

    def _fit(self) -> None:
        """Leave out columns that say nothing, and where there is no room for all, those that say least."""
        shown = [field for field in self._columns if field not in self._silent]
        for field in _LEAVING:
            if self._room and sum(self._columns[each].width for each in shown) > self._room:
                shown = [each for each in shown if each != field]
        for field, column in self._columns.items():
            column.show(field in shown)

    def _resized(self, width: int) -> None:
        if width != self._room:
            self._room = width
            # A widget must not change while it is being given its place.
            deliver(self._fit)

    def _changed(self, item: Item) -> None:
        """Give a row the room that it needs."""
        if (cells := self._rows.cells(item)) is not None:
            for column in self._columns.values():
                column.make_room(cells)

    def _unfold(self, path: Gtk.TreePath) -> None:
        """Show the rows of a group that has got its first, unless the user has folded it."""
        if self._rows.at(path).item not in self._folded:
            self.view.expand_row(path, False)

    def _settle(self) -> None:
        """Select again what the user has chosen: GTK selects the next row where one goes."""
        self._is_changing = True
        selection = self.view.get_selection()
        path = None if self._choice is None else self._rows.find(self._choice)
        if path is None or not self._is_open(path):
            selection.unselect_all()
        elif not selection.path_is_selected(path):
            self.view.set_cursor(path)
        self._rows.make_plain(self._choice)
        self._is_changing = False
        if not self.is_filling:
            self._tell()

    def _is_open(self, path: Gtk.TreePath) -> bool:
        """Whether a row is not folded away."""
        above = path.copy()
        return path.get_depth() == 1 or (above.up() and self.view.row_expanded(above))

    def _selected(self) -> None:
        """The user has chosen something."""
        if self._is_changing:
            return
        tree, found = self.view.get_selection().get_selected()
        self._choice = None if found is None else tree[found][0]
        self._rows.make_plain(self._choice)
        self._tell()

    def _tell(self) -> None:
        if self._told != self.chosen:
            self._told = self.chosen
            self._picked()

    def _fold(self, path: Gtk.TreePath, *, is_folded: bool) -> None:
        if self._is_changing:
            return
        group = self._rows.at(path).item
        if is_folded:
            self._folded.add(group)
        else:
            self._folded.discard(group)

    def _pressed(self, event: Gdk.EventKey) -> bool:
        """Left goes to the group and folds it, Right unfolds it."""
        path, _ = self.view.get_cursor()
        if path is None or event.keyval not in (Gdk.KEY_Left, Gdk.KEY_Right):
            return False
        if event.keyval == Gdk.KEY_Right:
            self.view.expand_row(path, False)
        elif path.get_depth() > 1:
            path.up()
            self.view.set_cursor(path)
        else:
            self.view.collapse_row(path)
        return True

    def _clicked(self, event: Gdk.EventButton) -> bool:
        """The right button chooses what it is pressed on, and shows what can be done with it."""
        if event.button != Gdk.BUTTON_SECONDARY or event.type != Gdk.EventType.BUTTON_PRESS:
            return False
        path = (self.view.get_path_at_pos(int(event.x), int(event.y)) or [None])[0]
        if path is None:
            return False
        self.view.grab_focus()
        self.view.set_cursor(path)
        return self._pop_up(event)

    def _pop_up(self, event: Gdk.EventButton | None) -> bool:
        """Show what can be done with what is chosen, at the pointer or below the row."""
        path = None if self._choice is None else self._rows.find(self._choice)
        if self._choice is None or path is None or not self._is_open(path):
            return False
        self._pop_down()
        self._popped = menu = self._menu(self._choice)
        menu.attach_to_widget(self.view)
        menu.show_all()
        window = self.view.get_bin_window()
        if event is not None or window is None:
            menu.popup_at_pointer(event)
        else:
            area = self.view.get_cell_area(path, self._columns["state"].widget)
            south, north = Gdk.Gravity.SOUTH_WEST, Gdk.Gravity.NORTH_WEST
            menu.popup_at_rect(window, area, south, north, None)
        return True

    def _pop_down(self) -> None:
        if self._popped is not None:
            self._popped.destroy()
            self._popped = None

    def _explain(self, x: int, y: int, is_keyboard: bool, tooltip: Gtk.Tooltip) -> bool:
        """All that a row says, where it does not show all of that."""
        found = self.view.get_tooltip_context(x, y, is_keyboard)
        if not found[0]:
            return False
        path = found[4]
        cells = self._rows.at(path)
        if not cells.note and not any(
            column.cuts(cells) for field, column in self._columns.items() if field not in self._silent
        ):
            return False
        tooltip.set_text(cells.text)
        self.view.set_tooltip_row(tooltip, path)
        return True

    def _restyle(self) -> None:
        """Another theme may have other letters and colours. Each change of the focus updates it, too."""
        font = self.view.get_pango_context().get_font_description()
        if font is not None and font.to_string() != self._font:
            self._font = font.to_string()
            for column in self._columns.values():
                column.measure()
        deliver(self._recolour)

    def _recolour(self) -> None:
        if self._colours not in (None, style.colours(self.view)):
            self.show(self._groups)

    def _stop(self) -> None:
        self._pop_down()
        self._colours = None
        self._portions.stop()
        self.is_filling = False
