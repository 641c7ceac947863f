# SPDX-License-Identifier: GPL-2.0-or-later
"""The exposed qube's firewall, opened by the program itself, as a client on the LAN finds it.

`test_keeper`, which has its own clock, tests how fast something is noticed.
"""

import re
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from exposed_qube import BOUND_S, IPV4, IPV6, LISTENER_UID, NO_IPV6, PORT, USERS, Edge, Program, becomes
from helpers import write_config

from qubes_fwd_qrexec.common.config import Side
from qubes_fwd_qrexec.common.report import Firewall, FirewallReport
from qubes_fwd_qrexec.firewall.keeper import STATE
from qubes_fwd_qrexec.firewall.tables import LISTENER
from qubes_fwd_qrexec.lab import netns
from qubes_fwd_qrexec.lab.blueprint import create_lab
from qubes_fwd_qrexec.system.sockdiag import DIRECTORY

OTHER_PORT = PORT + 1
ALLOWED = {"listen": "0.0.0.0,::", "srchosts": "192.168.77.0/24,fd77::/64"}

OURS = LISTENER.chain
PROBLEM = netns.why_unavailable() or (None if shutil.which("nft") else "the program 'nft' is missing")
pytestmark = pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))

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
def bare_edge(public_path: Path, places: netns.Namespaces) -> Iterator[Edge]:
    """With a firewall, and one forward that is to be let in; nobody listens."""
    with ExitStack() as opened:
        edge = Edge(places, public_path, opened)
        edge.nft(IPV4 + IPV6 + USERS)
        write_config(edge.config, PORT, 80, **ALLOWED)
        yield edge


@pytest.fixture
def edge(bare_edge: Edge) -> Edge:
    """The same, and the listener listens, also on a port that no forward has."""
    for port in (PORT, OTHER_PORT):
        bare_edge.listen(port, "0.0.0.0", "::")
    return bare_edge


@pytest.fixture
def start(
    bare_edge: Edge, places: netns.Namespaces, public_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Start]:
    path = public_path / "notify"
    with ExitStack() as programs, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(path))
        path.chmod(0o666)
        told.settimeout(BOUND_S)
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))

        def begin(*before: str, uid: int | None = LISTENER_UID) -> Program:
            program = Program(bare_edge, places, told, before, uid)
            programs.callback(program.process.communicate)
            programs.callback(program.process.kill)
            program.first = program.status("READY=1")
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


@pytest.mark.parametrize("side", Side)
@pytest.mark.parametrize("group", [0, 1, 2])
def test_a_packet_passes_by_the_interfaces_of_the_forwards_side_alone(
    edge: Edge, start: Start, side: Side, group: int
) -> None:
    """No internal forward from the LAN, no external one from vifs, none of a VPN qube through its uplink."""
    write_config(edge.config, PORT, 80, **ALLOWED, side=side)
    edge.run("ip", "link", "set", "eth0", "group", str(group))
    program = start()
    assert edge.reaches() is (group == side.group)
    assert edge.reaches_by_ipv6() is (group == side.group)
    program.end()


def test_the_users_rules_are_untouched_and_come_first(edge: Edge, start: Start) -> None:
    before = edge.handles()
    program = start()
    within = edge.handles()
    assert [line for line in within if line in before] == before
    assert len([line for line in within if f"jump {OURS}" in line]) == 2
    # A rule that the user adds behind ours is before ours in a moment.
    edge.nft(f'add rule ip qubes custom-input ip saddr {netns.LAN_HOST} counter drop comment "dropped"')
    assert becomes(edge.closes)
    edge.nft("flush chain ip qubes custom-input")
    assert becomes(edge.reaches)
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
def test_after_a_reload_of_the_firewall_it_is_opened_again(edge: Edge, start: Start, reload: str) -> None:
    program = start()
    assert edge.reaches()
    edge.nft(reload)
    assert becomes(edge.reaches)
    assert becomes(edge.reaches_by_ipv6)
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
    assert becomes(edge.reaches_by_ipv6)
    assert program.end()[0] == 0


