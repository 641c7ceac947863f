# SPDX-License-Identifier: GPL-2.0-or-later
"""The target's end: a mux in the place of the exposed qube, and real servers on loopback."""

import contextlib
import errno
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
from helpers import free_port, listening_socket, no_fds_left, port_of, tcp_pair
from mux_bench import ORIGIN, TunnelBench

from qubes_fwd_qrexec import tunnelservice
from qubes_fwd_qrexec.exitstatus import ExitStatus
from qubes_fwd_qrexec.leg import Leg, LegEnd
from qubes_fwd_qrexec.localserver import ServiceError
from qubes_fwd_qrexec.loop import Loop
from qubes_fwd_qrexec.mux import Mux
from qubes_fwd_qrexec.proxy_protocol import header
from qubes_fwd_qrexec.relay import abort, half_close
from qubes_fwd_qrexec.tunnel import Connection, GoawayCode, Hello, Origin, ProxyVersion, ResetCode
from qubes_fwd_qrexec.tunnelservice import LEASE_S, TunnelService, serve
from qubes_fwd_qrexec.values import TargetPorts


class ServiceBench(TunnelBench):
    """The near end of a tunnel and the service at the other, each with its loop, turned in turns."""

    def __init__(self, ports: TargetPorts, lease_s: int = LEASE_S, *, is_far_there: bool = False) -> None:
        super().__init__(is_far_there=is_far_there)
        self.near.abandon()
        hello = Connection(Hello(1 << 19, bytes(16)), range(ports.first, ports.last + 1))
        self.near = Mux(self.loop, hello, self.near_call, self.near_sink, self.near_budget, self.near_owner)
        self.service = TunnelService(ports, self.far_call, self.far_sink, lease_s)
        near_loop, far_loop = self.loop, self.service._loop

        class Both(Loop):
            def run_once(self, timeout_s: float | None = None) -> None:
                near_loop.run_once(0)
                far_loop.run_once(timeout_s)

            def close(self) -> None:
                super().close()
                near_loop.close()
                far_loop.close()

        self.loop = Both()
        self.until(lambda: self.near_owner.is_ready)

    def connect(
        self, port: int, proxy: ProxyVersion = ProxyVersion.OFF, origin: Origin = ORIGIN
    ) -> tuple[socket.socket, Leg]:
        client, accepted = tcp_pair()
        leg = self.near.open(port, origin, accepted, proxy)
        assert leg is not None
        return client, leg

    def refusal(self, port: int) -> ResetCode:
        """What a stream is refused with, which its socket survives."""
        client, leg = self.connect(port)
        with client, leg.sock:
            self.until(lambda: self.near_owner.refusals)
            ((refused, code),) = self.near_owner.refusals
            assert refused is leg
            self.near_owner.refusals.clear()
        return code

    def __exit__(self, *_: object) -> None:
        self.service._give_up_connecting()
        for leg in list(self.service._mux.legs.values()):
            leg.abort_from_here()
        self.service._mux.abandon()
        super().__exit__()


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with listening_socket() as sock:
        yield sock


@pytest.fixture
def bench(server: socket.socket) -> Iterator[ServiceBench]:
    port = port_of(server)
    with no_fds_left(), ServiceBench(TargetPorts(port, port)) as bench:
        yield bench


def accepted_from(bench: ServiceBench, server: socket.socket) -> socket.socket:
    found: list[socket.socket] = []

    def is_there() -> bool:
        with contextlib.suppress(BlockingIOError):
            found.append(server.accept()[0])
        return bool(found)

    bench.until(is_there)
    found[0].setblocking(False)
    return found[0]


# Streams


def test_a_stream_is_a_connection_to_the_server(bench: ServiceBench, server: socket.socket) -> None:
    client, leg = bench.connect(port_of(server))
    far = accepted_from(bench, server)
    with client, far:
        bench.until(lambda: leg.is_joined)
        client.send(b"request")
        assert bench.read(far, 7) == b"request"
        far.send(b"answer")
        half_close(far)
        half_close(client)
        assert bench.read_to_end(client) == (b"answer", "EOF")
        assert bench.read_to_end(far) == (b"", "EOF")
        bench.until(lambda: not bench.service._mux.legs and not bench.near.legs)


def test_the_sockets_buffers_are_set(bench: ServiceBench, server: socket.socket) -> None:
    """relay-behaviours 17."""
    client, leg = bench.connect(port_of(server))
    with client, accepted_from(bench, server):
        bench.until(lambda: leg.is_joined)
        (far,) = bench.service._mux.legs.values()
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            assert far.sock.getsockopt(socket.SOL_SOCKET, option) == 2 * 131_072
        assert far.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        leg.abort_from_here()
        bench.until(lambda: not bench.service._mux.legs)


