# SPDX-License-Identifier: GPL-2.0-or-later
"""Which forwards by nft are to be in force. `test_keeper` has those of the listener."""

import time
from pathlib import Path

import pytest

from qubes_fwd_qrexec.common.nftconfig import NftConfig
from qubes_fwd_qrexec.firewall.forwards import Forwards
from qubes_fwd_qrexec.firewall.pathrules import DRAIN_MAX_S, Kept
from qubes_fwd_qrexec.system.configsource import FileSource

KEY = "nft.work.web"
END = 1_000_000
LINE = "version=1 role=target side=uplink proto=tcp srcports=80-80 dstports=80-80 srchosts=any"


class Clocks:
    def __init__(self) -> None:
        self.wall_s = END - 100.0
        self.boot_s = 50.0

    def pass_(self, seconds: float) -> None:
        self.wall_s += seconds
        self.boot_s += seconds


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    made = Clocks()
    monkeypatch.setattr(time, "time", lambda: made.wall_s)
    monkeypatch.setattr(time, "clock_gettime", lambda which: made.boot_s)
    return made


def write(directory: Path, *more: str, key: str = KEY) -> NftConfig:
    directory.mkdir(exist_ok=True)
    line = " ".join((LINE, *more))
    (directory / key).write_text(line)
    return NftConfig.parse(key, line)


def read(directory: Path, before: tuple[NftConfig, ...] = ()) -> Forwards:
    made = Forwards(FileSource(directory), before)
    made.read()
    return made


CUT, DRAIN = (f"expire={END}",), ("on-expire=drain", f"expire={END}")


def test_an_entry_that_cannot_be_read_is_closed_alone_and_named(tmp_path: Path) -> None:
    web, dns = write(tmp_path), write(tmp_path, key="nft.work.dns")
    forwards = read(tmp_path)
    assert forwards.paths() == (Kept(dns), Kept(web))
    (tmp_path / KEY).write_text(f"{LINE} more=1")
    forwards.read()
    assert forwards.paths() == (Kept(dns),)
    assert "unknown option" in forwards.refused[KEY]
    (tmp_path / KEY).unlink()
    forwards.read()
    assert forwards.refused == {}


def test_what_is_over_is_out_and_stays_so(tmp_path: Path, clocks: Clocks) -> None:
    web = write(tmp_path, *CUT)
    forwards = read(tmp_path)
    assert forwards.paths() == (Kept(web),)
    assert forwards.over() == ()
    clocks.pass_(100)
    assert forwards.paths() == ()
    assert forwards.over() == (web,)
    clocks.wall_s = 0
    forwards.read()
    assert forwards.paths() == ()


def test_what_drains_does_so_for_an_hour(tmp_path: Path, clocks: Clocks) -> None:
    web = write(tmp_path, *DRAIN)
    forwards = read(tmp_path)
    clocks.pass_(100)
    assert forwards.paths() == (Kept(web, is_draining=True),)
    clocks.pass_(DRAIN_MAX_S - 1)
    assert forwards.paths() == (Kept(web, is_draining=True),)
    clocks.pass_(1)
    assert forwards.paths() == ()


@pytest.mark.parametrize(("before_end_s", "drains"), [(-5, True), (5, True), (60, False)])
def test_what_is_taken_away_because_it_is_over_drains_and_what_is_taken_away_before_does_not(
    tmp_path: Path, clocks: Clocks, before_end_s: int, drains: bool
) -> None:
    """dom0's clock may be a little ahead."""
    web = write(tmp_path, *DRAIN)
    forwards = read(tmp_path)
    clocks.pass_(100 - before_end_s)
    (tmp_path / KEY).unlink()
    forwards.read()
    assert forwards.paths() == ((Kept(web, is_draining=True),) if drains else ())
    again = write(tmp_path, f"expire={END + 1000}")
    forwards.read()
    assert forwards.paths() == (Kept(again),)


def test_what_an_earlier_run_left_draining_goes_on(tmp_path: Path, clocks: Clocks) -> None:
    web, cut = write(tmp_path, *DRAIN), write(tmp_path, *CUT, key="nft.work.cut")
    for file in tmp_path.iterdir():
        file.unlink()
    clocks.pass_(200)
    assert read(tmp_path, (web, cut)).paths() == (Kept(web, is_draining=True),)


def test_an_entry_that_cannot_be_read_any_more_does_not_drain(tmp_path: Path, clocks: Clocks) -> None:
    write(tmp_path, *DRAIN)
    forwards = read(tmp_path)
    clocks.pass_(100)
    (tmp_path / KEY).write_text("version=2")
    forwards.read()
    assert forwards.paths() == ()


def test_what_drains_ends_when_dom0_names_it_again_as_over(tmp_path: Path, clocks: Clocks) -> None:
    write(tmp_path, *DRAIN)
    forwards = read(tmp_path)
    clocks.pass_(105)
    for change in ((tmp_path / KEY).unlink, lambda: write(tmp_path, "expire=1"), (tmp_path / KEY).unlink):
        change()
        forwards.read()
    assert forwards.paths() == ()
