# SPDX-License-Identifier: GPL-2.0-or-later
"""What every command of qvm-forward has at hand: the system, the time, and where to print."""

from collections.abc import Mapping
from typing import Any, NamedTuple, TextIO

from qubes_fwd_qrexec.errors import ForwardError, RefusedError, StoreError
from qubes_fwd_qrexec.rules import BrokenRule, NamedRule
from qubes_fwd_qrexec.values import QubeName, RuleName

from .apply import Outcome, carry_out, differences
from .backend import Backend
from .inventory import Inventory
from .plan import plan
from .render import escaped
from .states import Plan, State
from .store import Stored, feature_key, read_rules
from .tables import Style


class UsageError(ForwardError):
    """The command line asks for something that cannot be meant."""


class Snapshot(NamedTuple):
    """The system as it was read, once."""

    inventory: Inventory
    stored: Stored

    def plan(self, now: float, newcomer: tuple[QubeName, RuleName] | None = None) -> Plan:
        return plan(self.stored.rules, self.inventory, now, broken=self.stored.broken, newcomer=newcomer)

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
        inventory = self.backend.inventory(with_config=with_config)
        return Snapshot(inventory, read_rules(inventory))

    def reconcile(self) -> tuple[Plan, Outcome]:
        """Make policy and configuration what the stored rules ask for; the lock is held.

        What could not be done is in the outcome.
        """
        snapshot = self.look(with_config=True)
        planned = snapshot.plan(self.now)
        steps = differences(planned, snapshot.inventory, self.backend.read_policy(), self.now)
        return planned, carry_out(steps, self.backend)

    def apply(self) -> tuple[Plan, Outcome]:
        """The same; raises `StoreError` that says what was done and what was not."""
        planned, outcome = self.reconcile()
        if outcome.problems:
            raise StoreError(_told(outcome))
        return planned, outcome

    def apply_change(self) -> Plan:
        """Apply after rules were changed; the same error says that the change itself is kept."""
        try:
            return self.apply()[0]
        except StoreError as error:
            raise StoreError(f"the rules are changed, but {error}") from error

    def store(self, inventory: Inventory, changes: Mapping[tuple[QubeName, str], str | None]) -> None:
        """Set (or with None remove) rules by qube and name; all of them, or on an error none: then they are
        again what they are in ``inventory``.
        """
        taken: list[tuple[QubeName, str]] = []
        try:
            for (qube, name), line in changes.items():
                taken.append((qube, feature_key(name)))
                self._put(qube, feature_key(name), line)
        except StoreError:
            for qube, key in taken:
                self._put(qube, key, inventory.qubes[qube].features.get(key))
            raise

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
        f"not everything could be done: {'; '.join(outcome.problems)}.\n"
        f"Done: {'; '.join(done) or 'nothing'}.\nNot done: {'; '.join(undone) or 'nothing'}.\n"
        "'qvm-forward apply' does the rest once that is mended"
    )