def test_a_port_that_another_program_has_is_opened_when_the_listener_has_it_and_no_longer(
    bare_edge: Edge, start: Start
) -> None:
    (other,) = bare_edge.listen(PORT, "0.0.0.0", uid=0)
    program = start()
    assert "0 forwards let in, 1 wait for the listener to listen: fwd.work.web" in program.first
    assert not bare_edge.reaches()
    assert OURS not in bare_edge.ruleset()
    other.close()
    ours, ours_ipv6 = bare_edge.listen(PORT, "0.0.0.0", "::")
    program.status("1 forwards let in")
    assert bare_edge.reaches()
    assert bare_edge.reaches_by_ipv6()
    ours.close()
    bare_edge.listen(PORT, "0.0.0.0", uid=LISTENER_UID + 1)
    program.status("0 forwards let in")
    assert not bare_edge.reaches()
    # By the other family the listener still has it.
    assert bare_edge.reaches_by_ipv6()
    ours_ipv6.close()
    assert becomes(lambda: not bare_edge.reaches_by_ipv6())
    assert program.end()[0] == 0


def test_another_program_that_has_the_port_at_another_address_is_not_let_in_to(
    bare_edge: Edge, start: Start
) -> None:
    """Not although the rule is for anybody; and what is taken at the rule's own address stays closed."""
    write_config(bare_edge.config, PORT, 80, listen=netns.EDGE_ADDRESS, srchosts="any")
    bare_edge.listen(PORT, netns.EDGE_ADDRESS)
    bare_edge.listen(PORT, netns.EDGE_ADDRESS_REFUSED, uid=0)
    bare_edge.listen(PORT, "::", uid=0)
    write_config(
        bare_edge.config, OTHER_PORT, 80, key="fwd.work.b", listen=netns.EDGE_ADDRESS, srchosts="any"
    )
    bare_edge.listen(OTHER_PORT, netns.EDGE_ADDRESS, uid=0)
    bare_edge.listen(OTHER_PORT, netns.EDGE_ADDRESS_REFUSED)
    assert "1 forwards let in, 1 wait for the listener to listen: fwd.work.b" in start().first
    assert bare_edge.reaches()
    elsewhere = {"address": netns.EDGE_ADDRESS_REFUSED, "source": netns.LAN_HOST_REFUSED}
    assert not bare_edge.reaches(**elsewhere)
    assert not bare_edge.reaches_by_ipv6()
    assert not bare_edge.reaches(OTHER_PORT)
    assert not bare_edge.reaches(OTHER_PORT, **elsewhere)


@pytest.mark.skipif(not shutil.which("unshare"), reason="the program 'unshare' is missing")
@pytest.mark.parametrize(("uid", "is_let_in"), [(LISTENER_UID, True), (LISTENER_UID + 1, False), (0, False)])
def test_by_default_the_listener_is_the_owner_of_its_runtime_directory(
    edge: Edge, start: Start, uid: int, is_let_in: bool
) -> None:
    made = f"mkdir {DIRECTORY} && chown {uid} {DIRECTORY}"
    in_a_run_of_its_own = f'mount -t tmpfs none /run && {made} && exec "$@"'
    start("unshare", "--mount", "sh", "-ec", in_a_run_of_its_own, "sh", uid=None)
    assert edge.reaches() is is_let_in


def test_dom0_learns_of_a_family_that_is_not_opened(
    edge: Edge, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an IPv6 rule in a qube that has no place for one: though IPv4 has, nobody is let in."""
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    edge.nft(f"delete table ip6 qubes\n{NO_IPV6}")
    write_config(edge.config, PORT, 80, listen="::", srchosts="fd77::/64")
    program = start()

    def told() -> FirewallReport:
        return FirewallReport.parse((tmp_path / STATE).read_bytes())

    assert told() == FirewallReport(Firewall.OPEN, Firewall.CLOSED)
    edge.nft("flush ruleset" + IPV4 + IPV6)
    assert becomes(lambda: told() == FirewallReport(Firewall.OPEN, Firewall.OPEN))
    assert edge.reaches_by_ipv6()
    program.end()
    assert told() == FirewallReport(Firewall.CLOSED, Firewall.CLOSED)


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
    edge.run(sys.executable, "-m", "qubes_fwd_qrexec.firewall.keeper", "--remove")
    assert edge.ruleset() == before


@pytest.mark.skipif(not shutil.which("setpriv"), reason="the program 'setpriv' is missing")
def test_it_needs_no_root_but_the_power_over_the_network(edge: Edge, start: Start) -> None:
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
        *(sys.executable, "-m", "qubes_fwd_qrexec.firewall.keeper", "--config", str(edge.config)),
        is_checked=False,
    )
    assert refused.returncode == 1
    assert "changes of the firewall cannot be watched: Operation not permitted" in refused.stderr
