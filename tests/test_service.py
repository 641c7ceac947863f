# SPDX-License-Identifier: GPL-2.0-or-later
import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from endings import pattern
from helpers import BOUND_S, free_port, port_of
from single_calls import ByProgram, Called

from qubes_fwd_qrexec.common.allowance import Allowance, Calls, Revoked
from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.common.values import QubeName, TargetPorts
from qubes_fwd_qrexec.relay.callsigns import GREETING, clean_end
from qubes_fwd_qrexec.relay.copy import abort, half_close
from qubes_fwd_qrexec.target.callnotes import living
from qubes_fwd_qrexec.target.revocation import LOOK, revoke

LOOK_AND_TERM = (LOOK, signal.SIGTERM)


@pytest.fixture
def served(single_calls: ByProgram, server: socket.socket) -> Iterator[tuple[Called, socket.socket]]:
    called = single_calls.call(str(port_of(server)))
    server.settimeout(BOUND_S)
    sock, _ = server.accept()
    with sock:
        sock.settimeout(BOUND_S)
        yield called, sock


def receive_all(sock: socket.socket) -> bytes:
    data = b""
    while chunk := sock.recv(65536):
        data += chunk
    return data


Served = tuple[Called, socket.socket]


def test_bytes_and_both_ends_pass_each_way_by_itself(served: Served) -> None:
    called, sock = served
    sock.send(b"banner")
    assert called.stdout.recv(100) == b"banner"
    called.stdin.send(b"request")
    half_close(called.stdin)
    assert receive_all(sock) == b"request"
    sock.sendall(pattern(3_000_00))
    half_close(sock)
    assert receive_all(called.stdout) == pattern(3_000_00)
    assert called.end() == (0, "")
    assert called.signs == [f"{GREETING}\n", f"{clean_end(300_006)}\n"]


def test_a_clean_end_is_reported_before_it_is_passed_on(served: Served) -> None:
    called, sock = served
    sock.send(b"answer")
    half_close(sock)
    assert receive_all(called.stdout) == b"answer"
    assert called.process.stderr is not None
    os.set_blocking(called.process.stderr.fileno(), False)
    assert called.process.stderr.read() == f"{GREETING}\n{clean_end(6)}\n".encode()


def test_a_server_that_ends_first_gets_the_rest_of_the_upload(served: Served) -> None:
    called, sock = served
    half_close(sock)
    assert called.stdout.recv(1) == b""
    called.stdin.sendall(pattern(100_000))
    half_close(called.stdin)
    assert receive_all(sock) == pattern(100_000)
    assert called.end() == (0, "")


def test_what_a_server_has_not_read_when_the_call_is_over_is_not_lost(
    single_calls: ByProgram, server: socket.socket
) -> None:
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # the rest is with the service's socket
    called = single_calls.call(str(port_of(server)))
    server.settimeout(BOUND_S)
    sock, _ = server.accept()
    with sock:
        sock.settimeout(BOUND_S)
        half_close(sock)
        called.stdin.sendall(pattern(100_000))
        half_close(called.stdin)
        assert called.end() == (0, "")
        assert receive_all(sock) == pattern(100_000)


def test_killed_it_is_an_abort_to_the_server(served: Served) -> None:
    """docs/behaviours.md, 14: the kernel closes its sockets."""
    called, sock = served
    called.process.kill()
    with pytest.raises(ConnectionResetError):
        sock.recv(1)


def test_a_server_abort_is_status_74_after_its_bytes(served: Served) -> None:
    called, sock = served
    sock.send(b"last words")
    assert called.stdout.recv(100) == b"last words"
    abort(sock)
    assert called.stdout.recv(1) == b""
    assert called.end() == (ExitStatus.SERVER_RESET, "")
    assert called.signs == [f"{GREETING}\n"]


def test_a_server_that_takes_no_more_after_its_own_end_is_status_74(served: Served) -> None:
    called, sock = served
    sock.close()  # all was read, so this is a FIN; what comes now is answered by RST
    assert called.stdout.recv(1) == b""
    called.stdin.send(b"x")
    for _ in range(1000):
        try:
            called.stdin.send(b"x")
        except OSError:
            break
    assert called.end() == (ExitStatus.SERVER_RESET, "")