def test_ipv6_is_tried_when_ipv4_refuses() -> None:
    with listening_socket("::1") as server:
        port = port_of(server)
        with ServiceBench(TargetPorts(port, port)) as bench:
            client, leg = bench.connect(port)
            with client, accepted_from(bench, server):
                bench.until(lambda: leg.is_joined)


def test_nobody_listening_is_a_refusal_and_nothing_was_read(server: socket.socket) -> None:
    """relay-behaviours 21."""
    port = free_port()
    with no_fds_left(), ServiceBench(TargetPorts(port, port)) as bench:
        client, leg = bench.connect(port)
        with client, leg.sock:
            client.send(b"unread")
            began = time.monotonic()
            bench.until(lambda: bench.near_owner.refusals)
            assert bench.near_owner.refusals == [(leg, ResetCode.REFUSED)]
            assert time.monotonic() - began < 1
            assert leg.sock.recv(100) == b"unread"


def test_a_full_accept_queue_is_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """relay-behaviours 22."""
    monkeypatch.setattr(tunnelservice, "CONNECT_TIMEOUT_S", 0.1)
    with socket.socket() as server, contextlib.ExitStack() as fillers, no_fds_left():
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        port = port_of(server)
        with ServiceBench(TargetPorts(port, port)) as bench:
            for _ in range(3):
                filler = fillers.enter_context(socket.socket())
                filler.setblocking(False)
                filler.connect_ex(("127.0.0.1", port))
            assert bench.refusal(port) is ResetCode.TIMEOUT
            assert not bench.service._connecting
        fillers.close()


def test_an_abandoned_request_leaves_no_connection_behind() -> None:
    with socket.socket() as server, contextlib.ExitStack() as fillers, no_fds_left():
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        port = port_of(server)
        with ServiceBench(TargetPorts(port, port)) as bench:
            for _ in range(3):
                filler = fillers.enter_context(socket.socket())
                filler.setblocking(False)
                filler.connect_ex(("127.0.0.1", port))
            client, leg = bench.connect(port)
            bench.until(lambda: bench.service._connecting)
            abort(client)
            bench.until(lambda: leg.ended is LegEnd.LOCAL_RESET)
            bench.until(lambda: not bench.service._connecting)
        fillers.close()


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.EMFILE, ResetCode.OVER_LIMIT), (errno.EAFNOSUPPORT, ResetCode.UNREACHABLE)],
)
def test_no_socket_to_be_had_is_a_refusal(
    bench: ServiceBench, server: socket.socket, monkeypatch: pytest.MonkeyPatch, number: int, code: ResetCode
) -> None:
    def refuse(_family: int) -> socket.socket:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tunnelservice, "new_socket", refuse)
    assert bench.refusal(port_of(server)) is code


def test_a_socket_that_cannot_be_watched_is_a_refusal(
    bench: ServiceBench, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "too many")

    monkeypatch.setattr(bench.service._loop, "watch", refuse)
    assert bench.refusal(port_of(server)) is ResetCode.UNREACHABLE


def test_a_port_that_nobody_listens_on_never_answers_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    real = tunnelservice.new_socket

    def unlucky(family: int) -> socket.socket:
        sock = real(family)
        if family == socket.AF_INET:
            sock.bind(("127.0.0.1", port))
        return sock

    monkeypatch.setattr(tunnelservice, "new_socket", unlucky)
    with ServiceBench(TargetPorts(port, port)) as bench:
        assert bench.refusal(port) is ResetCode.REFUSED


def test_a_budget_without_room_is_a_refusal(bench: ServiceBench, server: socket.socket) -> None:
    bench.service._mux.budget.streams = bench.service._mux.budget.streams_max
    assert bench.refusal(port_of(server)) is ResetCode.OVER_LIMIT
    bench.service._mux.budget.streams = 0
    with accepted_from(bench, server) as far:
        assert bench.read_to_end(far)[1] == "RST"


# The PROXY protocol


