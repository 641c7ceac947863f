# SPDX-License-Identifier: GPL-2.0-or-later
"""What ends the live connections of a forward by nft that is over, or that lets in fewer than before.

Rules do not end connections: the kernel goes on with those it knows. And to make it forget one is not enough,
since it takes the next segment of a connection it does not know for the first of a new one: what the server
sends is then translated to the same port as ever, and the connection lives on. So there are two parts, in
this order:

1. *guards*: rules that answer with a RST what belongs to no connection and does not begin one. They come by
   the transaction that takes away the forward's rules, and hold for a while.
2. the *end*: a hop's kernel forgets the connections, so that the next segment of either end meets a guard.
   The target's kernel ends the sockets of the server, and the client gets a RST at once.

UDP has no RST, and ends in silence. What the server still sends is held back for as long as it goes on
sending, or else it would come through after a while as something new that the target begins.

Each qube of the path ends everything by itself.
"""

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping

from qubes_fwd_qrexec.common.errors import ForwardError
from qubes_fwd_qrexec.common.nftconfig import NftConfig, Role
from qubes_fwd_qrexec.common.values import IPAddress, Proto
from qubes_fwd_qrexec.system import conntrack, sockdiag
from qubes_fwd_qrexec.system.conntrack import Connection, ConntrackError
from qubes_fwd_qrexec.system.sockdiag import SocketsError

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


class CutError(ForwardError):
    """Connections of a forward that is over may still live; the text says why."""


def guards(config: NftConfig, family: Family, now_s: float) -> Iterator[Guard]:
    """What keeps the connections of a forward from coming back, in one family, once its rules are gone."""
    if family.version not in config.versions:
        return
    hold = _hop_guards if config.role is Role.HOP else _target_guards
    for chain, text in hold(config, family):
        if config.proto is Proto.TCP:
            yield Guard(chain, text, _until(now_s, TCP_HOLD_S, _ROUND_LONG_S))
        else:
            yield Guard(chain, f"{text} {_flow(family, 'update')}", _until(now_s, UDP_HOLD_S, _ROUND_S))
            yield Guard(chain, f"{text} drop", _until(now_s, UDP_HOLD_S, _ROUND_S))
            held = f"meta l4proto udp ct state new {_flow(family)} {_flow(family, 'update')} drop"
            yield Guard(chain, held, _until(now_s, HELD_FLOWS_S, _ROUND_LONG_S))


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
        yield GUARD_FORWARD, f"{from_server}{_clients(config, family, 'daddr')} ct state new"
        return
    yield GUARD_FORWARD, f"{from_server} {_ASTRAY} {_RESET}"
    from_client = f"{by(config.side)}{_clients(config, family, 'saddr')}"
    ports = config.listen_ports.brief()
    # Rules that the forward still has, or has again, send on what the kernel takes for a first segment.
    yield GUARD_FORWARD, f"{from_client} {_ASTRAY} ct status dnat ct original proto-dst {ports} {_RESET}"
    yield GUARD_INPUT, f"{from_client} tcp dport {ports} {_ASTRAY} {_RESET}"


def _target_guards(config: NftConfig, family: Family) -> Iterator[tuple[str, str]]:
    """None for TCP, whose sockets are gone for good; the kernel itself answers with a RST."""
    if config.proto is Proto.UDP:
        out = f"oifgroup {config.side.group}{_clients(config, family, 'daddr')}"
        yield GUARD_OUTPUT, f"{out} udp sport {config.target_ports.brief()} ct state new"


def _clients(config: NftConfig, family: Family, which: str) -> str:
    """The clients in one family, as ``saddr`` or ``daddr``; empty for all."""
    if config.sources.anyone:
        return ""
    found = ", ".join(map(str, networks(config.sources, family)))
    return f" {family} {which} {{ {found} }}"


