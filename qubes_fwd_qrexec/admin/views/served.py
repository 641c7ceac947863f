# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether a server is where a forward gets to, and gets what it expects, by what the target says.

Nothing is sent to a server of UDP: that it listens is all that anybody can know, as it need not answer.
"""

from collections.abc import Iterator, Mapping

from qubes_fwd_qrexec.admin.states import Forward
from qubes_fwd_qrexec.common.refusals import Refusal
from qubes_fwd_qrexec.common.report import Answer, Expects, Trial
from qubes_fwd_qrexec.common.rules import Proxy
from qubes_fwd_qrexec.common.services import SERVERS_FILE
from qubes_fwd_qrexec.common.values import Proto, QubeName

from .tables import Check
from .walking import Remedy, Stops, ok, unknown

NO_SERVER = "no-server"
HEADER_EXPECTED = "header-expected"
SEND_HEADER: Remedy = (
    "if the configuration of the server asks for it, too, {0}",
    "qvm-forward set {target} {name} proxy={version}",
)


def served(
    target: QubeName, proto: Proto, trial: Trial | None, stops: Stops, remedies: Mapping[str, Remedy]
) -> Check:
    """What a target says of a port. ``remedies`` has what helps where nothing listens (`NO_SERVER`), and
    where something does in the wrong place: without a row for that, the place is right.

    Raises `StoppedError`.
    """
    if trial is None or trial.answer is Answer.FAILED:
        said = "" if trial is None else f": {trial.text}"
        return unknown(
            "server", f"{target} does not say whether a server listens{said}; {looks(proto, target)}"
        )
    text = f"in {target}, {trial.text}"
    listens = trial.answer is Answer.THROUGH or trial.reason == Refusal.LOOPBACK
    if listens and trial.reason not in remedies:
        return ok("server", text)
    cause = trial.reason if trial.reason in remedies else NO_SERVER
    raise stops.stopped("server", cause, text, remedies[cause])


def looks(proto: Proto, target: QubeName) -> str:
    """Where the user can look."""
    return f"'ss -ln{proto[0]}' in {target} shows where servers listen"


def elsewhere(proto: Proto, port: int) -> dict[str, Remedy]:
    """What helps where calls get to another place than the server is at."""
    line = f"'{proto} {port} ADDRESS'"
    return {
        Refusal.NOT_AT_LOOPBACK: (
            f"write {line} in {SERVERS_FILE} in {{target}}, with that address, or eth0 for the qube's own; "
            "or have the server listen on 127.0.0.1",
        ),
        Refusal.ELSEWHERE: ("have the server listen there, or change that line in {target}",),
    }


def misled(forward: Forward, trial: Trial | None, stops: Stops) -> Iterator[Check]:
    """Whether a server of TCP seems to expect another header than its connections have; nothing if not.

    That it expects none is less sure, as it may only end what comes from nobody. Raises `StoppedError`.
    """
    proxy = forward.named.rule.proxy
    expected = trial.reason if trial is not None and trial.answer is Answer.THROUGH else ""
    if proxy is Proxy.OFF and expected in (Expects.V1, Expects.V2):
        text = "the server seems to expect a PROXY header before each connection, but gets none"
        version = expected.removeprefix("expects-")
        raise stops.stopped("header", HEADER_EXPECTED, text, SEND_HEADER, version=version)
    if proxy is not Proxy.OFF and expected == Expects.NONE:
        text = "the server seems to expect no PROXY header, but gets one"
        undo = f"'qvm-forward set {forward.named.target} {forward.named.name} proxy=off' sends none"
        yield unknown("header", f"{text}; {undo}")
