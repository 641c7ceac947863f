# SPDX-License-Identifier: GPL-2.0-or-later
import contextlib
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from agents import connect_as_agent
from endings import pattern
from helpers import (
    BOUND_S,
    abort_stream,
    accept,
    echo_once,
    free_port,
    listening_socket,
    no_fds_left,
    port_of,
    until,
)

from qubes_fwd_qrexec.system import bugs
from qubes_fwd_qrexec.target import socketservice
from qubes_fwd_qrexec.target.localserver import ServiceError
from qubes_fwd_qrexec.target.servicesocket import listen_on
from qubes_fwd_qrexec.target.socketservice import ServiceServer, connect


async def test_ipv6_is_tried_when_ipv4_refuses() -> None:
    with listening_socket("::1") as server, await connect(port_of(server)) as sock:
        assert sock.getpeername()[:2] == server.getsockname()[:2]
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):  # docs/behaviours.md, 17
            assert sock.getsockopt(socket.SOL_SOCKET, option) == 2 * 131_072


async def test_nobody_listening_or_answering_is_a_service_error() -> None:
    with no_fds_left():
        with pytest.raises(ServiceError, match="Connection refused"):
            await connect(free_port())
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            server.listen(0)
            fillers = [socket.socket() for _ in range(3)]
            for filler in fillers:
                filler.setblocking(False)
                filler.connect_ex(server.getsockname())
            with pytest.raises(ServiceError, match="no answer within"):
                await connect(port_of(server), 0.05)
            for filler in fillers:
                filler.close()


class Agent:
    """The agent's side: calls to a running server."""

    def __init__(self, path: Path, server: ServiceServer) -> None:
        self._path = path
        self.server = server

    def call(self, untrusted_first: bytes) -> trio.SocketStream:
        sock = connect_as_agent(self._path)
        sock.setblocking(False)
        sock.send(untrusted_first)
        return trio.SocketStream(trio.socket.from_stdlib_socket(sock))


@asynccontextmanager
async def agent(tmp_path: Path, **options: float) -> AsyncIterator[Agent]:
    path = tmp_path / "service"
    server = ServiceServer(listen_on(path), **options)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        yield Agent(path, server)
        server.stop()
        server.stop()


def descriptor(server: socket.socket) -> bytes:
    return f"qubes.ForwardTCP+{port_of(server)} sys-net\0".encode()


async def read_all(stream: trio.SocketStream) -> bytes:
    with trio.fail_after(BOUND_S):
        return b"".join([chunk async for chunk in stream])


async def test_bytes_and_both_ends_pass_each_way_by_itself(tmp_path: Path, server: socket.socket) -> None:
    with no_fds_left():
        async with agent(tmp_path) as qrexec:  # noqa: SIM117
            async with qrexec.call(descriptor(server) + b"early") as call, await accept(server) as far:
                await call.send_eof()
                assert await read_all(far) == b"early"
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(far.send_all, pattern(300_000))
                    got = b""
                    while len(got) < 300_000:
                        got += await call.receive_some()
                assert got == pattern(300_000)
                await far.send_eof()
                assert await read_all(call) == b""
                await until(lambda: qrexec.server.calls == 0)


async def test_a_server_that_ends_first_gets_the_rest(tmp_path: Path, server: socket.socket) -> None:
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    async with agent(tmp_path) as qrexec:  # noqa: SIM117
        async with qrexec.call(descriptor(server)) as call, await accept(server) as far:
            await far.send_eof()
            assert await read_all(call) == b""
            await call.send_all(pattern(100_000))
            await call.send_eof()
            await until(lambda: qrexec.server.calls == 0)  # it need not have read it by then
            assert await read_all(far) == pattern(100_000)


