# SPDX-License-Identifier: GPL-2.0-or-later
"""One process as the target's qubes.ForwardTCP, where qrexec looks first, including mux calls."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import trio
from agents import connect_as_agent
from helpers import BOUND_S, KILLED_S, accept, listening_socket, no_fds_left, port_of
from helpers import until as until_true
from noted import after_a_tick
from processes import TARGET, Way, World, assert_reset, open_world, until, with_constants
from test_socketservice import Agent, agent, descriptor, read_all

from bench.memory import descendants
from qubes_fwd_qrexec.common.allowance import Allowance, Calls, Revoked
from qubes_fwd_qrexec.common.values import QubeName, TargetPorts
from qubes_fwd_qrexec.mux import Hello, wire
from qubes_fwd_qrexec.relay.copy import abort
from qubes_fwd_qrexec.target import portions
from qubes_fwd_qrexec.target.callnotes import living
from qubes_fwd_qrexec.target.portions import budget_of
from qubes_fwd_qrexec.target.revocation import revoke
from qubes_fwd_qrexec.target.servicesocket import listen_on
from qubes_fwd_qrexec.target.socketservice import ServiceServer

HELLO = bytes(wire.encode_hello(Hello(65536, bytes(16))))


@contextmanager
def serving(world: World) -> Iterator["subprocess.Popen[bytes]"]:
    path = world.lab.qube_dir(TARGET).service_dirs[0] / "qubes.ForwardTCP"
    command = [sys.executable, "-m", "qubes_fwd_qrexec.service", "--socket", str(path)]
    with ExitStack() as undo:
        server = undo.enter_context(subprocess.Popen(world.session.in_qube(TARGET, *command)))
        undo.callback(server.kill)
        until(lambda: is_serving(world))
        yield server


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with open_world(tmp_path) as made:
        yield made


def abort_is_an_abort(way: Way) -> bool:
    """Whether the client sees the server's abort as one."""
    with way.connect() as connection:
        connection.echo()
        abort(connection.far)
        try:
            return connection.client.recv(1) != b""
        except ConnectionResetError:
            return True


def is_service(pid: int) -> bool:
    command = Path(f"/proc/{pid}/cmdline").read_bytes()
    return b"qubes-forward-service" in command or b"qubes_fwd_qrexec.service" in command


def test_calls_and_mux_calls_both_come_to_the_socket(world: World) -> None:
    mux_call, call = world.forward("mux"), world.forward("call")
    with serving(world) as server:
        world.start_listener()
        with mux_call.connect() as one, mux_call.connect() as other, call.connect() as third:
            for connection in (one, other, third):
                connection.echo()
            # The mux call is a process of its own, and the agent has started none.
            assert len(descendants([server.pid])) == 1
            assert not [pid for pid in world.services if is_service(pid)]
        assert abort_is_an_abort(mux_call)
        assert not abort_is_an_abort(call)  # a socket service has no exit status to tell it by


def test_dom0_ends_a_mux_call_that_came_by_the_socket(world: World) -> None:
    way = world.forward()
    with serving(world) as server:
        world.start_listener()
        with way.connect() as connection:
            connection.echo()
            world.session.forward("remove", TARGET, "w0")
            assert_reset(connection.client)
        until(lambda: not descendants([server.pid]))


def test_sigterm_lets_a_mux_calls_connections_finish_and_takes_no_new_ones(world: World) -> None:
    way = world.forward()
    with serving(world) as server:
        world.start_listener()
        with way.connect() as connection:
            connection.echo()
            server.send_signal(signal.SIGTERM)
            until(lambda: not is_serving(world))
            connection.echo()
            assert server.poll() is None
        assert server.wait(BOUND_S) == 0


def is_serving(world: World) -> bool:
    return takes_calls(world.lab.qube_dir(TARGET).service_dirs[0] / "qubes.ForwardTCP")


