# SPDX-License-Identifier: GPL-2.0-or-later
"""What the command status makes of it when qubes answer this."""

from worlds import NOW

from qubes_fwd_qrexec.admin.answers import AnswerError
from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.snapshot import look as read_system
from qubes_fwd_qrexec.admin.views.judged import judged_apart
from qubes_fwd_qrexec.admin.views.status import (
    Row,
    Status,
    status_of,
    text,
    to_ask,
)
from qubes_fwd_qrexec.admin.views.tables import Style
from qubes_fwd_qrexec.common.report import (
    FirewallReport,
    ForwardReport,
    ListenerReport,
    Problem,
    QubeReport,
    Way,
)
from qubes_fwd_qrexec.common.rules import Transport
from qubes_fwd_qrexec.common.values import QubeName, RuleName

NOTHING = QubeReport(program="1", listener=ListenerReport(since=1, forwards=()))


def look(store: Backend, **answers: QubeReport | AnswerError) -> Status:
    """The status of a system whose other qubes answer that they have no listener."""
    snapshot = read_system(store, with_config=True)
    planned = snapshot.plan(NOW)
    asked: dict[QubeName, QubeReport | AnswerError] = dict.fromkeys(
        to_ask(planned, snapshot.inventory, ()), QubeReport(program="1")
    )
    asked |= {QubeName(name.replace("_", "-")): answer for name, answer in answers.items()}
    return status_of(snapshot, planned, NOW, judged_apart(planned.live, store, snapshot.installed), asked)


def row(store: Backend, **answers: QubeReport | AnswerError) -> Row:
    (found,) = look(store, **answers).rows
    return found


def shown(found: Status) -> str:
    return text(found, Style())


REPORT = ForwardReport(
    target=QubeName("work"),
    name=RuleName("web"),
    since=1,
    connections=3,
    total=40,
    refused={},
    sent=999,
    received=1536,
    transport=Transport.MUX,
    way=Way.OPEN,
    mux_calls=1,
    is_listening=True,
)


def listening(
    *forwards: ForwardReport, problems: tuple[Problem, ...] = (), waiting: tuple[str, ...] = (), bugs: int = 0
) -> QubeReport:
    listener = ListenerReport(since=1, forwards=forwards, problems=problems, bugs=bugs)
    return QubeReport(program="1", listener=listener, firewall=FirewallReport(waiting=waiting))
