# SPDX-License-Identifier: GPL-2.0-or-later
"""Rules for forwards by nft: what a qube of the path does with the packets of each.

A hop gives packets that come by the forward's side, from its sources, the address of the next hop
(``prerouting``), and lets them through to it, and only those that came to the exposed port (``admitted``,
and Qubes' own chain for what is forwarded). Who addresses the next hop directly is not let through. The
target lets in what comes from its netvm and from the sources; it does not look at its own address, which
``net.fake-ip`` changes.

Every rule ends with the forward by itself, so the kernel closes it even if this program is gone. Where a live
connection would pass by Qubes' rule for established connections all the same, another rule drops it.

A rule that every packet meets begins with the port, so that it costs packets of other forwards little.

Limits count in each family, and for each protocol, by itself. Who is one too many has no answer, as nothing
of ours is there to give one.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from qubes_fwd_qrexec.common.nftconfig import NftConfig, Role
from qubes_fwd_qrexec.common.rules import OnExpire
from qubes_fwd_qrexec.common.values import IPAddress, Proto

from .rule import Family, Rule, by, in_time, networks
from .tables import ADMITTED, ARRIVED, FORWARD, INPUT, PREROUTING, REPLIES, SENT, Content, Place

# How long connections may go on after the end of a forward with on-expire=drain; as the listener lets them.
DRAIN_MAX_S = 3600
# The most clients that per-source counts at once, as many as there are ports.
_CLIENTS_MAX = 65535


@dataclass(frozen=True, slots=True)
class Kept:
    """A forward in force. ``is_draining`` when it is over, and its connections may finish."""

    config: NftConfig
    is_draining: bool = False


@dataclass(frozen=True, slots=True)
class Names:
    """The names of a forward's counters: new connections, packets from clients, and packets to them."""

    key: str

    @property
    def new(self) -> str:
        return f"{self.key}/new"

    @property
    def sent(self) -> str:
        return f"{self.key}/in"

    @property
    def received(self) -> str:
        return f"{self.key}/out"


def content(forwards: Iterable[Kept], family: Family) -> Content:
    """The rules of all forwards in one family."""
    made = [
        _Forward(kept, proto, family)
        for kept in sorted(forwards, key=lambda kept: kept.config.key)
        if family.version in kept.config.versions
        for proto in kept.config.proto.each
    ]
    return Content(
        placed={FORWARD: _all(made, FORWARD), INPUT: _all(made, INPUT)},
        chains={chain: _all(made, chain) for chain in (PREROUTING, ADMITTED, REPLIES, ARRIVED, SENT)},
        objects={name: text for forward in made for name, text in forward.objects()},
    )


def _all(forwards: list["_Forward"], chain: str | Place) -> tuple[Rule, ...]:
    """What lets packets of any forward through, and behind all of that what drops the rest."""
    passing = [Rule(f.config.key, text) for f in forwards for text in f.passing(chain)]
    dropping = [Rule(f.config.key, text) for f in forwards for text in f.dropping(chain)]
    # What the target sends is let through anyway, so these only keep it from what drops.
    return (*passing, *dropping) if dropping or chain != SENT else ()


