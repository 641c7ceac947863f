# SPDX-License-Identifier: GPL-2.0-or-later
"""The target's end of a datagram call as the agent starts it: its argument, its note and its exit status."""

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from flow_bench import ORIGIN, Kept, Owner
from helpers import BOUND_S, unix_pair
from processes import with_constants
from udpservice_bench import udp_port, udp_server

from qubes_fwd_qrexec.common.allowance import Allowance, Calls, Revoked
from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.common.values import Proto, QubeName, TargetPorts
from qubes_fwd_qrexec.mux import FlowCode, FlowConnection, GoawayCode, Hello, ProxyVersion
from qubes_fwd_qrexec.relay.flowmux import FlowMux
from qubes_fwd_qrexec.relay.loop import Loop
from qubes_fwd_qrexec.target.callnotes import Kind, living
from qubes_fwd_qrexec.target.revocation import revoke

pytestmark = pytest.mark.usefixtures("mux_call_home")


class Program:
    """The service as its RPC file starts it, with a mux of ours at the other end of its call."""

    def __init__(self, directory: Path, argument: str, port: int = 1) -> None:
        self.call, theirs = unix_pair()
        self.sink = self.call.dup()
        of_call = {"QREXEC_REMOTE_DOMAIN": "sys-net", "QUBES_FORWARD_RUN_DIR": str(directory)}
        with theirs:
            self.process = subprocess.Popen(
                [*with_constants("service"), "--udp", argument],
                stdin=theirs,
                stdout=theirs,
                stderr=subprocess.PIPE,
                env=os.environ | of_call,
            )
        self.loop = Loop()
        self.owner = Owner()
        connection = FlowConnection(Hello(0, bytes(16)), range(port, port + 1))
        self.mux = FlowMux(self.loop, connection, self.call, self.sink, self.owner)

    def until(self, condition: object) -> None:
        assert callable(condition)
        done: list[bool] = []
        timer = self.loop.after(BOUND_S, lambda: done.append(True), lambda: None)
        while not condition():
            assert not done, "it does not come"
            self.loop.run_once()
        timer.cancel()

    def end(self) -> tuple[int, str]:
        _, stderr = self.process.communicate(timeout=BOUND_S)
        return self.process.returncode, stderr.decode()

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_: object) -> None:
        self.mux.abandon()
        self.loop.close()
        self.call.close()
        self.sink.close()
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with udp_server() as sock:
        yield sock


@pytest.fixture
def program(tmp_path: Path, server: socket.socket) -> Iterator[Program]:
    port = udp_port(server)
    with Program(tmp_path / "run", f"{port}+mux", port) as program:
        program.until(lambda: program.owner.is_ready)
        yield program


def _ask(program: Program, server: socket.socket) -> Kept:
    """A flow that the server has answered."""
    kept = Kept()
    flow_id = program.mux.open(udp_port(server), ORIGIN, ProxyVersion.OFF, kept)
    program.mux.send(flow_id, b"ask", 0)
    program.loop.run_once(0.0)
    data, client = server.recvfrom(100)
    server.sendto(data * 2, client)
    program.until(lambda: kept.datagrams == [b"askask"])
    return kept


def test_it_carries_flows_and_an_agreed_end_is_status_0(program: Program, server: socket.socket) -> None:
    _ask(program, server)
    program.mux.close()
    assert program.loop.run_once(0.0) is None
    assert program.end() == (0, "")


def test_dom0_ends_it_by_its_note(program: Program, server: socket.socket, tmp_path: Path) -> None:
    kept = _ask(program, server)
    port = udp_port(server)
    calls = Calls(TargetPorts(port, port), QubeName("sys-net"), Proto.UDP)
    (note,) = living(tmp_path / "run")
    assert (note.kind, note.calls, note.pid) == (Kind.UDP, calls, program.process.pid)
    assert revoke(Allowance(keeps=frozenset([calls])), tmp_path / "run") == Revoked(0, 0)
    tcp = Allowance(keeps=frozenset([calls._replace(proto=Proto.TCP)]))
    assert revoke(tcp, tmp_path / "run", obey_s=BOUND_S) == Revoked(1, 0)
    program.until(lambda: kept.code)
    assert kept.code is FlowCode.REVOKED
    assert program.mux.is_revoked
    assert program.end() == (0, "")


def test_sigusr2_lets_flows_go_on_and_takes_no_more(program: Program, server: socket.socket) -> None:
    kept = _ask(program, server)
    program.process.send_signal(signal.SIGUSR2)
    program.until(lambda: program.owner.drained is GoawayCode.LEASE_OVER)
    assert program.mux.room == 0
    (flow_id,) = program.mux.flows
    program.mux.send(flow_id, b"still", 0)
    program.loop.run_once(0.0)
    assert server.recv(100) == b"still"
    assert kept.code is None
    program.mux.end(flow_id, FlowCode.DONE)
    program.until(lambda: program.owner.problems == [None])
    assert program.end() == (0, "")


@pytest.mark.parametrize("argument", ["", "53", "53+mux+", "--udp", "--socket", "0+mux", "54-53+mux"])
def test_whatever_names_no_ports_is_refused_with_status_2(tmp_path: Path, argument: str) -> None:
    with Program(tmp_path / "run", argument) as program:
        status, message = program.end()
        assert status == ExitStatus.BAD_ARGUMENT
        assert message.startswith("qubes.ForwardUDP: argument ")