@pytest.mark.parametrize("version", [ProxyVersion.V1, ProxyVersion.V2])
@pytest.mark.parametrize("client_address", ["192.0.2.1", "::ffff:192.0.2.1", "2001:db8::1"])
def test_the_server_is_told_first_who_connected(
    bench: ServiceBench, server: socket.socket, version: ProxyVersion, client_address: str
) -> None:
    """relay-behaviours 44."""
    origin = Origin(ip_address(client_address), 40_000, ip_address("2001:db8::2"), 80)
    if "." in client_address:
        origin = Origin(origin.client, origin.client_port, ip_address("198.51.100.2"), 80)
    client, _ = bench.connect(port_of(server), version, origin)
    own = b"PROXY TCP4 6.6.6.6 6.6.6.6 6 6\r\n"
    with client, accepted_from(bench, server) as far:
        client.send(own)
        expected = header(version, origin)
        assert bench.read(far, len(expected) + len(own)) == expected + own


# The range


def test_every_port_of_the_range_is_reached_and_no_other() -> None:
    with listening_socket() as first, listening_socket() as second:
        low, high = sorted((port_of(first), port_of(second)))
        by_port = {port_of(first): first, port_of(second): second}
        with ServiceBench(TargetPorts(low, high)) as bench:
            for port in (low, high):
                client, _ = bench.connect(port)
                with client, accepted_from(bench, by_port[port]):
                    pass
    with listening_socket() as inside, ServiceBench(TargetPorts(port_of(inside), port_of(inside))) as bench:
        # A listener that lies about the ports of its call: the whole tunnel ends.
        bench.near.connection._target_ports = range(1, 65536)
        with listening_socket() as outside:
            client, leg = bench.connect(port_of(outside))
            bench.until(lambda: bench.near_owner.is_over and bench.service._is_over)
            assert leg.ended is LegEnd.REMOTE_RESET
            assert bench.service._problem == f"OPEN to port {port_of(outside)}, which is not of this call"
            with pytest.raises(BlockingIOError):
                outside.accept()
            client.close()
            leg.sock.close()


# The lease, and the end


def test_past_its_lease_it_takes_no_stream_and_serves_those_it_has(server: socket.socket) -> None:
    """relay-behaviours 53."""
    port = port_of(server)
    with ServiceBench(TargetPorts(port, port), lease_s=1) as bench:
        client, leg = bench.connect(port)
        with client, accepted_from(bench, server) as far:
            bench.until(lambda: bench.near_owner.drained)
            assert bench.near_owner.drained == [GoawayCode.LEASE_OVER]
            assert bench.near.open_room == 0
            bench.near.connection._drain_received = None  # one that does not listen
            assert bench.refusal(port) is ResetCode.LEASE_OVER
            client.send(b"x")
            assert bench.read(far, 1) == b"x"
            leg.abort_from_here()
            bench.until(lambda: bench.service._is_over)
        assert bench.service._problem is None


def test_a_lease_of_a_tunnel_that_is_over_is_no_trouble(bench: ServiceBench) -> None:
    bench.near.drain(GoawayCode.SHUTDOWN)
    bench.until(lambda: bench.service._is_over)
    bench.service._end_lease()
    bench.service._revoke()
    assert bench.service.run() is None


def test_taken_back_by_dom0_every_stream_is_aborted_and_no_server_is_asked(
    bench: ServiceBench, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _ = bench.connect(port_of(server))
    with client, accepted_from(bench, server) as far:
        waiting, leg = bench.connect(port_of(server))
        monkeypatch.setattr(tunnelservice._Connecting, "_on_answer", lambda *_: pytest.fail("connected"))
        bench.loop.run_once(0)
        monkeypatch.undo()
        bench.service._revoke()
        assert not bench.service._connecting
        bench.until(lambda: bench.near_owner.is_over and bench.service._is_over)
        assert bench.near_owner.problem == "the other end closed the tunnel: REVOKED"
        assert bench.read_to_end(client)[1] == bench.read_to_end(far)[1] == "RST"
        with waiting:
            assert leg.ended is LegEnd.REMOTE_RESET or not leg.sock.close()


def test_a_lost_call_gives_up_every_request(bench: ServiceBench, server: socket.socket) -> None:
    client, _ = bench.connect(port_of(server))
    bench.near.backlog.send()
    bench.near.abandon()
    bench.near_call.shutdown(socket.SHUT_RDWR)
    bench.until(lambda: bench.service._is_over)
    assert bench.service._problem == "the byte stream ended without a final GOAWAY"
    assert not bench.service._connecting
    bench.until(lambda: not bench.service._mux.legs)
    client.close()


# As a program


class Program:
    """The service as the agent starts it, with a mux of ours at the other end of its call."""

    def __init__(self, directory: Path, port: int, *, source: str = "sys-net") -> None:
        self.bench = TunnelBench(is_far_there=False)
        environment = os.environ | {"QREXEC_REMOTE_DOMAIN": source, "QUBES_FORWARD_RUN_DIR": str(directory)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "qubes_fwd_qrexec.service", f"{port}+tunnel"],
            stdin=self.bench.far_call,
            stdout=self.bench.far_sink,
            stderr=subprocess.PIPE,
            env=environment,
        )
        self.bench.far_call.close()
        self.bench.far_sink.close()
        self.bench.near.connection._target_ports = range(port, port + 1)

    def end(self) -> tuple[int, str]:
        _, stderr = self.process.communicate(timeout=10)
        return self.process.returncode, stderr.decode()

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.bench.__exit__()