class _Forward:
    """The rules of one forward for one protocol in one family, as text."""

    def __init__(self, kept: Kept, proto: Proto, family: Family) -> None:
        self.config = config = replace(kept.config, proto=proto)
        self._family = family
        self._is_draining = kept.is_draining
        # Both protocols of a forward have the same counters, and each its own limits.
        self._suffix = f".{proto}" if kept.config.proto is Proto.BOTH else ""
        self._next_hop = config.to4 if family is Family.IP else config.to6
        self._is_hop = config.role is Role.HOP
        self._names = Names(config.key)
        self._by = by(config.side)
        self._from = self._clients()
        self._to_exposed = f"{config.proto} dport {config.listen_ports.brief()}"
        self._in_time = in_time(config.expire)

    def passing(self, chain: str | Place) -> Iterator[str]:
        """The rules of a chain but those that drop."""
        if chain == PREROUTING and not self._is_draining:
            yield from self._arriving()
        elif chain == ADMITTED and self._is_hop:
            yield from self._accepting(self._through, f"counter name {self._names.sent} accept")
        elif chain == REPLIES and self._is_hop:
            yield f"{self._back} counter name {self._names.received}"
        elif chain == FORWARD and self._is_hop and not self._is_draining:
            yield f"{self._through}{self._in_time} accept"
        elif chain == ARRIVED and not self._is_hop:
            yield f"{self._inward} ct direction original counter name {self._names.sent}"
        elif chain == INPUT and not self._is_hop:
            yield from self._accepting(self._inward, "accept")
        elif chain == SENT and not self._is_hop:
            yield f"{self._outward}{self._until_all_end} accept"

    def dropping(self, chain: str | Place) -> Iterator[str]:
        if chain == ADMITTED and self._is_hop:
            yield f"{self._to_next} {self._family} daddr {self._next_hop} {self._original} drop"
        elif chain == INPUT and not self._is_hop and self.config.expire is not None:
            yield f"{self._inward} drop"
        elif chain == REPLIES and self._is_hop and self.config.expire is not None:
            yield f"{self._back}{self._until_all_end.replace('<', '>=')} drop"
        elif chain == SENT and not self._is_hop and self.config.expire is not None:
            yield f"{self._outward} drop"

    def objects(self) -> Iterator[tuple[tuple[str, str], str]]:
        """The counters and sets that the rules use, and how they are declared."""
        yield ("counter", self._names.new), ""
        yield ("counter", self._names.sent), ""
        if self._is_hop:
            yield ("counter", self._names.received), ""
        limits = self.config.limits
        if limits.per_source is not None:
            of = f" {{ type {'ipv4_addr' if self._family is Family.IP else 'ipv6_addr'}; flags dynamic;"
            yield ("set", self._each), f"{of} size {_CLIENTS_MAX}; }}"
        if limits.connections is not None:
            yield ("set", self._total), " { type inet_proto; flags dynamic; size 1; }"

    def _clients(self, which: str = "saddr") -> str:
        if self.config.sources.anyone:
            return ""
        found = ", ".join(map(str, networks(self.config.sources, self._family)))
        return f" {self._family} {which} {f'{{ {found} }}' if ',' in found else found}"

    @property
    def _not_loopback(self) -> str:
        """Not to a loopback address, which is a local one: docs/facts.md, F17."""
        return " ip daddr != 127.0.0.0/8" if self._family is Family.IP else ""

    @property
    def _to_next(self) -> str:
        return f"{self.config.proto} dport {self.config.target_ports.brief()}"

    @property
    def _original(self) -> str:
        return f"ct original proto-dst {self.config.listen_ports.brief()}"

    @property
    def _inward(self) -> str:
        return f"{self._to_exposed} {self._by}{self._from}{self._not_loopback}"

    @property
    def _through(self) -> str:
        """A packet of this forward on its way to the next hop; what is forwarded never came by lo."""
        to = f"{self._family} daddr {self._next_hop} {self._original}"
        return f"{self._to_next} iifgroup {self.config.side.group} oifgroup 2{self._from} {to}"

    @property
    def _back(self) -> str:
        """A packet of this forward on its way from the next hop."""
        by_vif = f"iifgroup 2 oifgroup {self.config.side.group} {self._family} saddr {self._next_hop}"
        return f"{self.config.proto} sport {self.config.target_ports.brief()} {by_vif} {self._original}"

    @property
    def _outward(self) -> str:
        """A packet of the target's server to a client."""
        to_clients = f"oifgroup {self.config.side.group}{self._clients('daddr')}"
        return f"{self.config.proto} sport {self.config.target_ports.brief()} {to_clients} ct direction reply"

    @property
    def _until_all_end(self) -> str:
        """Before the time when no connection may live any more; empty if there is none."""
        if self.config.expire is None:
            return ""
        longer = DRAIN_MAX_S if self.config.on_expire is OnExpire.DRAIN else 0
        return in_time(self.config.expire + longer)

    def _accepting(self, what: str, accept: str) -> Iterator[str]:
        """What accepts while the forward lasts, and of what drains longer what is established."""
        if self.config.expire is not None and self.config.on_expire is OnExpire.DRAIN:
            yield f"{what} ct state established{self._until_all_end} {accept}"
        if not self._is_draining:
            yield f"{what}{self._in_time} {accept}"

    def _arriving(self) -> Iterator[str]:
        """The first packet of each connection: too many are dropped, the others counted and sent on."""
        to_listen = self._not_loopback
        if self.config.listen is not None:
            to_listen = f" {self._family} daddr {self.config.listen}"
        # Not with the interface: docs/facts.md, F13.
        first = f"{self._by}{to_listen} fib daddr type local{self._from} {self._to_exposed}{self._in_time}"
        limits = self.config.limits
        if limits.rate is not None:
            yield f"{first} limit rate over {limits.rate}/second burst {limits.rate} packets drop"
        if limits.per_source is not None:
            count = f"{self._family} saddr ct count over {limits.per_source}"
            yield f"{first} add @{self._each} {{ {count} }} drop"
        if limits.connections is not None:
            yield f"{first} add @{self._total} {{ meta l4proto ct count over {limits.connections} }} drop"
        sent_on = "" if self._next_hop is None else f" dnat to {self._destination(self._next_hop)}"
        yield f"{first} counter name {self._names.new}{sent_on}"

    # Their names have the limit, since what such a set counts by cannot be changed.
    @property
    def _each(self) -> str:
        return f"{self.config.key}/each.{self.config.limits.per_source}{self._suffix}"

    @property
    def _total(self) -> str:
        return f"{self.config.key}/all.{self.config.limits.connections}{self._suffix}"

    def _destination(self, to: IPAddress) -> str:
        if not self.config.is_shifted:
            return str(to)
        bracketed = str(to) if to.version == 4 else f"[{to}]"
        if len(self.config.listen_ports) == 1:
            return f"{bracketed}:{self.config.target_ports.first}"
        # A range of ports as destination would not be shifted: docs/facts.md, F14.
        pairs = zip(self.config.listen_ports, self.config.target_ports, strict=True)
        mapped = ", ".join(f"{exposed} : {sent}" for exposed, sent in pairs)
        return f"{bracketed} : {self.config.proto} dport map {{ {mapped} }}"
