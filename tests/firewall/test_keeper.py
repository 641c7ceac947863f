# SPDX-License-Identifier: GPL-2.0-or-later
"""What the firewall's program decides. `test_firewall_namespaces` tests what it does."""

import os
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest
from helpers import write_config
from keeperbench import BINDINGS, CLOSED, LISTENING, OPEN, WITH_TABLE, FakeNft, FakeSockets, a_keeper, places

from qubes_fwd_qrexec.common import report
from qubes_fwd_qrexec.common.errors import ConfigError
from qubes_fwd_qrexec.common.report import FORWARDS_MAX, FirewallReport
from qubes_fwd_qrexec.firewall import keeper
from qubes_fwd_qrexec.firewall.accounts import account, firewall_report
from qubes_fwd_qrexec.firewall.forwards import Forwards
from qubes_fwd_qrexec.firewall.keeper import main
from qubes_fwd_qrexec.firewall.nfttool import Nft
from qubes_fwd_qrexec.firewall.rule import Family, NftError
from qubes_fwd_qrexec.firewall.signals import Signals
from qubes_fwd_qrexec.firewall.tables import transaction
from qubes_fwd_qrexec.firewall.wanted import Firewall, Wanted
from qubes_fwd_qrexec.system.configsource import FileSource
from qubes_fwd_qrexec.system.sockdiag import SocketsError
from qubes_fwd_qrexec.target.statusservice import FIREWALL_STATE


@pytest.fixture
def forwards(tmp_path: Path) -> Forwards:
    write_config(tmp_path / "c", 80, 80)
    made = Forwards(FileSource(tmp_path / "c"))
    made.read()
    return made


def names(forwards: Forwards) -> list[str]:
    return [config.key for config in forwards.active()]


def test_a_bad_entry_leaves_what_was_open_under_its_name_and_no_other(
    forwards: Forwards, tmp_path: Path
) -> None:
    before = forwards.active()
    for key in ("fwd.work.web", "fwd.work.new", "fwd.!"):
        (tmp_path / "c" / key).write_text("bad")
    forwards.read()
    assert forwards.active() == before


def test_a_change_is_seen_once_also_when_it_cannot_be_read(forwards: Forwards, tmp_path: Path) -> None:
    assert not forwards.has_changed()
    write_config(tmp_path / "c", 81, 80, key="fwd.work.new")
    assert forwards.has_changed()
    forwards.read()
    assert names(forwards) == ["fwd.work.new", "fwd.work.web"]
    shutil.rmtree(tmp_path / "c")
    with pytest.raises(ConfigError):
        forwards.read()
    assert not forwards.has_changed()
    assert names(forwards) == ["fwd.work.new", "fwd.work.web"]


