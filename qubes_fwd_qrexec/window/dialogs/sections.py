# SPDX-License-Identifier: GPL-2.0-or-later
"""The parts of the form of Add and Edit: what is reached, where, by whom, and how."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

from qubes_fwd_qrexec.admin.inventory import ADMIN, REMOTE, TEMPLATE, Inventory
from qubes_fwd_qrexec.common.rules import Mode, OnExpire, Proxy, Transport
from qubes_fwd_qrexec.common.values import Proto, QubeName
from qubes_fwd_qrexec.window.gtk import Gtk
from qubes_fwd_qrexec.window.model.draft import NAME, PRESETS, QUBE, Draft, Where
from qubes_fwd_qrexec.window.model.judgement import Judgement
from qubes_fwd_qrexec.window.model.words import _
from qubes_fwd_qrexec.window.widgets import GAP, button, column, label, row

from .fields import Changed, Choice, NameField, Radios, Section, Switch, TextField, hidden

_NO_TARGETS = (ADMIN, TEMPLATE, REMOTE)


class What(Section):
    """The qube and the ports of its server."""

    def __init__(self, changed: Changed) -> None:
        self._fixed = label(style="title")
        hidden(self._fixed)
        self._qube = NameField(_("Qube"), _("_Qube:"), changed, beside=(self._fixed,))
        self._proto = Choice(
            _("Protocol"),
            _("Protoco_l:"),
            changed,
            {Proto.TCP: _("TCP"), Proto.UDP: _("UDP"), Proto.BOTH: _("TCP and UDP")},
        )
        self._ports = TextField(
            _("Server port"),
            _("Server _port:"),
            changed,
            hint=_("80 or 80-90"),
            width=14,
            beside=(self._proto.label, self._proto.widget),
        )
        self.rows = (self._qube, self._ports)
        self.fields = {QUBE: self._qube, "dstports": self._ports, "proto": self._proto}

    def show(self, draft: Draft) -> None:
        self._qube.text, self._ports.text, self._proto.text = draft.target, draft.ports, draft.proto
        self._qube.show_control(draft.base is None)
        self._fixed.set_text("" if draft.base is None else draft.base.target)
        self._fixed.set_visible(draft.base is not None)

    def read(self, draft: Draft) -> Draft:
        return replace(draft, target=self._qube.text, ports=self._ports.text, proto=self._proto.text)

    def follow(self, draft: Draft, inventory: Inventory | None, now: float) -> None:
        if inventory is not None:
            self._qube.offer(
                sorted(name for name, qube in inventory.qubes.items() if qube.klass not in _NO_TARGETS)
            )


class Reachable(Section):
    """The qube and the port where it is exposed."""

    def __init__(self, changed: Changed) -> None:
        self._changed = changed
        self._via = NameField(_("The other qube"), "", self._typed)
        self._inside = Switch(_("Only for qubes behind it"), _("Only for qubes _behind it"), changed)
        self._bypass = Switch(
            _("Bypass the tunnel, I accept the risk"), _("Bypass the tunnel, I accept the ris_k"), changed
        )
        self._inside.widget.set_valign(Gtk.Align.CENTER)
        hidden(self._bypass.widget)
        self._where = Radios(_("Reachable at"), _("Reachable at:"), changed, _places(), self._placed)
        self._ports = TextField(_("Exposed port"), _("Exposed por_t:"), changed, hint=_("the same"), width=14)
        self.rows = (self._where, self._ports)
        self.fields = {
            "forwardtype": self._where,
            "via": self._via,
            "srcports": self._ports,
            "bypass-tunnel": self._bypass,
        }

    def _placed(self, buttons: Mapping[str, Gtk.RadioButton]) -> Gtk.Widget:
        other = row(buttons[Where.OTHER], self._via.widget, self._inside.widget)
        return column(buttons[Where.OUTERMOST], buttons[Where.NETVM], other, self._bypass.widget, gap=0)

    def show(self, draft: Draft) -> None:
        self._via.text, self._inside.is_on = draft.via, draft.is_inside
        self._where.text, self._ports.text = draft.where, draft.exposed_ports
        self._bypass.is_on = draft.bypass_tunnel
        self._bypass.widget.set_visible(draft.bypass_tunnel)

    def read(self, draft: Draft) -> Draft:
        return replace(
            draft,
            where=Where(self._where.text),
            via=self._via.text,
            is_inside=self._inside.is_on,
            exposed_ports=self._ports.text,
            bypass_tunnel=self._bypass.is_on,
        )

    def follow(self, draft: Draft, inventory: Inventory | None, now: float) -> None:
        if inventory is None:
            return
        netvms = sorted(name for name, qube in inventory.qubes.items() if qube.provides_network)
        self._via.offer(netvms)
        chain = inventory.chain(QubeName(draft.target.strip())).qubes
        for where, words in _places(chain[-1:], chain[:1]).items():
            self._where.say(where, words)

    def learn(self, judgement: Judgement) -> None:
        """Ask whether the tunnel may be bypassed where there is one; what is answered with yes stays."""
        self._bypass.widget.set_visible(judgement.asks_bypass or self._bypass.is_on)

    def _typed(self) -> None:
        if self._via.text:
            self._where.text = Where.OTHER
        self._changed()


def _places(outermost: Sequence[str] = (), netvm: Sequence[str] = ()) -> dict[str, str]:
    """The words for each place, with the qube that it is now."""
    far, near = _("The outermost qube of its net_work"), _("Its _netvm, only for other qubes")
    return {
        Where.OUTERMOST: ": ".join((far, *map(_escaped, outermost))),
        Where.NETVM: ": ".join((near, *map(_escaped, netvm))),
        Where.OTHER: _("Anot_her qube:"),
    }


def _escaped(name: str) -> str:
    """A name in a text with a mnemonic."""
    return name.replace("_", "__")


class Who(Section):
    """Networks and qubes, or anybody."""

    _ANYBODY: ClassVar = "anybody"
    _SOME: ClassVar = "some"

    def __init__(self, changed: Changed) -> None:
        self._changed = changed
        self._sources = TextField(
            _("Networks and qubes that may connect"), "", self._typed, hint=_("networks, such as 10.0.0.0/8")
        )
        self._presets = {network: Gtk.CheckButton(label=network) for network in PRESETS}
        for network, box in self._presets.items():
            box.connect("toggled", self._preset, network)
        self._more = NameField(_("A qube or tag to let in"), "", lambda: None)
        self._let_in = hidden(row(self._more.widget, button(_("Let _in"), self._add)))
        self._warning = hidden(
            label(_("Anybody who can reach this port may connect."), wraps=True, style="anybody")
        )
        words = {self._SOME: _("Th_ese networks and qubes:"), self._ANYBODY: _("_Anybody who can reach it")}
        self._followed = False, False, ""
        self._who = Radios(_("Who may connect"), _("Who may connect:"), changed, words, self._placed)
        self.rows = (self._who,)
        self.fields = {"srchosts": self._sources}

    def _placed(self, buttons: Mapping[str, Gtk.RadioButton]) -> Gtk.Widget:
        some = column(self._sources.widget, row(*self._presets.values()), self._let_in)
        for each in (some, self._warning):
            each.set_margin_start(4 * GAP)
        return column(buttons[self._SOME], some, buttons[self._ANYBODY], self._warning, gap=0)

    def show(self, draft: Draft) -> None:
        self._sources.text = draft.sources
        self._who.text = self._ANYBODY if draft.is_anybody else self._SOME

    def read(self, draft: Draft) -> Draft:
        return replace(draft, sources=self._sources.text, is_anybody=self._who.text == self._ANYBODY)

    def follow(self, draft: Draft, inventory: Inventory | None, now: float) -> None:
        if (draft.is_anybody, draft.is_internal, draft.sources) != self._followed:
            self._followed = draft.is_anybody, draft.is_internal, draft.sources
            self._warning.set_visible(draft.is_anybody)
            self._let_in.set_visible(draft.is_internal)
            for network, box in self._presets.items():
                box.set_active(network in draft.source_list)
        if inventory is not None and draft.is_internal:
            tags = sorted({f"@tag:{tag}" for qube in inventory.qubes.values() for tag in qube.tags})
            names = (name for name, qube in inventory.qubes.items() if qube.klass not in _NO_TARGETS)
            self._more.offer((*sorted(names), *tags))

    def _typed(self) -> None:
        if self._sources.text:
            self._who.text = self._SOME
        self._changed()

    def _preset(self, box: Gtk.CheckButton, network: str) -> None:
        draft = Draft(sources=self._sources.text)
        if box.get_active() is not (network in draft.source_list):
            self._sources.text = draft.with_source(network, is_in=box.get_active()).sources

    def _add(self) -> None:
        name = self._more.text.strip()
        if name:
            self._sources.text = Draft(sources=self._sources.text).with_source(name, is_in=True).sources
            self._more.text = ""


class Remark(Section):
    """The comment."""

    def __init__(self, changed: Changed) -> None:
        self._comment = TextField(_("Comment"), _("Co_mment:"), changed)
        self.rows = (self._comment,)
        self.fields = {"comment": self._comment}

    def show(self, draft: Draft) -> None:
        self._comment.text = draft.comment

    def read(self, draft: Draft) -> Draft:
        return replace(draft, comment=self._comment.text)


class Further(Section):
    """What most rules leave as it is."""

    def __init__(self, changed: Changed) -> None:
        self._name = TextField(_("Name of the rule"), _("Name:"), changed, width=20)
        self._mode = Choice(_("Mode"), _("Mo_de:"), changed, _modes())
        self._transport = Choice(_("Transport over qrexec"), _("Transport:"), changed, _transports())
        self._proxy = Choice(
            _("PROXY header"),
            _("PROX_Y header:"),
            changed,
            {Proxy.OFF: _("None"), Proxy.V1: _("Version 1"), Proxy.V2: _("Version 2")},
        )
        self._limits = TextField(
            _("Limits"), _("Limits:"), changed, hint="connections:1000,per-source:100,rate:50"
        )
        self._listen = TextField(
            _("Listen only on this address"), _("Listen on:"), changed, hint=_("all addresses"), width=40
        )
        self._on_expire = Choice(
            _("Open connections on expiry"),
            _("On e_xpiry:"),
            changed,
            {OnExpire.CUT: _("Cut open connections"), OnExpire.DRAIN: _("Let open connections finish")},
        )
        starts, follows = _("Let connections start the qube"), _("Stay open when a netvm changes")
        self._autostart, self._follow = Switch(starts, starts, changed), Switch(follows, follows, changed)
        self.fields = {
            NAME: self._name,
            "mode": self._mode,
            "transport": self._transport,
            "proxy": self._proxy,
            "limits": self._limits,
            "listen": self._listen,
            "on-expire": self._on_expire,
            "autostart": self._autostart,
            "follow-netvm": self._follow,
        }
        self.rows = tuple(self.fields.values())

    def show(self, draft: Draft) -> None:
        for field in (self._name.widget, self._name.label):
            field.set_no_show_all(draft.base is not None)
            field.set_visible(draft.base is None)
        self._name.text, self._limits.text, self._listen.text = draft.name, draft.limits, draft.listen
        self._mode.text, self._transport.text = draft.mode, draft.transport
        self._proxy.text, self._on_expire.text = draft.proxy, draft.on_expire
        self._autostart.is_on, self._follow.is_on = draft.autostart, draft.follow_netvm

    def read(self, draft: Draft) -> Draft:
        return replace(
            draft,
            name=self._name.text,
            mode=self._mode.text,
            transport=self._transport.text,
            proxy=self._proxy.text,
            limits=self._limits.text,
            listen=self._listen.text,
            on_expire=self._on_expire.text,
            autostart=self._autostart.is_on,
            follow_netvm=self._follow.is_on,
        )

    def learn(self, judgement: Judgement) -> None:
        """Show the name that the rule gets if none is typed."""
        if judgement.named is not None:
            self._name.hint(judgement.named.name)


def _modes() -> dict[str, str]:
    return {
        Mode.AUTO: _("Decided when it is stored"),
        Mode.NFT: _("As packets, by nft"),
        Mode.QREXEC: _("As bytes, over qrexec"),
    }


def _transports() -> dict[str, str]:
    return {
        Transport.AUTO: _("Whatever the qube supports"),
        Transport.MUX: _("Many connections in one call"),
        Transport.CALL: _("One call for each connection"),
    }
