# SPDX-License-Identifier: GPL-2.0-or-later
"""Who is connected to a forward, as its listeners say; each can be cut, and all at once."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from qubes_fwd_qrexec.admin.states import Key
from qubes_fwd_qrexec.admin.views.connected import Client
from qubes_fwd_qrexec.admin.views.tables import size
from qubes_fwd_qrexec.admin.views.times import amount, local
from qubes_fwd_qrexec.common.values import IPAddress, Proto, QubeName, address_text

from .gtk import Gtk
from .kept import Rows, Text
from .model.commands import Commands
from .model.words import _, ngettext
from .widgets import button, column, named, row

SHOWN_MAX = 20
"""Of thousands; the others are counted."""


class _Key(NamedTuple):
    """What tells a client from the others."""

    exposed: QubeName
    proto: Proto
    address: IPAddress
    port: int


class _Item(NamedTuple):
    client: Client
    can_cut: bool


class ClientList:
    """The clients of one forward; ``widget`` takes no room while there are none."""

    def __init__(self, commands: Commands) -> None:
        self._commands = commands
        self._key: Key | None = None
        self._head, self._more = Text(), Text()
        self._all = button(_("Cu_t all…"), self._cut_all)
        self._all.set_no_show_all(True)
        self._all_shown = (False, True)
        self._rows: Rows[_Key, _Item] = Rows(lambda _key: _ClientRow(commands))
        self.widget = column(self._head.widget, self._all, self._rows.widget, self._more.widget)
        self._all.set_halign(Gtk.Align.START)

    def show(self, key: Key, clients: Sequence[Client], *, can_cut: bool) -> Iterator[None]:
        """Show the clients of a rule, in steps; without ``can_cut`` nothing can be changed from here."""
        self._key = key
        count = len(clients)
        connected = ngettext("{count} client is connected:", "{count} clients are connected:", count)
        self._head.show(connected.format(count=count) if count else "")
        more = max(0, count - SHOWN_MAX)
        self._more.show(
            ngettext("and {count} more", "and {count} more", more).format(count=more) if more else ""
        )
        if self._all_shown != (all_shown := (bool(count), can_cut)):
            self._all_shown = all_shown
            self._all.set_visible(bool(count))
            self._all.set_sensitive(can_cut)
        return self._rows.show({_key(client): _Item(client, can_cut) for client in clients[:SHOWN_MAX]})

    def _cut_all(self) -> None:
        if self._key is not None:
            self._commands.cut(self._key, None)


def _key(client: Client) -> _Key:
    report = client.report
    return _Key(client.exposed, report.proto, report.address, report.port)


class _ClientRow:
    """One client; its button cuts the client that is shown, whatever the pane is about by then."""

    def __init__(self, commands: Commands) -> None:
        self._commands = commands
        self._client: Client | None = None
        self._can_cut = True
        self._text = Text()
        self._button = button(_("Cut…"), self._cut)
        self._button.set_valign(Gtk.Align.START)
        self.widget = row()
        self.widget.pack_start(self._text.widget, True, True, 0)
        self.widget.pack_start(self._button, False, False, 0)

    def show(self, item: _Item) -> None:
        client, can_cut = item
        if self._client is None:
            named(self._button, _("Cut {client}").format(client=who(client)))
        self._client = client
        self._text.show(words(client))
        if can_cut is not self._can_cut:
            self._can_cut = can_cut
            self._button.set_sensitive(can_cut)

    def _cut(self) -> None:
        if self._client is not None:
            report = self._client.report
            self._commands.cut((report.target, report.name), self._client)


def who(client: Client) -> str:
    """The address and port of a client."""
    return address_text(client.report.address, client.report.port)


def words(client: Client) -> str:
    """What a listener says of one client."""
    report = client.report
    text = _("{client} at {qube} ({proto}) since {since}, {sent} from it, {received} to it, idle for {idle}")
    if report.is_draining:
        text = _("{client} at {qube} ({proto}) may finish; {sent} from it, {received} to it, idle for {idle}")
    return text.format(
        client=who(client),
        qube=client.exposed,
        proto=report.proto,
        since=local(report.since),
        idle=amount(report.idle_s),
        sent=size(report.sent),
        received=size(report.received),
    )