def test_a_caller_that_is_gone_is_an_abort_to_the_server(served: Served) -> None:
    called, sock = served
    called.stdout.close()
    assert called.end() == (ExitStatus.TROUBLE, "")
    with pytest.raises(ConnectionResetError):
        sock.recv(1)


def lose(called: Called) -> None:
    """As the agent does when the call is lost: it closes nothing, and waits for the service to exit."""
    called.stdin.shutdown(socket.SHUT_WR)
    called.stdout.shutdown(socket.SHUT_RD)


def fill(sock: socket.socket) -> None:
    """Send until the way is full."""
    sock.settimeout(0.2)
    with contextlib.suppress(TimeoutError):
        while True:
            sock.send(bytes(65536))
    sock.settimeout(BOUND_S)


@pytest.mark.parametrize("is_half_closed", [False, True])
def test_a_download_that_stands_ends_when_its_call_is_lost(served: Served, *, is_half_closed: bool) -> None:
    """A full UNIX stream whose reader takes no more is never ready to be written to."""
    called, sock = served
    if is_half_closed:
        half_close(called.stdin)
    fill(sock)
    lose(called)
    assert called.end() == (ExitStatus.TROUBLE, "")
    with pytest.raises(OSError, match=r"reset|Broken pipe"):
        fill(sock)


def test_a_call_in_which_nothing_moves_ends_when_it_is_lost(served: Served) -> None:
    called, sock = served
    half_close(called.stdin)
    assert sock.recv(1) == b""
    called.stdout.shutdown(socket.SHUT_RD)
    assert called.end() == (ExitStatus.TROUBLE, "")
    with pytest.raises(BrokenPipeError):
        sock.send(b"x")  # the FIN came before, so a reader is not told of the RST


def test_an_upload_that_stands_ends_when_its_call_is_lost(served: Served) -> None:
    called, _ = served
    fill(called.stdin)
    lose(called)
    assert called.end() == (ExitStatus.TROUBLE, "")


def test_an_upload_that_a_server_does_not_take_after_its_own_end_has_a_bound(
    single_calls: ByProgram, server: socket.socket
) -> None:
    """The agent has nothing more to shut down by which it could say that the call is lost."""
    called = single_calls.call(str(port_of(server)), target__singlecall__HALF_CLOSE_S=2.0)
    server.settimeout(BOUND_S)
    sock, _ = server.accept()
    with sock:
        half_close(sock)
        assert called.stdout.recv(1) == b""
        fill(called.stdin)
        assert called.end() == (ExitStatus.TROUBLE, "")


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QUBES_FORWARD_RUN_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


def test_dom0_ends_a_single_call_with_an_abort_and_a_status_of_its_own(run_dir: Path, served: Served) -> None:
    called, sock = served
    assert revoke(Allowance(), run_dir) == Revoked(1, 0)
    assert called.end() == (ExitStatus.REVOKED, "")
    with pytest.raises(ConnectionResetError):
        sock.recv(1)
    assert living(run_dir) == []


def test_a_single_call_that_drains_goes_on_to_its_deadline(
    run_dir: Path, server: socket.socket, served: Served
) -> None:
    called, sock = served
    mine = Calls(TargetPorts(port_of(server), port_of(server)), QubeName("sys-net"))
    assert revoke(Allowance(drains={mine: 3600}), run_dir) == Revoked(0, 1)
    called.stdin.send(b"x")
    assert sock.recv(100) == b"x"
    assert revoke(Allowance(drains={mine: 1}), run_dir).ended == 0
    assert called.end() == (ExitStatus.REVOKED, "")


def test_a_call_that_dom0_no_longer_allows_reaches_no_server(
    run_dir: Path, mux_call_home: None, single_calls: ByProgram, server: socket.socket
) -> None:
    """Its agent's process is older than dom0's list, however late the exposed qube lets it begin."""
    revoke(Allowance(), run_dir)
    for argument in (f"{port_of(server)}", f"{port_of(server)}+mux"):
        called = single_calls.call(argument)
        status, stderr = called.end()
        assert status == ExitStatus.REVOKED
        assert "dom0 no longer allows" in stderr
        server.setblocking(False)
    with pytest.raises(BlockingIOError):
        server.accept()


