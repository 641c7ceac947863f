# SPDX-License-Identifier: GPL-2.0-or-later
"""What is let through and what is not: in the status line, and for dom0."""

from collections.abc import Collection, Iterable, Iterator, Mapping

from qubes_fwd_qrexec import __version__
from qubes_fwd_qrexec.common import report
from qubes_fwd_qrexec.common.nftconfig import NftConfig
from qubes_fwd_qrexec.common.nftreport import NftReport, PathReport, Why
from qubes_fwd_qrexec.common.report import FORWARDS_MAX, PROBLEMS_MAX, FirewallReport, Problem
from qubes_fwd_qrexec.system.logs import one_line

from .pathrules import Kept, Names
from .rule import Family
from .tables import CUSTOM_INPUT, FORWARD, INPUT, LISTENER, TABLE, Place, Seen
from .wanted import Wanted, place_of

Places = Mapping[Family, Seen]


def account(wanted: Wanted, places: Places) -> Iterator[str]:
    """In words, for the status line."""
    waiting = wanted.waiting
    yield f"{len(wanted.configs) - len(waiting)} forwards let in"
    for family in Family:
        if wanted.rules(family) and not _has(places, family, LISTENER):
            yield f"none by {family}: no table {TABLE} with a chain {CUSTOM_INPUT}"
    if waiting:
        yield f"{len(waiting)} wait for the listener to listen: {' '.join(waiting)}"
    if wanted.paths:
        without = [kept.config.key for kept in wanted.paths if not _families(kept.config, places)]
        yield f"{len(wanted.paths) - len(without)} forwards by nft"
        if without:
            yield f"no place in the firewall for {' '.join(without)}"


def firewall_report(wanted: Wanted, places: Places) -> FirewallReport:
    """What the listener's forwards find, as a value for dom0."""
    if len(wanted.waiting) > FORWARDS_MAX:
        return FirewallReport()  # an incomplete list would be wrong
    words = {
        family: report.Firewall.OPEN if _has(places, family, LISTENER) else report.Firewall.CLOSED
        for family in Family
    }
    return FirewallReport(words[Family.IP], words[Family.IP6], wanted.waiting)


def nft_report(
    *,
    kept: Iterable[Kept],
    over: Iterable[NftConfig],
    failed: Collection[NftConfig],
    places: Places,
    counters: Mapping[str, tuple[int, int]],
    refused: Mapping[str, str],
    problem: str | None,
) -> NftReport:
    """What becomes of each forward by nft.

    ``kept`` are in force, or drain; of these and ``over`` (not in force), each key is told once. ``failed``
    could not be put in force.
    """
    found = {config.key: PathReport(key=config.key, why=Why.OVER) for config in over}
    found |= {config.key: PathReport(key=config.key, why=Why.FAILED) for config in failed}
    found |= {forward.config.key: _path_report(forward, places, counters) for forward in kept}
    forwards = [report for _, report in sorted(found.items())]
    return NftReport(
        program=__version__,
        versions=frozenset(f.version for f, seen in places.items() if seen.has(FORWARD) and seen.has(INPUT)),
        forwards=tuple(forwards[:FORWARDS_MAX]),
        refused=tuple(
            Problem(one_line(untrusted_key), one_line(text))
            for untrusted_key, text in list(refused.items())[:PROBLEMS_MAX]
        ),
        problem=None if problem is None else one_line(problem),
        left_out=max(0, len(forwards) - FORWARDS_MAX),
    )


def _path_report(kept: Kept, places: Places, counters: Mapping[str, tuple[int, int]]) -> PathReport:
    config, names = kept.config, Names(kept.config.key)
    is_there = bool(_families(config, places))
    why = Why.OVER if kept.is_draining else None if is_there else Why.NO_TABLE
    nothing = (0, 0)
    packets, sent = counters.get(names.sent, nothing)
    return PathReport(
        key=config.key,
        digest=config.digest if why is None else None,
        why=why,
        draining=kept.is_draining and is_there,
        connections=counters.get(names.new, nothing)[0],
        packets=packets,
        sent=sent,
        received=counters.get(names.received, nothing)[1],
    )


def _families(config: NftConfig, places: Places) -> list[Family]:
    """The families of a forward that the firewall has a place for."""
    return [f for f in Family if f.version in config.versions and _has(places, f, place_of(config))]


def _has(places: Places, family: Family, place: Place) -> bool:
    return family in places and places[family].has(place)