def takes_calls(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    run = tmp_path / "run"
    monkeypatch.setenv("QUBES_FORWARD_RUN_DIR", str(run))
    return run


def mux_call_to(server: socket.socket, source: str = "sys-net") -> bytes:
    return f"qubes.ForwardTCP+{port_of(server)}+mux {source}\0".encode()


async def test_a_mux_call_leaves_the_note_of_its_caller_and_its_end_is_the_calls(
    tmp_path: Path, server: socket.socket, home: Path
) -> None:
    with no_fds_left():
        async with agent(tmp_path) as qrexec, qrexec.call(mux_call_to(server)) as call:
            await call.send_all(HELLO)
            with trio.fail_after(BOUND_S):
                assert await call.receive_some()
            port = port_of(server)
            (process,) = qrexec.server.mux_calls
            (note,) = living(home)
            assert (str(note.calls), note.pid) == (f"{port}-{port} sys-net", process.pid)
            await call.send_eof()
            await read_all(call)
            await until_true(lambda: not qrexec.server.mux_calls)


async def test_a_caller_whose_name_is_none_gets_no_mux_call(
    tmp_path: Path, server: socket.socket, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with agent(tmp_path) as qrexec, qrexec.call(mux_call_to(server, "../x")) as call:
        assert await read_all(call) == b""
        assert "is not a qube's name" in caplog.text


async def test_no_caller_has_more_mux_calls_than_it_leaves_and_each_has_its_part_of_the_memory(
    tmp_path: Path,
    server: socket.socket,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(portions, "CALLS_MAX", 2)
    async with agent(tmp_path) as qrexec, qrexec.call(mux_call_to(server)) as call:
        with trio.fail_after(BOUND_S):
            hello = await call.receive_some()
        parts = (portions.PARTS - 2 * 2) // 8 + 2
        assert wire.decode_hello(hello[8:48]).max_streams == budget_of(parts).streams_max
        async with qrexec.call(b"qubes.ForwardTCP+1+mux sys-net\0") as another:
            assert await read_all(another) == b""
        assert "sys-net has 1 of 1 mux calls; of 2 in all no qube has more than it leaves" in caplog.text
        async with qrexec.call(mux_call_to(server, "sys-vpn")) as others:
            with trio.fail_after(BOUND_S):
                assert await others.receive_some()
        await call.send_eof()
        await read_all(call)


async def test_the_deadline_ends_mux_calls(tmp_path: Path, server: socket.socket, home: Path) -> None:
    path = tmp_path / "service"
    async with trio.open_nursery() as nursery:
        serving = ServiceServer(listen_on(path), drain_s=0.2)
        await nursery.start(serving.run)
        async with Agent(path, serving).call(mux_call_to(server)) as call:
            await call.send_all(HELLO)
            with trio.fail_after(BOUND_S):
                await call.receive_some()
                (process,) = serving.mux_calls
                process.send_signal(signal.SIGSTOP)  # it obeys nothing any more
                serving.stop()
                await process.wait()
    assert process.returncode == -signal.SIGKILL


async def test_a_mux_call_that_cannot_be_started_ends_alone(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with listening_socket() as server:
        async with agent(tmp_path) as qrexec:
            monkeypatch.setattr(sys, "executable", str(tmp_path / "missing"))
            async with qrexec.call(mux_call_to(server)) as call:
                assert await read_all(call) == b""
            assert "no process for a mux call: No such file" in caplog.text
            async with qrexec.call(descriptor(server)), await accept(server):
                pass  # and others are served as before


async def test_a_mux_call_that_comes_while_it_ends_is_refused(
    tmp_path: Path, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with agent(tmp_path) as qrexec, qrexec.call(b"qubes.ForwardTCP+80+mux") as call:
        await until_true(lambda: qrexec.server.calls)
        qrexec.server.stop()
        await call.send_all(b" sys-net\0")
        assert await read_all(call) == b""
        assert "came too late" in caplog.text


@contextmanager
def program(tmp_path: Path, **constants: float) -> Iterator[Path]:
    """The server as a process of its own; the path of its socket."""
    path = tmp_path / "service"
    command = [*with_constants("service", **constants), "--socket", str(path)]
    with subprocess.Popen(command) as process:
        try:
            until(lambda: takes_calls(path))
            yield path
        finally:
            process.kill()


def call_to(path: Path, server: socket.socket, kind: str = "") -> socket.socket:
    call = connect_as_agent(path)
    call.settimeout(BOUND_S)
    call.send(f"qubes.ForwardTCP+{port_of(server)}{kind} sys-net\0".encode())
    return call


def test_dom0_ends_the_single_calls_of_the_socket_that_it_does_not_allow(
    tmp_path: Path, server: socket.socket, home: Path
) -> None:
    server.settimeout(BOUND_S)
    with program(tmp_path) as path, listening_socket() as kept_server:
        kept_server.settimeout(BOUND_S)
        kept = Calls(TargetPorts(port_of(kept_server), port_of(kept_server)), QubeName("sys-net"))
        with call_to(path, server) as ended, call_to(path, kept_server) as call:
            (far, _), (kept_far, _) = server.accept(), kept_server.accept()
            with far, kept_far:
                assert revoke(Allowance(keeps=frozenset({kept})), home) == Revoked(1, 0)
                far.settimeout(BOUND_S)
                with pytest.raises(ConnectionResetError):
                    far.recv(1)
                assert ended.recv(1) == b""
                call.send(b"x")
                kept_far.settimeout(BOUND_S)
                assert kept_far.recv(1) == b"x"
                assert revoke(Allowance(drains={kept: 3600}), home) == Revoked(0, 1)
                assert revoke(Allowance(drains={kept: 1}), home).ended == 0
                with pytest.raises(ConnectionResetError):
                    kept_far.recv(1)
                until(lambda: living(home) == [])


@pytest.mark.parametrize("kind", ["", "+mux"])
def test_a_call_that_was_allowed_before_dom0s_list_reaches_no_server(
    tmp_path: Path, server: socket.socket, home: Path, kind: str
) -> None:
    """The kernel says which process connected: this one, older than the list, and then a newer one."""
    with program(tmp_path) as path:
        revoke(Allowance(), home)
        with call_to(path, server, kind) as call:
            assert call.recv(1) == b""
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
        after_a_tick()
        code = (
            "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
            "s.send(sys.argv[2].encode() + b'\\0'); sys.stdout.buffer.write(s.recv(1)); sys.stdin.read()"
        )
        words = f"qubes.ForwardTCP+{port_of(server)}{kind} sys-net"
        with subprocess.Popen(
            [sys.executable, "-c", code, str(path), words], stdin=subprocess.PIPE
        ) as agents:
            until(lambda: living(home))
            agents.kill()


def test_dom0_ends_a_server_that_does_not_obey(tmp_path: Path, server: socket.socket, home: Path) -> None:
    server.settimeout(BOUND_S)
    with program(tmp_path) as path, call_to(path, server) as call:
        far, _ = server.accept()
        with far:
            (note,) = living(home)
            os.kill(note.pid, signal.SIGSTOP)
            assert revoke(Allowance(), home, obey_s=KILLED_S) == Revoked(1, 0)
            far.settimeout(BOUND_S)
            with pytest.raises(ConnectionResetError):
                far.recv(1)
            assert call.recv(1) == b""


def fill(sock: socket.socket) -> None:
    """Send until the way is full."""
    sock.settimeout(0.2)
    with suppress(TimeoutError):
        while True:
            sock.send(bytes(65536))
    sock.settimeout(BOUND_S)


@pytest.mark.parametrize("stands", ["download", "upload", "both", "nothing"])
@pytest.mark.parametrize("is_half_closed", [False, True])
def test_a_single_call_that_is_lost_ends_though_the_agent_closes_nothing(
    tmp_path: Path, server: socket.socket, home: Path, stands: str, *, is_half_closed: bool
) -> None:
    server.settimeout(BOUND_S)
    with program(tmp_path) as path, call_to(path, server) as call:
        far, _ = server.accept()
        with far:
            if stands in ("upload", "both"):
                fill(call)
            if is_half_closed:
                call.shutdown(socket.SHUT_WR)
            if stands in ("download", "both"):
                fill(far)
            if not is_half_closed:
                call.shutdown(socket.SHUT_WR)
            call.shutdown(socket.SHUT_RD)
            until(lambda: living(home) == [])


def test_a_single_call_whose_server_has_ended_and_takes_nothing_has_a_bound(
    tmp_path: Path, server: socket.socket, home: Path
) -> None:
    server.settimeout(BOUND_S)
    with program(tmp_path, target__socketservice__HALF_CLOSE_S=2.0) as path, call_to(path, server) as call:
        far, _ = server.accept()
        with far:
            far.shutdown(socket.SHUT_WR)
            assert call.recv(1) == b""
            fill(call)
            call.shutdown(socket.SHUT_WR)
            until(lambda: living(home) == [])