def end(gone: Collection[NftConfig], living: Collection[NftConfig]) -> int:
    """End the connections of forwards that are gone, but for those that a living one has as well.

    It needs CAP_NET_ADMIN, and acts in this thread's network namespace. Returns how many were ended. Raises
    `CutError` after having done all that can be done.
    """
    hops = [config for config in gone if config.role is Role.HOP]
    targets = [config for config in gone if config.role is Role.TARGET]
    works: list[Callable[[], int]] = []
    for version in (4, 6):
        # In the target a connection of TCP would come back; its sockets are what has to end.
        udp = [config for config in targets if config.proto is Proto.UDP]
        for configs, sent_on in ((hops, True), (udp, False)):
            if meant := [config for config in configs if version in config.versions]:
                works.append(_Forgetting(version, meant, living, sent_on).run)
    if tcp := [config for config in targets if config.proto is Proto.TCP]:
        works.append(_Destroying(tcp, living).run)
    ended, problems = 0, []
    for work in works:
        try:
            ended += work()
        except (ConntrackError, SocketsError) as error:
            problems.append(str(error))
    if problems:
        raise CutError("; ".join(dict.fromkeys(problems)))
    return ended


def has(config: NftConfig, connection: Connection) -> bool:
    """Whether a connection in the kernel's table may be one of this forward's."""
    version = connection.source.version
    if version not in config.versions or connection.protocol != _NUMBERS[config.proto]:
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


_NUMBERS = {Proto.TCP: 6, Proto.UDP: 17}


def _same_way(config: NftConfig, living: Collection[NftConfig]) -> list[NftConfig]:
    """The living forwards whose connections come in as those of this one do."""
    return [other for other in living if (other.role, other.side) == (config.role, config.side)]


class _Forgetting:
    """Has the kernel forget connections."""

    def __init__(
        self, version: int, gone: Collection[NftConfig], living: Collection[NftConfig], sent_on: bool
    ) -> None:
        self._version = version
        self._gone = [(config, _same_way(config, living)) for config in gone]
        self._sent_on = sent_on

    def run(self) -> int:
        return conntrack.delete(self._version, self.is_over, sent_on=self._sent_on)

    def is_over(self, connection: Connection) -> bool:
        return not connection.source.is_loopback and any(
            has(config, connection) and not any(has(other, connection) for other in kept)
            for config, kept in self._gone
        )


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
    is_meant = config.proto is Proto.TCP and port in config.target_ports
    return is_meant and peer.version in config.versions and peer in config.sources


class Cutter:
    """Cuts off what is over, in two steps around the transaction that takes away its rules."""

    def __init__(
        self,
        end: Callable[[Collection[NftConfig], Collection[NftConfig]], int] = end,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``clock`` tells UNIX seconds, as the kernel has them for ``meta time``."""
        self._end = end
        self._clock = clock
        self._guards: dict[Family, tuple[Guard, ...]] = dict.fromkeys(Family, ())

    def guards(self, gone: Collection[NftConfig]) -> Mapping[Family, tuple[Guard, ...]]:
        """The guards that the transaction should make: those for what goes now, and earlier ones not over."""
        now_s = self._clock()
        for family, before in self._guards.items():
            kept = [guard for guard in before if guard.until > now_s]
            new = [guard for config in gone for guard in guards(config, family, now_s)]
            self._guards[family] = tuple(dict.fromkeys((*kept, *new)))
        return dict(self._guards)

    @property
    def is_over(self) -> bool:
        """Whether there are guards to be taken away."""
        now_s = self._clock()
        return any(guard.until <= now_s for held in self._guards.values() for guard in held)

    def finish(self, gone: Collection[NftConfig], living: Collection[NftConfig]) -> None:
        """End the connections of what has gone, once its rules have. Raises `CutError`."""
        if gone:
            ended = self._end(gone, living)
            _logger.info("%d connections ended: %s", ended, " ".join(sorted(c.key for c in gone)))
