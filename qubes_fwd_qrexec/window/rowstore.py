# SPDX-License-Identifier: GPL-2.0-or-later
"""The rows of the list as a GtkTreeStore, brought up to date by as few changes as possible.

What stays is not touched, so the view keeps what is selected, focused and folded.
"""

from collections.abc import Iterator, Mapping, Sequence

from .cells import Cells, of_group, of_row
from .gtk import Gio, GObject, Gtk
from .model.rows import Group, Item, Row

_COLOURS = tuple(Cells._fields.index(field) for field in ("state_foreground", "who_foreground"))


class RowStore:
    """``tree`` has a column for each field of `Cells`."""

    def __init__(self) -> None:
        texts, colours, weights = [str] * 9, [str] * 2, [int] * 2
        self.tree = Gtk.TreeStore(object, *texts, *colours, *weights, Gio.Icon)
        self._colours: Mapping[str, str] = {}
        self._made_from: dict[Item, Row] = {}
        self._shown: dict[Item, Cells] = {}
        self._iters: dict[Item, Gtk.TreeIter] = {}
        self._orders: dict[Item | None, list[Item]] = {None: []}
        self._plain: Item | None = None

    def find(self, item: Item) -> Gtk.TreePath | None:
        """Where a group or a rule is shown."""
        found = self._iters.get(item)
        return None if found is None else self.tree.get_path(found)

    def at(self, path: Gtk.TreePath) -> Cells:
        """What is shown there."""
        item: Item = self.tree[path][0]
        return self._shown[item]

    def cells(self, item: Item) -> Cells | None:
        """What is shown of a group or a rule."""
        return self._shown.get(item)

    def make_plain(self, item: Item | None) -> None:
        """Show a row without colours, as that which is selected has a ground of its own."""
        before, self._plain = self._plain, item
        if before != item:
            for each in (before, item):
                if each is not None and each in self._iters:
                    cells = self._coloured(self._shown[each])
                    self._set(each, {column: cells[column] for column in _COLOURS})

    def changes(self, groups: Sequence[Group], colours: Mapping[str, str]) -> Iterator[Item | None]:
        """Make the tree equal to these groups, row by row; ``colours`` are those of `style`.

        Each step looks at one row, and yields what it is about if it was changed. It may be given up after
        any step, for other groups.
        """
        if colours != self._colours:
            self._colours = colours
            self._made_from.clear()
        yield from self._remove(groups)
        for at, group in enumerate(groups):
            yield self._put(None, at, of_group(group, colours))
            for place, row in enumerate(group.rows):
                yield self._put(group.qube, place, self._made(row, group))

    def _made(self, row: Row, group: Group) -> Cells:
        if self._made_from.get(row.key) == row:
            return self._shown[row.key]
        self._made_from[row.key] = row
        return of_row(row, group.qube, self._colours)

    def _remove(self, groups: Sequence[Group]) -> Iterator[Item]:
        kept_in: dict[Item, set[Item]] = {group.qube: {*(row.key for row in group.rows)} for group in groups}
        for group in tuple(self._orders[None]):
            kept = kept_in.get(group) or set()
            for item in tuple(self._orders[group]):
                if item not in kept:
                    self._take(group, item)
                    yield item
            if group not in kept_in:
                self._take(None, group)
                del self._orders[group]
                yield group

    def _take(self, parent: Item | None, item: Item) -> None:
        self._orders[parent].remove(item)
        self._made_from.pop(item, None)
        del self._shown[item]
        self.tree.remove(self._iters.pop(item))

    def _put(self, parent: Item | None, at: int, cells: Cells) -> Item | None:
        """Have a row at a place below its parent; those before it are there already."""
        order, item = self._orders[parent], cells.item
        found = self._iters.get(item)
        if found is None:
            self._iters[item] = self._insert(None if parent is None else self._iters[parent], at, cells)
            self._shown[item] = cells
            order.insert(at, item)
            if parent is None:
                self._orders[item] = []
            return item
        is_moved = order[at] != item
        if is_moved:
            self.tree.move_before(found, self._iters[order[at]])
            order.remove(item)
            order.insert(at, item)
        was = self._shown[item]
        if was != cells:
            self._shown[item] = cells
            old, new = self._coloured(was), self._coloured(cells)
            self._set(item, {column: new[column] for column in range(len(new)) if new[column] != old[column]})
        return item if is_moved or was != cells else None

    def _insert(self, above: Gtk.TreeIter | None, at: int, cells: Cells) -> Gtk.TreeIter:
        """Make a row by one call of GTK, as each may wait for Python's lock. PyGObject's `insert` makes some
        more for each column.
        """
        item, *rest = self._coloured(cells)
        said = {column: value for column, value in enumerate(rest, 1) if value is not None}
        # The name of a qube would be taken for a text.
        values = [GObject.Value(GObject.TYPE_PYOBJECT, item), *said.values()]
        return self.tree.insert_with_values(above, at, [0, *said], values)

    def _set(self, item: Item, columns: Mapping[int, object]) -> None:
        self.tree.set(self._iters[item], columns)  # type: ignore[no-untyped-call]  # it has no types

    def _coloured(self, cells: Cells) -> Cells:
        if cells.item == self._plain:
            return cells._replace(state_foreground=None, who_foreground=None)
        return cells
