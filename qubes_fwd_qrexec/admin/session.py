# SPDX-License-Identifier: GPL-2.0-or-later
"""What every command of qvm-forward has at hand: the system, the time, and where to print."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TextIO

from qubes_fwd_qrexec.errors import ForwardError, RefusedError, StoreError
from qubes_fwd_qrexec.rules import BrokenRule, NamedRule
from qubes_fwd_qrexec.values import QubeName, RuleName

from . import policy
from .apply import Outcome, Step, carry_out, differences
from .backend import NEW, Backend, PolicyFile
from .inventory import Inventory
from .plan import plan
from .render import escaped
from .states import NOT_THROUGH, Cause, Plan, State
from .store import TUNNEL_NAME, Stored, feature_key, read_rules
from .tables import Style

# Policy that somebody else keeps on writing is no reason to go on for ever while the lock is held.
_MORE_LOOKS = 2


class UsageError(ForwardError):
    """The command line asks for something that cannot be meant."""


class Snapshot(NamedTuple):
    """The system as it was read, once; ``installed`` is dom0's policy file."""

    inventory: Inventory
    stored: Stored
    installed: PolicyFile = PolicyFile(None, NEW)

    def plan(self, now: float, newcomer: tuple[QubeName, RuleName] | None = None) -> Plan:
        """What the rules ask for; as long as panic is not through, no forward of it is live."""
        planned = plan(self.stored.rules, self.inventory, now, broken=self.stored.broken, newcomer=newcomer)
        if not policy.panic_notes(self.installed.text):
            return planned
        return replace(planned, forwards=tuple(forward.held() for forward in planned))

    def check_qube(self, name: str) -> QubeName:
        """Raises `RefusedError` if there is no such qube."""
        qube = self.inventory.get(name)
        if qube is None:
            raise RefusedError(f"there is no qube {name!a}; name one that 'qvm-ls' shows")
        return qube.name

    def find(self, target: str, name: str) -> NamedRule | BrokenRule:
        """A stored rule. Raises `RefusedError` that names those that there are."""
        self.check_qube(target)
        entry = self.stored.find(target, name)
        if entry is None:
            names = ", ".join(map(escaped, self.stored.names(target)))
            if not names:
                raise RefusedError(f"{target} has no forward at all; 'qvm-forward list' shows what there is")
            raise RefusedError(f"{target} has no forward {name!a}: it has {names}")
        return entry


