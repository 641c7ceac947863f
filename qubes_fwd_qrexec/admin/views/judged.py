# SPDX-License-Identifier: GPL-2.0-or-later
"""What dom0's whole policy says of the calls of live forwards, whichever of its files decides.

Our own file allows what the rules ask for. A file that sorts before it may deny the same, and one mistake
in any file denies every call.
"""

from collections.abc import Iterable

from qubes_fwd_qrexec.admin import policy
from qubes_fwd_qrexec.admin.backend import Backend, PolicyCall, PolicyFile, PolicyVerdict
from qubes_fwd_qrexec.admin.states import Forward
from qubes_fwd_qrexec.common.errors import ForwardError
from qubes_fwd_qrexec.common.values import QubeName, RuleName


def judged(
    forwards: Iterable[Forward], backend: Backend, installed: PolicyFile
) -> dict[tuple[QubeName, RuleName], PolicyVerdict]:
    """One verdict for each live forward: that of the first of its calls that is not allowed, if any.

    ``installed`` is our own file, for where the whole policy cannot be read: then a call that it does not
    allow is denied, and one that it allows, or that it may allow as it cannot be read, has the verdict None.
    """
    lines = {forward.named[:2]: policy.lines(forward) for forward in forwards if forward.is_live}
    calls = {line: _call(line) for needed in lines.values() for line in needed}
    verdicts = dict(zip(calls, backend.verdicts(list(calls.values())), strict=True)) if calls else {}
    ours = policy.allowing(installed.text)

    def verdict(line: str) -> PolicyVerdict:
        if verdicts[line].is_allowed is None and installed.is_read and line not in ours:
            return PolicyVerdict(False, f"{policy.NAME}.policy does not allow it")
        return verdicts[line]

    return {
        key: min(map(verdict, needed), key=lambda found: _ORDER[found.is_allowed])
        for key, needed in lines.items()
        if needed
    }


def denials(forwards: Iterable[Forward], backend: Backend) -> dict[tuple[QubeName, RuleName], str]:
    """Why dom0 denies the calls of live forwards, whatever our own file says. Never raises."""
    try:
        verdicts = judged(forwards, backend, backend.read_policy())
    except (ForwardError, OSError):
        return {}  # status says so
    return {key: verdict.reason for key, verdict in verdicts.items() if verdict.is_allowed is False}


_ORDER = {False: 0, None: 1, True: 2}


def _call(line: str) -> PolicyCall:
    service, argument, source, target, *_ = line.split()
    return PolicyCall(service, argument, QubeName(source), QubeName(target))
