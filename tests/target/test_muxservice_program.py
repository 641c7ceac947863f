# SPDX-License-Identifier: GPL-2.0-or-later
"""The target's end as a program, and as it is run: its signals, its note and its exit status."""

import os
import random
import select
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import nobody, port_of, unix_pair
from loop_time import SLOWNESS
from mux_bench import BOUND_S, MuxBench
from noted import just_now
from processes import with_constants
from service_bench import ServiceBench

from qubes_fwd_qrexec.common.allowance import Allowance, Calls, Revoked
from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.common.values import QubeName, TargetPorts
from qubes_fwd_qrexec.mux import GoawayCode
from qubes_fwd_qrexec.relay.copy import abort
from qubes_fwd_qrexec.target.callnotes import Kind, RevocationError
from qubes_fwd_qrexec.target.callservice import LEASE_S
from qubes_fwd_qrexec.target.callstart import TICKS_PER_S, CallStart
from qubes_fwd_qrexec.target.localserver import ServiceError
from qubes_fwd_qrexec.target.muxservice import MuxService, serve
from qubes_fwd_qrexec.target.revocation import RevokedError, permitted, revoke

pytestmark = pytest.mark.usefixtures("mux_call_home")


class Program:
    """The service as the agent starts it, with a mux of ours at the other end of its call."""

    def __init__(self, directory: Path, port: int, *, caller: str = "sys-net", slowness: float = 1.0) -> None:
        self.bench = MuxBench(is_far_there=False, ports=range(port, port + 1))
        environment = os.environ | {"QREXEC_REMOTE_DOMAIN": caller, "QUBES_FORWARD_RUN_DIR": str(directory)}
        self.process = subprocess.Popen(
            [*with_constants("service", slowness=slowness), f"{port}+mux"],
            stdin=self.bench.far_call,
            stdout=self.bench.far_sink,
            stderr=subprocess.PIPE,
            env=environment,
        )
        self.bench.far_call.close()
        self.bench.far_sink.close()

    def end(self) -> tuple[int, str]:
        _, stderr = self.process.communicate(timeout=BOUND_S)
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


@pytest.fixture
def slow_program(tmp_path: Path, server: socket.socket) -> Iterator[Program]:
    """All timers of its loop are a hundred times as slow: what it does all the same waits for none."""
    with Program(tmp_path / "run", port_of(server), slowness=SLOWNESS) as program:
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


def test_sigterm_is_an_abort_of_every_stream_at_once(slow_program: Program, server: socket.socket) -> None:
    """Within a second, that is, where there is no other load."""
    program = slow_program
    client, far = stream_of(program, server)
    with client, far:
        program.process.send_signal(signal.SIGTERM)
        assert program.bench.is_aborted(client)
        assert program.bench.is_aborted(far)
        assert program.end() == (0, "")


def test_sigusr2_lets_streams_go_on_and_takes_no_more(program: Program, server: socket.socket) -> None:
    client, far = stream_of(program, server)
    with client, far:
        program.process.send_signal(signal.SIGUSR2)
        program.bench.until(lambda: program.bench.near_owner.drained == [GoawayCode.LEASE_OVER])
        assert not program.bench.near.open_room
        client.send(b"still here")
        program.bench.until(lambda: far in select.select([far], [], [], 0)[0])
        assert far.recv(100) == b"still here"
        abort(client)
        assert program.bench.is_aborted(far)
        assert program.end() == (0, "")


def test_after_the_calls_death_it_ends(program: Program, server: socket.socket) -> None:
    """docs/behaviours.md, 28, with a server that takes nothing, and 27 for it; within two seconds, as
    `test_muxservice` has it by a clock."""
    client, far = stream_of(program, server)
    with client, far:
        program.bench.stall(client)
        program.bench.near_call.shutdown(socket.SHUT_RDWR)
        status, message = program.end()
        assert status == ExitStatus.TROUBLE
        assert "without a final GOAWAY" in message
        assert program.bench.is_aborted(far)


def test_killed_it_is_an_abort_to_the_server(program: Program, server: socket.socket) -> None:
    """docs/behaviours.md, 14: nobody is left to say so, and still it is no clean end."""
    client, far = stream_of(program, server)
    with client, far:
        program.process.kill()
        assert program.bench.is_aborted(far)
        assert program.bench.is_aborted(client)


