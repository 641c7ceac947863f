# SPDX-License-Identifier: GPL-2.0-or-later
"""Targets are asked where their servers listen when mode=auto is decided, and all at once."""

import json
from threading import Barrier

import pytest
from bounds import BOUND_S
from memory import Memory
from worlds import NOW, nft_world, rule

from qubes_fwd_qrexec.admin.answers import AnswerError, waiting
from qubes_fwd_qrexec.admin.deciding import Decision, decided
from qubes_fwd_qrexec.admin.snapshot import look
from qubes_fwd_qrexec.admin.states import Key
from qubes_fwd_qrexec.common.refusals import Refusal
from qubes_fwd_qrexec.common.report import Answer, QubeReport, Trial
from qubes_fwd_qrexec.common.rules import Mode
from qubes_fwd_qrexec.common.values import QubeName, RuleName

WORK = QubeName("work")
WEB, MAIL = (WORK, RuleName("web")), (WORK, RuleName("mail"))


class Servers(Memory):
    """Their servers listen at loopback alone, but those of some ports, of which the target says nothing. None
    answers before as many are asked as are to be.
    """

    def __init__(self, asked: int, *silent: str) -> None:
        super().__init__(nft_world())
        self._all = Barrier(asked)
        self._silent = silent

    def ask(self, qube: QubeName, service: str, *_: object, **__: object) -> bytes:
        self.log.append(f"{qube} {service}")
        with waiting():
            self._all.wait(BOUND_S)
        if service.endswith(self._silent):
            raise AnswerError("it hangs")
        report = QubeReport(program="0.1", trial=Trial(Answer.REFUSED, Refusal.LOOPBACK, "the server"))
        return json.dumps(report.as_json()).encode()


def decisions(backend: Servers, *lines: str) -> dict[Key, Decision]:
    keys = (WEB, MAIL)[: len(lines)]
    for (qube, name), line in zip(keys, lines, strict=True):
        backend.qubes[qube][f"forward.{name}"] = str(rule(line, name=name).rule)
    return decided(look(backend), keys, NOW, backend)


def test_several_are_asked_at_once_and_each_is_decided_by_itself() -> None:
    backend = Servers(2, "tcp.25")
    found = decisions(backend, "mode=auto", "mode=auto srcports=25 dstports=25")
    assert (found[WEB].rule.mode, found[WEB].is_at_loopback) == (Mode.QREXEC, True)
    assert found[MAIL] == Decision(found[MAIL].rule)
    assert found[MAIL].rule.mode is Mode.NFT


def test_udp_is_asked_about_and_decided_as_tcp_is() -> None:
    backend = Servers(2, "udp.25")
    found = decisions(backend, "mode=auto proto=udp", "mode=auto proto=udp srcports=25")
    assert (found[WEB].rule.mode, found[WEB].is_at_loopback) == (Mode.QREXEC, True)
    assert found[MAIL] == Decision(found[MAIL].rule)
    assert found[MAIL].rule.mode is Mode.NFT


@pytest.mark.parametrize(
    ("silent", "mode"),
    [
        ((), Mode.QREXEC),
        (("tcp.80",), Mode.QREXEC),
        (("udp.80",), Mode.QREXEC),
        (("tcp.80", "udp.80"), Mode.NFT),
    ],
)
def test_of_both_each_protocol_is_asked_about_and_one_at_loopback_is_enough(
    silent: tuple[str, ...], mode: Mode
) -> None:
    backend = Servers(2, *silent)
    assert decisions(backend, "mode=auto proto=both")[WEB].rule.mode is mode
    assert sorted(line.rpartition("+")[2] for line in backend.log) == ["tcp.80", "udp.80"]


def test_nobody_is_asked_about_what_goes_one_way_anyhow() -> None:
    backend = Servers(1)
    found = decisions(backend, "mode=auto autostart=yes", "mode=auto proto=udp proxy=v2 srcports=25")
    assert (found[WEB].rule.mode, found[WEB].option) == (Mode.QREXEC, "autostart")
    assert (found[MAIL].rule.mode, found[MAIL].option) == (Mode.QREXEC, "proxy")
    assert decisions(backend, "mode=qrexec") == {}
    assert backend.log == []