def test_what_is_over_stays_over_when_the_clock_is_set_back(
    forwards: Forwards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wall, boot = [1000.0], [50.0]
    monkeypatch.setattr(time, "time", lambda: wall[0])
    monkeypatch.setattr(time, "clock_gettime", lambda which: boot[0])
    write_config(tmp_path / "c", 80, 80, expire="1010")
    forwards.read()
    assert names(forwards) == ["fwd.work.web"]
    wall[0] = 1010
    assert names(forwards) == []
    wall[0] = 0
    forwards.read()
    assert names(forwards) == []
    write_config(tmp_path / "c", 80, 80, expire="2000")
    forwards.read()
    assert names(forwards) == ["fwd.work.web"]


def test_the_firewall_is_asked_again_when_it_changed_meanwhile(forwards: Forwards) -> None:
    fake = FakeNft(refusals=2)
    wanted = Wanted(forwards.active(), LISTENING)
    assert Firewall(fake).keep(wanted)[Family.IP] == WITH_TABLE
    assert fake.given == [transaction(Family.IP, wanted.content(Family.IP, WITH_TABLE), WITH_TABLE, 0)]
    with pytest.raises(NftError, match="gone meanwhile"):
        Firewall(FakeNft(refusals=3)).keep(wanted)


def test_a_family_that_cannot_be_opened_is_named(forwards: Forwards) -> None:
    missing = "none by ip: no table qubes with a chain custom-input"
    assert list(account(Wanted(forwards.active(), LISTENING), {})) == ["1 forwards let in", missing]
    assert list(account(Wanted(), {})) == ["0 forwards let in"]


def test_a_forward_whose_listener_does_not_listen_is_named_and_not_counted(forwards: Forwards) -> None:
    assert list(account(Wanted(forwards.active()), places(*Family))) == [
        "0 forwards let in",
        "1 wait for the listener to listen: fwd.work.web",
    ]


def test_dom0_learns_of_each_family_and_of_forwards_that_wait(forwards: Forwards) -> None:
    wanted = Wanted(forwards.active(), LISTENING)
    assert firewall_report(wanted, places(Family.IP)) == FirewallReport(OPEN, CLOSED)
    assert firewall_report(wanted, places(Family.IP6)) == FirewallReport(CLOSED, OPEN)
    assert firewall_report(replace(wanted, listening=frozenset()), places(*Family)) == FirewallReport(
        OPEN, OPEN, ("fwd.work.web",)
    )


def test_if_more_wait_than_fit_the_report_leaves_them_out(forwards: Forwards) -> None:
    some = Wanted(forwards.active() * FORWARDS_MAX)
    assert len(firewall_report(some, places(*Family)).waiting) == FORWARDS_MAX
    more = replace(some, configs=(*some.configs, *forwards.active()))
    assert firewall_report(more, places(*Family)) == FirewallReport(
        report.Firewall.UNKNOWN, report.Firewall.UNKNOWN
    )


class FakeEvents:
    """Readable or not, as is said."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd


def test_endless_changes_of_the_firewall_are_followed_a_few_times_a_second(
    forwards: Forwards, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[tuple[int, float]] = []

    def select(
        waited_for: list[object], _: object, __: object, timeout_s: float
    ) -> tuple[list[object], list[object], list[object]]:
        waits.append((len(waited_for), timeout_s))
        return [], [], []

    monkeypatch.setattr(keeper.select, "select", select)
    now = [100.0]
    kept = a_keeper(forwards, FakeNft(), clock=lambda: now[0])
    kept.keep(Wanted())
    with Signals() as signals:
        kept.wait(FakeEvents(0), signals)  # type: ignore[arg-type]
        # First for signals alone, then for changes too; together until the next look is due.
        assert waits == [
            (1, pytest.approx(keeper.GAP_S)),
            (2, pytest.approx(keeper.LOOK_S - keeper.GAP_S)),
        ]
        waits.clear()
        now[0] += keeper.GAP_S
        kept.wait(FakeEvents(0), signals)  # type: ignore[arg-type]
        assert waits == [(1, pytest.approx(0)), (2, pytest.approx(keeper.LOOK_S))]


@pytest.mark.parametrize("kept_before_s", [0.0, 0.1, 0.19, 1.0])
@pytest.mark.parametrize("comes_after_s", [0.0, 0.1, 0.3, 0.49, 0.6])
@pytest.mark.parametrize("is_of_nftables", [True, False])
def test_whatever_happens_is_looked_at_within_half_a_second(
    forwards: Forwards,
    monkeypatch: pytest.MonkeyPatch,
    kept_before_s: float,
    comes_after_s: float,
    is_of_nftables: bool,
) -> None:
    """By a clock that only waiting moves; what nft then takes is milliseconds, and the promise one second.

    A change of nftables can be waited for; one of the configuration, or of a socket, cannot.
    """
    now = [100.0]
    with Signals() as signals:
        changes = FakeEvents(0)

        def select(waited_for: list[object], _: object, __: object, timeout_s: float) -> tuple[list[object]]:
            assert timeout_s >= 0
            if changes.fileno() in waited_for and is_of_nftables and now[0] + timeout_s >= comes_s:
                now[0] = max(now[0], comes_s)
                return ([changes.fileno()],)
            now[0] += timeout_s
            return ([],)

        monkeypatch.setattr(keeper.select, "select", select)
        kept = a_keeper(forwards, FakeNft(), clock=lambda: now[0])
        kept.keep(Wanted())
        now[0] += kept_before_s
        comes_s = now[0] + comes_after_s
        while now[0] < comes_s:
            kept.wait(changes, signals)  # type: ignore[arg-type]
        assert now[0] - comes_s <= (keeper.GAP_S if is_of_nftables else keeper.LOOK_S) + 1e-9
        assert keeper.GAP_S < keeper.LOOK_S <= 0.5


class FakeChanges:
    """Says that the firewall has changed, once for each change."""

    def __init__(self) -> None:
        self.are_there = False

    def has_any(self) -> bool:
        found, self.are_there = self.are_there, False
        return found


def test_what_fails_while_it_runs_is_tried_at_the_next_look(
    forwards: Forwards, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake, changes = FakeNft(), FakeChanges()
    kept = a_keeper(forwards, fake)
    kept.keep(kept.wanted())

    def look() -> int:
        """How many transactions it makes."""
        before = len(fake.given)
        kept.look(changes)  # type: ignore[arg-type]
        return len(fake.given) - before

    assert look() == 0
    changes.are_there, fake.refusals = True, 3
    assert look() == 0
    assert "gone meanwhile" in caplog.text
    assert look() == 1
    assert look() == 0
    write_config(tmp_path / "c", 81, 80)
    assert look() == 1


def test_it_keeps_or_removes_and_not_both(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--config", "x", "--remove"])
    assert end.value.code == 2
    assert "--remove: not allowed with argument --config" in capsys.readouterr().err


def test_without_nft_it_fails_and_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(keeper, "Nft", lambda: Nft("/nonexistent/nft"))
    assert main(["--remove"]) == 1
    assert "the package nftables has it" in capfd.readouterr().err


def test_signals_are_given_back() -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    with Signals() as signals:
        assert signals.take() == set()
        signal.raise_signal(signal.SIGHUP)
        assert signals.take() == {signal.SIGHUP}
    assert [signal.getsignal(number) for number in numbers] == before


def test_the_listeners_ports_are_followed_without_a_change_of_anything_else(
    forwards: Forwards, tmp_path: Path
) -> None:
    fake, sockets, state = FakeNft(), FakeSockets(frozenset()), tmp_path / "state"
    kept = a_keeper(forwards, fake, sockets=sockets, state=state)

    def look() -> tuple[int, tuple[str, ...]]:
        """How many accepting rules its transactions have, and which forwards it reports as waiting."""
        before = len(fake.given)
        kept.look(NoChanges())
        made = "".join(fake.given[before:]).count("accept")
        return made, FirewallReport.parse(state.read_bytes()).waiting

    waits = (0, ("fwd.work.web",))
    assert look() == waits
    sockets.said = BINDINGS
    assert look() == (1, ())
    assert look() == (0, ())
    sockets.said = frozenset((ip_address("127.0.0.1"), port) for port in (79, 81))
    assert look() == waits


@pytest.mark.usefixtures("said_once")
def test_if_the_kernel_does_not_say_who_listens_nobody_is_let_in(
    forwards: Forwards, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake, sockets = FakeNft(), FakeSockets()
    kept = a_keeper(forwards, fake, sockets=sockets)
    kept.look(NoChanges())
    assert kept.kept == Wanted(forwards.active(), LISTENING)
    sockets.said = SocketsError("no listener is running")
    for _ in range(3):
        kept.look(NoChanges())
        assert kept.kept == Wanted(forwards.active(), frozenset())
    assert caplog.text.count("nobody is let in: no listener is running") == 1
    # With no forward there is nothing to ask for.
    before = sockets.times
    (tmp_path / "c" / "fwd.work.web").unlink()
    kept.look(NoChanges())
    kept.look(NoChanges())
    assert sockets.times == before


@pytest.mark.parametrize(
    ("there", "refusals", "ip", "ip6"),
    [
        (tuple(Family), 0, OPEN, OPEN),
        ((Family.IP,), 0, OPEN, CLOSED),
        ((Family.IP6,), 0, CLOSED, OPEN),
        ((), 0, CLOSED, CLOSED),
        ((Family.IP,), 99, CLOSED, CLOSED),
    ],
)
def test_what_is_left_for_dom0_says_of_each_family_whether_clients_are_let_in(
    forwards: Forwards,
    tmp_path: Path,
    there: tuple[Family, ...],
    refusals: int,
    ip: report.Firewall,
    ip6: report.Firewall,
) -> None:
    state = tmp_path / "state"
    kept = a_keeper(forwards, FakeNft(refusals=refusals, there=there), state=state)
    with suppress(NftError):
        kept.look(NoChanges(), is_told=True)
    assert FirewallReport.parse(state.read_bytes()) == FirewallReport(ip, ip6)
    assert state.stat().st_mode & 0o777 == 0o644


def test_the_time_of_the_state_file_is_that_of_the_last_look(forwards: Forwards, tmp_path: Path) -> None:
    state = tmp_path / "state"
    kept = a_keeper(forwards, FakeNft(), state=state)
    for _ in range(2):  # the second has nothing new to write
        before = time.time()
        kept.look(NoChanges())
        assert before - 0.001 <= state.stat().st_mtime <= time.time() + 0.001
        os.utime(state, (0, 0))


def test_a_state_file_that_cannot_be_written_stops_nothing(forwards: Forwards, tmp_path: Path) -> None:
    fake = FakeNft()
    a_keeper(forwards, fake, state=tmp_path / "missing" / "state").look(NoChanges(), is_told=True)
    assert fake.given


@pytest.mark.parametrize(
    ("uid", "words"),
    [("x", "is not a whole number"), ("-1", "is not a whole number"), ("4294967295", "is more than")],
)
def test_a_user_is_a_number(capsys: pytest.CaptureFixture[str], uid: str, words: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--listener-uid", uid])
    assert end.value.code == 2
    assert words in capsys.readouterr().err


class NoChanges(keeper.Changes):
    """News that never comes."""

    def __init__(self) -> None:
        pass

    def has_any(self) -> bool:
        return False


def test_the_state_file_is_where_it_is_looked_for() -> None:
    unit = (Path(__file__).parents[2] / "systemd" / "qubes-forward-nft.service").read_text()
    name = Path(FIREWALL_STATE).parent.name
    assert f"/run/{name}/{keeper.STATE}" == FIREWALL_STATE
    assert f"RuntimeDirectory={name}\n" in unit
