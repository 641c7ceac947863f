# SPDX-License-Identifier: GPL-2.0-or-later
"""A rule ends, and with it its mux calls: dom0, broker, listener and target as they are, each a program."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import trio
from bounds import BOUND_S
from dom0 import forward
from helpers import free_port, is_listening, until

from qubes_fwd_qrexec.exposed.callwaits import WAIT_S
from qubes_fwd_qrexec.lab import daemon
from qubes_fwd_qrexec.lab.session import LabSession, open_session
from qubes_fwd_qrexec.target.callservice import LEASE_S


@pytest.fixture
def session() -> Iterator[LabSession]:
    with open_session(daemon.Network.LOOPBACK) as opened:
        yield opened


class Server:
    """A server in the target, and what it accepted."""

    def __init__(self) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.listening.settimeout(BOUND_S)
        self.port: int = self.listening.getsockname()[1]

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.listening.close()


class Joined:
    """A client's connection and the server's end of it; bytes have passed both ways."""

    def __init__(self, exposed_port: int, server: Server) -> None:
        self._open = ExitStack()
        self.client = self._open.enter_context(
            socket.create_connection(("127.0.0.1", exposed_port), timeout=BOUND_S)
        )
        self.client.sendall(b"hello")
        self.far = self._open.enter_context(server.listening.accept()[0])
        self.far.settimeout(BOUND_S)
        self.echo()

    def __enter__(self) -> "Joined":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def echo(self) -> None:
        self.client.sendall(b"x")
        while not self.far.recv(64).endswith(b"x"):
            pass
        self.far.sendall(b"y")
        assert self.client.recv(64) == b"y"


def add(session: LabSession, server: Server, *options: str, name: str = "web") -> int:
    """Forward a free port to the server in work; the exposed port."""
    port = free_port()
    forward(
        session.lab,
        "add",
        "work",
        f"{port}:{server.port}",
        "--from=any",
        "--listen=127.0.0.1",
        f"--name={name}",
        *options,
    )
    return port


# What ends within a bound is ended by dom0's word, and not by its lease.
assert BOUND_S < LEASE_S


def refused(port: int) -> bool:
    """Whether a new connection gets nowhere: not accepted, or accepted and reset."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=BOUND_S) as client:
            client.sendall(b"x")
            client.recv(1)
            return False
    except (ConnectionRefusedError, ConnectionResetError):
        return True


def test_a_removed_rules_connections_end_at_once_and_those_of_others_go_on(session: LabSession) -> None:
    with Server() as server, Server() as other_server:
        port = add(session, server)
        other_port = add(session, other_server, name="other")
        inner = add(session, server, "--via=sys-firewall", name="inner")
        for qube in ("sys-net", "sys-firewall"):
            session.start_listener(qube)
        with (
            Joined(port, server) as idle,
            Joined(other_port, other_server) as of_another_port,
            Joined(inner, server) as of_another_source,
        ):
            assert "is removed and closed" in forward(session.lab, "remove", "work", "web")
            for end in (idle.client, idle.far):
                with pytest.raises(ConnectionResetError):
                    end.recv(1)
            assert refused(port)
            of_another_port.echo()
            of_another_source.echo()
            with Joined(inner, server) as new:
                new.echo()


def test_clients_that_are_cut_end_at_once_also_after_their_rule_and_those_of_others_go_on(
    session: LabSession,
) -> None:
    with Server() as server:
        port = add(session, server, "--on-expire=drain")
        session.start_listener("sys-net")
        with Joined(port, server) as first, Joined(port, server) as second:
            client = f"127.0.0.1:{first.client.getsockname()[1]}"
            assert client in forward(session.lab, "status", "--clients")
            assert "Cut 1 connection " in forward(session.lab, "cut", "work", "web", f"--client={client}")
            for end in (first.client, first.far):
                with pytest.raises(ConnectionResetError):
                    end.recv(1)
            second.echo()
            assert client not in forward(session.lab, "status", "--clients")
            forward(session.lab, "remove", "work", "web")
            second.echo()
            assert "Cut 1 connection " in forward(session.lab, "cut", "work", "web")
            with pytest.raises(ConnectionResetError):
                second.client.recv(1)


@pytest.mark.parametrize("transport", ["mux", "call"])
def test_dom0_ends_calls_though_the_exposed_qube_does_nothing(session: LabSession, transport: str) -> None:
    with Server() as server:
        port = add(session, server, f"--transport={transport}")
        listener = session.start_listener("sys-net")
        with Joined(port, server) as idle:
            listener.send_signal(signal.SIGSTOP)
            try:
                forward(session.lab, "disable", "work", "web")
                with pytest.raises(ConnectionResetError):
                    idle.far.recv(1)
            finally:
                listener.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("change", ["srcports={port} dstports={other}", "via=sys-firewall"])
