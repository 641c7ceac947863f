# SPDX-License-Identifier: GPL-2.0-or-later
"""The networks of a lab that is up, and what listens in them: namespaces, IP as on Qubes, and ``listen``.

What passes the joins of qubes, and what does not, is tested in `test_wires`.
"""

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import free_port

from qubes_fwd_qrexec.admin.answers import AnswerError
from qubes_fwd_qrexec.common.nftreport import NftReport
from qubes_fwd_qrexec.common.report import REPORT_MAX_BYTES
from qubes_fwd_qrexec.common.services import NFT_SERVICE
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.lab import daemon, netns, qubechanges, units
from qubes_fwd_qrexec.lab.blueprint import create_lab
from qubes_fwd_qrexec.lab.cli import main
from qubes_fwd_qrexec.lab.directory import LabDirectory, write_text
from qubes_fwd_qrexec.lab.qube import QubeState
from qubes_fwd_qrexec.lab.store import LabStore

from .lab_up import BOUND_S, becomes, call, kill_broker

NETNS_PROBLEM = netns.why_unavailable()
needs_netns = pytest.mark.skipif(NETNS_PROBLEM is not None, reason=str(NETNS_PROBLEM))
WIRES_PROBLEM = NETNS_PROBLEM or netns.why_no_firewall()
needs_wires = pytest.mark.skipif(WIRES_PROBLEM is not None, reason=str(WIRES_PROBLEM))
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
    try:
        yield made
    finally:
        daemon.stop(made)


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
    assert (
        "the listener is already running\nsys-net: the firewall helper is already running"
    ) in capfd.readouterr().out
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
    said = "sys-net: the listener is ready\nno firewall helper, as the qubes of this lab have no firewalls\n"
    assert capfd.readouterr().out == said
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
def test_if_one_of_them_does_not_start_none_does_and_its_last_words_are_told(
    lab: LabDirectory, capfd: pytest.CaptureFixture[str]
) -> None:
    daemon.start(lab, daemon.Network.NAMESPACES)
    # Where its socket belongs lies a directory.
    lab.qube_dir("sys-net").firewall_run.joinpath("ask").mkdir(parents=True)
    assert main(["listen", "sys-net", "sys-firewall"]) == 1
    assert "sys-net: the firewall helper ended with exit status 1: " in capfd.readouterr().err
    assert units.running(lab, "sys-net") == units.running(lab, "sys-firewall") == set()


@needs_wires
def test_a_qube_whose_switch_is_on_has_its_firewall_helper_when_it_starts(
    lab: LabDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    with lab.locked():
        lab.set_feature("sys-firewall", "service.qubes-forward-nft", "1")
    assert main(["up", "--netns"]) == 0
    assert capsys.readouterr().out.endswith("\nsys-firewall: the firewall helper is ready\n")
    assert units.running(lab, "sys-firewall") == {units.Unit.FIREWALL}
    assert units.running(lab, "sys-net") == set()
    qubechanges.shutdown(lab, ["sys-firewall"], force=True)
    assert units.running(lab, "sys-firewall") == set()
    qubechanges.start(lab, "sys-firewall")
    assert units.running(lab, "sys-firewall") == {units.Unit.FIREWALL}


@needs_wires
@pytest.mark.parametrize(
    ("target", "path", "client", "address"),
    [
        ("work", ("sys-firewall", "sys-net"), netns.LAN, netns.EDGE_ADDRESS),
        ("untrusted", ("sys-vpn",), netns.PROVIDER, "10.8.0.2"),
    ],
)
def test_packets_go_along_a_forward_by_nft_also_after_a_qube_of_its_path_was_halted(
    lab: LabDirectory, target: str, path: tuple[str, ...], client: str, address: str
) -> None:
    """From the LAN, and through a VPN's tunnel. The helpers start and stop with their qubes."""
    with lab.locked():
        for qube, value in nft_values(lab, (target, *path)):
            lab.set_feature(qube, "service.qubes-forward-nft", "1")
            lab.set_feature(qube, f"vm-config.nft.{target}.web", value)
    daemon.start(lab, daemon.Network.NAMESPACES)
    # Nobody listens: a RST comes from the target alone, as all others drop.
    becomes(lambda: connect_error(lab, client, address, FORWARD_PORT, 1) == "ConnectionRefusedError")
    for state, error in ((QubeState.HALTED, "TimeoutError"), (QubeState.RUNNING, "ConnectionRefusedError")):
        with lab.locked():
            lab.set_state(path[0], state)
        becomes(lambda error=error: connect_error(lab, client, address, FORWARD_PORT, 1) == error)


def nft_values(lab: LabDirectory, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """What dom0 tells the qubes of a path, the target first."""
    ports = f"{FORWARD_PORT}-{FORWARD_PORT}"
    to = ""
    for qube in path:
        side = "outer" if qube == path[-1] else "uplink"
        role = "hop" if to else "target"
        yield (
            qube,
            f"version=1 role={role} side={side} proto=tcp srcports={ports} dstports={ports}"
            f" srchosts={netns.LAN_HOST}/32,{netns.PROVIDER_HOST}/32{to}",
        )
        to = f" to4={lab.qube(qube).ip}"


@pytest.mark.parametrize("network", [pytest.param("namespaces", marks=needs_wires), "loopback"])
def test_client_qube_reaches_an_internal_forward_and_another_one_does_not(
    network: str, lab: LabDirectory
) -> None:
    """In the loopback form by a loopback address, which is the qube's own."""
    port, target_port = free_port(), free_port()
    at, allowed, other = str(lab.qube("sys-firewall").ip), None, None
    if network == "loopback":
        at, allowed, other = "127.0.0.1", "127.0.0.11", "127.0.0.12"
        qubechanges.set_property(lab, "personal", "ip", allowed)
    daemon.start(lab, daemon.Network(network))
    assert main(["listen", "sys-firewall"]) == 0
    script = (
        f"import socket; s = socket.create_server(('127.0.0.1', {target_port})); print('up', flush=True)\n"
        "while True: s.accept()[0].sendall(b'page')"
    )
    with qube_python(lab, "work", script) as server, ExitStack() as undo:
        undo.callback(server.kill)
        assert server.stdout is not None
        assert server.stdout.readline() == b"up\n"
        rule = ("add", "work", f"{port}:{target_port}", "--internal", "--from", "personal")
        forward = [sys.executable, "-m", "qubes_fwd_qrexec.admin.views.cli", "--lab", str(lab.root), *rule]
        subprocess.run(forward, check=True, capture_output=True, timeout=BOUND_S)
        becomes(lambda: page(lab, "personal", at, port, allowed) == "page")
        assert page(lab, "untrusted", at, port, other) in ("TimeoutError", "ConnectionResetError")


def page(lab: LabDirectory, qube: str, address: str, port: int, source: str | None) -> str:
    """What a client in a qube gets, or the kind of error."""
    script = (
        "import socket\n"
        f"try: s = socket.create_connection(({address!r}, {port}), 1, {source and (source, 0)!r})\n"
        "except OSError as error: print(type(error).__name__)\n"
        "else:\n"
        f"  try: s.settimeout({BOUND_S}); print(s.recv(9).decode())\n"
        "  except OSError as error: print(type(error).__name__)\n"
    )
    with qube_python(lab, qube, script) as program:
        return program.communicate(timeout=2 * BOUND_S)[0].decode().strip()


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


def qube_python(lab: LabDirectory, qube: str, script: str) -> subprocess.Popen[bytes]:
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
