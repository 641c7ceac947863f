# SPDX-License-Identifier: GPL-2.0-or-later
"""One rule for TCP and UDP: dom0 opens and ends the calls of each protocol by itself, each part a program."""

import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import trio
from dom0 import forward
from helpers import BOUND_S, free_port, until

from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.lab import daemon
from qubes_fwd_qrexec.lab.session import LabSession, open_session
from qubes_fwd_qrexec.target.callnotes import Kind, living

HOST = "127.0.0.1"


@pytest.fixture
def session() -> Iterator[LabSession]:
    with open_session(daemon.Network.LOOPBACK) as opened:
        yield opened


class Both:
    """A server of TCP and UDP on one port, a client of each, and one rule that forwards both."""

    def __init__(self, session: LabSession, *options: str) -> None:
        self._session = session
        self._open = ExitStack()
        self._tcp, self._udp = self._servers()
        self.port = free_port()
        route = f"{self.port}:{self._tcp.getsockname()[1]}"
        said = ("--proto=both", "--mode=qrexec", "--from=any", f"--listen={HOST}", "--name=dns", *options)
        forward(session.lab, "add", "work", route, *said)
        self.listener = session.start_listener("sys-net")
        self.datagrams = self._kept(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self.datagrams.connect((HOST, self.port))
        self.connection = self._kept(socket.create_connection((HOST, self.port), timeout=BOUND_S))
        self.connection.sendall(b"hello")
        self._far = self._kept(self._tcp.accept()[0])

    def __enter__(self) -> "Both":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _kept(self, sock: socket.socket) -> socket.socket:
        sock.settimeout(BOUND_S)
        return self._open.enter_context(sock)

    def _servers(self) -> tuple[socket.socket, socket.socket]:
        """Listen on a port that is free for both protocols."""
        while True:
            tcp = socket.create_server((HOST, 0))
            udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            try:
                udp.bind(tcp.getsockname())
            except OSError:
                tcp.close()
                udp.close()
            else:
                return self._kept(tcp), self._kept(udp)

    def echo_connection(self) -> None:
        self.connection.sendall(b"x")
        while not self._far.recv(64).endswith(b"x"):
            pass
        self._far.sendall(b"y")
        assert self.connection.recv(64) == b"y"

    def echo_datagram(self) -> None:
        self.datagrams.send(b"question")
        question, client = self._udp.recvfrom(64)
        self._udp.sendto(b"answer to " + question, client)
        assert self.datagrams.recv(64) == b"answer to question"

    def calls(self) -> list[Kind]:
        """What the calls carry that the target serves."""
        notes = self._session.lab.qube_dir("work").root / "run" / "forward"
        return sorted(note.kind for note in living(notes))


@pytest.mark.parametrize(("proto", "left"), [("tcp", Kind.MUX), ("udp", Kind.UDP)])
def test_dom0_ends_the_calls_of_one_protocol_though_the_exposed_qube_does_nothing(
    session: LabSession, proto: str, left: Kind
) -> None:
    with Both(session) as both:
        both.echo_connection()
        both.echo_datagram()
        assert both.calls() == [Kind.MUX, Kind.UDP]
        both.listener.send_signal(signal.SIGSTOP)
        try:
            forward(session.lab, "set", "work", "dns", f"proto={proto}")
            assert both.calls() == [left]
        finally:
            both.listener.send_signal(signal.SIGCONT)
        (both.echo_connection if left is Kind.MUX else both.echo_datagram)()


def test_flows_of_a_rule_that_drains_go_on_and_panic_ends_them(session: LabSession) -> None:
    with Both(session, "--on-expire=drain") as both:
        both.echo_datagram()
        forward(session.lab, "set", "work", "dns", "proto=tcp")
        both.echo_datagram()
        both.echo_connection()
        forward(session.lab, "panic")
        trio.run(until, lambda: both.calls() == [])
        with pytest.raises(ConnectionResetError):
            both.connection.recv(1)


@pytest.mark.parametrize(("proto", "other"), [("tcp", "UDP"), ("udp", "TCP")])
def test_what_allows_one_protocol_lets_no_call_of_the_other_through(
    session: LabSession, proto: str, other: str
) -> None:
    forward(session.lab, "add", "work", "53", f"--proto={proto}", "--mode=qrexec", "--from=any")

    def status(service: str) -> int:
        call = session.in_qube("sys-net", "qrexec-client-vm", "work", f"{service}+53+mux")
        done = subprocess.run(
            call, stdin=subprocess.DEVNULL, capture_output=True, timeout=BOUND_S, check=False
        )
        return done.returncode

    assert status(f"qubes.Forward{proto.upper()}") != ExitStatus.REFUSED
    assert status(f"qubes.Forward{other}") == ExitStatus.REFUSED
