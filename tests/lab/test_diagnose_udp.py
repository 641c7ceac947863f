# SPDX-License-Identifier: GPL-2.0-or-later
"""A forward of TCP and UDP in a lab, from the command that makes it to the answer of its server."""

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from udp_clients import free_udp_port

from qubes_fwd_qrexec.lab import daemon
from qubes_fwd_qrexec.lab.session import open_session

from .diagnosed_lab import BOUND_S, Lab

PAIRS = ["listener", "server", "round trip"]


def servers() -> tuple[socket.socket, socket.socket]:
    """Of TCP and UDP, at one port."""
    while True:
        tcp = socket.create_server(("127.0.0.1", 0))
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            udp.bind(tcp.getsockname())
        except OSError:  # another program has that one
            tcp.close(), udp.close()
        else:
            udp.settimeout(BOUND_S)
            return tcp, udp


@pytest.fixture
def lab() -> Iterator[Lab]:
    with open_session(daemon.Network.LOOPBACK) as session, ExitStack() as undo:
        yield Lab(session, undo)


def steps(lab: Lab) -> list[tuple[str, str, str]]:
    data = json.loads(lab.run("diagnose", "work", "web", "--json")[1])
    return [(step["step"], step["verdict"], step["text"]) for step in data["steps"]]


def test_each_protocol_is_walked_and_a_flow_is_counted(lab: Lab) -> None:
    tcp, udp = servers()
    with tcp, udp:
        lab.server.close()
        lab.server, lab.port = tcp, free_udp_port()
        lab.add("--proto", "both", "--mode", "qrexec")
        lab.listen()
        found = steps(lab)
        assert [step for step, *_ in found if step in PAIRS] == [step for step in PAIRS for _ in "12"]
        assert found[-1] == (
            *("round trip", "ok"),
            "a call for UDP from sys-net reached work; no packet was sent, so only a client can tell "
            "whether the server answers",
        )
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(BOUND_S)
            client.sendto(b"who are you?", ("127.0.0.1", lab.port))
            asked, address = udp.recvfrom(100)
            udp.sendto(asked.upper(), address)
            assert client.recv(100) == b"WHO ARE YOU?"
        rows = json.loads(lab.run("status", "--json")[1])["forwards"]
        figures = next(row["figures"] for row in rows if row["proto"] == "udp")
        counted = ("connections", "total", "datagrams_sent", "datagrams_received", "mux_calls_in_target")
        assert [figures[what] for what in counted] == [1] * 5
        # With nobody there, diagnose says so by the target's list of sockets.
        udp.close()
        port = tcp.getsockname()[1]
        assert steps(lab)[-1] == ("server", "stops", f"in work, udp port {port}: nothing listens there")
