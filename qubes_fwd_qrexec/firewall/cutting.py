# SPDX-License-Identifier: GPL-2.0-or-later
"""What ends live connections by nft, and flows of UDP to the listener, when their forward is over or lets in
fewer than before.

Rules do not end connections: the kernel goes on with those it knows. And to make it forget one is not enough,
since it takes the next segment of a connection it does not know for the first of a new one: what the server
sends is then translated to the same port as ever, and the connection lives on. So there are two parts, in
this order:

1. *guards*: rules that answer with a RST what belongs to no connection and does not begin one. They come by
   the transaction that takes away the forward's rules, and hold for a while.
2. the *end*: a hop's kernel forgets the connections, so that the next segment of either end meets a guard.
   The target's kernel ends the sockets of the server, and the client gets a RST at once.

UDP has no RST, and ends in silence. What a target's server still sends is held back for as long as it goes on
sending, or else it would come through after a while as something new that the target begins.

Each qube of the path ends everything by itself.
"""

import logging
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial

from qubes_fwd_qrexec.common.config import Side
from qubes_fwd_qrexec.common.errors import ForwardError
from qubes_fwd_qrexec.common.nftconfig import NftConfig, Role
from qubes_fwd_qrexec.common.values import IPAddress, Proto, Sources
from qubes_fwd_qrexec.system import conntrack, sockdiag
from qubes_fwd_qrexec.system.addresses import AddressesError, local_addresses, routed_by
from qubes_fwd_qrexec.system.conntrack import Connection, ConntrackError
from qubes_fwd_qrexec.system.sockdiag import SocketsError

from .openings import Opening
from .rule import Family, by, networks
from .tables import GUARD_FORWARD, GUARD_INPUT, GUARD_OUTPUT, HELD, Guard

# How long guards hold. Both ends of an idle connection learn nothing when a hop forgets it, and one of them
# asks after two hours by default (tcp_keepalive_time): the guard must still be there to answer.
TCP_HOLD_S = 24 * 3600
# The kernel forgets a flow of UDP that has been silent for 120 s (nf_conntrack_udp_timeout_stream).
UDP_HOLD_S = 180
# How long the kernel looks for flows that are held back: see `tables.HELD`.
HELD_FLOWS_S = 24 * 3600
# Ends of guards are rounded up to whole minutes and hours, so that one rule serves for many cuts.
_ROUND_S = 60
_ROUND_LONG_S = 3600
# Of no connection that is known, and not the first segment of one, whatever it says of congestion (ECN).
_ASTRAY = "ct state new tcp flags & (fin | syn | rst | ack) != syn"
_RESET = "reject with tcp reset"
_logger = logging.getLogger(__name__)

NUMBERS = {Proto.TCP: socket.IPPROTO_TCP, Proto.UDP: socket.IPPROTO_UDP}
Cut = NftConfig | Opening
"""What may be cut: a forward by nft, or an opening for UDP."""


class CutError(ForwardError):
    """Connections of a forward that is over may still live; the text says why."""


def guards(cut: Cut, family: Family, now_s: float) -> Iterator[Guard]:
    """What keeps the connections of a forward from coming back, in one family, once its rules are gone."""
    if isinstance(cut, Opening):
        if cut.address.version == family.version:
            # The listener sends no more than what it has at hand, so nothing need be held back for longer.
            yield Guard(GUARD_OUTPUT, f"{_answers(cut, family)} drop", _until(now_s, UDP_HOLD_S, _ROUND_S))
    elif family.version in cut.versions:
        for proto in cut.proto.each:
            yield from _path_guards(replace(cut, proto=proto), family, now_s)


def _path_guards(config: NftConfig, family: Family, now_s: float) -> Iterator[Guard]:
    """Of a forward by nft, for one protocol."""
    hold = _hop_guards if config.role is Role.HOP else _target_guards
    for chain, text in hold(config, family):
        if config.proto is Proto.TCP:
            yield Guard(chain, text, _until(now_s, TCP_HOLD_S, _ROUND_LONG_S))
        else:
            yield Guard(chain, f"{text} {_flow(family, 'update')}", _until(now_s, UDP_HOLD_S, _ROUND_S))
            yield Guard(chain, f"{text} drop", _until(now_s, UDP_HOLD_S, _ROUND_S))
            held = f"meta l4proto udp ct state new {_flow(family)} {_flow(family, 'update')} drop"
            yield Guard(chain, held, _until(now_s, HELD_FLOWS_S, _ROUND_LONG_S))


def _answers(opening: Opening, family: Family) -> str:
    """What the listener sends to clients that the kernel no longer knows."""
    at = "" if opening.address.is_unspecified else f" {family} saddr {opening.address}"
    to = _clients(opening.sources, family, "daddr")
    return f"oifgroup {opening.side.group}{at}{to} udp sport {opening.ports.brief()} ct state new"


