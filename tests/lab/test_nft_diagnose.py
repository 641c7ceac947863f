# SPDX-License-Identifier: GPL-2.0-or-later
"""What status and diagnose say of a forward by nft in a lab with the IP of Qubes, as packets go along it."""

import io
import json
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import schema

from qubes_fwd_qrexec.admin.views.cli import run
from qubes_fwd_qrexec.admin.views.tables import Style
from qubes_fwd_qrexec.lab import daemon, netns
from qubes_fwd_qrexec.lab.blueprint import create_lab
from qubes_fwd_qrexec.lab.directory import LabDirectory

from .lab_up import BOUND_S, becomes
from .test_networks import connect_error, needs_wires, qube_python

PORT = 8000
PATH = ("sys-net", "sys-firewall", "work")


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[LabDirectory]:
    """A lab with a forward by nft that is in force at each qube of its path."""
    made = create_lab(tmp_path / "lab")
    for qube in PATH:
        made.set_feature(qube, "service.qubes-forward-nft", "1")
        made.set_feature(qube, "supported-rpc.qubes.ForwardNft", "1")
    try:
        daemon.start(made, daemon.Network.NAMESPACES)
        forward(made, "add", "work", str(PORT), "--from", netns.LAN_HOST, "--name", "web", "--mode", "nft")
        becomes(lambda: standings(made) == {"in-force"})
        yield made
    finally:
        daemon.stop(made)


def forward(lab: LabDirectory, *words: str) -> Any:
    out, err = io.StringIO(), io.StringIO()
    environ = {"QVM_FORWARD_LAB": str(lab.root)}
    given: dict[str, Any] = {"stdin": io.StringIO(), "out": out, "err": err, "style": Style()}
    run([*words, "--json"], environ=environ, now=1_800_000_000, **given)
    assert not err.getvalue()
    schema.check([*words, "--json"], out.getvalue())
    return json.loads(out.getvalue())


def standings(lab: LabDirectory) -> set[str]:
    (found,) = forward(lab, "status")["forwards"]
    return {hop["state"] for hop in found["answers"]}


def last_step(lab: LabDirectory) -> tuple[str, str]:
    """The step at which diagnose ends, and why or what it found."""
    step = forward(lab, "diagnose", "work", "web")["steps"][-1]
    return step["step"], step["cause"] or step["text"]


def serve(lab: LabDirectory, address: str, opened: ExitStack) -> subprocess.Popen[bytes]:
    """A server in work, until the test is over."""
    script = (
        f"import socket; s = socket.create_server(({address!r}, {PORT})); print('up', flush=True)\n"
        "while True: s.accept()[0].close()"
    )
    server = opened.enter_context(qube_python(lab, "work", script))
    opened.callback(server.kill)
    assert server.stdout is not None
    assert server.stdout.readline() == b"up\n"
    return server


@needs_wires
def test_status_counts_what_goes_and_diagnose_tells_where_it_ends(lab: LabDirectory) -> None:
    (found,) = forward(lab, "status")["forwards"]
    assert found["state"] == "active"
    assert [hop["qube"] for hop in found["answers"]] == [*PATH]
    assert found["figures"]["total"] == 0
    assert last_step(lab) == ("server", "no-server")
    with ExitStack() as opened:
        server = serve(lab, "127.0.0.1", opened)
        assert last_step(lab) == ("server", "loopback")
        server.kill()
        server.wait(BOUND_S)
        serve(lab, "0.0.0.0", opened)
        assert connect_error(lab, netns.LAN, netns.EDGE_ADDRESS, PORT) == ""
        assert last_step(lab) == ("server", f"in work, tcp port {PORT}: a server listens at 0.0.0.0")
    (found,) = forward(lab, "status")["forwards"]
    assert [hop["figures"]["total"] for hop in found["answers"]] == [1, 1, 1]
    assert all(hop["figures"]["packets"] > 0 for hop in found["answers"])
    texts = [
        step["text"] for step in forward(lab, "diagnose", "work", "web")["steps"] if step["step"] == "hop"
    ]
    assert [text.partition(": ")[2].partition(" and ")[0] for text in texts] == ["1 connection"] * 2


@needs_wires
def test_a_client_that_is_not_let_in_is_not_counted(lab: LabDirectory) -> None:
    forward(lab, "set", "work", "web", "srchosts=192.0.2.1")
    assert connect_error(lab, netns.LAN, netns.EDGE_ADDRESS, PORT, 0.5) == "TimeoutError"
    (found,) = forward(lab, "status")["forwards"]
    assert [hop["figures"]["packets"] for hop in found["answers"]] == [0, 0, 0]