class Session(NamedTuple):
    """One run of qvm-forward; ``now`` is in UNIX seconds."""

    backend: Backend
    now: float
    environ: Mapping[str, str]
    stdin: TextIO
    out: TextIO
    err: TextIO
    style: Style
    is_json: bool

    def say(self, text: str) -> None:
        self.out.write(text)

    def say_json(self, data: Any) -> None:
        import json

        self.out.write(f"{json.dumps(data, indent=2)}\n")

    def warn(self, text: str) -> None:
        self.err.write(f"qvm-forward: {text}\n")

    def look(self, *, with_config: bool = False) -> Snapshot:
        """``with_config``: also what listeners have been told, which only a comparison needs."""
        # Policy first: so its token tells also of whoever closes it while the qubes are read.
        installed = self.backend.read_policy()
        inventory = self.backend.inventory(with_config=with_config)
        return Snapshot(inventory, read_rules(inventory), installed)

    def reconcile(self) -> tuple[Plan, Outcome]:
        """Make policy and configuration what the stored rules ask for; the lock is held.

        What could not be done is in the outcome. If somebody without our lock changes policy meanwhile, all
        is looked at again.
        """
        planned, outcome = self._reconcile_once()
        for _ in range(_MORE_LOOKS):
            if not outcome.is_overtaken:
                break
            planned, again = self._reconcile_once(is_overtaken=True)
            # What is owed may be owed by the look before.
            outcome = again._replace(done=(*outcome.done, *again.done), problems=again.troubles, owed=())
        return planned, outcome

    def _reconcile_once(self, *, is_overtaken: bool = False) -> tuple[Plan, Outcome]:
        """Whoever has overtaken us and closed everything is panic, or means it as panic does. That closes
        policy first and disables the rules when it has the lock, which we have: so nothing is opened again.
        """
        snapshot = self.look(with_config=True)
        installed = snapshot.installed
        planned = snapshot.plan(self.now)
        steps = differences(planned, snapshot.inventory, installed, self.now)
        left: tuple[Step, ...] = ()
        if is_overtaken and not policy.allowing(installed.text):
            left = tuple(step for step in steps if step.opens)
        outcome = carry_out([step for step in steps if step not in left], self.backend, installed)
        why = ""
        if left:
            why = "somebody else closed everything in dom0's policy meanwhile, and nothing is opened again"
        elif is_overtaken and any(forward.cause is Cause.PANIC for forward in planned):
            why = NOT_THROUGH
        if why:
            outcome = outcome._replace(undone=(*outcome.undone, *left), problems=(*outcome.problems, why))
        return planned, outcome

    def apply(self) -> tuple[Plan, Outcome]:
        """The same; raises `StoreError` that says what was done and what was not."""
        planned, outcome = self.reconcile()
        if outcome.troubles:
            raise StoreError(_told(outcome))
        return planned, outcome

    def apply_change(self, done: str = "the rules are changed") -> Plan:
        """Apply after something was changed; an error says that the change itself is kept.

        What is left of changes before is no fault of this one, and only a warning.
        """
        try:
            planned, outcome = self.reconcile()
        except StoreError as error:
            raise StoreError(f"{done}, but {error}") from error
        if outcome.problems:
            raise StoreError(f"{done}, but {_told(outcome)}")
        if outcome.owed:
            self.warn(f"note: tunnels of earlier changes are still not ended: {'; '.join(outcome.owed)}")
        return planned

    def store(self, inventory: Inventory, changes: Mapping[tuple[QubeName, str], str | None]) -> None:
        """Set (or with None remove) rules by qube and name; all of them, or on an error none: then they are
        again what they are in ``inventory``.

        Where they cannot be put back either, the `StoreError` names each, and the way out.
        """
        taken: list[tuple[QubeName, str]] = []
        try:
            for (qube, name), line in changes.items():
                taken.append((qube, name))
                self._put(qube, feature_key(name), line)
        except StoreError as error:
            left = "\n".join(words for qube, name in taken for words in self._put_back(inventory, qube, name))
            if not left:
                raise
            raise StoreError(
                f"{error}.\nWhat was changed before could not be put back, and the next 'qvm-forward apply' "
                f"puts it in force:\n{left}"
            ) from error

    def _put_back(self, inventory: Inventory, qube: QubeName, name: str) -> Iterator[str]:
        """Words for what may not be again as it was."""
        key = feature_key(name)
        old = inventory.qubes[qube].features.get(key)
        try:
            self._put(qube, key, old)
        except StoreError as error:
            if name == TUNNEL_NAME:
                way_out = f"'qvm-forward tunnel {'mark' if old else 'unmark'} {qube}' mends that"
                yield f"{qube} may be marked otherwise than before ({error}); {way_out}"
            elif old is None:
                way_out = f"'qvm-forward remove {qube} {escaped(name)}' takes it away"
                yield f"{qube} {escaped(name)} may be stored ({error}); {way_out}"
            else:
                way_out = (
                    f"'qvm-forward import --replace' reads it back: {qube} {escaped(name)} {escaped(old)}"
                )
                yield f"{qube} {escaped(name)} may be changed or gone ({error}); {way_out}"

    def _put(self, qube: QubeName, key: str, value: str | None) -> None:
        if value is None:
            self.backend.remove_feature(qube, key)
        else:
            self.backend.set_feature(qube, key, value)


def plan_as_json(planned: Plan) -> dict[str, Any]:
    broken = [
        {
            "qube": rule.target,
            "name": rule.name,
            "state": State.BROKEN,
            "reason": rule.problem,
            "text": rule.text,
        }
        for rule in planned.broken
    ]
    return {"forwards": [forward.as_json() for forward in planned], "broken": broken}


def _told(outcome: Outcome) -> str:
    done = [word for step in outcome.done for word in step.words()]
    undone = [word for step in outcome.undone for word in step.words()]
    return (
        f"not everything could be done: {'; '.join(outcome.troubles)}.\n"
        f"Done: {'; '.join(done) or 'nothing'}.\nNot done: {'; '.join(undone) or 'nothing'}.\n"
        "'qvm-forward apply' does the rest once that is mended"
    )