def _until(now_s: float, hold_s: int, round_s: int) -> int:
    return (int(now_s) // round_s + 1) * round_s + hold_s


def _flow(family: Family, verb: str = "") -> str:
    """Whether a datagram is of a flow that is held back; with ``update``, it is one from now on."""
    what = f"{family} saddr . udp sport . {family} daddr . udp dport"
    return f"{verb} @{HELD} {{ {what} }}" if verb else f"{what} @{HELD}"


def _hop_guards(config: NftConfig, family: Family) -> Iterator[tuple[str, str]]:
    next_hop = config.to4 if family is Family.IP else config.to6
    from_server = f"iifgroup 2 {family} saddr {next_hop} {config.proto} sport {config.target_ports.brief()}"
    if config.proto is Proto.UDP:
        # What clients send is for this qube itself now, whose firewall drops it.
        yield GUARD_FORWARD, f"{from_server}{_clients(config.sources, family, 'daddr')} ct state new"
        return
    yield GUARD_FORWARD, f"{from_server} {_ASTRAY} {_RESET}"
    from_client = f"{by(config.side)}{_clients(config.sources, family, 'saddr')}"
    ports = config.listen_ports.brief()
    # Rules that the forward still has, or has again, send on what the kernel takes for a first segment.
    yield GUARD_FORWARD, f"{from_client} {_ASTRAY} ct status dnat ct original proto-dst {ports} {_RESET}"
    yield GUARD_INPUT, f"{from_client} tcp dport {ports} {_ASTRAY} {_RESET}"


def _target_guards(config: NftConfig, family: Family) -> Iterator[tuple[str, str]]:
    """None for TCP, whose sockets are gone for good; the kernel itself answers with a RST."""
    if config.proto is Proto.UDP:
        out = f"oifgroup {config.side.group}{_clients(config.sources, family, 'daddr')}"
        yield GUARD_OUTPUT, f"{out} udp sport {config.target_ports.brief()} ct state new"


def _clients(sources: Sources, family: Family, which: str) -> str:
    """The clients in one family, as ``saddr`` or ``daddr``; empty for all."""
    if sources.anyone:
        return ""
    found = ", ".join(map(str, networks(sources, family)))
    return f" {family} {which} {{ {found} }}"


def end(gone: Collection[Cut], living: Collection[Cut]) -> int:
    """End the connections of what is gone, but for those that something living has as well.

    It needs CAP_NET_ADMIN, and acts in this thread's network namespace. Returns how many were ended. Raises
    `CutError` after having done all that can be done.
    """
    paths = [cut for cut in living if isinstance(cut, NftConfig)]
    ended, problems = 0, []
    for work in (*_path_works(gone, paths), *_flow_works(gone, living)):
        try:
            ended += work()
        except (ConntrackError, SocketsError, AddressesError) as error:
            problems.append(str(error))
    if problems:
        raise CutError("; ".join(dict.fromkeys(problems)))
    return ended


def _path_works(gone: Collection[Cut], living: Collection[NftConfig]) -> Iterator[Callable[[], int]]:
    """What ends the connections of forwards by nft."""
    each = [
        replace(cut, proto=proto) for cut in gone if isinstance(cut, NftConfig) for proto in cut.proto.each
    ]
    hops = [config for config in each if config.role is Role.HOP]
    targets = [config for config in each if config.role is Role.TARGET]
    for version in (4, 6):
        # In the target a connection of TCP would come back; its sockets are what has to end.
        udp = [config for config in targets if config.proto is Proto.UDP]
        for configs, sent_on in ((hops, True), (udp, False)):
            if meant := [config for config in configs if version in config.versions]:
                yield _Forgetting(version, meant, living, sent_on).run
    if tcp := [config for config in targets if config.proto is Proto.TCP]:
        yield _Destroying(tcp, living).run


def _flow_works(gone: Collection[Cut], living: Collection[Cut]) -> Iterator[Callable[[], int]]:
    """What ends the flows to the listener."""
    for version in (4, 6):
        closed, opened = (
            [cut for cut in cuts if isinstance(cut, Opening) and cut.address.version == version]
            for cuts in (gone, living)
        )
        if closed:
            yield partial(_forget_flows, version, closed, opened)


def _forget_flows(version: int, gone: Collection[Opening], living: Collection[Opening]) -> int:
    here = local_addresses(version)

    def is_over(connection: Connection) -> bool:
        # What this qube passes on between others is not the listener's.
        is_ours = connection.protocol == NUMBERS[Proto.UDP] and not here.isdisjoint(
            (connection.source, connection.destination)
        )
        return (
            is_ours
            and not connection.source.is_loopback
            and any(opening.has(connection) for opening in gone)
            and not any(opening.has(connection) for opening in living)
        )

    ports = {port for opening in gone for port in opening.ports}
    return conntrack.delete(version, is_over, sent_on=False, ports=ports)


def has(config: NftConfig, connection: Connection) -> bool:
    """Whether a connection in the kernel's table may be one of this forward's."""
    version = connection.source.version
    if version not in config.versions or connection.protocol not in map(NUMBERS.get, config.proto.each):
        return False
    if connection.destination_port not in config.listen_ports or connection.source not in config.sources:
        return False
    shift = config.target_ports.first - config.listen_ports.first
    if connection.answerer_port != connection.destination_port + shift:
        return False
    if config.role is Role.TARGET:
        return not connection.is_sent_on
    next_hop = config.to4 if version == 4 else config.to6
    is_there = config.listen is None or connection.destination == config.listen
    return connection.is_sent_on and is_there and connection.answerer == next_hop


def _same_way(config: NftConfig, living: Collection[NftConfig]) -> list[NftConfig]:
    """The living forwards whose connections come in as those of this one do."""
    return [other for other in living if (other.role, other.side) == (config.role, config.side)]


class _Forgetting:
    """Has the kernel forget connections."""

    def __init__(
        self, version: int, gone: Collection[NftConfig], living: Collection[NftConfig], sent_on: bool
    ) -> None:
        self._version = version
        self._gone = [(config, [other for other in living if other.role is config.role]) for config in gone]
        self._sent_on = sent_on
        self._behind: frozenset[IPAddress] = frozenset()

    def run(self) -> int:
        sides = {each.side for config, others in self._gone for each in (config, *others)}
        if Side.VIFS in sides and len(sides) > 1:
            self._behind = routed_by(self._version, Side.VIFS.group)
        ports = {port for config, _ in self._gone for port in config.listen_ports}
        return conntrack.delete(self._version, self.is_over, sent_on=self._sent_on, ports=ports)

    def is_over(self, connection: Connection) -> bool:
        return not connection.source.is_loopback and any(
            has(config, connection)
            and not any(has(other, connection) and self._is_by(other, config, connection) for other in others)
            for config, others in self._gone
        )

    def _is_by(self, other: NftConfig, config: NftConfig, connection: Connection) -> bool:
        """Whether a connection that may be of a forward that is gone is one of another: it has come by the
        same side, or, as only a qube behind this one has such a source, by the vifs or by none of them.
        """
        if other.side is config.side:
            return True
        is_behind = connection.source in self._behind
        return (other.side is Side.VIFS and is_behind) or (config.side is Side.VIFS and not is_behind)


class _Destroying:
    """Ends the sockets of the target's server."""

    def __init__(self, gone: Collection[NftConfig], living: Collection[NftConfig]) -> None:
        self._gone = [(config, _same_way(config, living)) for config in gone]

    def run(self) -> int:
        return sockdiag.destroy(self.is_over)

    def is_over(self, peer: IPAddress, port: int) -> bool:
        return any(
            _lets_in(config, peer, port) and not any(_lets_in(other, peer, port) for other in kept)
            for config, kept in self._gone
        )


def _lets_in(config: NftConfig, peer: IPAddress, port: int) -> bool:
    is_meant = Proto.TCP in config.proto.each and port in config.target_ports
    return is_meant and peer.version in config.versions and peer in config.sources


class Cutter:
    """Cuts off what is over, in two steps around the transaction that takes away its rules."""

    def __init__(
        self,
        end: Callable[[Collection[Cut], Collection[Cut]], int] = end,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``clock`` tells UNIX seconds, as the kernel has them for ``meta time``."""
        self._end = end
        self._clock = clock
        self._guards: dict[Family, tuple[Guard, ...]] = dict.fromkeys(Family, ())

    def guards(self, gone: Collection[Cut]) -> Mapping[Family, tuple[Guard, ...]]:
        """The guards that the transaction should make: those for what goes now, and earlier ones not over."""
        now_s = self._clock()
        for family, before in self._guards.items():
            kept = [guard for guard in before if guard.until > now_s]
            new = [guard for cut in gone for guard in guards(cut, family, now_s)]
            self._guards[family] = tuple(dict.fromkeys((*kept, *new)))
        return dict(self._guards)

    @property
    def is_over(self) -> bool:
        """Whether there are guards to be taken away."""
        now_s = self._clock()
        return any(guard.until <= now_s for held in self._guards.values() for guard in held)

    def finish(self, gone: Collection[Cut], living: Collection[Cut]) -> None:
        """End the connections of what has gone, once its rules have. Raises `CutError`."""
        if gone:
            ended = self._end(gone, living)
            _logger.info("%d connections ended: %s", ended, " ".join(sorted({cut.key for cut in gone})))
