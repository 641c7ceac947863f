# SPDX-License-Identifier: GPL-2.0-or-later
"""What a qube says of its forwards by nft, as dom0 reads it."""

import json
from typing import Any

import pytest

from qubes_fwd_qrexec.common.document import VERSION, ReportError, dump
from qubes_fwd_qrexec.common.nftreport import NftReport, PathReport, Why
from qubes_fwd_qrexec.common.report import FORWARDS_MAX, Problem

WHOLE = NftReport(
    program="1.0",
    versions=frozenset((4, 6)),
    forwards=(
        PathReport(
            key="nft.work.web", digest="0" * 16, connections=3, packets=30, sent=4000, received=50_000
        ),
        PathReport(key="nft.work.dns", why=Why.NO_TABLE),
        PathReport(key="nft.work.old", why=Why.OVER, draining=True),
    ),
    refused=(Problem("nft.work.new", "unknown option"),),
    problem="nft is missing",
    left_out=2,
)


@pytest.mark.parametrize("report", [WHOLE, NftReport(program="1.0", versions=frozenset((6,)))])
def test_a_report_reads_as_it_was_written(report: NftReport) -> None:
    assert NftReport.parse(dump(report.as_json())) == report


def test_a_forward_is_found_by_the_key_of_its_configuration() -> None:
    assert WHOLE.find("nft.work.dns") == PathReport(key="nft.work.dns", why=Why.NO_TABLE)
    assert WHOLE.find("nft.work") is None


@pytest.mark.parametrize(
    "change",
    [
        {"version": VERSION + 1},
        {"families": ["ip", "ip6", "ip"]},
        {"families": "ip"},
        {"forwards": [{}]},
        {"forwards": [WHOLE.forwards[0].as_json() | {"digest": 1}]},
        {"forwards": [WHOLE.forwards[0].as_json() | {"why": "because"}]},
        {"forwards": [WHOLE.forwards[0].as_json() | {"sent": -1}]},
        {"forwards": [WHOLE.forwards[0].as_json()] * (FORWARDS_MAX + 1)},
        {"refused": [{"key": "\x1b[2J", "text": ""}]},
        {"problem": 7},
        {"left_out": None},
    ],
)
def test_a_report_that_is_wrong_anywhere_is_refused_whole(change: dict[str, Any]) -> None:
    with pytest.raises(ReportError, match="the firewall's answer"):
        NftReport.parse(dump(WHOLE.as_json() | change))


@pytest.mark.parametrize("key", sorted(WHOLE.as_json()))
def test_a_report_that_lacks_something_is_refused(key: str) -> None:
    untrusted = WHOLE.as_json()
    del untrusted[key]
    with pytest.raises(ReportError, match=key):
        NftReport.parse(dump(untrusted))


def test_an_unknown_word_of_a_newer_qube_is_ignored() -> None:
    untrusted = WHOLE.as_json() | {"families": ["ip", "bridge"], "more": 1}
    assert NftReport.parse(json.dumps(untrusted).encode()).versions == {4}
