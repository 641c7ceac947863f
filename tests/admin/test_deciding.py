# SPDX-License-Identifier: GPL-2.0-or-later
"""Targets are asked where their servers listen when mode=auto is decided, and all at once."""

import json
from threading import Barrier

from memory import Memory
from worlds import NOW, nft_world, rule

from qubes_fwd_qrexec.admin.answers import AnswerError
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
    """Their servers listen at loopback alone, but that of one port, of which the target says nothing. None
    answers before as many are asked as are to be.
    """

    def __init__(self, asked: int) -> None:
        super().__init__(nft_world())
        self._all = Barrier(asked)
        self.silent = ""

    def ask(self, qube: QubeName, service: str, *_: object, **__: object) -> bytes:
        self.log.append(f"{qube} {service}")
        self._all.wait(10.0)
        if service.endswith(self.silent):
            raise AnswerError("it hangs")
        report = QubeReport(program="0.1", trial=Trial(Answer.REFUSED, Refusal.LOOPBACK, "the server"))
        return json.dumps(report.as_json()).encode()


def decisions(backend: Servers, *lines: str) -> dict[Key, Decision]:
    keys = (WEB, MAIL)[: len(lines)]
    for (qube, name), line in zip(keys, lines, strict=True):
        backend.qubes[qube][f"forward.{name}"] = str(rule(line, name=name).rule)
    return decided(look(backend), keys, NOW, backend)


def test_several_are_asked_at_once_and_each_is_decided_by_itself() -> None:
    backend = Servers(asked=2)
    backend.silent = "tcp.25"
    found = decisions(backend, "mode=auto", "mode=auto srcports=25 dstports=25")
    assert (found[WEB].rule.mode, found[WEB].is_at_loopback) == (Mode.QREXEC, True)
    assert found[MAIL] == Decision(found[MAIL].rule)
    assert found[MAIL].rule.mode is Mode.NFT


def test_nobody_is_asked_about_what_goes_one_way_anyhow() -> None:
    backend = Servers(asked=1)
    found = decisions(backend, "mode=auto autostart=yes", "mode=auto proto=udp srcports=25 dstports=25")
    assert (found[WEB].rule.mode, found[WEB].option) == (Mode.QREXEC, "autostart")
    assert found[MAIL].rule.mode is Mode.NFT
    assert decisions(backend, "mode=qrexec") == {}
    assert backend.log == []