def test_garbage_is_status_125_with_the_reason(program: Program) -> None:
    program.bench.near_call.send(random.Random(1).randbytes(100))
    status, message = program.end()
    assert status == ExitStatus.TROUBLE
    assert message.startswith("qubes.ForwardTCP: ")


def test_a_caller_without_a_name_is_refused(tmp_path: Path) -> None:
    with Program(tmp_path, 80, caller="../etc") as program:
        status, message = program.end()
        assert status == ExitStatus.TROUBLE
        assert "is not" in message


CALLS = Calls(TargetPorts(80, 90), QubeName("sys-net"))


def test_a_mux_call_that_dom0_could_not_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUBES_FORWARD_RUN_DIR", str(tmp_path / "no" / "such"))
    one, other = socket.socketpair()
    with one, other, pytest.raises(RevocationError, match="notes of calls is missing"):
        serve(CALLS, just_now(), one, other)


def test_serve_says_why_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUBES_FORWARD_RUN_DIR", str(tmp_path / "run"))
    one, other = socket.socketpair()
    with one, other, one.dup() as again:
        one.setblocking(False)
        again.setblocking(False)
        other.shutdown(socket.SHUT_WR)
        with pytest.raises(ServiceError, match="without a final GOAWAY"):
            serve(CALLS, just_now(), one, again)


def test_a_call_that_waited_longer_than_its_lease_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exposed qube can let a call wait that dom0 has allowed: its lease runs meanwhile."""
    monkeypatch.setenv("QUBES_FORWARD_RUN_DIR", str(tmp_path / "run"))
    start = just_now()
    waited = CallStart(start.boot_ticks - LEASE_S * TICKS_PER_S, start.monotonic_s - LEASE_S)
    one, other = socket.socketpair()
    with one, other, pytest.raises(RevokedError, match="more than 300 s ago"):
        serve(CALLS, waited, one, other)


def test_serve_looks_at_what_dom0_has_allowed_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUBES_FORWARD_RUN_DIR", str(tmp_path / "run"))
    found = list[float]()
    start = just_now()

    def run(service: MuxService) -> None:
        found.append(service.lease.left_s)
        with permitted(Kind.MUX, CALLS, start, tmp_path / "run", 1):
            found.append(service.lease.left_s)

    monkeypatch.setattr(MuxService, "run", run)
    one, other = unix_pair()
    with one, other, one.dup() as again:
        assert serve(CALLS, start._replace(monotonic_s=start.monotonic_s - 100), one, again) == 0
    assert found[0] <= LEASE_S - 100 < LEASE_S - 50 < found[1] <= LEASE_S


def test_dom0_ends_the_program_or_lets_it_drain(
    tmp_path: Path, program: Program, server: socket.socket
) -> None:
    client, far = stream_of(program, server)
    mine = Calls(TargetPorts(port_of(server), port_of(server)), QubeName("sys-net"))
    with client, far:
        assert revoke(Allowance(drains={mine: 3600}), tmp_path / "run") == Revoked(0, 1)
        program.bench.until(lambda: program.bench.near_owner.drained == [GoawayCode.LEASE_OVER])
        client.send(b"still here")
        program.bench.until(lambda: far in select.select([far], [], [], 0)[0])
        assert far.recv(100) == b"still here"
        assert revoke(Allowance(cuts_drains=True), tmp_path / "run") == Revoked(1, 0)
        assert program.bench.is_aborted(client)
        assert program.bench.is_aborted(far)
        assert program.end() == (0, "")


def test_a_signal_ends_the_run(server: socket.socket) -> None:
    """Between two handlers: the loop is woken by it."""
    port = port_of(server)
    with ServiceBench(TargetPorts(port, port)) as bench:
        before = signal.getsignal(signal.SIGTERM)
        bench.service.loop.after(0.0, lambda: os.kill(os.getpid(), signal.SIGTERM), nobody)
        assert bench.service.run() is None
        assert bench.service.is_over
        assert signal.getsignal(signal.SIGTERM) is before
