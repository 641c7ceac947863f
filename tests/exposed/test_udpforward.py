# SPDX-License-Identifier: GPL-2.0-or-later
"""A forward of UDP under floods from addresses that anybody may claim: their cost, and what is told of it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from fakeclient import FakeClient
from helpers import NEVER_AGAIN, running_listener, until
from udp_clients import UdpClient, free_udp_port
from udp_forwards import forward_of, write_udp_config

pytestmark = pytest.mark.usefixtures("no_hurry")

SOURCES = 300


@contextmanager
def sources(port: int) -> Iterator[list[UdpClient]]:
    """Clients with an address each, as one sender may claim them."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(UdpClient(port, own=f"127.1.{number >> 8}.{number & 255}"))
            for number in range(1, SOURCES + 1)
        ]


def heard_any(clients: list[UdpClient]) -> bool:
    for client in clients:
        with pytest.raises(BlockingIOError):
            client.sock.recv(10)
    return False


async def test_a_flood_from_many_addresses_is_bounded_and_leaves_a_flow_that_moves(tmp_path: Path) -> None:
    port, client = free_udp_port(), FakeClient(tmp_path, "flows")
    write_udp_config(tmp_path / "config", port, limits="connections:20")
    async with running_listener(tmp_path / "config", client.command) as listener:
        forward = forward_of(listener)
        with UdpClient(port) as near, sources(port) as flood:
            for number, source in enumerate(flood):
                if number % 10 == 0:
                    assert await near.ask(b"x") == b"x"
                source.send(b"flood")
                assert forward.connections <= 20
            counters = forward.table.counters
            await until(lambda: counters.datagrams_sent == SOURCES * 11 // 10)
            assert await near.ask(b"x") == b"x"
        report = forward.report()
        # Each source began a flow, for which that of another source ended; the client has its own all along.
        assert (report.connections, report.total) == (20, SOURCES + 1)
        assert report.refused == {"made-room": SOURCES + 1 - 20}
    assert len(client.calls) == 1


async def test_a_flood_without_a_server_is_answered_by_nothing_and_asks_for_one_call(tmp_path: Path) -> None:
    port, client = free_udp_port(), FakeClient(tmp_path, "exit126")
    write_udp_config(tmp_path / "config", port)
    async with running_listener(tmp_path / "config", client.command, waits=NEVER_AGAIN) as listener:
        counters = forward_of(listener).table.counters
        with sources(port) as flood:
            for _ in range(3):
                for source in flood:
                    source.send(b"flood")
            await until(lambda: sum(counters.drops.values()) == 3 * SOURCES)
            assert not heard_any(flood)
        report = forward_of(listener).report()
        assert (report.connections, report.total) == (0, SOURCES)
        assert report.refused == {"policy": SOURCES}
        # What did not wait for the answer came behind it.
        assert set(report.dropped) <= {"no-call", "refused"}
    assert len(client.calls) == 1
