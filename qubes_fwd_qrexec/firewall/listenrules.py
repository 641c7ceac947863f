# SPDX-License-Identifier: GPL-2.0-or-later
"""Rules that let connections in to the listener of an exposed qube.

A rule names the side that connections may come from, the port, and the address, unless the forward listens on
all of them. So a program that has the same port at another address is not exposed; and on all addresses the
kernel lets nobody else listen beside the listener.
"""

from collections.abc import Container, Iterable, Iterator

from qubes_fwd_qrexec.common.config import ListenerConfig
from qubes_fwd_qrexec.common.values import Binding, IPAddress, PortRange

from .rule import Family, Rule, by, networks


def rules(
    configs: Iterable[ListenerConfig], family: Family, listening: Container[Binding]
) -> tuple[Rule, ...]:
    """The rules of one family: one for each network, address and range of ports.

    ``listening`` is where the listener listens; a port of a forward that is not among these gets no rule.
    Adjacent ports share a rule.
    """
    return tuple(
        Rule(config.key, " ".join((*match, "accept")))
        for config in sorted(configs, key=lambda config: config.key)
        for match in _matches(config, family, listening)
    )


def is_waiting(config: ListenerConfig, listening: Container[Binding]) -> bool:
    """Whether the listener does not yet listen on every address and port of a forward."""
    return any((address, port) not in listening for address in config.listen for port in config.listen_ports)


def _matches(
    config: ListenerConfig, family: Family, listening: Container[Binding]
) -> Iterator[tuple[str, ...]]:
    listen = sorted({address for address in config.listen if address.version == family.version}, key=int)
    for address in listen:
        to = () if address.is_unspecified else (f"{family} daddr {address}",)
        all_ports = [f"tcp dport {ports.brief()}" for ports in _open_ports(config, address, listening)]
        for of in _clients(config, family):
            yield from ((by(config.side), *of, *to, ports) for ports in all_ports)


def _clients(config: ListenerConfig, family: Family) -> Iterator[tuple[str, ...]]:
    if config.sources.anyone:
        yield ()
    for network in networks(config.sources, family):
        yield (f"{family} saddr {network}",)


def _open_ports(
    config: ListenerConfig, address: IPAddress, listening: Container[Binding]
) -> Iterator[PortRange]:
    """The ports that the listener listens on, in ranges as long as possible."""
    first = None
    for port in config.listen_ports:
        if (address, port) not in listening:
            if first is not None:
                yield PortRange(first, port - 1)
            first = None
        elif first is None:
            first = port
    if first is not None:
        yield PortRange(first, config.listen_ports.last)
