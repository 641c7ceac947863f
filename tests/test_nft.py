# SPDX-License-Identifier: GPL-2.0-or-later
"""What the firewall's program decides. What it does is for `test_nft_namespaces`."""

import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from helpers import write_config

from qubes_fwd_qrexec import nft
from qubes_fwd_qrexec.configsource import ConfigSource
from qubes_fwd_qrexec.errors import ConfigError
from qubes_fwd_qrexec.nft import Firewall, Forwards, main
from qubes_fwd_qrexec.nftchain import Family, NftError, Seen, rules, transaction
from qubes_fwd_qrexec.nfttool import Nft
from qubes_fwd_qrexec.statusservice import FIREWALL_STATE


class FakeNft(Nft):
    """A firewall with one family's table, which may refuse so many transactions."""

    def __init__(self, *, refusals: int = 0, there: tuple[Family, ...] = (Family.IP,)) -> None:
        super().__init__("/nonexistent")
        self.refusals = refusals
        self.there = there
        self.given: list[str] = []

    def look(self) -> dict[Family, Seen]:
        return {family: Seen() for family in self.there}

    def carry_out(self, transaction: str) -> None:
        if self.refusals:
            self.refusals -= 1
            raise NftError("gone meanwhile")
        self.given.append(transaction)


@pytest.fixture
def forwards(tmp_path: Path) -> Forwards:
    write_config(tmp_path / "c", 80, 80)
    made = Forwards(ConfigSource(tmp_path / "c"))
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
    assert Firewall(fake).keep(forwards.active()) == "1 forwards let in"
    assert fake.given == [transaction(Family.IP, rules(forwards.active(), Family.IP), Seen())]
    with pytest.raises(NftError, match="gone meanwhile"):
        Firewall(FakeNft(refusals=3)).keep(forwards.active())


def test_a_family_that_cannot_be_opened_is_named(forwards: Forwards) -> None:
    status = Firewall(FakeNft(there=())).keep(forwards.active())
    assert status == "1 forwards let in, none by ip: no table qubes with a chain custom-input"
    assert Firewall(FakeNft(there=())).keep(()) == "0 forwards let in"


class FakeEvents:
    """Readable or not, as is said."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd


def test_who_changes_the_firewall_without_end_is_followed_a_few_times_a_second_only(
    forwards: Forwards, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[tuple[int, float]] = []

    def select(
        waited_for: list[object], _: object, __: object, timeout_s: float
    ) -> tuple[list[object], list[object], list[object]]:
        waits.append((len(waited_for), timeout_s))
        return [], [], []

    monkeypatch.setattr(nft.select, "select", select)
    now = [100.0]
    monkeypatch.setattr(nft.time, "monotonic", lambda: now[0])
    keeper = nft.Keeper(forwards, Firewall(FakeNft()))
    keeper._keep()
    with nft.Signals() as signals:
        keeper._wait(FakeEvents(0), signals)  # type: ignore[arg-type]
        # First for signals alone, then for changes too.
        assert waits == [(1, pytest.approx(nft._GAP_S)), (2, nft._LOOK_S)]
        waits.clear()
        now[0] += nft._GAP_S
        keeper._wait(FakeEvents(0), signals)  # type: ignore[arg-type]
        assert waits == [(1, pytest.approx(0)), (2, nft._LOOK_S)]


class FakeChanges:
    """Says that the firewall has changed, once each time that it is told."""

    def __init__(self) -> None:
        self.are_there = False

    def has_any(self) -> bool:
        found, self.are_there = self.are_there, False
        return found


def test_what_fails_while_it_runs_is_tried_at_the_next_look(
    forwards: Forwards, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake, changes = FakeNft(), FakeChanges()
    keeper = nft.Keeper(forwards, Firewall(fake))
    keeper._keep()

    def look() -> int:
        """How many transactions it makes."""
        before = len(fake.given)
        keeper._look(changes, is_asked=False)  # type: ignore[arg-type]
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
    monkeypatch.setattr(nft, "Nft", lambda: Nft("/nonexistent/nft"))
    assert main(["--remove"]) == 1
    assert "the package nftables has it" in capfd.readouterr().err


def test_signals_are_given_back() -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    with nft.Signals() as signals:
        assert signals.take() == set()
        signal.raise_signal(signal.SIGHUP)
        assert signals.take() == {signal.SIGHUP}
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize(
    ("there", "refusals", "word"),
    [((Family.IP,), 0, "open"), ((), 0, "closed"), ((Family.IP,), 99, "closed")],
)
def test_one_word_says_whether_clients_are_let_in(
    forwards: Forwards, tmp_path: Path, there: tuple[Family, ...], refusals: int, word: str
) -> None:
    state = tmp_path / "state"
    keeper = nft.Keeper(forwards, Firewall(FakeNft(refusals=refusals, there=there)), state)
    with suppress(NftError):
        keeper._look(NoChanges(), is_asked=True)
    assert state.read_text() == f"{word}\n"
    assert state.stat().st_mode & 0o777 == 0o644


def test_a_word_that_cannot_be_left_stops_nothing(forwards: Forwards, tmp_path: Path) -> None:
    firewall = FakeNft()
    nft.Keeper(forwards, Firewall(firewall), tmp_path / "missing" / "state")._look(NoChanges(), is_asked=True)
    assert firewall.given


class NoChanges(nft.Changes):
    """News that never comes."""

    def __init__(self) -> None:
        pass

    def has_any(self) -> bool:
        return False


def test_the_word_lies_where_it_is_looked_for() -> None:
    unit = (Path(__file__).parent.parent / "systemd" / "qubes-forward-nft.service").read_text()
    name = Path(FIREWALL_STATE).parent.name
    assert f"/run/{name}/{nft.STATE}" == FIREWALL_STATE
    assert f"RuntimeDirectory={name}\n" in unit
