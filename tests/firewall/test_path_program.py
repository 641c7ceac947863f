# SPDX-License-Identifier: GPL-2.0-or-later
"""The firewall's program in the qubes of a path, as its unit runs it: what it keeps, and what it says of it.

`test_keeper` has how fast it notices something, by a clock of its own; here a question shows that it has.
"""

import os
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
from helpers import BOUND_S
from wired import FAMILIES, FIREWALL, LAN, NET, PROBLEM, WORK, Addresses, Wired

from qubes_fwd_qrexec.common.nftconfig import NftConfig
from qubes_fwd_qrexec.common.nftreport import NftReport, Why
from qubes_fwd_qrexec.firewall.ask import ask
from qubes_fwd_qrexec.firewall.asked import ASK
from qubes_fwd_qrexec.firewall.tables import OWN

pytestmark = pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))

PATH = (WORK, FIREWALL, NET)
KEY = "nft.work.web"
EXPOSED, SERVER = 80, 8080
UID = 54321
V4, V6 = FAMILIES
SOURCES = f"{V4.lan_network},{V6.lan_network}"


def line(qube: str, proto: str = "tcp", more: str = "") -> str:
    common = f"version=1 proto={proto} srchosts={SOURCES}{more}"
    if qube == NET:
        return (
            f"{common} role=hop side=outer srcports=80-80 dstports=80-80 to4={V4.firewall} to6={V6.firewall}"
        )
    if qube == FIREWALL:
        return f"{common} role=hop side=uplink srcports=80-80 dstports=8080-8080 to4={V4.work} to6={V6.work}"
    return f"{common} role=target side=uplink srcports=8080-8080 dstports=8080-8080"


class Programs:
    """One program for each qube, with its configuration and its runtime directory."""

    def __init__(self, wired: Wired, directory: Path, ended: ExitStack) -> None:
        self._wired = wired
        self._directory = directory
        self._ended = ended
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        for qube in PATH:
            (directory / qube).mkdir()
            (directory / qube).chmod(0o777)
            self.config(qube).mkdir()
        self._told = ended.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        self._told.bind(str(directory / "notify"))
        (directory / "notify").chmod(0o777)
        self._told.settimeout(BOUND_S)

    def config(self, qube: str) -> Path:
        return self._directory / qube / "config"

    def tell(self, qube: str, text: str | None, key: str = KEY) -> None:
        """What dom0 tells a qube of a forward; None takes it away."""
        file = self.config(qube) / key
        if text is None:
            file.unlink()
        else:
            file.write_text(text)

    def start(self, qube: str, *before: str) -> None:
        """Return when it is ready."""
        command = (sys.executable, "-m", "qubes_fwd_qrexec.firewall.keeper", f"--config={self.config(qube)}")
        env = os.environ | {
            "RUNTIME_DIRECTORY": str(self._directory / qube),
            "NOTIFY_SOCKET": str(self._directory / "notify"),
        }
        with self._wired.places.entering(qube)():
            self.running[qube] = subprocess.Popen((*before, *command, f"--listener-uid={UID}"), env=env)
        self._ended.callback(self.running[qube].wait, BOUND_S)
        self._ended.callback(self.running[qube].kill)
        while not self._told.recv(4096).startswith(b"READY=1"):
            assert self.running[qube].poll() is None

    def end(self, qube: str, number: int = signal.SIGTERM) -> int:
        self.running[qube].send_signal(number)
        return self.running[qube].wait(BOUND_S)

    def remove(self, qube: str) -> None:
        """What the unit runs when the program has ended."""
        command = (sys.executable, "-m", "qubes_fwd_qrexec.firewall.keeper", "--remove")
        with self._wired.places.entering(qube)():
            env = os.environ | {"RUNTIME_DIRECTORY": str(self._directory / qube)}
            subprocess.run(command, env=env, check=True, timeout=BOUND_S)

    def ask(self, qube: str) -> NftReport:
        return NftReport.parse(ask(self._directory / qube / ASK, BOUND_S))

    def digest(self, qube: str, key: str = KEY) -> str | None:
        found = self.ask(qube).find(key)
        return None if found is None else found.digest


@pytest.fixture
def ended() -> Iterator[ExitStack]:
    with ExitStack() as ended:
        yield ended


