# SPDX-License-Identifier: GPL-2.0-or-later
"""Forwards of UDP in a listener under test."""

import socket
from pathlib import Path

from helpers import write_config

from qubes_fwd_qrexec.exposed.listener import Listener
from qubes_fwd_qrexec.exposed.udpforward import OpenUdpForward

KEY = "udp.work.dns"


def write_udp_config(directory: Path, listen_port: int, target_port: int = 53, **options: str) -> Path:
    """The configuration of one forward of UDP; see `write_config`."""
    given = {"key": KEY, "service": "qubes.ForwardUDP", "transport": "mux"} | options
    return write_config(directory, listen_port, target_port, **given)


def is_bound(port: int, host: str = "127.0.0.1") -> bool:
    """Whether somebody has the port of UDP."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.bind((host, port))
        except OSError:
            return True
    return False


def forward_of(listener: Listener, key: str = KEY) -> OpenUdpForward:
    forward = listener.forwards[key]
    assert isinstance(forward, OpenUdpForward)
    return forward
