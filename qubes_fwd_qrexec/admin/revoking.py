# SPDX-License-Identifier: GPL-2.0-or-later
"""Calls of our services outlive the policy that allowed them: here targets are told what is still allowed.

A target is told everything that dom0 allows there from now on, and ends the rest. That is one call to each
target, with a time limit, all at once. Failures are not remembered: safety rests on the lease in the target.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from qubes_fwd_qrexec.common.allowance import ANSWER_MAX_BYTES, Allowance, Calls, Revoked
from qubes_fwd_qrexec.common.config import ListenerConfig
from qubes_fwd_qrexec.common.errors import ConfigError, StoreError, TextError
from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.common.rules import OnExpire, Transport
from qubes_fwd_qrexec.common.services import REVOKE_SERVICE
from qubes_fwd_qrexec.common.values import Proto, QubeName, TargetPorts

from . import policy
from .answers import AnswerError, NotRunningError, at_once
from .backend import Backend
from .inventory import ADMIN, TEMPLATE, Inventory

# How long a mux call goes on without dom0 being asked: `callservice.LEASE_S` of the target.
LEASE_S = 300
# How long connections may go on whose rule ended with on-expire=drain.
DRAIN_S = 3600
# A call takes some tenths of a second, and others wait for the lock for 10 s.
_TIMEOUT_S = 5.0


class Ended(NamedTuple):
    """Calls of a target that ended, and that may drain; ``problem`` is why it was not told: all may go on."""

    target: QubeName
    ended: int = 0
    draining: int = 0
    problem: str | None = None


def allowances(
    targets: Iterable[QubeName],
    lines: Iterable[str],
    *,
    drains: Collection[tuple[QubeName, Calls]] = (),
    cuts_drains: bool = False,
) -> dict[QubeName, Allowance]:
    """What each of the targets is to be told when exactly these lines of policy are in force."""
    kept, draining = defaultdict[QubeName, set[Calls]](set), defaultdict[QubeName, set[Calls]](set)
    for target, calls in filter(None, map(policy.calls_of, lines)):
        kept[target].add(calls)
    for target, calls in drains:
        draining[target].add(calls)
    found: dict[QubeName, Allowance] = {}
    for target in sorted(set(targets)):
        keeps = frozenset(kept[target])
        left = dict.fromkeys(draining[target] - keeps, DRAIN_S)
        try:
            found[target] = Allowance(keeps=keeps, drains=left, cuts_drains=cuts_drains)
        except TextError:
            # Longer than a target reads, and more calls than it can carry: all end, and may be made anew.
            found[target] = Allowance(cuts_drains=True)
    return found


def targets_of(lines: Iterable[str], inventory: Inventory) -> set[QubeName]:
    """The running qubes that may have calls which these lines allowed.

    A line that we would not write might have allowed calls to any qube that offers our services, so all of
    them count then.
    """
    found: set[QubeName] = set()
    for line in lines:
        call = policy.calls_of(line)
        if call is not None:
            called = inventory.get(call[0])
            found |= {call[0]} if called is not None and called.is_running else set()
        elif line.split()[0] in (*policy.OURS, "*"):
            found |= serving(inventory)
    return found


def serving(inventory: Inventory) -> set[QubeName]:
    """The running qubes that offer our services, without the one that this runs in: it cannot call itself."""
    return {
        qube.name
        for qube in inventory.qubes.values()
        if qube.is_running
        and qube.klass not in (ADMIN, TEMPLATE)
        and qube.name != inventory.here
        and any(inventory.offers(qube.name, service) for service in policy.OURS)
    }


def drains(inventory: Inventory) -> set[tuple[QubeName, Calls]]:
    """The calls that may drain when they are no longer allowed.

    Their listeners know: all forwards that share a call must say on-expire=drain. What cannot be read cuts.
    """
    cut: set[tuple[QubeName, Calls]] = set()
    drained: set[tuple[QubeName, Calls]] = set()
    for exposed, key, value in inventory.configurations():
        try:
            config = ListenerConfig.parse(key, value)
        except ConfigError:
            continue
        if config.proto is Proto.UDP and not inventory.offers(config.target, config.service):
            continue  # it has no such calls, and a target that knows no UDP would refuse the whole list
        is_mux = config.transport is Transport.MUX
        each = [config.target_ports] if is_mux else [TargetPorts(p, p) for p in config.target_ports]
        told = drained if config.on_expire is OnExpire.DRAIN else cut
        told.update((config.target, Calls(ports, exposed, config.proto)) for ports in each)
    return drained - cut


def revoke(told: Mapping[QubeName, Allowance], backend: Backend) -> tuple[Ended, ...]:
    """Tell all of these targets at once; the result for each. Raises nothing."""
    return tuple(at_once(lambda target: _revoke(target, told[target], backend), told).values())


def _revoke(target: QubeName, allowance: Allowance, backend: Backend) -> Ended:
    try:
        revoked = Revoked.parse(_told(target, allowance, backend))
    except NotRunningError:
        return Ended(target)
    except AnswerError as error:
        # A target without the service has no calls of ours.
        return Ended(target, problem=None if error.status == ExitStatus.NO_SERVICE else str(error))
    except (StoreError, TextError, OSError) as error:
        return Ended(target, problem=f"{REVOKE_SERVICE} in {target}: {error}")
    return Ended(target, revoked.ended, revoked.draining)


def _told(target: QubeName, allowance: Allowance, backend: Backend) -> bytes:
    """Tell a target, and return its answer, which is untrusted. Raises `AnswerError`."""

    def tell(allowance: Allowance) -> bytes:
        return backend.ask(target, REVOKE_SERVICE, ANSWER_MAX_BYTES, _TIMEOUT_S, str(allowance))

    try:
        return tell(allowance)
    except AnswerError as error:
        # A target that was started before its template knew UDP refuses the list, and would end nothing.
        if error.status != ExitStatus.BAD_ARGUMENT or allowance.of_tcp == allowance:
            raise
    return tell(allowance.of_tcp)
