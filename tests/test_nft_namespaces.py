# SPDX-License-Identifier: GPL-2.0-or-later
"""The exposed qube's firewall, opened by the program itself, as a client on the LAN finds it.

sys-net and the LAN are network namespaces of a lab; sys-net has rules in the shape of Qubes' own.
"""

import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from helpers import write_config

from qubes_fwd_qrexec.lab import netns
from qubes_fwd_qrexec.lab.blueprint import create_lab
from qubes_fwd_qrexec.nftchain import OURS

BOUND_S = 20.0
# A packet that is not answered in this time was dropped; the two ends are on one machine.
DROPPED_S = 0.2
PORT, OTHER_PORT = 8080, 8081
ALLOWED = {"listen": "0.0.0.0,::", "srchosts": "192.168.77.0/24,fd77::/64"}

PROBLEM = netns.why_unavailable() or (None if shutil.which("nft") else "the program 'nft' is missing")
pytestmark = pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))

# What a qube has for what comes in (qubes-facts): a chain that drops, and that asks the user's chain first.
QUBES_TABLE = """
table {family} qubes {{
    chain input {{
        type filter hook input priority filter; policy drop;
        jump custom-input
        ct state invalid counter drop
        ct state established,related accept
        iif lo accept
        {neighbours}
        counter
    }}
    chain custom-input {{ }}
}}
"""
IPV4 = QUBES_TABLE.format(family="ip", neighbours="")
IPV6 = QUBES_TABLE.format(family="ip6", neighbours="meta l4proto ipv6-icmp accept")
# Without IPv6: the table is for antispoofing alone, and another one drops everything.
NO_IPV6 = """
table ip6 qubes {
    chain antispoof {
        counter drop
    }
}
table ip6 qbs-filter {
    chain input {
        type filter hook input priority filter; policy drop;
        iif lo accept
    }
}
"""
USERS = """
add rule ip qubes custom-input tcp dport 22 counter accept comment "mine"
add rule ip qubes custom-input udp dport 53 accept
"""


class Edge:
    """sys-net, with its firewall, and the LAN beside it."""

    def __init__(self, places: netns.Namespaces, directory: Path) -> None:
        self._places = places
        self.config = directory / "config"
        self.config.mkdir()

    def run(
        self, *command: str, text: str = "", is_checked: bool = True
    ) -> "subprocess.CompletedProcess[str]":
        with self._places.entering(netns.EDGE)():
            return subprocess.run(
                command, input=text, capture_output=True, text=True, timeout=BOUND_S, check=is_checked
            )

    def nft(self, text: str) -> None:
        self.run("nft", "-f", "-", text=text)

    def ruleset(self) -> str:
        """All rules with their handles; ``counter`` without its numbers."""
        return self.run("nft", "-s", "-a", "list", "ruleset").stdout

    def handles(self) -> list[str]:
        """Everything that has one: tables, chains and rules, in their order."""
        return [line for line in self.ruleset().splitlines() if "# handle" in line]

    def reaches(
        self, port: int = PORT, address: str = netns.EDGE_ADDRESS, source: str = netns.LAN_HOST
    ) -> bool:
        """Whether a packet from the LAN arrives: nobody listens, so it is refused; or else dropped."""
        with self._places.entering(netns.LAN)(), pytest.raises((ConnectionRefusedError, TimeoutError)) as end:
            socket.create_connection((address, port), DROPPED_S, (source, 0))
        return end.type is ConnectionRefusedError

    def reaches_by_ipv6(self) -> bool:
        return self.reaches(address=netns.EDGE_ADDRESS_IPV6, source=netns.LAN_HOST_IPV6)

    def heals_s(self, is_healed: Callable[[], bool]) -> float:
        """How long it takes until then; bounded by the test that asks."""
        began_s = time.monotonic()
        while not is_healed():
            assert time.monotonic() - began_s < BOUND_S
        return time.monotonic() - began_s


class Program:
    """The program in sys-net, and what it tells systemd."""

    def __init__(self, edge: Edge, places: netns.Namespaces, told: socket.socket, *before: str) -> None:
        command = [*before, sys.executable, "-m", "qubes_fwd_qrexec.nft", "--config", str(edge.config)]
        with places.entering(netns.EDGE)():
            self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self._told = told

    def status(self, containing: str) -> str:
        """The next status that contains this; the program may have told others before."""
        while containing not in (told := self._told.recv(4096).decode()):
            assert self.process.poll() is None, told
        return told

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        self.process.send_signal(number)
        _, stderr = self.process.communicate(timeout=BOUND_S)
        return self.process.returncode, stderr


Start = Callable[..., Program]


@pytest.fixture
def places(tmp_path: Path) -> Iterator[netns.Namespaces]:
    made = netns.Namespaces(create_lab(tmp_path / "lab"))
    made.create()
    try:
        yield made
    finally:
        made.destroy()


@pytest.fixture
def edge(tmp_path: Path, places: netns.Namespaces) -> Edge:
    """With a firewall, and one forward that is to be let in."""
    edge = Edge(places, tmp_path)
    edge.nft(IPV4 + IPV6 + USERS)
    write_config(edge.config, PORT, 80, **ALLOWED)
    return edge


@pytest.fixture
def start(
    edge: Edge, places: netns.Namespaces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Start]:
    path = tmp_path / "notify"
    with ExitStack() as programs, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(path))
        path.chmod(0o666)
        told.settimeout(BOUND_S)
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))

        def begin(*before: str) -> Program:
            program = Program(edge, places, told, *before)
            programs.callback(program.process.communicate)
            programs.callback(program.process.kill)
            program.status("READY=1")
            return program

        yield begin