@pytest.fixture
def programs(fresh: Wired, tmp_path: Path, ended: ExitStack) -> Programs:
    return Programs(fresh, tmp_path, ended)


@pytest.fixture
def opened(fresh: Wired, programs: Programs) -> Programs:
    """Port 80 of sys-net is forwarded to 8080 of work, which is served."""
    fresh.serve("tcp", WORK, SERVER)
    for qube in PATH:
        programs.tell(qube, line(qube))
        programs.start(qube)
    return programs


def reach(wired: Wired, at: Addresses = V4) -> str:
    return wired.send("tcp", LAN, at.net, EXPOSED, at.lan)


ANSWERED = "answered by work"


def test_each_qube_says_what_is_in_force_and_what_has_passed(fresh: Wired, opened: Programs) -> None:
    assert [reach(fresh, at) for at in FAMILIES] == [ANSWERED, ANSWERED]
    for qube in PATH:
        report = opened.ask(qube)
        (forward,) = report.forwards
        assert forward.digest == NftConfig.parse(KEY, line(qube)).digest
        assert report.versions == {4, 6}
        assert forward.connections == 2
        assert forward.sent > 0


def test_a_change_is_in_force_when_the_qube_says_so(fresh: Wired, opened: Programs) -> None:
    opened.tell(NET, None)
    assert opened.digest(NET) is None
    assert reach(fresh) == f"dropped in {NET}"
    opened.tell(NET, line(NET))
    assert opened.digest(NET) is not None
    assert reach(fresh) == ANSWERED


@pytest.mark.parametrize(
    "reference",
    [
        f"add rule ip qubes custom-forward ip saddr vmap {{ 192.0.2.1 : jump {OWN}-forward }}",
        "add map ip qubes m { type ipv4_addr : verdict; }\n"
        f"add element ip qubes m {{ 192.0.2.1 : jump {OWN}-forward }}",
    ],
    ids=["in a rule", "with a name"],
)
def test_a_map_that_leads_to_our_chain_keeps_nothing_open(
    fresh: Wired, opened: Programs, reference: str
) -> None:
    """The chain cannot be deleted, and a transaction that tries to is refused as a whole."""
    fresh.nft(NET, reference)
    opened.tell(NET, None)
    assert opened.digest(NET) is None
    assert opened.ask(NET).problem is None
    assert [reach(fresh, at) for at in FAMILIES] == [f"dropped in {NET}"] * 2


def test_an_entry_that_cannot_be_read_closes_its_forward_and_is_named(fresh: Wired, opened: Programs) -> None:
    opened.tell(FIREWALL, f"{line(FIREWALL)} newer=1")
    opened.tell(FIREWALL, line(FIREWALL, "udp"), "nft.work.dns")
    report = opened.ask(FIREWALL)
    assert [problem.key for problem in report.refused] == [KEY]
    assert report.find(KEY) is None
    assert opened.digest(FIREWALL, "nft.work.dns") is not None
    assert reach(fresh) == f"dropped in {FIREWALL}"


Change = Callable[[Wired, str], None]
CHANGES: dict[str, Change] = {
    "all is loaded anew": lambda wired, qube: wired.wires.reload_firewall(qube),
    "qubes-firewall is restarted": lambda wired, qube: (
        None if qube == WORK else wired.wires.restart_firewall_service(qube)
    ),
    "the user's chains are flushed": lambda wired, qube: wired.nft(
        qube,
        "".join(
            f"flush chain {f} qubes {chain}\n"
            for f in ("ip", "ip6")
            for chain in ("custom-forward", "custom-input")
        ),
    ),
    "our table is deleted": lambda wired, qube: wired.nft(
        qube, f"delete table ip {OWN}\ndelete table ip6 {OWN}"
    ),
    "our rules are flushed": lambda wired, qube: wired.nft(
        qube, f"flush table ip {OWN}\nflush table ip6 {OWN}"
    ),
    "our table has a rule more": lambda wired, qube: wired.nft(
        qube, f"insert rule ip {OWN} prerouting drop\ninsert rule ip6 {OWN} prerouting drop"
    ),
    "our table is asleep": lambda wired, qube: wired.nft(
        qube, f"add table ip {OWN} {{ flags dormant; }}\nadd table ip6 {OWN} {{ flags dormant; }}"
    ),
}


