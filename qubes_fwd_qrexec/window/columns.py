# SPDX-License-Identifier: GPL-2.0-or-later
"""The columns of the list. Their widths are found here, as GTK would measure each row again and again."""

from .cells import Cells
from .gtk import Gtk, Pango
from .model.words import _

WIDE = {"who": 18, "comment": 8}
"""Columns that share the place that is left, and how many characters they show at least."""
_FIRST = "state"
# Of a cell; and of the first column, with what folds a group and its icon.
_MARGIN, _FIRST_MARGIN = 10, 56
# The first column has bold letters, and so have titles.
_BOLD = 1.12


def titles() -> dict[str, str]:
    """What the columns show, by the fields of `Cells`."""
    return {
        "state": _("State"),
        "who": _("From"),
        "at": _("Reachable at"),
        "to": _("Goes to"),
        "mode": _("Mode"),
        "ends": _("Ends"),
        "comment": _("Comment"),
        "role": _("Role"),
    }


class Column:
    """One column; ``widget`` is GTK's, and ``width`` how many pixels it takes at least."""

    def __init__(self, view: Gtk.TreeView, field: str, title: str) -> None:
        self._view = view
        self._field = field
        self._is_wide = field in WIDE
        self._title = title
        self._texts: dict[object, str] = {0: WIDE.get(field, 0) * "0"}
        self.is_shown, self.width = True, 0
        self.widget = Gtk.TreeViewColumn(title)
        self.widget.set_sizing(Gtk.TreeViewColumnSizing.FIXED)
        self.widget.set_resizable(True)
        self.widget.set_expand(self._is_wide)
        if field == _FIRST:
            icon = Gtk.CellRendererPixbuf(xpad=2)
            self.widget.pack_start(icon, False)
            self.widget.add_attribute(icon, "gicon", Cells._fields.index("icon"))
        text = Gtk.CellRendererText(ellipsize=Pango.EllipsizeMode.END)
        self.widget.pack_start(text, True)
        self.widget.add_attribute(text, "text", Cells._fields.index(field))
        for attribute in ("foreground", "weight"):
            name = f"{field}_{attribute}"
            if name in Cells._fields:
                self.widget.add_attribute(text, attribute, Cells._fields.index(name))
        self.measure()
        view.append_column(self.widget)

    def show(self, is_shown: bool) -> None:
        if is_shown is not self.is_shown:
            self.is_shown = is_shown
            self.widget.set_visible(is_shown)

    def make_room(self, cells: Cells) -> None:
        """Be wide enough for one more row, unless this column gets what the others leave.

        Of texts that are equally long, one is measured; of the first column each, as they differ more.
        """
        text: str = getattr(cells, self._field)
        kind = text if self._field == _FIRST else len(text)
        if not self._is_wide and kind not in self._texts:
            self._texts[kind] = text
            self._widen(self._needs(text))

    def cuts(self, cells: Cells) -> bool:
        """Whether it does not show all of a row."""
        text: str = getattr(cells, self._field)
        return bool(text) and (not self.is_shown or self._needs(text) > self.widget.get_width())

    def measure(self) -> None:
        """Be as wide as what there is to show, in the letters of the theme."""
        self.width = 0
        title = self._view.create_pango_layout(self._title).get_pixel_size()[0]
        self._widen(max(int(_BOLD * title) + 4 + _MARGIN, *map(self._needs, self._texts.values())))

    def _needs(self, text: str) -> int:
        width = self._view.create_pango_layout(text).get_pixel_size()[0]
        return int(_BOLD * width) + _FIRST_MARGIN if self._field == _FIRST else width + _MARGIN

    def _widen(self, width: int) -> None:
        if width > self.width:
            self.width = width
            self.widget.set_fixed_width(width)
