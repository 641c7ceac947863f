# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether a server listens where a forward gets to, by what the target says of its sockets.

Nothing is sent to the server. That is all that anybody can know of UDP: a server need not answer.
"""

from collections.abc import Mapping

from qubes_fwd_qrexec.common.refusals import Refusal
from qubes_fwd_qrexec.common.report import Answer, Trial
from qubes_fwd_qrexec.common.values import Proto, QubeName

from .tables import Check
from .walking import Remedy, Stops, ok, unknown

NO_SERVER = "no-server"


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
    """Where to look oneself."""
    return f"'ss -ln{proto[0]}' in {target} shows where servers listen"
