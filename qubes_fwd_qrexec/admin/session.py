# SPDX-License-Identifier: GPL-2.0-or-later
"""What every command of qvm-forward has at hand: the system, the time, and where to print."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TextIO

from qubes_fwd_qrexec.common.errors import ForwardError, RefusedError, StoreError
from qubes_fwd_qrexec.common.rules import BrokenRule, NamedRule
from qubes_fwd_qrexec.common.values import QubeName, RuleName

from . import policy
from .apply import Kind, Outcome, carry_out, differences
from .backend import ANY, NEW, Backend, PolicyFile
from .inventory import Inventory
from .plan import plan
from .states import Plan, State
from .store import TUNNEL_NAME, Stored, feature_key, read_rules
from .views.render import escaped
from .views.tables import Style

# Policy that somebody else keeps on writing is no reason to go on for ever while the lock is held.
_MORE_LOOKS = 2


# Only what puts everything on hold is written over a file that cannot be read.
_UNREAD = PolicyFile(None, ANY)


class UsageError(ForwardError):
    """The command line asks for something that cannot be meant."""


class Snapshot(NamedTuple):
    """The system as it was read, once; ``installed`` is dom0's policy file, unless ``policy_problem`` says
    why it could not be read.
    """

    inventory: Inventory
    stored: Stored
    installed: PolicyFile = PolicyFile(None, NEW)
    policy_problem: str | None = None

    @property
    def is_held(self) -> bool:
        """Whether dom0's policy says that nothing is to be opened."""
        return policy.is_held(self.installed.text)

    def plan(
        self,
        now: float,
        newcomers: Collection[tuple[QubeName, RuleName]] = (),
        *,
        is_held: bool | None = None,
    ) -> Plan:
        """What the rules ask for; ``is_held`` where it is not for dom0's policy to say."""
        planned = plan(
            self.stored.rules,
            self.inventory,
            now,
            broken=self.stored.broken,
            newcomers=newcomers,
            stock=policy.stock_targets(self.installed.text),
        )
        if not (self.is_held if is_held is None else is_held):
            return planned
        return replace(planned, forwards=tuple(forward.held() for forward in planned), is_held=True)

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


class Applied(NamedTuple):
    """What the rules ask for, what became of the steps there, and the system as it was before them."""

    plan: Plan
    outcome: Outcome
    snapshot: Snapshot


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
    warned: set[str] | None = None

    def say(self, text: str) -> None:
        self.out.write(text)

    def say_json(self, data: Any) -> None:
        import json

        self.out.write(f"{json.dumps(data, indent=2)}\n")

    def warn(self, text: str) -> None:
        self.err.write(f"qvm-forward: {text}\n")

    def warn_once(self, text: str) -> None:
        """The same only once in a run."""
        if self.warned is None or text not in self.warned:
            self.warn(text)
        if self.warned is not None:
            self.warned.add(text)

    def look(self, *, with_config: bool = False) -> Snapshot:
        """``with_config``: also what listeners have been told, which only a comparison needs."""
        # Policy first: so its token tells also of whoever closes it while the qubes are read.
        installed, problem = _UNREAD, None
        try:
            installed = self.backend.read_policy()
        except StoreError as error:
            problem = str(error)
        inventory = self.backend.inventory(with_config=with_config)
        for text in (problem, *(qube.problem for qube in inventory.qubes.values())):
            if text is not None:
                self.warn_once(escaped(text))
        return Snapshot(inventory, read_rules(inventory), installed, problem)

    def reconcile(self, *, is_held: bool | None = None, ends_all: bool = False) -> Applied:
        """Make policy and configuration what the stored rules ask for; the lock is held.

        What could not be done is in the outcome. If somebody without our lock changes policy meanwhile, all
        is looked at again. ``is_held`` puts everything on hold or lifts that, where it is not None; what
        others write meanwhile stands all the same. ``ends_all`` is for `differences`.
        """
        outcome = Outcome()
        for _ in range(1 + _MORE_LOOKS):
            snapshot = self.look(with_config=True)
            planned = snapshot.plan(self.now, is_held=is_held)
            steps = differences(planned, snapshot.inventory, snapshot.installed, self.now, ends_all=ends_all)
            problem = None if is_held else snapshot.policy_problem
            if problem is not None:
                # Who knows whether it is held: close what can be closed without it.
                steps = tuple(step for step in steps if step.narrows)
            outcome = carry_out(steps, self.backend, snapshot.installed).after(outcome)
            if problem is not None:
                problem = f"dom0's policy cannot be read, and stays as it is: {problem}"
                outcome = outcome._replace(problems=(problem, *outcome.problems))
            if not outcome.is_overtaken:
                break
            # Whoever lifts a hold lifts the one that was seen, and no later one.
            is_held = is_held or None
        return Applied(planned, outcome, snapshot)

    def apply(self, *, is_held: bool | None = None) -> Applied:
        """The same; raises `StoreError` that says what was done and what was not."""
        applied = self.reconcile(is_held=is_held)
        if applied.outcome.troubles:
            raise StoreError(told(applied.outcome))
        return applied

    def apply_change(self, done: str = "the rules are changed") -> tuple[Plan, Outcome]:
        """Apply after something was changed; an error says that the change itself is kept."""
        try:
            planned, outcome, _ = self.reconcile()
        except StoreError as error:
            raise StoreError(f"{done}, but {error}") from error
        if outcome.troubles:
            raise StoreError(f"{done}, but {told(outcome)}")
        return planned, outcome

    def say_unwatched(self, applied: Plan, asked: Iterable[NamedRule]) -> None:
        """A live forward is promised to end by itself: say so if nothing sees to that."""
        is_live = any((f := applied.find(*named[:2])) is not None and f.is_live for named in asked)
        start = self.backend.unwatched() if is_live else None
        if start is not None:
            self.say(
                "Note: 'qvm-forward watch' does not run here, so nothing closes this when its time is over, "
                "a netvm changes or a qube goes, before the next command of qvm-forward does. This helps: "
                f"{start}.\n"
            )

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
    return {
        "forwards": [forward.as_json() for forward in planned],
        "broken": broken,
        "is_held": planned.is_held,
    }


def told(outcome: Outcome) -> str:
    """Words for steps of which not all could be taken."""
    done = [word for step in outcome.done for word in step.words()]
    undone = [word for step in outcome.undone for word in step.words()]
    words = (
        f"not everything could be done: {'; '.join(outcome.troubles)}.\nDone: {'; '.join(done) or 'nothing'}."
    )
    if undone:
        words += f"\nNot done: {'; '.join(undone)}."
    if all(step.kind is Kind.REVOKE for step in outcome.undone) and not outcome.problems:
        # The next apply has no line of policy left to take away, so it tells that target nothing.
        return words
    return f"{words}\n'qvm-forward apply' does the rest once that is mended"
