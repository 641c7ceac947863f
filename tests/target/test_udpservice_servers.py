# SPDX-License-Identifier: GPL-2.0-or-later
"""Flows to servers that are not at localhost."""

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import no_fds_left
from udpservice_bench import UdpBench, udp_port, udp_server

from qubes_fwd_qrexec.common.values import TargetPorts
from qubes_fwd_qrexec.mux import FlowCode

Write = Callable[[str], Path]


def test_a_flow_gets_to_a_server_at_another_address_where_that_is_named(name_servers: Write) -> None:
    with udp_server("127.0.0.2") as server, no_fds_left():
        port = udp_port(server)
        name_servers(f"udp {port} 127.0.0.2")
        with UdpBench(TargetPorts(port, port)) as bench:
            _, kept = bench.ask(port, b"ask")
            data, client = server.recvfrom(100)
            server.sendto(data * 2, client)
            bench.run(lambda: kept.datagrams)
            assert kept.datagrams == [b"askask"]


@pytest.mark.parametrize("where", ["127.0.0.2", "nosuch0"])
def test_a_flow_of_a_port_that_is_named_gets_to_nobody_at_localhost(name_servers: Write, where: str) -> None:
    with udp_server() as server, no_fds_left():
        port = udp_port(server)
        name_servers(f"udp {port} {where}")
        with UdpBench(TargetPorts(port, port)) as bench:
            _, kept = bench.ask(port, b"ask")
            bench.run(lambda: kept.code)
            assert kept.code is FlowCode.REFUSED
