# SPDX-License-Identifier: GPL-2.0-or-later
"""What forwards of TCP and of UDP have in common: where they listen, whom they allow, what they say of it."""

import socket
from collections.abc import Callable, Iterable

from qubes_fwd_qrexec.common.config import ListenerConfig
from qubes_fwd_qrexec.common.values import Binding, IPAddress, address_text
from qubes_fwd_qrexec.relay.acceptloop import BindError
from qubes_fwd_qrexec.system.logs import one_line


def bindings(config: ListenerConfig) -> frozenset[Binding]:
    """Every address and port that a forward listens on."""
    return frozenset((address, port) for address in config.listen for port in config.listen_ports)


def places(config: ListenerConfig) -> str:
    """The same for people."""
    return ", ".join(address_text(address, config.listen_ports.brief()) for address in config.listen)


def open_all(
    wanted: Iterable[Binding], open_one: Callable[[IPAddress, int], socket.socket]
) -> dict[Binding, socket.socket]:
    """Open a socket for each. Raises `BindError` if one cannot be bound, and then none is."""
    opened: dict[Binding, socket.socket] = {}
    try:
        for address, port in sorted(wanted, key=str):
            opened[address, port] = open_one(address, port)
    except BindError:
        for sock in opened.values():
            sock.close()
        raise
    return opened


def allows(config: ListenerConfig, client: IPAddress, local: Binding, target_port: int) -> bool:
    """Whether a client may come to this address and port of the qube and get to this port of the target.

    By which interface it comes is not asked here.
    """
    address, port = local
    listened_at = {(ours.version, ours if not ours.is_unspecified else address) for ours in config.listen}
    return (
        client in config.sources
        and (address.version, address) in listened_at
        and port in config.listen_ports
        and config.target_port(port) == target_port
    )


def last_said(*errors: tuple[str, float] | None) -> tuple[str | None, int | None]:
    """The latest error on one line, and when it was (UNIX seconds)."""
    said = [error for error in errors if error is not None]
    if not said:
        return None, None
    text, at = max(said, key=lambda error: error[1])
    return one_line(text), int(at)
