# SPDX-License-Identifier: GPL-2.0-or-later
"""Rules that let packets in to the listener of an exposed qube.

A rule names the side that packets may come from, the port, and the address, unless the forward listens on all
of them. So a program that has the same port at another address is not exposed; and on all addresses the
kernel lets nobody else listen beside the listener. It ends with the forward by itself.

By UDP, what is sent to everybody on a network is let in to nobody, and what claims to come from an address of
this qube neither: the answer would come back as if a client had sent it, and so on for ever. (Of IPv4 the
kernel drops that by itself: docs/facts.md, F20.)
"""

from collections.abc import Container, Iterable, Iterator

from qubes_fwd_qrexec.common.config import ListenerConfig
from qubes_fwd_qrexec.common.values import Proto, Sources

from .openings import Opening, Socket, openings
from .rule import Family, Rule, by, in_time, networks


def rules(
    configs: Iterable[ListenerConfig], family: Family, listening: Container[Socket]
) -> tuple[Rule, ...]:
    """The rules of one family: one for each address, range of ports and network.

    ``listening`` is where the listener listens; a port of a forward that is not among these gets no rule.
    Adjacent ports share a rule.
    """
    return tuple(
        Rule(config.key, f"{match}{in_time(config.expire)} accept")
        for config in sorted(configs, key=lambda config: config.key)
        for opening in _of_family(openings(config, listening), family)
        for match in _matches(opening, family)
    )


def _of_family(found: Iterable[Opening], family: Family) -> list[Opening]:
    """In the order of their addresses."""
    ours = [opening for opening in found if opening.address.version == family.version]
    return sorted(ours, key=lambda opening: (int(opening.address), opening.ports.first))


def _matches(opening: Opening, family: Family) -> Iterator[str]:
    is_udp = opening.proto is Proto.UDP
    to = f"{family} daddr {opening.address} "
    if opening.address.is_unspecified:
        to = "fib daddr type local " if is_udp else ""
    if is_udp and family is Family.IP6:
        to = f"fib saddr type != local {to}"
    for clients in _clients(opening.sources, family):
        yield f"{by(opening.side)} {clients}{to}{opening.proto} dport {opening.ports.brief()}"


def _clients(sources: Sources, family: Family) -> Iterator[str]:
    if sources.anyone:
        yield ""
    for network in networks(sources, family):
        yield f"{family} saddr {network} "