async def test_a_server_abort_ends_the_call(tmp_path: Path, server: socket.socket) -> None:
    async with agent(tmp_path) as qrexec, qrexec.call(descriptor(server)) as call:
        far = await accept(server)
        await far.send_all(b"last words")
        with trio.fail_after(BOUND_S):
            assert await call.receive_some() == b"last words"
        abort_stream(far)
        assert await read_all(call) == b""
        await until(lambda: qrexec.server.calls == 0)


async def test_a_call_that_is_gone_is_an_abort_to_the_server(tmp_path: Path, server: socket.socket) -> None:
    async with agent(tmp_path) as qrexec:
        call = qrexec.call(descriptor(server))
        async with await accept(server) as far:
            await far.send_all(bytes(3_000))
            await until(lambda: qrexec.server.calls == 1)
            call.socket.close()
            with trio.fail_after(BOUND_S), pytest.raises(trio.BrokenResourceError):
                await far.receive_some()


@pytest.mark.parametrize(
    "untrusted", [b"garbage\0", b"\0", b"x" * 2000, b"qubes.ForwardTCP+80-90 sys-net\0", b"\xff\0"]
)
async def test_a_bad_descriptor_is_answered_by_closing(tmp_path: Path, untrusted: bytes) -> None:
    async with agent(tmp_path) as qrexec, qrexec.call(untrusted) as call:
        with trio.fail_after(BOUND_S):
            # What was not read of it makes the close an abort.
            with contextlib.suppress(trio.BrokenResourceError):
                assert await call.receive_some() == b""
        await until(lambda: qrexec.server.calls == 0)


async def test_a_missing_descriptor_is_given_up_on(tmp_path: Path) -> None:
    async with agent(tmp_path, descriptor_s=0.05) as qrexec, qrexec.call(b"qubes.Forw") as call:
        assert await read_all(call) == b""


async def test_nobody_listening_closes_the_call(tmp_path: Path) -> None:
    async with agent(tmp_path) as qrexec:  # noqa: SIM117
        async with qrexec.call(f"qubes.ForwardTCP+{free_port()} sys-net\0".encode()) as call:
            assert await read_all(call) == b""


async def test_calls_above_the_bound_are_refused_and_places_come_back(
    tmp_path: Path, server: socket.socket
) -> None:
    async with agent(tmp_path, connections_max=1) as qrexec:
        async with qrexec.call(descriptor(server)), await accept(server), qrexec.call(b"") as second:
            assert await read_all(second) == b""
        await until(lambda: qrexec.server.calls == 0)
        async with qrexec.call(descriptor(server)), await accept(server):
            pass


async def test_stopping_lets_calls_finish(tmp_path: Path, server: socket.socket) -> None:
    path = tmp_path / "service"
    listening = listen_on(path)
    serving = ServiceServer(listening, drain_s=300)
    serving_agent = Agent(path, serving)
    async with trio.open_nursery() as nursery:
        await nursery.start(serving.run)
        async with serving_agent.call(descriptor(server)) as call, await accept(server) as far:
            serving.stop()
            await until(lambda: listening.fileno() < 0)
            with pytest.raises(ConnectionRefusedError):
                serving_agent.call(b"")
            await call.send_all(b"x")
            with trio.fail_after(BOUND_S):
                assert await far.receive_some() == b"x"
            serving.stop()
            with trio.fail_after(BOUND_S), pytest.raises(trio.BrokenResourceError):
                await far.receive_some()


async def test_what_has_not_finished_by_the_deadline_is_aborted(
    tmp_path: Path, server: socket.socket
) -> None:
    path = tmp_path / "service"
    serving = ServiceServer(listen_on(path), drain_s=0.1)
    async with trio.open_nursery() as nursery:
        await nursery.start(serving.run)
        async with Agent(path, serving).call(descriptor(server)), await accept(server) as far:
            serving.stop()
            with trio.fail_after(BOUND_S), pytest.raises(trio.BrokenResourceError):
                await far.receive_some()


async def test_stopping_before_the_start_is_no_error(tmp_path: Path) -> None:
    serving = ServiceServer(listen_on(tmp_path / "service"))
    serving.stop()
    serving.stop()
    with trio.fail_after(BOUND_S):
        await serving.run()