@pytest.mark.parametrize("qube", PATH)
def test_whatever_becomes_of_the_firewall_it_is_as_it_should_be_again(
    fresh: Wired, opened: Programs, qube: str
) -> None:
    for name, change in CHANGES.items():
        change(fresh, qube)
        assert opened.digest(qube) is not None, name
        assert [reach(fresh, at) for at in FAMILIES] == [ANSWERED, ANSWERED], name


def test_the_users_own_rules_win_and_stay(fresh: Wired, opened: Programs) -> None:
    fresh.nft(FIREWALL, f'add rule ip qubes custom-forward ip saddr {V4.lan} drop comment "mine"')
    assert opened.digest(FIREWALL) is not None
    assert reach(fresh) == f"dropped in {FIREWALL}"
    assert reach(fresh, V6) == ANSWERED
    assert opened.end(FIREWALL) == 0
    assert 'comment "mine"' in fresh.ruleset(FIREWALL)


def test_a_qube_that_is_back_behind_another_interface_is_reached(fresh: Wired, opened: Programs) -> None:
    """Only the target starts anew; the netvms' rules do not name interfaces."""
    fresh.halt(WORK)
    assert reach(fresh) == f"dropped in {FIREWALL}"
    opened.end(WORK)
    fresh.start(WORK)
    opened.start(WORK)
    assert [reach(fresh, at) for at in FAMILIES] == [ANSWERED, ANSWERED]


@pytest.mark.parametrize("has_ipv6", [False])
def test_a_family_that_the_qubes_do_not_have_is_told_and_the_other_works(
    fresh: Wired, opened: Programs
) -> None:
    for qube in PATH:
        report = opened.ask(qube)
        assert report.versions == {4}
        assert report.problem is None
    assert reach(fresh) == ANSWERED


def test_its_own_clock_ends_a_forward_and_nothing_is_left_of_its_rules(
    fresh: Wired, opened: Programs
) -> None:
    opened.tell(NET, line(NET, more=f" expire={int(time.time()) + 2}"))
    until_s = time.monotonic() + BOUND_S
    while (found := opened.ask(NET).find(KEY)) is None or found.why is not Why.OVER:
        assert time.monotonic() < until_s
    assert found.digest is None
    assert KEY not in fresh.ruleset(NET)
    assert reach(fresh) == f"dropped in {NET}"


def test_at_its_end_it_takes_everything_out_and_ends_what_lives(fresh: Wired, opened: Programs) -> None:
    client = fresh.connect(LAN, V4.net, EXPOSED, V4.lan)
    assert opened.end(WORK) == 0
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    assert KEY not in fresh.ruleset(WORK)
    assert "qubes-fwd-nft-input" not in fresh.ruleset(WORK)
    assert reach(fresh) == f"dropped in {WORK}"


def test_what_a_killed_one_left_is_closed_by_what_follows(fresh: Wired, opened: Programs) -> None:
    opened.end(NET, signal.SIGKILL)
    assert reach(fresh) == ANSWERED
    opened.remove(NET)
    assert KEY not in fresh.ruleset(NET)
    assert reach(fresh) == f"dropped in {NET}"
    opened.end(WORK, signal.SIGKILL)
    opened.tell(WORK, None)
    opened.start(WORK)
    assert KEY not in fresh.ruleset(WORK)


@pytest.mark.skipif(not shutil.which("setpriv"), reason="the program 'setpriv' is missing")
def test_it_needs_no_root_but_the_power_over_the_network(
    fresh: Wired, public_path: Path, ended: ExitStack
) -> None:
    programs = Programs(fresh, public_path, ended)
    only = "-all,+net_admin"
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs")
    fresh.serve("tcp", WORK, SERVER)
    for qube in PATH:
        programs.tell(qube, line(qube))
        programs.start(
            qube, *nobody, f"--inh-caps={only}", f"--ambient-caps={only}", f"--bounding-set={only}"
        )
    client = fresh.connect(LAN, V4.net, EXPOSED, V4.lan)
    programs.tell(NET, None)
    assert programs.digest(NET) is None
    client.sendall(b"x")
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    programs.tell(WORK, None)
    assert programs.digest(WORK) is None
