# SPDX-License-Identifier: GPL-2.0-or-later
"""The broker in the background, by the program that users have: up, down, status, knob, run, verdicts."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from helpers import free_port, until

from qubes_fwd_qrexec.admin.answers import AnswerError
from qubes_fwd_qrexec.common.nftreport import NftReport
from qubes_fwd_qrexec.common.report import REPORT_MAX_BYTES
from qubes_fwd_qrexec.common.services import NFT_SERVICE
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.lab import control, daemon, netns, units
from qubes_fwd_qrexec.lab.blueprint import create_lab
from qubes_fwd_qrexec.lab.cli import main
from qubes_fwd_qrexec.lab.directory import LabDirectory, write_text
from qubes_fwd_qrexec.lab.qube import QubeState
from qubes_fwd_qrexec.lab.running import client_command
from qubes_fwd_qrexec.lab.store import LabStore

NETNS_PROBLEM = netns.why_unavailable()
needs_netns = pytest.mark.skipif(NETNS_PROBLEM is not None, reason=str(NETNS_PROBLEM))
WIRES_PROBLEM = NETNS_PROBLEM or netns.why_no_firewall()
needs_wires = pytest.mark.skipif(WIRES_PROBLEM is not None, reason=str(WIRES_PROBLEM))
VECTORS = Path(__file__).parents[1] / "vectors" / "policy-verdicts.json"
BOUND_S = 60.0
SYS_NET = QubeName("sys-net")
FORWARD_PORT = 8000
FORWARD_KEY = "vm-config.fwd.work.web"
FORWARD = (
    "version=1 service=qubes.ForwardTCP transport=call side=outer listen=0.0.0.0"
    f" srcports={FORWARD_PORT}-{FORWARD_PORT} dstports=80-80 srchosts={netns.LAN_HOST}/32"
)


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LabDirectory]:
    made = create_lab(tmp_path / "lab")
    monkeypatch.setenv("QVM_FORWARD_LAB", str(made.root))
    write_text(made.policy_dir / "30-forward.policy", "* * @anyvm @anyvm allow\n")
    service = made.qube_dir("work").service_dirs[0] / "test.Service"
    service.write_text("#!/bin/sh\necho up; cat; exit 3\n", encoding="utf-8")
    service.chmod(0o755)
    try:
        yield made
    finally:
        daemon.stop(made)


@contextmanager
def calling(lab: LabDirectory) -> Iterator[subprocess.Popen[bytes]]:
    """A call that is up and goes on."""
    client = subprocess.Popen(
        [*client_command(lab, "sys-net"), "work", "test.Service"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"up\n"
        yield client


def call(
    lab: LabDirectory, service: str = "test.Service", target: str = "work", **options: object
) -> subprocess.CompletedProcess[bytes]:
    command = [*client_command(lab, "sys-net"), target, service]
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, timeout=BOUND_S, check=False
    )


def test_up_takes_calls_and_down_ends_all(lab: LabDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", "--no-netns"]) == 0
    assert "share this machine's loopback" in capsys.readouterr().out
    assert call(lab).returncode == 3
    assert main(["up"]) == 1
    assert "is up already" in capsys.readouterr().err
    # A call has its place until its agent has ended, a moment after its client has.
    trio.run(until, lambda: control.ask(lab, {"do": "status"})["calls"] == {})
    assert main(["status", "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["up"], status["network"], status["calls"]) == (True, "loopback", {})
    assert main(["down"]) == 0
    assert main(["down"]) == 0
    assert "was not up" in capsys.readouterr().out
    assert not lab.qube_dir("sys-net").agent_socket.exists()
    assert main(["status"]) == 0
    assert "down" in capsys.readouterr().out
    assert call(lab).returncode == 1


def test_up_recovers_after_the_broker_was_killed(lab: LabDirectory) -> None:
    pid = daemon.start(lab, daemon.Network.LOOPBACK)
    with calling(lab) as client:
        kill_broker(lab, pid)
        assert client.wait(BOUND_S) == 255
    assert lab.qube_dir("sys-net").agent_socket.exists()
    assert daemon.start(lab, daemon.Network.LOOPBACK) != pid
    assert call(lab).returncode == 3


def kill_broker(lab: LabDirectory, pid: int) -> None:
    """Kill it, and wait until it is gone."""
    broker = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(broker, signal.SIGKILL)
        assert select.select([broker], [], [], BOUND_S)[0]
    finally:
        os.close(broker)
    assert daemon.broker_pid(lab) is None


def test_pid_of_another_program_is_not_taken_for_a_broker(lab: LabDirectory) -> None:
    lab.pid_file.write_text(f"{os.getpid()}\n", encoding="ascii")
    assert daemon.broker_pid(lab) is None
    assert daemon.stop(lab) is False


def test_signal_of_a_service_to_its_agent_does_not_end_the_broker(lab: LabDirectory) -> None:
    daemon.start(lab, daemon.Network.LOOPBACK)
    service = lab.qube_dir("work").service_dirs[0] / "test.Service"
    service.write_text("#!/bin/sh\nkill -USR1 $QREXEC_AGENT_PID; exit 8\n", encoding="utf-8")
    assert call(lab).returncode == 8
    assert call(lab).returncode == 8


def test_broker_that_cannot_start_says_why(lab: LabDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    lab.qube_dir("work").file.write_text("{", encoding="utf-8")
    assert main(["up", "--no-netns"]) == 1
    assert "work/qube.json" in capsys.readouterr().err
    assert daemon.broker_pid(lab) is None


def test_knobs_are_set_by_name_and_calls_dropped(
    lab: LabDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.start(lab, daemon.Network.LOOPBACK)
    assert main(["knob", "refuse", "work"]) == 0
    assert call(lab).returncode == 126
    assert main(["knob", "refuse", ""]) == 0
    assert lab.knobs().refuse == ()
    with calling(lab) as client:
        assert main(["knob", "drop", "1"]) == 0
        assert client.wait(BOUND_S) == 255
    assert "dropped 1 calls" in capsys.readouterr().out
    assert main(["knob"]) == 0
    assert json.loads(capsys.readouterr().out)["latency_ms"] == 0
    assert main(["knob", "latency_ms"]) == 0
    assert capsys.readouterr().out == "latency_ms = 0\n"


@pytest.mark.parametrize(
    "words",
    [
        ["knob", "nosuch", "1"],
        ["knob", "nosuch"],
        ["knob", "drop"],
        ["--lab", "", "status"],
        ["init", ""],
        ["knob", "drop", "2"],
        ["knob", "drop", "x"],
        ["run", "work"],
    ],
)
def test_bad_words_are_usage_errors(
    lab: LabDirectory, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err.startswith("qvm-forward-lab: ")


def test_without_a_lab_the_program_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("QVM_FORWARD_LAB", raising=False)
    assert main(["status"]) == 2
    assert "--lab DIR" in capsys.readouterr().err
    assert main(["--lab", str(tmp_path), "status"]) == 1
    assert main(["init", str(tmp_path / "new")]) == 0
    assert main(["--lab", str(tmp_path / "new"), "status"]) == 0
    assert main(["--lab", str(tmp_path / "new"), "knob", "drop", "1"]) == 1


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["up", "--no-netns"], "run/broker.log: Is a directory"),
        (["run", "work", "--", "true"], ": down; 'qvm-forward-lab up' starts it"),
        (["knob", "drop", "1"], ": down; 'qvm-forward-lab up' starts it"),
    ],
)
def test_what_cannot_be_done_is_said_with_its_place(
    lab: LabDirectory, words: list[str], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lab.log_file.mkdir(parents=True)
    assert main(words) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"qvm-forward-lab: {lab.root}")
    assert said.endswith(f"{what}\n")
    assert "Errno" not in said


def test_a_reader_that_has_seen_enough_is_no_error(lab: LabDirectory) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "wb") as out:
        done = subprocess.run(
            [sys.executable, "-m", "qubes_fwd_qrexec.lab.cli", "--lab", str(lab.root), "status"],
            stdout=out,
            stderr=subprocess.PIPE,
            timeout=BOUND_S,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, b"")


def test_verdicts_are_counted_and_differences_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verdicts", str(VECTORS)]) == 0
    assert capsys.readouterr().out == "1205 verdicts agree, 0 differ\n"
    data = json.loads(VECTORS.read_text(encoding="utf-8"))
    data["cases"] = data["cases"][:3]
    data["cases"][1]["result"] = {"outcome": "allow"}
    path = tmp_path / "v.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    assert main(["verdicts", str(path)]) == 1
    out = capsys.readouterr().out
    assert out.startswith("2 verdicts agree, 1 differ\ncase 1:")
    assert main(["verdicts", "--json", str(path)]) == 1
    assert json.loads(capsys.readouterr().out)["differ"] == 1


@needs_netns
def test_what_listens_on_a_qubes_loopback_is_found_by_a_call_and_by_nothing_else(lab: LabDirectory) -> None:
    daemon.start(lab, daemon.Network.NAMESPACES)
    port = free_port()
    script = (
        f"import socket; s = socket.create_server(('127.0.0.1', {port})); print('up', flush=True);"
        "c, _ = s.accept(); c.sendall(b'page'); c.close()"
    )
    with qube_python(lab, "work", script) as server, ExitStack() as undo:
        undo.callback(server.kill)  # it would wait for ever, and we for it
        assert server.stdout is not None
        assert server.stdout.readline() == b"up\n"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=BOUND_S)
        assert call(lab, f"qubes.ConnectTCP+{port}").stdout == b"page"
        assert server.wait(BOUND_S) == 0
    assert daemon.stop(lab)
    assert not list(Path("/run/netns").glob(netns.namespace_name(lab, "*")))


@needs_wires
def test_qubes_are_joined_by_ip_as_their_netvms_say_and_as_those_change(lab: LabDirectory) -> None:
    """What passes these joins, and what does not, is tested in `test_wires`."""
    daemon.start(lab, daemon.Network.NAMESPACES)
    for address in (netns.LAN_HOST, netns.LAN_HOST_IPV6):
        assert connect_error(lab, "work", address) == "ConnectionRefusedError"
        assert connect_error(lab, "vault", address) == "OSError"
    # Behind the VPN qube there is the tunnel.
    assert connect_error(lab, "untrusted", netns.PROVIDER_HOST) == "ConnectionRefusedError"
    work = lab.qube("work")
    for netvm, error in ((None, "OSError"), (work.netvm, "ConnectionRefusedError")):
        with lab.locked():
            lab.write_qube(replace(work, netvm=netvm))
        becomes(lambda error=error: connect_error(lab, "work", netns.LAN_HOST) == error)
    with lab.locked():
        lab.set_state("sys-firewall", QubeState.HALTED)
    becomes(lambda: connect_error(lab, "work", netns.LAN_HOST) == "OSError")
    # A call starts it.
    assert call(lab, "qubes.Missing", "sys-firewall").returncode == 127
    assert connect_error(lab, "work", netns.LAN_HOST) == "ConnectionRefusedError"


@needs_wires
def test_listen_starts_what_the_units_of_a_qube_start_until_the_lab_is_down(
    lab: LabDirectory, capfd: pytest.CaptureFixture[str]
) -> None:
    daemon.start(lab, daemon.Network.NAMESPACES)
    assert main(["listen", "sys-net"]) == 0
    assert capfd.readouterr().out == "sys-net: the listener is ready\nsys-net: the firewall helper is ready\n"
    assert main(["listen", "sys-net"]) == 0
    assert "the listener runs already\nsys-net: the firewall helper runs already" in capfd.readouterr().out
    with lab.locked():
        lab.set_feature("sys-net", FORWARD_KEY, FORWARD)
    becomes(lambda: connect_error(lab, netns.LAN, netns.EDGE_ADDRESS, FORWARD_PORT) == "")
    report = NftReport.parse(LabStore(lab).ask(SYS_NET, NFT_SERVICE, REPORT_MAX_BYTES, BOUND_S))
    assert report.versions == {4, 6}
    # The port is the forward's, and the firewall is open for that alone.
    assert connect_error(lab, netns.LAN, netns.EDGE_ADDRESS, FORWARD_PORT + 1, 0.5) == "TimeoutError"
    assert daemon.stop(lab)
    assert units.running(lab, "sys-net") == set()


def test_without_networks_of_their_own_listen_says_what_is_missing(
    lab: LabDirectory, capfd: pytest.CaptureFixture[str]
) -> None:
    daemon.start(lab, daemon.Network.LOOPBACK)
    assert main(["listen", "sys-net"]) == 0
    out = capfd.readouterr().out
    assert "sys-net: the listener is ready\nsys-net: no firewall, and no forward by nft: " in out
    assert "'qvm-forward-lab up' by root gives each a network of its own" in out
    assert units.running(lab, "sys-net") == {units.Unit.LISTENER}
    with pytest.raises(AnswerError, match="there is no forward by nft in this lab: its qubes share this"):
        LabStore(lab).ask(SYS_NET, NFT_SERVICE, REPORT_MAX_BYTES, BOUND_S)


def test_listen_names_what_cannot_listen(lab: LabDirectory, capfd: pytest.CaptureFixture[str]) -> None:
    with lab.locked():
        lab.set_state("work", QubeState.HALTED)
    for qube, problem in (("work", "work: is not running"), ("dom0", "dom0: has no listener")):
        assert main(["listen", qube]) == 1
        assert problem in capfd.readouterr().err
    assert main(["listen", "sys-net"]) == 1
    assert "down; 'qvm-forward-lab up' starts it" in capfd.readouterr().err


@needs_wires
def test_a_qube_whose_switch_is_on_has_its_firewall_helper_when_it_starts(lab: LabDirectory) -> None:
    with lab.locked():
        lab.set_feature("sys-firewall", "service.qubes-forward-nft", "1")
    daemon.start(lab, daemon.Network.NAMESPACES)
    becomes(lambda: units.running(lab, "sys-firewall") == {units.Unit.FIREWALL})
    assert units.running(lab, "sys-net") == set()
    with lab.locked():
        lab.set_state("sys-firewall", QubeState.HALTED)
    becomes(lambda: units.running(lab, "sys-firewall") == set())
    with lab.locked():
        lab.set_state("sys-firewall", QubeState.RUNNING)
    becomes(lambda: units.running(lab, "sys-firewall") == {units.Unit.FIREWALL})


@needs_netns
def test_namespaces_of_a_killed_broker_are_removed_by_the_next(lab: LabDirectory) -> None:
    kill_broker(lab, daemon.start(lab, daemon.Network.NAMESPACES))
    assert list(Path("/run/netns").glob(netns.namespace_name(lab, "*")))
    daemon.start(lab, daemon.Network.LOOPBACK)
    assert not list(Path("/run/netns").glob(netns.namespace_name(lab, "*")))


@needs_netns
def test_namespaces_that_fail_half_way_leave_none(lab: LabDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netns, "EDGE_ADDRESSES", ("nonsense",))
    with pytest.raises(netns.StoreError, match="nonsense"):
        netns.Namespaces(lab).create()
    assert not list(Path("/run/netns").glob(netns.namespace_name(lab, "*")))


def becomes(condition: Callable[[], bool]) -> None:
    """Wait until it comes true, within the bound; each look starts a program."""
    until_s = time.monotonic() + BOUND_S
    while not condition():
        assert time.monotonic() < until_s


def qube_python(lab: LabDirectory, qube: str, script: str) -> subprocess.Popen[bytes]:
    import sys

    command = [sys.executable, "-m", "qubes_fwd_qrexec.lab.cli", "--lab", str(lab.root), "run", qube, "--"]
    return subprocess.Popen([*command, sys.executable, "-c", script], stdout=subprocess.PIPE)


def connect_error(
    lab: LabDirectory, qube: str, address: str, port: int = 8080, timeout_s: float = BOUND_S
) -> str:
    """The kind of error with which a connection fails, or nothing."""
    script = (
        "import socket\n"
        f"try: socket.create_connection(({address!r}, {port}), timeout={timeout_s})\n"
        "except OSError as error: print(type(error).__name__)"
    )
    with qube_python(lab, qube, script) as program:
        return program.communicate(timeout=2 * BOUND_S)[0].decode().strip()