_ACTIVATE = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ["LISTEN_FDS"] = sys.argv[2]
os.environ["LISTEN_PID"] = sys.argv[3] or str(os.getpid())
os.execv(sys.executable, [sys.executable, "-m", "qubes_fwd_qrexec.service", "--activated"])
"""


def activated(fd: int, fds: str = "1", pid: str = "") -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", _ACTIVATE, str(fd), fds, pid]
    return subprocess.Popen(command, pass_fds=[fd], stderr=subprocess.PIPE)


async def test_systemd_may_pass_the_socket_and_keeps_it(tmp_path: Path, server: socket.socket) -> None:
    path = tmp_path / "service"
    with listen_on(path) as listening:
        process = activated(listening.fileno())
        sock = connect_as_agent(path)
        sock.setblocking(False)
        async with trio.SocketStream(trio.socket.from_stdlib_socket(sock)) as call:
            await call.send_all(descriptor(server))
            async with await accept(server) as far:
                await far.send_all(b"hello")
                await far.send_eof()
                assert await read_all(call) == b"hello"
                process.send_signal(signal.SIGTERM)
                await call.send_eof()
                assert await read_all(far) == b""
        _, stderr = await trio.to_thread.run_sync(process.communicate)
        assert (process.returncode, stderr) == (0, b"")
        with socket.socket(socket.AF_UNIX) as again:
            again.connect(str(path))  # the next start will accept it


@pytest.mark.parametrize(
    ("fds", "pid", "words"), [("2", "", "LISTEN_FDS"), ("1", "1", "LISTEN_PID"), ("x", "", "LISTEN_FDS")]
)
def test_descriptors_for_somebody_else_are_refused(tmp_path: Path, fds: str, pid: str, words: str) -> None:
    with listen_on(tmp_path / "service") as listening, activated(listening.fileno(), fds, pid) as process:
        _, stderr = process.communicate(timeout=BOUND_S)
    assert process.returncode == 1
    assert words in stderr.decode()


async def test_the_program_makes_its_socket_and_ends_on_sigterm(tmp_path: Path) -> None:
    path = tmp_path / "service"
    command = [sys.executable, "-m", "qubes_fwd_qrexec.service", "--socket", str(path)]
    with subprocess.Popen(command) as process:  # noqa: ASYNC220
        await until(lambda: path.exists() and stat.S_ISSOCK(path.lstat().st_mode))
        await until(lambda: _answers(path))
        process.send_signal(signal.SIGTERM)
        assert await trio.to_thread.run_sync(process.wait) == 0


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(BOUND_S)
        try:
            sock.connect(str(path))
            sock.send(b"\0")
            return sock.recv(1) == b""
        except OSError:
            return False


def test_a_path_that_cannot_be_bound_is_status_1() -> None:
    command = [sys.executable, "-m", "qubes_fwd_qrexec.service", "--socket", "/nonexistent/service"]
    ended = subprocess.run(command, capture_output=True, check=False, timeout=BOUND_S)
    assert ended.returncode == 1
    assert b"/nonexistent/service" in ended.stderr


@pytest.mark.usefixtures("bugs_are_wanted")
async def test_a_bug_in_one_call_ends_that_call_and_is_reported_to_dom0(
    tmp_path: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUBES_FORWARD_RUN_DIR", str(tmp_path))

    async def fail(*_: object) -> socket.socket:
        raise ZeroDivisionError("a bug")

    async with agent(tmp_path) as qrexec:
        with monkeypatch.context() as patch:
            patch.setattr(socketservice, "connect", fail)
            async with qrexec.call(descriptor(server)) as call:
                assert await read_all(call) == b""
        assert bugs.left(tmp_path) == 1
        async with qrexec.call(descriptor(server)) as call, await accept(server) as far:
            await echo_once(call, far)