@pytest.mark.parametrize("agent", ["", "x", "1000000000"])
def test_a_call_without_a_known_time_of_permission_is_refused(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, single_calls: ByProgram, server: socket.socket, agent: str
) -> None:
    monkeypatch.setenv("QREXEC_AGENT_PID", agent)
    called = single_calls.call(str(port_of(server)))
    status, stderr = called.end()
    assert status == ExitStatus.TROUBLE
    assert "agent" in stderr


@pytest.mark.parametrize("redirect", ["2>&-", "0<&- 2>&-", "1>&- 2>&-", "0<&- 1>&- 2>&-"])
def test_errors_never_go_into_the_data(single_calls: ByProgram, redirect: str) -> None:
    ours, theirs = socket.socketpair()
    code = f"exec {shlex.join(map(str, single_calls.command()))} {free_port()} {redirect}"
    with ours, theirs, subprocess.Popen(["/bin/sh", "-c", code], stdin=theirs, stdout=theirs) as process:
        theirs.close()
        assert receive_all(ours) == b""
        assert process.wait(BOUND_S) != 0


def test_a_signal_that_was_blocked_at_the_start_ends_it_all_the_same(
    run_dir: Path, single_calls: ByProgram, server: socket.socket
) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, LOOK_AND_TERM)
    try:
        called = single_calls.call(str(port_of(server)))
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, LOOK_AND_TERM)
    server.settimeout(BOUND_S)
    sock, _ = server.accept()
    with sock:
        assert revoke(Allowance(), run_dir) == Revoked(1, 0)
        assert called.end() == (ExitStatus.REVOKED, "")


def test_one_socket_for_both_ways_will_do(single_calls: ByProgram, server: socket.socket) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [*single_calls.command(), str(port_of(server))]
        with subprocess.Popen(command, stdin=theirs, stdout=theirs) as process:
            theirs.close()
            server.settimeout(BOUND_S)
            sock, _ = server.accept()
            with sock:
                ours.send(b"request")
                half_close(ours)
                assert receive_all(sock) == b"request"
                sock.send(b"answer")
                half_close(sock)
                assert receive_all(ours) == b"answer"
            assert process.wait(BOUND_S) == 0


@pytest.mark.parametrize("arguments", [(), ("80", "81"), ("80+muxs",), ("\u0668\u0660",), ("x" * 10_000,)])
def test_a_bad_argument_ends_with_status_2_and_a_short_message(
    single_calls: ByProgram, arguments: tuple[str, ...]
) -> None:
    called = single_calls.call(*arguments)
    called.stdin.send(b"x")
    status, stderr = called.end()
    assert status == 2
    assert stderr.startswith("qubes.ForwardTCP: ")
    assert len(stderr) < 210


def test_nobody_listening_is_status_69(single_calls: ByProgram) -> None:
    called = single_calls.call(str(free_port()))
    status, stderr = called.end()
    assert status == ExitStatus.SERVER_REFUSED
    assert "Connection refused" in stderr
    assert called.signs == [f"{GREETING}\n"]


@pytest.mark.parametrize("redirect", ["</dev/null", "<&-", ">/dev/null", ">&- </dev/null"])
def test_standard_streams_that_are_no_sockets_are_refused(single_calls: ByProgram, redirect: str) -> None:
    command = f"exec {shlex.join(map(str, single_calls.command()))} 80 {redirect}"
    ended = subprocess.run(["/bin/sh", "-c", command], capture_output=True, check=False, timeout=BOUND_S)
    assert ended.returncode == 2
    assert b"is not a socket" in ended.stderr


def test_a_call_never_waits_for_trio_to_be_imported() -> None:
    code = "import sys, qubes_fwd_qrexec.service; sys.exit('trio' in sys.modules or 'logging' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
