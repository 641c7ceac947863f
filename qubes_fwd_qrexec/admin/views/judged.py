# SPDX-License-Identifier: GPL-2.0-or-later
"""What dom0's whole policy says of the calls of live forwards, whichever of its files decides.

Our own file allows what the rules ask for. A file that sorts before it may deny the same, and one mistake
in any file denies every call.
"""

from collections.abc import Iterable, Mapping

from qubes_fwd_qrexec.admin import policy
from qubes_fwd_qrexec.admin.backend import NEW, Backend, PolicyCall, PolicyFile, PolicyVerdict
from qubes_fwd_qrexec.admin.states import Forward, Key
from qubes_fwd_qrexec.common.config import ForwardKey
from qubes_fwd_qrexec.common.errors import ForwardError
from qubes_fwd_qrexec.common.values import Proto, QubeName


def judged(forwards: Iterable[Forward], backend: Backend, installed: PolicyFile) -> dict[Key, PolicyVerdict]:
    """One verdict for each live forward over qrexec: that of the first of its calls that is not allowed, if
    any. If that is so of one protocol alone, the reason says of which.

    ``installed`` is as for `judged_apart`.
    """
    return together(judged_apart(forwards, backend, installed))


def together(apart: Mapping[ForwardKey, PolicyVerdict]) -> dict[Key, PolicyVerdict]:
    """One verdict from those on each protocol."""
    found: dict[Key, PolicyVerdict] = {}
    for key, one in apart.items():
        other = found.setdefault(key[:2], one)
        if other.is_allowed is not one.is_allowed:
            worst, proto = (one, key.proto) if _order(one) < _order(other) else (other, Proto.TCP)
            found[key[:2]] = worst._replace(reason=f"{worst.reason} ({proto} alone)")
    return found


def judged_apart(
    forwards: Iterable[Forward], backend: Backend, installed: PolicyFile
) -> dict[ForwardKey, PolicyVerdict]:
    """One verdict for each protocol of each live forward over qrexec.

    ``installed`` is our own file, for where the whole policy cannot be read: then a call that it does not
    allow is denied, and one that it allows, or that it may allow as it cannot be read, has the verdict None.
    """
    found = _verdicts(forwards, backend, installed)
    return {key: min(verdicts, key=_order) for key, verdicts in found.items()}


def allowed(forwards: Iterable[Forward], backend: Backend) -> list[Key]:
    """The live forwards of which dom0's policy allows any call, though our own file should allow none."""
    found = _verdicts(forwards, backend, PolicyFile(None, NEW))
    some = (key[:2] for key, verdicts in found.items() if any(one.is_allowed for one in verdicts))
    return list(dict.fromkeys(some))


def _verdicts(
    forwards: Iterable[Forward], backend: Backend, installed: PolicyFile
) -> dict[ForwardKey, list[PolicyVerdict]]:
    """What dom0's policy says of each call of each protocol, TCP first."""
    lines = {
        ForwardKey(*forward.named.key, config.proto): policy.lines_of(forward, config)
        for forward in forwards
        for config in forward.listener_configs
    }
    calls = {line: _call(line) for needed in lines.values() for line in needed}
    verdicts = dict(zip(calls, backend.verdicts(list(calls.values())), strict=True)) if calls else {}
    ours = policy.allowing(installed.text)

    def verdict(line: str) -> PolicyVerdict:
        if verdicts[line].is_allowed is None and installed.is_read and line not in ours:
            return PolicyVerdict(False, f"{policy.NAME}.policy does not allow it")
        return verdicts[line]

    return {key: [*map(verdict, needed)] for key, needed in lines.items()}


def denials(forwards: Iterable[Forward], backend: Backend) -> dict[Key, str]:
    """Why dom0 denies the calls of live forwards, whatever our own file says. Never raises."""
    try:
        return denied(judged(forwards, backend, backend.read_policy()))
    except (ForwardError, OSError):
        return {}  # status says so


def denied(verdicts: Mapping[Key, PolicyVerdict]) -> dict[Key, str]:
    """Why dom0 denies the calls of those that it denies."""
    return {key: verdict.reason for key, verdict in verdicts.items() if verdict.is_allowed is False}


def _order(verdict: PolicyVerdict) -> int:
    return {False: 0, None: 1, True: 2}[verdict.is_allowed]


def _call(line: str) -> PolicyCall:
    service, argument, source, target, *_ = line.split()
    return PolicyCall(service, argument, QubeName(source), QubeName(target))