@pytest.fixture
def program(tmp_path: Path, server: socket.socket) -> Iterator[Program]:
    with Program(tmp_path / "run", port_of(server)) as program:
        program.bench.until(lambda: program.bench.near_owner.is_ready)
        yield program


def stream_of(program: Program, server: socket.socket) -> tuple[socket.socket, socket.socket]:
    client, leg = program.bench.open(port_of(server))
    program.bench.until(lambda: leg.is_joined)
    far, _ = server.accept()
    far.setblocking(False)
    return client, far


def test_an_agreed_end_is_status_0(program: Program) -> None:
    program.bench.near.drain(GoawayCode.SHUTDOWN)
    program.bench.until(lambda: program.bench.near_owner.is_over)
    assert program.end() == (0, "")


def test_sigterm_is_an_abort_of_every_stream_within_a_second(program: Program, server: socket.socket) -> None:
    client, far = stream_of(program, server)
    with client, far:
        began = time.monotonic()
        program.process.send_signal(signal.SIGTERM)
        assert program.bench.read_to_end(client)[1] == "RST"
        assert program.bench.read_to_end(far)[1] == "RST"
        assert program.end() == (0, "")
        assert time.monotonic() - began < 1


def test_after_the_calls_death_it_ends_within_two_seconds(program: Program, server: socket.socket) -> None:
    """relay-behaviours 28, with a client that takes nothing, and 27 for the server."""
    client, far = stream_of(program, server)
    with client, far:
        program.bench.stall(client)
        began = time.monotonic()
        program.bench.near_call.shutdown(socket.SHUT_RDWR)
        status, message = program.end()
        assert time.monotonic() - began < 2
        assert status == ExitStatus.TROUBLE
        assert "without a final GOAWAY" in message
        assert program.bench.read_to_end(far)[1] == "RST"


def test_killed_it_is_an_abort_to_the_server(program: Program, server: socket.socket) -> None:
    """relay-behaviours 14: nobody is left to say so, and still it is no clean end."""
    client, far = stream_of(program, server)
    with client, far:
        program.process.kill()
        assert program.bench.read_to_end(far)[1] == "RST"
        assert program.bench.read_to_end(client)[1] == "RST"


def test_garbage_is_status_125_with_the_reason(program: Program) -> None:
    program.bench.near_call.send(random.Random(1).randbytes(100))
    status, message = program.end()
    assert status == ExitStatus.TROUBLE
    assert message.startswith("qubes.ForwardTCP: ")


def test_a_caller_without_a_name_is_refused(tmp_path: Path) -> None:
    with Program(tmp_path, 80, source="../etc") as program:
        status, message = program.end()
        assert status == ExitStatus.TROUBLE
        assert "is not" in message


def test_a_tunnel_that_could_not_be_ended_must_not_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUBES_FORWARD_RUN_DIR", str(tmp_path / "no" / "such"))
    monkeypatch.setenv("QREXEC_REMOTE_DOMAIN", "sys-net")
    one, other = socket.socketpair()
    with one, other, pytest.raises(ServiceError) as caught:
        serve(TargetPorts(80, 80), one, other)
    assert caught.value.status is ExitStatus.TROUBLE


def test_serve_says_why_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUBES_FORWARD_RUN_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    monkeypatch.setenv("QREXEC_REMOTE_DOMAIN", "sys-net")
    one, other = socket.socketpair()
    with one, other, one.dup() as again:
        one.setblocking(False)
        again.setblocking(False)
        other.shutdown(socket.SHUT_WR)
        with pytest.raises(ServiceError, match="without a final GOAWAY"):
            serve(TargetPorts(80, 80), one, again)


def test_a_signal_ends_the_run(server: socket.socket) -> None:
    """Between two handlers: the loop is woken by it."""
    port = port_of(server)
    with ServiceBench(TargetPorts(port, port)) as bench:
        before = signal.getsignal(signal.SIGTERM)
        bench.service._loop.after(0.05, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert bench.service.run() is None
        assert bench.service._is_over
        assert signal.getsignal(signal.SIGTERM) is before