def test_a_packet_from_the_allowed_network_alone_passes_while_the_forward_is_there(
    edge: Edge, start: Start
) -> None:
    before = edge.ruleset()
    assert not edge.reaches()
    assert not edge.reaches_by_ipv6()
    program = start()
    assert edge.reaches()
    assert edge.reaches_by_ipv6()
    assert not edge.reaches(address=netns.EDGE_ADDRESS_REFUSED, source=netns.LAN_HOST_REFUSED)
    assert not edge.reaches(OTHER_PORT)
    assert program.end()[0] == 0
    assert not edge.reaches()
    assert not edge.reaches_by_ipv6()
    assert edge.ruleset() == before


def test_the_users_rules_are_untouched_and_come_first(edge: Edge, start: Start) -> None:
    before = edge.handles()
    program = start()
    within = edge.handles()
    assert [line for line in within if line in before] == before
    assert len([line for line in within if f"jump {OURS}" in line]) == 2
    # A rule that the user adds behind ours is before ours in a moment.
    edge.nft(f"add rule ip qubes custom-input ip saddr {netns.LAN_HOST} counter drop")
    assert edge.heals_s(lambda: not edge.reaches()) < 1 + DROPPED_S
    edge.nft("flush chain ip qubes custom-input")
    assert edge.heals_s(edge.reaches) < 1
    program.end()
    assert OURS not in edge.ruleset()


@pytest.mark.parametrize(
    "reload",
    [
        "flush chain ip qubes custom-input",
        f"delete table ip qubes\n{IPV4}",
        f"flush ruleset\n{IPV4}{IPV6}{USERS}",
        f"flush table ip qubes\n{IPV4}",
        f"flush chain ip qubes {OURS}",
        f"flush chain ip qubes custom-input\ndelete chain ip qubes {OURS}",
    ],
)
def test_a_reload_of_the_firewall_leaves_us_closed_for_less_than_a_second(
    edge: Edge, start: Start, reload: str
) -> None:
    program = start()
    assert edge.reaches()
    edge.nft(reload)
    assert edge.heals_s(edge.reaches) < 1
    assert edge.heals_s(edge.reaches_by_ipv6) < 1
    assert not edge.reaches(OTHER_PORT)
    assert program.end()[0] == 0


@pytest.mark.parametrize("table", ["", NO_IPV6])
def test_a_qube_without_ipv6_is_opened_for_ipv4_and_for_ipv6_when_that_comes(
    edge: Edge, start: Start, table: str
) -> None:
    edge.nft(f"delete table ip6 qubes\n{table}")
    foreign = edge.run("nft", "list", "tables", "ip6").stdout
    edge.config.joinpath("fwd.work.web").unlink()
    program = start()
    write_config(edge.config, PORT, 80, **ALLOWED)
    told = program.status("1 forwards let in")
    assert "none by ip6: no table qubes with a chain custom-input" in told
    assert edge.reaches()
    assert edge.run("nft", "list", "tables", "ip6").stdout == foreign
    edge.nft("flush ruleset" + IPV4 + IPV6)
    assert edge.heals_s(edge.reaches_by_ipv6) < 1
    assert program.end()[0] == 0


def test_changes_of_the_configuration_are_followed(edge: Edge, start: Start) -> None:
    program = start()
    other = write_config(edge.config, OTHER_PORT, 80, key="fwd.work.other", **ALLOWED)
    program.status("2 forwards let in")
    assert edge.reaches(OTHER_PORT)
    # What cannot be read stays as it was, as in the listener.
    other.write_text("half of")
    write_config(edge.config, PORT, 80, expire="1", **ALLOWED)
    program.status("1 forwards let in")
    assert edge.reaches(OTHER_PORT)
    assert not edge.reaches()
    other.unlink()
    program.status("0 forwards let in")
    assert not edge.reaches(OTHER_PORT)
    assert OURS not in edge.ruleset()
    status, stderr = program.end()
    assert status == 0
    assert "fwd.work.other" in stderr


def test_sighup_is_answered_as_a_reload(edge: Edge, start: Start) -> None:
    program = start()
    program.process.send_signal(signal.SIGHUP)
    assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=\d+", program.status("RELOADING"))
    program.status("READY=1")


def test_what_a_killed_one_left_is_taken_over_or_removed(edge: Edge, start: Start) -> None:
    before = edge.ruleset()
    start().end(signal.SIGKILL)
    assert edge.reaches()
    (edge.config / "fwd.work.web").unlink()
    assert start().end()[0] == 0
    assert edge.ruleset() == before
    write_config(edge.config, PORT, 80, **ALLOWED)
    start().end(signal.SIGKILL)
    edge.run(sys.executable, "-m", "qubes_fwd_qrexec.nft", "--remove")
    assert edge.ruleset() == before


@pytest.mark.skipif(not shutil.which("setpriv"), reason="the program 'setpriv' is missing")
def test_it_needs_no_root_but_the_power_over_the_network(edge: Edge, start: Start, tmp_path: Path) -> None:
    for directory in (edge.config, *edge.config.parents):
        if directory == Path(tmp_path.anchor):
            break
        if not directory.stat().st_mode & 0o001:
            directory.chmod(directory.stat().st_mode | 0o055)
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs"]
    only = "-all,+net_admin"
    program = start(*nobody, f"--inh-caps={only}", f"--ambient-caps={only}", f"--bounding-set={only}")
    assert edge.reaches()
    assert program.end()[0] == 0
    assert not edge.reaches()
    refused = edge.run(
        *nobody,
        "--inh-caps=-all",
        "--bounding-set=-all",
        *(sys.executable, "-m", "qubes_fwd_qrexec.nft", "--config", str(edge.config)),
        is_checked=False,
    )
    assert refused.returncode == 1
    assert "changes of the firewall cannot be watched: Operation not permitted" in refused.stderr
