# SPDX-License-Identifier: GPL-2.0-or-later
"""The process for all calls for one connection, as systemd starts it, and as dom0 ends calls of it."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from helpers import BOUND_S, KILLED_S, listening_socket, port_of
from processes import TARGET, open_world, until
from single_calls import ByHandover, handover_program, takes_calls
from test_handover import activated

from qubes_fwd_qrexec.common.allowance import Allowance, Calls, Revoked
from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.common.services import FORWARD_SERVICE
from qubes_fwd_qrexec.common.values import QubeName, TargetPorts
from qubes_fwd_qrexec.relay.copy import abort, half_close
from qubes_fwd_qrexec.target.callnotes import Note, living
from qubes_fwd_qrexec.target.handover import SOCKET_VARIABLE, listen_on
from qubes_fwd_qrexec.target.revocation import revoke


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    run = tmp_path / "run"
    monkeypatch.setenv("QUBES_FORWARD_RUN_DIR", str(run))
    return run


@pytest.fixture
def handover(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ByHandover]:
    with ExitStack() as undo:
        yield ByHandover(undo, tmp_path, monkeypatch)


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with listening_socket() as sock:
        sock.settimeout(BOUND_S)
        yield sock


def accept(server: socket.socket) -> socket.socket:
    sock, _ = server.accept()
    sock.settimeout(BOUND_S)
    return sock


def calls_to(server: socket.socket) -> Calls:
    return Calls(TargetPorts(port_of(server), port_of(server)), QubeName("sys-net"))


def test_dom0_ends_the_calls_that_it_does_not_allow_and_no_others(
    handover: ByHandover, server: socket.socket, home: Path
) -> None:
    with listening_socket() as kept_server:
        kept_server.settimeout(BOUND_S)
        kept = calls_to(kept_server)
        ended, call = handover.call(str(port_of(server))), handover.call(str(port_of(kept_server)))
        with accept(server) as far, accept(kept_server) as kept_far:
            assert revoke(Allowance(keeps=frozenset({kept})), home) == Revoked(1, 0)
            with pytest.raises(ConnectionResetError):
                far.recv(1)
            assert ended.end()[0] == ExitStatus.REVOKED
            call.stdin.send(b"x")
            assert kept_far.recv(1) == b"x"
            assert revoke(Allowance(drains={kept: 3600}), home) == Revoked(0, 1)
            assert revoke(Allowance(drains={kept: 1}), home).ended == 0
            with pytest.raises(ConnectionResetError):
                kept_far.recv(1)
            assert call.end()[0] == ExitStatus.REVOKED
            assert living(home) == []


def test_dom0_ends_a_process_that_does_not_obey(
    handover: ByHandover, server: socket.socket, home: Path
) -> None:
    """And what has handed its call over then says that it failed."""
    call = handover.call(str(port_of(server)))
    with accept(server) as far:
        (note,) = living(home)
        os.kill(note.pid, signal.SIGSTOP)
        assert revoke(Allowance(), home, obey_s=KILLED_S) == Revoked(1, 0)
        with pytest.raises(ConnectionResetError):
            far.recv(1)
        assert call.end() == (ExitStatus.TROUBLE, "")


def test_without_a_process_each_call_is_a_program(handover: ByHandover, server: socket.socket) -> None:
    handover.command()
    assert handover.process is not None
    handover.process.kill()
    handover.process.wait()
    call = handover.call(str(port_of(server)))
    with accept(server) as far:
        far.send(b"answer")
        half_close(far)
        half_close(call.stdin)
        assert call.stdout.recv(10) == b"answer"
        assert call.end() == (0, "")


def test_a_mux_call_is_a_program_too(handover: ByHandover, server: socket.socket, home: Path) -> None:
    handover.call(f"{port_of(server)}+mux")
    until(lambda: living(home))
    assert handover.process is not None
    assert [str(note.kind) for note in living(home) if note.pid != handover.process.pid] == ["mux"]


def test_systemd_may_pass_the_socket_and_keeps_it(
    tmp_path: Path, server: socket.socket, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "socket"
    monkeypatch.setenv(SOCKET_VARIABLE, str(path))
    with listen_on(path) as listening, ExitStack() as undo:
        process = activated(listening.fileno())
        undo.callback(process.kill)
        command = [str(handover_program()), str(port_of(server))]
        ours, theirs = socket.socketpair()
        with ours, subprocess.Popen(command, stdin=theirs, stdout=theirs) as program:
            theirs.close()
            with accept(server) as far:
                far.send(b"hello")
                half_close(far)
                assert ours.recv(10) == b"hello"
                process.send_signal(signal.SIGTERM)
                half_close(ours)
                assert far.recv(1) == b""
            assert program.wait(BOUND_S) == 0
        _, stderr = process.communicate(timeout=BOUND_S)
        assert (process.returncode, stderr) == (0, b"")
        assert takes_calls(path)  # the next start will accept it


def test_the_program_makes_its_socket_and_ends_on_sigterm(tmp_path: Path, home: Path) -> None:
    path = tmp_path / "socket"
    command = [sys.executable, "-m", "qubes_fwd_qrexec.service", "--socket", str(path)]
    with subprocess.Popen(command) as process:
        until(lambda: takes_calls(path))
        process.send_signal(signal.SIGTERM)
        assert process.wait(BOUND_S) == 0


def test_in_a_lab_it_begins_at_the_first_call_and_every_abort_is_one(tmp_path: Path) -> None:
    """docs/behaviours.md, 11: all the way."""
    with open_world(tmp_path) as world:
        place = world.lab.qube_dir(TARGET)
        entry = place.service_dirs[-1] / FORWARD_SERVICE
        entry.unlink()
        entry.symlink_to(handover_program())
        way = world.forward("call")
        world.start_listener()
        assert not notes_in(place.root)
        with way.connect() as connection, way.connect() as other:
            connection.echo()
            other.echo()
            (pid,) = {note.pid for note in notes_in(place.root)}
            assert b"--activated" in Path(f"/proc/{pid}/cmdline").read_bytes()
            abort(connection.far)
            with pytest.raises(ConnectionResetError):
                connection.client.recv(1)
            other.echo()
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(ConnectionResetError):
                other.client.recv(1)
        with way.connect() as another:
            another.echo()
            assert pid not in {note.pid for note in notes_in(place.root)}


def notes_in(qube: Path) -> list[Note]:
    return living(qube / "run" / "forward")