def test_a_rule_that_moves_takes_its_mux_calls_along(session: LabSession, change: str) -> None:
    with Server() as server, Server() as other_server:
        port = add(session, server)
        session.start_listener("sys-net")
        with Joined(port, server) as idle:
            words = change.format(port=port, other=other_server.port).split()
            forward(session.lab, "set", "work", "web", *words)
            with pytest.raises(ConnectionResetError):
                idle.far.recv(1)


def test_an_expired_rules_mux_calls_end_when_it_is_applied(session: LabSession) -> None:
    with Server() as server:
        port = add(session, server)
        session.start_listener("sys-net")
        with Joined(port, server) as idle:
            forward(session.lab, "set", "work", "web", f"expire={int(time.time()) + 1}", "--no-apply")
            end = "work: end connections that are not allowed any more"
            trio.run(until, lambda: end in forward(session.lab, "apply", "--dry-run"))
            idle.echo()
            assert end in forward(session.lab, "apply")
            with pytest.raises(ConnectionResetError):
                idle.client.recv(1)


def test_a_change_that_keeps_the_flow_keeps_its_connections(session: LabSession) -> None:
    with Server() as server:
        port = add(session, server)
        session.start_listener("sys-net")
        with Joined(port, server) as idle:
            forward(session.lab, "set", "work", "web", "autostart=yes", "comment=still here")
            idle.echo()


def test_connections_of_a_rule_that_drains_go_on(session: LabSession) -> None:
    with Server() as server:
        port = add(session, server, "--on-expire=drain")
        session.start_listener("sys-net")
        with Joined(port, server) as idle:
            forward(session.lab, "remove", "work", "web")
            trio.run(until, lambda: not is_listening(port))
            idle.echo()


def test_a_mux_call_that_drains_takes_no_new_connection_whatever_the_exposed_qube_does(
    session: LabSession,
) -> None:
    with Server() as server:
        port = add(session, server, "--on-expire=drain")
        listener = session.start_listener("sys-net")
        with Joined(port, server) as idle:
            config = session.lab.qube_dir("sys-net").vm_config / "fwd.work.web"
            text = config.read_text()
            forward(session.lab, "remove", "work", "web")
            # The exposed qube goes on as if it had not been told.
            config.write_text(text)
            listener.send_signal(signal.SIGHUP)
            trio.run(until, lambda: is_listening(port))
            with socket.create_connection(("127.0.0.1", port), timeout=BOUND_S) as new:
                new.sendall(b"x")
                server.listening.settimeout(1.0)
                with pytest.raises(TimeoutError):
                    server.listening.accept()
                # Nor does it wait for as long as it would for a target that is full.
                new.settimeout(WAIT_S / 2)
                with pytest.raises(ConnectionResetError):
                    new.recv(1)
            idle.echo()


def removed_where_revoking_ends(session: LabSession, status: int) -> subprocess.CompletedProcess[str]:
    """The rule's removal, which fails as the target's service ends with this status."""
    place = session.lab.qube_dir("work").service_dirs[0] / "qubes.ForwardRevoke"
    place.unlink(missing_ok=True)
    place.write_text(f"#!/bin/sh\nexit {status}\n", encoding="ascii")
    place.chmod(0o755)
    done = subprocess.run(
        session.command("admin.views.cli", "--lab", str(session.lab.root), "remove", "work", "web"),
        capture_output=True,
        text=True,
        env=os.environ,
        check=False,
        timeout=BOUND_S,
    )
    assert done.returncode == 1
    return done


def test_a_revocation_that_fails_is_said_and_all_else_is_closed(session: LabSession) -> None:
    with Server() as server:
        add(session, server)
        done = removed_where_revoking_ends(session, 3)
        assert "the change is stored, but not everything could be done" in done.stderr
        assert "qubes.ForwardRevoke in work ended with exit status 3" in done.stderr
        assert "What is open to work may go on: over a mux call for at most 300 s" in done.stderr
        assert session.lab.vm_config("sys-net") == {}
        assert "Nothing to change" in forward(session.lab, "apply")


def test_a_target_that_is_older_than_the_message_is_said_and_all_else_is_closed(session: LabSession) -> None:
    with Server() as server:
        port = add(session, server)
        session.start_listener("sys-net")
        done = removed_where_revoking_ends(session, 2)
        assert "its package is older than dom0's" in done.stderr
        assert session.lab.vm_config("sys-net") == {}
        trio.run(until, lambda: not is_listening(port))
