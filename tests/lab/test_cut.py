# SPDX-License-Identifier: GPL-2.0-or-later
"""Clients are seen and cut in a lab: from dom0's command to the client's socket."""

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from qubes_fwd_qrexec.lab import daemon
from qubes_fwd_qrexec.lab.session import open_session

from .diagnosed_lab import BOUND_S, Lab


@pytest.fixture
def lab() -> Iterator[Lab]:
    """With a forward that drains."""
    with open_session(daemon.Network.LOOPBACK) as session, ExitStack() as undo:
        found = Lab(session, undo)
        found.add("--on-expire=drain")
        found.listen()
        yield found


class Client:
    """A connection through the forward, with the server's end of it."""

    def __init__(self, lab: Lab, undo: ExitStack) -> None:
        self.near = undo.enter_context(socket.create_connection(("127.0.0.1", lab.port), timeout=BOUND_S))
        far, _ = lab.server.accept()
        self._far = undo.enter_context(far)
        self.check_alive()

    @property
    def name(self) -> str:
        return f"127.0.0.1:{self.near.getsockname()[1]}"

    def check_alive(self) -> None:
        self._far.sendall(b"x")
        assert self.near.recv(1) == b"x"

    def check_cut(self) -> None:
        with pytest.raises(ConnectionResetError):
            self.near.recv(1)


def named(lab: Lab) -> dict[str, bool]:
    """The clients that status names, and whether each drains."""
    told = json.loads(lab.run("status", "--clients", "--json")[1])
    assert {(one["exposed"], one["target"], one["name"]) for one in told["clients"]} <= {
        ("sys-net", "work", "web")
    }
    return {f"{one['address']}:{one['port']}": one["is_draining"] for one in told["clients"]}


def test_one_client_is_cut_at_once_and_another_once_its_rule_is_gone(lab: Lab) -> None:
    with ExitStack() as undo:
        first, second = Client(lab, undo), Client(lab, undo)
        assert named(lab) == dict.fromkeys((first.name, second.name), False)
        status, said = lab.run("cut", "work", "web", "--client", first.name)
        assert (status, said.partition(".")[0]) == (0, "Cut 1 connection of work web from 127")
        first.check_cut()
        lab.run("remove", "work", "web")
        rows = [" ".join(line.split()) for line in lab.run("status", "--clients")[1].splitlines()]
        assert any(row.startswith("work web draining sys-net 1 connection in ") for row in rows)
        assert any(row.startswith(f"work web draining sys-net {second.name} ") for row in rows)
        second.check_alive()
        said = "Cut 1 connection of work web. Its forward is closed, so nobody can connect again.\n"
        assert lab.run("cut", "work") == (0, said)
        second.check_cut()
