# SPDX-License-Identifier: GPL-2.0-or-later
"""What dom0 is told of the forwards by nft in a qube, also while nft refuses something or fails."""

from collections.abc import Collection
from pathlib import Path

import pytest

from qubes_fwd_qrexec.common.nftconfig import NftConfig
from qubes_fwd_qrexec.common.nftreport import PathReport, Why
from qubes_fwd_qrexec.firewall.cutting import CutError, Cutter
from qubes_fwd_qrexec.firewall.forwards import Forwards
from qubes_fwd_qrexec.firewall.inforce import InForce
from qubes_fwd_qrexec.firewall.keeper import Keeper
from qubes_fwd_qrexec.firewall.nfttool import Changes, Nft
from qubes_fwd_qrexec.firewall.rule import Family, NftError
from qubes_fwd_qrexec.firewall.tables import CUSTOM_FORWARD, CUSTOM_INPUT, Seen, SeenTable
from qubes_fwd_qrexec.firewall.wanted import Firewall
from qubes_fwd_qrexec.system.configsource import FileSource

WITH_TABLE = Seen(SeenTable({CUSTOM_INPUT: (), CUSTOM_FORWARD: ()}))
LINE = "version=1 role=target side=uplink proto=tcp srcports={0}-{0} dstports={0}-{0} srchosts=10.0.0.0/8"


def entry(name: str = "web", port: int = 80, more: str = "") -> NftConfig:
    return NftConfig.parse(f"nft.work.{name}", LINE.format(port) + more)


WEB, DNS, BAD = entry(), entry("dns", 53), entry("bad", 666)


class FakeNft(Nft):
    """A firewall that refuses rules for port 666, or everything while ``is_broken``."""

    def __init__(self, there: tuple[Family, ...] = tuple(Family)) -> None:
        super().__init__("/nonexistent")
        self.there = there
        self.is_broken = False
        self.given: list[str] = []

    def look(self) -> dict[Family, Seen]:
        if self.is_broken:
            raise NftError("Operation not supported")
        return {family: WITH_TABLE if family in self.there else Seen() for family in Family}

    def carry_out(self, transaction: str) -> None:
        if "dport 666" in transaction:
            raise NftError("Operation not supported")
        self.given.append(transaction)

    def counters(self) -> dict[str, tuple[int, int]]:
        if self.is_broken:
            raise NftError("Operation not supported")
        return {"nft.work.web/new": (3, 180), "nft.work.web/in": (30, 4000), "nft.work.web/out": (40, 50_000)}


class NoChanges(Changes):
    """News that never comes."""

    def __init__(self) -> None:
        pass

    def has_any(self) -> bool:
        return False


class Bench:
    """The keeper, and the directory that it reads."""

    def __init__(self, directory: Path, nft: FakeNft) -> None:
        self.config, self.nft = directory / "config", nft
        self.config.mkdir()
        self.cut_problem = ""
        self.in_force = InForce(Firewall(nft), Cutter(self._end), directory / "in-force")
        self.keeper = Keeper(Forwards(FileSource(self.config)), self.in_force, lambda _: frozenset())

    def tell(self, *configs: NftConfig, **untrusted: str) -> None:
        """Configure exactly this, and look."""
        for file in self.config.iterdir():
            file.unlink()
        for config in configs:
            (self.config / config.key).write_text(str(config))
        for name, value in untrusted.items():
            (self.config / f"nft.work.{name}").write_text(value)
        self.keeper.look(NoChanges(), is_asked=True)

    def _end(self, gone: Collection[NftConfig], living: Collection[NftConfig]) -> int:
        if self.cut_problem:
            raise CutError(self.cut_problem)
        return 0

    def told(self) -> dict[str, PathReport]:
        return {forward.key: forward for forward in self.keeper.report(self.nft).forwards}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path, FakeNft())


def test_what_is_in_force_is_told_with_digest_and_counters(bench: Bench) -> None:
    bench.tell(WEB, DNS)
    assert bench.told() == {
        WEB.key: PathReport(
            key=WEB.key, digest=WEB.digest, connections=3, packets=30, sent=4000, received=50_000
        ),
        DNS.key: PathReport(key=DNS.key, digest=DNS.digest),
    }
    report = bench.keeper.report(bench.nft)
    assert report.versions == {4, 6}
    assert report.problem is None


def test_an_entry_that_is_refused_is_told_and_not_in_force(bench: Bench) -> None:
    bench.tell(WEB, dns="half of")
    report = bench.keeper.report(bench.nft)
    assert [problem.key for problem in report.refused] == [DNS.key]
    assert set(bench.told()) == {WEB.key}


def test_a_forward_whose_time_is_over_is_told_as_that(bench: Bench) -> None:
    bench.tell(entry(more=" expire=1"), entry("dns", 53, " expire=1 on-expire=drain"))
    assert bench.told() == {
        WEB.key: PathReport(key=WEB.key, why=Why.OVER, connections=0),
        DNS.key: PathReport(key=DNS.key, why=Why.OVER),
    }


def test_a_forward_that_finds_no_table_is_told_as_that(tmp_path: Path) -> None:
    bench = Bench(tmp_path, FakeNft(there=(Family.IP6,)))
    bench.tell(WEB)
    assert bench.told()[WEB.key].why is Why.NO_TABLE
    assert bench.keeper.report(bench.nft).versions == {6}
    assert bench.nft.given == []


def test_a_forward_that_nft_refuses_keeps_no_other_from_being_closed(bench: Bench) -> None:
    bench.tell(WEB, DNS)
    bench.nft.given.clear()
    bench.tell(DNS, BAD)
    assert len(bench.nft.given) == 1
    assert "dport 80 " not in bench.nft.given[0]
    assert "dport 53 " in bench.nft.given[0]
    assert bench.told() == {
        BAD.key: PathReport(key=BAD.key, why=Why.FAILED),
        DNS.key: PathReport(key=DNS.key, digest=DNS.digest),
    }
    assert bench.keeper.report(bench.nft).problem == "Operation not supported"
    bench.tell(DNS)
    assert bench.keeper.report(bench.nft).problem is None


def test_a_forward_whose_connections_do_not_end_is_told_until_they_do(bench: Bench) -> None:
    """dom0 must not take it for closed."""
    bench.tell(WEB, DNS)
    bench.cut_problem = "Device or resource busy"
    bench.tell(DNS)
    assert set(bench.told()) == {WEB.key, DNS.key}
    assert bench.keeper.report(bench.nft).problem == "Device or resource busy"
    bench.cut_problem = ""
    bench.keeper.look(NoChanges())  # nothing has changed, and still it tries again
    assert bench.told() == {DNS.key: PathReport(key=DNS.key, digest=DNS.digest)}
    assert bench.keeper.report(bench.nft).problem is None


def test_while_nft_fails_what_may_still_be_in_force_is_told(bench: Bench) -> None:
    bench.tell(WEB)
    bench.nft.is_broken = True
    bench.tell(DNS)
    told = bench.told()
    assert told[WEB.key].digest == WEB.digest
    assert told[DNS.key].why is Why.FAILED
