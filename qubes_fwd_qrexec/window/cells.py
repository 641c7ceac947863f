# SPDX-License-Identifier: GPL-2.0-or-later
"""What the list shows of a group and of a rule, column by column.

A state has a sign besides its word and its colour, and a group a box in the colour of its qube's label where
the icons of Qubes are not installed.
"""

from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

from qubes_fwd_qrexec.admin.states import State
from qubes_fwd_qrexec.admin.views.tables import escaped, shortened
from qubes_fwd_qrexec.common.values import QubeName

from . import style
from .gtk import GdkPixbuf, Gio, GLib, Gtk, Pango
from .kept import LINE_MAX
from .model.rows import ENDED, Group, Item, Row
from .model.words import _, ngettext

SIGNS = {
    State.ACTIVE: ("●", "open"),
    State.WAITING: ("◐", "open"),
    State.SUSPENDED: ("▲", "note"),
    State.EXPIRED: ("◇", "faint"),
    State.DISABLED: ("○", "faint"),
    State.REFUSED: ("✖", "bad"),
    State.BROKEN: ("✖", "bad"),
    State.HELD: ("■", "note"),
}
_BOX_SIZE = 14
_NORMAL, _BOLD = int(Pango.Weight.NORMAL), int(Pango.Weight.BOLD)
_EDGE = b"\x88\x88\x88"


class Cells(NamedTuple):
    """The columns of one row. The first is what it is about, and the last five are how it looks."""

    item: Item
    state: str
    who: str = ""
    at: str = ""
    to: str = ""
    mode: str = ""
    ends: str = ""
    comment: str = ""
    role: str = ""
    note: str = ""
    state_foreground: str | None = None
    who_foreground: str | None = None
    state_weight: int = _NORMAL
    who_weight: int = _NORMAL
    icon: Gio.Icon | None = None

    @property
    def text(self) -> str:
        """All that it says, in one line."""
        return "  ".join(filter(None, self[1:10]))


def of_row(row: Row, group: QubeName, colours: Mapping[str, str]) -> Cells:
    """A rule in a group; ``colours`` are those of `style`."""
    sign, colour = SIGNS[row.state]
    is_to_all = row.is_anybody and row.is_live
    who = row.who
    if row.state is State.BROKEN:
        who = _("{name} (unreadable)").format(name=escaped(row.key[1]))
    return Cells(
        row.key,
        f"{sign} {row.mark}",
        shortened(who, LINE_MAX),
        row.at,
        row.to.removeprefix(f"{group}:"),
        row.mode,
        row.ends,
        shortened(row.comment, LINE_MAX),
        row.role,
        row.note,
        colours[colour],
        colours["bad"] if is_to_all else None,
        _BOLD if row.is_live else _NORMAL,
        _BOLD if is_to_all else _NORMAL,
    )


def of_group(group: Group, colours: Mapping[str, str]) -> Cells:
    """The head of a group: its qube and the way out from there."""
    faint = colours["faint"]
    if group.qube == ENDED:
        count = len(group.rows)
        ended = ngettext("{count} ended", "{count} ended", count).format(count=count)
        return Cells(ENDED, ended, state_foreground=faint)
    bold, picture = _BOLD, icon(group.icon, group.label)
    # Translators: before the netvms of a qube, such as sys-firewall - sys-net.
    way_out = _("via {netvms}").format(netvms=group.netvms) if group.netvms else _("no netvm")
    return Cells(group.qube, group.qube, way_out, who_foreground=faint, state_weight=bold, icon=picture)


@cache
def icon(name: str, label: str) -> Gio.Icon | None:
    """The icon of that name; else a box in the colour of the label, with an edge that shows on any ground."""
    if Gtk.IconTheme.get_default().has_icon(name):
        return Gio.ThemedIcon.new(name)
    colour = style.LABELS.get(label)
    if colour is None:
        return None
    edge, inside = _EDGE, bytes.fromhex(colour[1:])
    row = edge + inside * (_BOX_SIZE - 2) + edge
    pixels = edge * _BOX_SIZE + row * (_BOX_SIZE - 2) + edge * _BOX_SIZE
    size = (_BOX_SIZE, _BOX_SIZE, 3 * _BOX_SIZE)
    return GdkPixbuf.Pixbuf.new_from_bytes(GLib.Bytes.new(pixels), GdkPixbuf.Colorspace.RGB, False, 8, *size)
