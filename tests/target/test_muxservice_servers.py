# SPDX-License-Identifier: GPL-2.0-or-later
"""Streams to servers that are not at localhost: at another address of the target, and on a UNIX socket."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import is_ready, listening_socket, no_fds_left, port_of
from mux_bench import ORIGIN
from service_bench import ServiceBench

from qubes_fwd_qrexec.common.values import TargetPorts
from qubes_fwd_qrexec.mux import ProxyVersion, ResetCode
from qubes_fwd_qrexec.relay.copy import abort, half_close
from qubes_fwd_qrexec.relay.leg_end import LegEnd
from qubes_fwd_qrexec.target.proxyheader import header

Write = Callable[[str], Path]
PORT = 80


@pytest.fixture
def bench(name_servers: Write) -> Iterator[ServiceBench]:
    with no_fds_left(), ServiceBench(TargetPorts(1, 65535)) as bench:
        yield bench


@pytest.fixture
def named(unix_server: socket.socket, name_servers: Write) -> socket.socket:
    """A server on a UNIX socket, to which `PORT` goes."""
    name_servers(f"tcp {PORT} unix:{unix_server.getsockname()}")
    return unix_server


def test_a_server_at_another_address_is_reached_and_nobody_at_localhost(
    bench: ServiceBench, name_servers: Write
) -> None:
    with listening_socket("127.0.0.2") as server:
        port = port_of(server)
        assert bench.refusal(port) is ResetCode.REFUSED
        name_servers(f"tcp {port} 127.0.0.2")
        client, leg = bench.connect(port)
        with client, bench.accept(server):
            bench.until(lambda: leg.is_joined)
    with listening_socket() as server:
        name_servers(f"tcp {port_of(server)} 127.0.0.2")
        assert bench.refusal(port_of(server)) is ResetCode.REFUSED


def test_a_port_whose_line_is_wrong_is_refused_and_the_place_is_told_once(
    bench: ServiceBench, server: socket.socket, name_servers: Write, capfd: pytest.CaptureFixture[str]
) -> None:
    path = name_servers(f"tcp {port_of(server)} nosuch0")
    for _ in range(3):
        assert bench.refusal(port_of(server)) is ResetCode.REFUSED
    assert capfd.readouterr().err == (f"{path}:1: this qube has no such interface, or that has no address\n")


def test_a_unix_server_gets_the_header_and_all_bytes_and_each_end_of_file(
    bench: ServiceBench, named: socket.socket
) -> None:
    client, leg = bench.connect(PORT, ProxyVersion.V1)
    with client, bench.accept(named) as far:
        bench.until(lambda: leg.is_joined)
        client.send(b"request")
        half_close(client)
        assert bench.read_to_end(far) == (header(ProxyVersion.V1, ORIGIN) + b"request", "EOF")
        far.send(b"answer")
        half_close(far)
        assert bench.read_to_end(client) == (b"answer", "EOF")
        bench.until(lambda: not bench.service.mux.legs and not bench.near.legs)


def test_a_unix_server_that_has_closed_has_ended_cleanly_if_its_client_does(
    bench: ServiceBench, named: socket.socket
) -> None:
    client, leg = bench.connect(PORT)
    with client:
        with bench.accept(named) as far:
            bench.until(lambda: leg.is_joined)
            far.send(b"answer")
        assert bench.read_to_end(client) == (b"answer", "EOF")
        bench.until(lambda: not is_ready(bench.service.loop) and not is_ready(bench.near.loop))
        assert leg.ended is None
        half_close(client)
        bench.until(lambda: leg.ended is LegEnd.DONE and not bench.service.mux.legs)


def test_what_a_client_sends_to_a_unix_server_that_has_closed_is_answered_by_an_abort(
    bench: ServiceBench, named: socket.socket
) -> None:
    client, leg = bench.connect(PORT)
    with client:
        bench.accept(named).close()
        assert bench.read_to_end(client) == (b"", "EOF")
        client.send(b"more")
        bench.until(lambda: leg.ended is LegEnd.REMOTE_RESET and not bench.service.mux.legs)


def test_a_unix_server_that_closes_without_reading_all_is_an_abort(
    bench: ServiceBench, named: socket.socket
) -> None:
    client, leg = bench.connect(PORT)
    with client, bench.accept(named) as far:
        client.send(b"request")
        bench.until(lambda: is_readable(far))
        far.send(b"last words")
        far.close()
        assert bench.read_to_end(client) == (b"last words", "RST")
        bench.until(lambda: leg.ended is LegEnd.REMOTE_RESET)


def is_readable(sock: socket.socket) -> bool:
    try:
        return bool(sock.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False


def test_a_clients_abort_ends_the_connection_to_a_unix_server(
    bench: ServiceBench, named: socket.socket
) -> None:
    client, leg = bench.connect(PORT)
    with bench.accept(named) as far:
        bench.until(lambda: leg.is_joined)
        abort(client)
        assert bench.read_to_end(far) == (b"", "EOF")
        bench.until(lambda: not bench.service.mux.legs)


def test_nobody_at_a_unix_socket_is_a_refusal(bench: ServiceBench, named: socket.socket) -> None:
    named.close()
    assert bench.refusal(PORT) is ResetCode.REFUSED


def test_a_unix_server_whose_queue_is_full_is_waited_for(bench: ServiceBench, named: socket.socket) -> None:
    named.listen(0)
    first, its_leg = bench.connect(PORT)
    bench.until(lambda: its_leg.is_joined)
    second, leg = bench.connect(PORT)
    bench.until(lambda: bench.service.is_connecting)
    with first, second, bench.accept(named), bench.accept(named):
        bench.until(lambda: leg.is_joined)


def test_a_full_queue_of_a_unix_server_is_a_timeout_and_an_abandoned_request_leaves_it(
    bench: ServiceBench, named: socket.socket
) -> None:
    named.listen(0)
    bench.is_time_still = True
    first, its_leg = bench.connect(PORT)
    bench.until(lambda: its_leg.is_joined)
    late, leg = bench.connect(PORT)
    gone, gone_leg = bench.connect(PORT)
    with first, late, leg.sock:
        bench.until(lambda: bench.service.is_connecting)
        abort(gone)
        bench.until(lambda: gone_leg.ended is LegEnd.LOCAL_RESET)
        bench.clock.advance(10)
        bench.until(lambda: bench.near_owner.refusals == [(leg, ResetCode.TIMEOUT)])
        bench.accept(named).close()
        bench.clock.advance(1)
        bench.until(lambda: not is_ready(bench.service.loop) and not is_ready(bench.near.loop))
        with pytest.raises(BlockingIOError):  # neither of the others comes later
            named.accept()
    assert not bench.service.is_connecting
