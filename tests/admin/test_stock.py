# SPDX-License-Identifier: GPL-2.0-or-later
"""What goes on over the stock service after its forward has ended, as its listener tells."""

import json
from typing import Any

import pytest
from memory import Memory
from worlds import NOW, rule, world

from qubes_fwd_qrexec.admin.answers import NO_SERVICE, AnswerError, NotRunningError
from qubes_fwd_qrexec.admin.plan import plan
from qubes_fwd_qrexec.admin.states import Plan
from qubes_fwd_qrexec.admin.stock import Stock, ended, left_over
from qubes_fwd_qrexec.common.config import Service
from qubes_fwd_qrexec.common.report import DrainingReport, ForwardReport, ListenerReport, QubeReport, Way
from qubes_fwd_qrexec.common.rules import Transport
from qubes_fwd_qrexec.common.values import QubeName, RuleName

SSH = rule("srcports=22", target="personal", name="ssh")
PERSONAL, NAME, SYS_NET = QubeName("personal"), RuleName("ssh"), QubeName("sys-net")


def planned(*rules: Any) -> Plan:
    return plan(rules, world(), NOW)


def report(connections: int | None = None, draining: int | None = None) -> bytes:
    forwards = [] if connections is None else [forward(connections)]
    drains = (
        []
        if draining is None
        else [DrainingReport(target=PERSONAL, name=NAME, connections=draining, left_s=3000)]
    )
    listener = ListenerReport(since=0, forwards=tuple(forwards), draining=tuple(drains))
    return json.dumps(QubeReport(program="x", listener=listener).as_json()).encode()


def forward(connections: int) -> ForwardReport:
    return ForwardReport(
        target=PERSONAL,
        name=NAME,
        since=0,
        connections=connections,
        total=9,
        refused={},
        sent=0,
        received=0,
        transport=Transport.CALL,
        way=Way.OPEN,
        mux_calls=0,
        is_listening=True,
    )


class Listener(Memory):
    """It answers one thing after the other, and the last one again."""

    def __init__(self, *says: bytes | Exception) -> None:
        super().__init__(world())
        self._says = list(says)

    def ask(self, *args: object, **more: object) -> bytes:
        said = self._says.pop(0) if len(self._says) > 1 else self._says[0]
        if isinstance(said, Exception):
            raise said
        return said


def left(*says: bytes | Exception) -> tuple[Stock, ...]:
    now = [0.0]
    return left_over(
        ended(planned(SSH), planned()),
        Listener(*says),
        elapsed=lambda: now[0],
        rest=lambda seconds: now.__setitem__(0, now[0] + seconds),
    )


def test_what_has_ended_over_the_stock_service_is_found_and_no_other() -> None:
    before = planned(SSH, rule(), rule("srcports=23", target="personal", name="other"))
    after = planned(rule("srcports=23", target="personal", name="other"))
    assert [forward.source.name for forward in ended(before, after)] == ["ssh"]
    assert ended(planned(), planned(SSH)) == []


def test_a_forward_is_found_whose_call_another_one_needs() -> None:
    both = (rule(), rule("srcports=81 dstports=80", name="other"))
    (found,) = ended(planned(*both), planned(both[1]))
    assert found.source.name == "web"
    assert "another forward needs" in Stock(PERSONAL, NAME, SYS_NET, 3, None, Service.FORWARD_TCP).words()
    assert ended(planned(rule()), planned(rule("srchosts=10.0.0.0/8"))) == []


def test_what_is_changed_and_goes_on_has_not_ended() -> None:
    wider = rule("srcports=22 srchosts=192.168.0.0/16", target="personal", name="ssh")
    assert ended(planned(SSH), planned(wider)) == []


def test_a_listener_that_has_ended_all_leaves_nothing() -> None:
    assert left(report(connections=3), report()) == ()
    assert left(report(connections=0)) == ()


def test_connections_that_the_listener_does_not_end_are_counted() -> None:
    (stock,) = left(report(connections=3))
    assert stock == Stock(PERSONAL, NAME, SYS_NET, 3)
    assert stock.words() == (
        "personal ssh: 3 connections over qubes.ConnectTCP, which dom0 cannot end at sys-net"
    )


def test_those_that_may_finish_say_how_long() -> None:
    (stock,) = left(report(connections=1), report(draining=1))
    assert stock.words() == "personal ssh: 1 connection at sys-net may go on for at most 3000 s"


@pytest.mark.parametrize("error", [NotRunningError("down"), AnswerError("none", NO_SERVICE)])
def test_where_nothing_listens_nothing_is_left(error: Exception) -> None:
    assert left(error) == ()


def test_a_listener_that_does_not_say_is_not_taken_for_closed() -> None:
    (stock,) = left(AnswerError("silent"))
    assert stock.connections is None
    assert stock.words() == (
        "personal ssh: connections over qubes.ConnectTCP, which dom0 cannot end; sys-net does not say"
    )


def test_a_qube_that_does_not_answer_may_have_connections_of_any_forward() -> None:
    now = [0.0]
    (stock,) = left_over(
        (),
        Listener(AnswerError("it hangs")),
        everything_at=[SYS_NET],
        elapsed=lambda: now[0],
        rest=lambda s: now.__setitem__(0, now[0] + s),
    )
    assert stock == Stock(None, None, SYS_NET, None)
    assert stock.words().startswith("sys-net does not say whether it has connections over qubes.ConnectTCP,")
