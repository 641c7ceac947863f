# SPDX-License-Identifier: GPL-2.0-or-later
"""The command panic: everything closed at once, whatever else is wrong; the rules are kept, disabled.

dom0's policy first, without the lock. Then at once the lock, if it is free: `watch` sees that policy has
changed, and would open it again. If it is not, the tunnels that policy allowed are ended, and then the lock
is waited for as long as the backend does, and on without it. Then policy and tunnels, again: whoever had the
lock may have opened them meanwhile. Then the rules and the listeners' configuration. Each step is tried
though others fail; and if one did, or somebody without our lock has opened policy before the rules were
disabled, all of it once more. `apply` refuses in doubt; here doubt closes.

What it writes says that it is not through, and as long as policy says so nobody else opens anything. The last
write takes that out, unless a rule is enabled still. So whatever becomes of this one, another one can end it.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

from qubes_fwd_qrexec.errors import ForwardError, StoreError
from qubes_fwd_qrexec.rules import BrokenRule, NamedRule
from qubes_fwd_qrexec.values import QubeName

from . import policy
from .apply import LEASE_S, Kind, Step
from .backend import ANY
from .inventory import CONFIG_PREFIX, Inventory
from .render import escaped
from .revocations import Revocation, configured, noted, running
from .revoking import Result, SkippedError, revoke
from .session import Session
from .store import feature_key, read_rules

_POLICY = "policy: deny every call"
_INVENTORY = "read all qubes, to find rules and listeners"


class Failure(NamedTuple):
    """What was not done, and why."""

    what: str
    why: str


@dataclass(slots=True)
class Report:
    """What was and was not done; ``open_still`` is what a look at the system found afterwards.

    ``owed`` are the tunnels that may be open and have not been ended. ``is_held``: policy says that we
    are not through, and nobody opens anything.
    """

    done: list[str] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    disabled: list[NamedRule] = field(default_factory=list)
    broken: tuple[BrokenRule, ...] = ()
    open_still: list[str] = field(default_factory=list)
    owed: set[Revocation] = field(default_factory=set)
    is_held: bool = False

    @property
    def is_closed(self) -> bool:
        return not self.failures and not self.open_still

    def attempt(self, what: str, action: Callable[[], None]) -> bool:
        """Do one thing, and write down what became of it; what is done once has not failed."""
        try:
            action()
        except (ForwardError, OSError) as error:
            if what not in self.done:
                self.failures = [*(f for f in self.failures if f.what != what), Failure(what, str(error))]
            return False
        self.failures = [failure for failure in self.failures if failure.what != what]
        if what not in self.done:
            self.done.append(what)
        return True

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def as_json(self) -> dict[str, Any]:
        return {
            "is_closed": self.is_closed,
            "is_held": self.is_held,
            "done": self.done,
            "not_done": [failure._asdict() for failure in self.failures],
            "notes": self.notes,
            "open_still": self.open_still,
            "disabled": [{"qube": rule.target, "name": rule.name} for rule in self.disabled],
            "broken": [{"qube": rule.target, "name": rule.name} for rule in self.broken],
        }


def panic(args: Namespace, session: Session) -> int:
    """Close everything; status 0 only if all of it is closed."""
    report = Report()
    _close(session, report)
    with ExitStack() as held:
        if _lock(held, session, timeout_s=0) is not None:
            _end_tunnels(session, report)
            why = _lock(held, session)
            if why is not None:
                # No failure by itself: everything is done all the same, and looked at in the end.
                report.note(f"this went on without the lock: {why}")
        _close_all(session, report)
        if report.failures or _is_open_again(session):
            _close_all(session, report)
        open_in_qubes, is_through = _open_in_qubes(session)
        _keep_notes(session, report, is_through=is_through)
        report.open_still += [*_open_in_policy(session, report), *open_in_qubes]
    if session.is_json:
        session.say_json(report.as_json())
    else:
        _say(report, session)
    return 0 if report.is_closed else 1


def _lock(held: ExitStack, session: Session, timeout_s: float | None = None) -> str | None:
    """Take the lock; why not, if it cannot be had."""
    try:
        held.enter_context(session.backend.locked(timeout_s))
    except (ForwardError, OSError) as error:
        return str(error)
    return None


def _close_all(session: Session, report: Report) -> None:
    """Everything, in order; what was done before and not undone since is not done again."""
    _close(session, report)
    inventory = _end_tunnels(session, report)
    if inventory is not None:
        _disable(inventory, session, report)
        _remove_configs(inventory, session, report)


def _close(session: Session, report: Report) -> None:
    """Close policy, and keep in mind which tunnels it allowed."""
    report.owed |= _allowed(session, report)
    _close_policy(session, report)


def _end_tunnels(session: Session, report: Report) -> Inventory | None:
    inventory = _inventory(session, report)
    if inventory is not None:
        told = {Revocation(tunnel) for tunnel, _ in configured(inventory)}
        report.owed |= {revocation for revocation in told if revocation.words() not in report.done}
        # Without an inventory none is known to be halted.
        report.owed = set(running(report.owed, inventory))
    for revocation, result in revoke(report.owed, session.backend).items():
        if report.attempt(revocation.words(), partial(_check_ended, revocation, result)):
            report.owed.discard(revocation)
    return inventory


def _close_policy(session: Session, report: Report, *, is_through: bool = False) -> None:
    """Deny everything; what is still to be ended is noted, for whoever comes after us."""
    notes = [] if is_through else [policy.PANIC]
    notes += [revocation.note() for revocation in sorted(report.owed)]
    text = policy.text((), session.now, notes=notes)
    report.attempt(_POLICY, lambda: session.backend.replace_policy(text, ANY))


def _is_open_again(session: Session) -> bool:
    """Whether somebody opened policy before the rules were disabled who had another lock, as in a management
    qube, and did not heed our note, as an older release.
    """
    try:
        return bool(policy.allowing(session.backend.read_policy().text))
    except (ForwardError, OSError):
        return True


def _keep_notes(session: Session, report: Report, *, is_through: bool) -> None:
    """Leave in the policy file exactly what is still to be ended, and that we are not through if so it is."""
    with suppress(ForwardError, OSError):
        text = session.backend.read_policy().text
        if noted(text) != report.owed or bool(policy.panic_notes(text)) == is_through:
            _close_policy(session, report, is_through=is_through)


def _allowed(session: Session, report: Report) -> set[Revocation]:
    """What to end of all that policy allows, and of what it has noted, also of what would drain.

    If it cannot be read, the tunnels are found by what the listeners were told.
    """
    try:
        text = session.backend.read_policy().text
    except (ForwardError, OSError) as error:
        report.note(f"what the policy allowed could not be read: {error}")
        return set()
    found = {Revocation(tunnel) for tunnel in policy.tunnels(policy.allowing(text))}
    old = {Revocation(revocation.tunnel) for revocation in noted(text)}
    return found | {revocation for revocation in old if revocation.words() not in report.done}


def _inventory(session: Session, report: Report) -> Inventory | None:
    found: list[Inventory] = []
    report.attempt(_INVENTORY, lambda: found.append(session.backend.inventory()))
    return found[0] if found else None


def _disable(inventory: Inventory, session: Session, report: Report) -> None:
    stored = read_rules(inventory)
    report.broken = stored.broken
    for named in stored.rules:
        if not named.rule.enabled:
            continue
        line = str(replace(named.rule, enabled=False))
        key = feature_key(named.name)

        def store(target: QubeName = named.target, key: str = key, line: str = line) -> None:
            session.backend.set_feature(target, key, line)

        if report.attempt(f"{named}: disable the rule", store) and named not in report.disabled:
            report.disabled.append(named)


def _check_ended(revocation: Revocation, result: Result) -> None:
    """Raises `StoreError` if a call has not ended its tunnels."""
    if isinstance(result, SkippedError):
        raise result
    if result is not None:
        raise StoreError(
            f"{result}; what goes through them may go on, and new connections for {LEASE_S} s, until another "
            f"panic or 'qvm-forward apply' can end them, or 'qvm-shutdown {revocation.target}' does"
        ) from result


def _remove_configs(inventory: Inventory, session: Session, report: Report) -> None:
    for qube, key, _ in sorted(inventory.told()):
        (words,) = Step(Kind.REMOVE_CONFIG, qube=qube, key=key).words()

        def remove(qube: QubeName = qube, key: str = key) -> None:
            session.backend.remove_feature(qube, key)

        report.attempt(words, remove)


def _open_in_policy(session: Session, report: Report) -> Iterator[str]:
    """What a look at policy finds open after all, or could not see."""
    try:
        text = session.backend.read_policy().text
    except (ForwardError, OSError) as error:
        yield f"policy: it cannot be read ({error})"
        return
    report.is_held = bool(policy.panic_notes(text))
    for line in sorted(policy.allowing(text)):
        yield f"policy: {' '.join(line.split())}"


def _open_in_qubes(session: Session) -> tuple[list[str], bool]:
    """The same of the qubes; and whether no rule is left for which anybody would open something."""
    try:
        inventory = session.backend.inventory()
    except (ForwardError, OSError):
        return [], False  # this has been said
    enabled = [f"{named}: the rule is enabled" for named in read_rules(inventory).rules if named.rule.enabled]
    told = sorted(inventory.told())
    listens = [f"{qube}: told to listen for {key.removeprefix(CONFIG_PREFIX)}" for qube, key, _ in told]
    return [*enabled, *listens], not enabled


def _say(report: Report, session: Session) -> None:
    if report.is_closed:
        session.say("Everything is closed: dom0 denies every forward, and no qube is told to listen.\n")
    else:
        session.say("NOT EVERYTHING IS CLOSED.\n")
        session.say("".join(f"Done: {what}.\n" for what in report.done))
    if report.disabled:
        count = len(report.disabled)
        session.say(f"{count} rule{'' if count == 1 else 's'} disabled and kept:\n")
        session.say("".join(f"  {rule}\n" for rule in report.disabled))
        session.say("'qvm-forward enable QUBE NAME' opens one again.\n")
    for rule in report.broken:
        session.say(
            f"{rule.target} {escaped(rule.name)} is no readable rule; it is left, and opens nothing.\n"
        )
    for note in report.notes:
        session.warn(f"note: {note}")
    for failure in report.failures:
        session.warn(f"not done: {failure.what}: {failure.why}")
    for what in report.open_still:
        session.warn(f"still open: {what}")
    if report.is_held:
        session.warn(
            "nobody opens anything until 'qvm-forward panic' is through: say it again once that is mended"
        )
    elif not report.is_closed:
        session.warn(
            "what is enabled opens again at the next 'qvm-forward apply': say 'qvm-forward panic' again once "
            "that is mended"
        )
