# SPDX-License-Identifier: GPL-2.0-or-later
"""What the command status makes of it when qubes answer this."""

from typing import Any

from answering import LACKS
from worlds import NOW

from qubes_fwd_qrexec.admin.answers import AnswerError
from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.snapshot import look as read_system
from qubes_fwd_qrexec.admin.views.status import Row, Status, asked, text
from qubes_fwd_qrexec.admin.views.tables import Style
from qubes_fwd_qrexec.common.report import (
    FirewallReport,
    ForwardReport,
    ListenerReport,
    Problem,
    QubeReport,
    Way,
    dump,
)
from qubes_fwd_qrexec.common.rules import Transport
from qubes_fwd_qrexec.common.services import STATUS_SERVICE
from qubes_fwd_qrexec.common.values import QubeName, RuleName

NOTHING = QubeReport(program="1", listener=ListenerReport(since=1, forwards=()))


class Saying:
    """A system whose qubes say this of themselves, and the others that they have no listener. ``asked`` are
    those that were asked.
    """

    def __init__(self, store: Backend, says: dict[str, QubeReport | AnswerError]) -> None:
        self._store = store
        self._says = says
        self.asked: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def ask(self, qube: QubeName, service: str, *_: object) -> bytes:
        if not service.startswith(STATUS_SERVICE):
            raise LACKS
        self.asked.add(qube)
        answer = self._says.get(qube, QubeReport(program="1"))
        if isinstance(answer, AnswerError):
            raise answer
        return dump(answer.as_json())


def look(store: Backend, **answers: QubeReport | AnswerError) -> Status:
    """The status of a system whose other qubes answer that they have no listener."""
    snapshot = read_system(store, with_config=True)
    says = {name.replace("_", "-"): answer for name, answer in answers.items()}
    return asked(snapshot, snapshot.plan(NOW), NOW, Saying(store, says))


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
