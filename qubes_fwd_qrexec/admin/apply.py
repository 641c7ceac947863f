# SPDX-License-Identifier: GPL-2.0-or-later
"""From plan to system: what differs between the two, and the steps that make it so.

`differences` decides and changes nothing, and `carry_out` acts; `reconcile` reads the system and does both.
Nothing else opens anything. Closing comes before opening, and policy before the listener in both: a listener
without policy can do no harm, and one that goes on listening after its rule is gone gets no call through.
Calls outlive the policy that allowed them, so their targets are told what is allowed from now on. If a step
fails, later steps that close are still taken.

Policy is only written over the text from which the differences were computed. If somebody else has changed it
since, their text stays: they may have closed what we would open.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple

from qubes_fwd_qrexec.common.allowance import Allowance
from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.common.nftconfig import is_nft_key, parse_nft_key
from qubes_fwd_qrexec.common.rules import Mode
from qubes_fwd_qrexec.common.values import QubeName, parse_printable

from . import policy
from .backend import Backend, ChangedError, PolicyFile, put
from .confirming import Place, Unconfirmed, switched, unconfirmed, widens
from .inventory import CONFIG_PREFIX, RULE_PREFIX, Inventory
from .revoking import Ended, allowances, drains, revoke, serving, targets_of
from .snapshot import Snapshot, look
from .states import Cause, Forward, Key, Plan

# Somebody who keeps rewriting policy must not keep us here for ever, as we hold the lock.
_LOOKS = 3


class Kind(StrEnum):
    """What a step does, as a word for programs."""

    CLOSE_POLICY = "close-policy"
    REVOKE = "revoke"
    REMOVE_CONFIG = "remove-config"
    SET_CONFIG = "set-config"
    END_RULE = "end-rule"
    OPEN_POLICY = "open-policy"


class Step(NamedTuple):
    """One change: of policy (``value`` is the whole new text, ``lines`` are those that go or come), of what a
    qube is told of a forward or a rule (``key`` is that of the configuration, or the rule's name; without a
    value it goes), or of what targets are told of the calls to them (``allowances``).
    """

    kind: Kind
    value: str = ""
    qube: QubeName = QubeName("")
    key: str = ""
    was: str | None = None
    lines: tuple[str, ...] = ()
    allowances: Mapping[QubeName, Allowance] = MappingProxyType({})

    @property
    def is_policy(self) -> bool:
        return self.kind in (Kind.CLOSE_POLICY, Kind.OPEN_POLICY)

    @property
    def tells(self) -> bool:
        """Whether it is what a qube is told of a forward."""
        return self.kind in (Kind.SET_CONFIG, Kind.REMOVE_CONFIG)

    @property
    def feature(self) -> str:
        """The feature that changes."""
        return f"{CONFIG_PREFIX if self.tells else RULE_PREFIX}{self.key}"

    @property
    def opens(self) -> bool:
        """Whether it lets in more, or tells a qube of a forward that it did not know."""
        return self.kind is Kind.OPEN_POLICY or (self.kind is Kind.SET_CONFIG and self.was is None)

    @property
    def narrows(self) -> bool:
        """Whether it closes, or changes what is open; not what lets in more packets, which need no policy."""
        if self.kind is Kind.SET_CONFIG and is_nft_key(self.key):
            return self.was is not None and not widens(self.key, self.was, self.value)
        return self.tells and not self.opens


class Outcome(NamedTuple):
    """What became of the steps; ``problems`` are errors, and ``undone`` the steps that they kept back.

    ``untold`` are the steps that were to tell a qube of a forward and failed, with the error. ``ended``
    is what targets made of what they were told. ``is_overtaken``: somebody else has changed policy
    meanwhile, and the steps are out of date.
    """

    done: tuple[Step, ...] = ()
    undone: tuple[Step, ...] = ()
    problems: tuple[str, ...] = ()
    untold: tuple[tuple[Step, str], ...] = ()
    ended: tuple[Ended, ...] = ()
    is_overtaken: bool = False

    @property
    def told(self) -> dict[Place, str | None]:
        """What qubes were told of forwards, as the last of these steps left it; None where it was removed."""
        return {(step.qube, step.key): step.value or None for step in self.done if step.tells}

    @property
    def before(self) -> dict[Place, str | None]:
        """What these qubes had been told before all of these steps."""
        return {(step.qube, step.key): step.was for step in reversed(self.done) if step.tells}

    def after(self, earlier: "Outcome") -> "Outcome":
        """This outcome combined with the previous one, whose undone steps and problems this one met again."""
        return self._replace(
            done=(*earlier.done, *self.done),
            untold=(*earlier.untold, *self.untold),
            ended=(*earlier.ended, *self.ended),
        )


def _without(forward: Forward, untold: Collection[Place]) -> Forward:
    """What is left of a forward if qubes could not be told of it.

    Over qrexec each protocol stands alone; by nft nothing is left, as each qube on the path decides on both.
    """
    if not untold:
        return forward
    left = tuple((qube, config) for qube, config in forward.configs if (qube, config.key) not in untold)
    is_closed = forward.mode is Mode.NFT and left != forward.configs
    return forward._replace(configs=() if is_closed else left)


def _keys(places: Iterable[Place]) -> set[Key]:
    """The rules by nft that qubes are told of there."""
    return {parse_nft_key(key) for _, key in places}


def differences(
    plan: Plan,
    inventory: Inventory,
    installed: PolicyFile,
    untold: Collection[Place] = (),
    stopped: Collection[Key] = (),
    *,
    ends_all: bool = False,
) -> tuple[Step, ...]:
    """The steps from what is to what the plan asks for, in the order in which they are to be taken.

    ``untold`` are places that could not be told: what is told there is closed, and a forward by nft at all
    its qubes. A listener keeps what it was told, as it gets no call through; what lets packets through goes.
    ``stopped`` are rules that changed from nft to qrexec, and whose qubes have confirmed that packets are
    stopped: others wait for that.
    ``ends_all``: as long as any qube is told of a forward, all that serve are told what is allowed.
    """
    ending = switched(plan, inventory, stopped)
    waiting = _keys(ending)
    opening = (_without(f, untold) for f in plan if f.named.key not in waiting)
    plan = replace(plan, forwards=tuple(opening))
    final = policy.text(plan)
    old_lines, new_lines = policy.allowing(installed.text), policy.allowing(final)
    gone, new = old_lines - new_lines, new_lines - old_lines
    steps: list[Step] = []
    if gone or not (new or policy.is_written(installed.text, final)):
        # Two writes if there is something to open too, so that closing never waits for opening.
        closed = policy.text(plan, withheld=new)
        steps.append(Step(Kind.CLOSE_POLICY, closed, lines=tuple(sorted(gone))))
    present = {(qube, key): value for qube, key, value in inventory.configurations()}
    # A line that only changes, in its autostart, ends nothing.
    kept = {call for line in new_lines if (call := policy.calls_of(line)) is not None} if gone else set()
    over = [line for line in gone if policy.calls_of(line) not in kept]
    if targets := targets_of(over, inventory) | (serving(inventory) if ends_all and present else set()):
        drained = () if plan.is_held else drains(inventory)
        told = allowances(targets, new_lines, drains=drained, cuts_drains=plan.is_held)
        steps.append(Step(Kind.REVOKE, allowances=told))
    wanted = ending | {
        (qube, config.key): str(config) for forward in plan for qube, config in forward.configs
    }

    def outermost_first(place: Place) -> tuple[int, Place]:
        return len(inventory.chain(place[0]).qubes), place

    staying = {place for place in untold if not is_nft_key(place[1])}
    for qube, key in sorted(present.keys() - wanted.keys() - staying, key=outermost_first):
        steps.append(Step(Kind.REMOVE_CONFIG, qube=qube, key=key, was=present[qube, key]))
    differing = (place for place, value in wanted.items() if value != present.get(place))
    changed = [
        Step(Kind.SET_CONFIG, parse_printable(wanted[place]), *place, present.get(place))
        for place in sorted(differing, key=outermost_first)
    ]
    # A qube that has it may be narrowed by it, so that comes before anything opens.
    steps += [step for step in changed if not step.opens]
    steps += _ends(plan)
    if new:
        steps.append(Step(Kind.OPEN_POLICY, final, lines=tuple(sorted(new))))
    # From the target outwards: what a qube sends on is let in already.
    return (*steps, *(step for step in reversed(changed) if step.opens))


def _ends(plan: Plan) -> Iterator[Step]:
    """Steps that store that rules have expired, so that a clock that is set back does not open them again."""
    for forward in plan:
        target, name, rule = forward.named
        if forward.cause is Cause.EXPIRED and not rule.has_ended:
            line = str(replace(rule, has_ended=True))
            yield Step(Kind.END_RULE, line, target, name, str(rule))


def carry_out(steps: Iterable[Step], backend: Backend, installed: PolicyFile) -> Outcome:
    """Take the steps; the caller holds the backend's lock. Never raises `StoreError`: see the outcome.

    ``installed`` is the policy from which the steps were computed. If policy cannot be written, or a listener
    cannot be told of a change to a forward that it has open, nothing opens any more; the steps that close are
    still taken.
    """
    done: list[Step] = []
    undone: list[Step] = []
    problems: list[str] = []
    untold: list[tuple[Step, str]] = []
    ended: tuple[Ended, ...] = ()
    may_open, is_checked, is_overtaken = True, False, False
    for step in steps:
        if step.opens and not (step.is_policy or is_checked):
            # Packets need no policy, so that a hold which began meanwhile is only found by looking.
            is_overtaken = is_overtaken or not _is_still(installed, backend, if_unread=False)
            may_open, is_checked = may_open and not is_overtaken, True
        if step.opens and not may_open:
            undone.append(step)
            continue
        try:
            if step.is_policy:
                backend.replace_policy(step.value, installed.token)
                installed, is_checked = _written(backend, step.value), True
            elif step.kind is Kind.REVOKE:
                ended = revoke(step.allowances, backend)
            else:
                put(backend, step.qube, step.feature, step.value or None)
        except (StoreError, OSError) as error:
            is_overtaken = is_overtaken or isinstance(error, ChangedError)
            if step.kind is Kind.SET_CONFIG:
                untold.append((step, str(error)))
                may_open = may_open and step.opens
                # It may have been set and not delivered; the next `differences` is to find it again.
                with suppress(StoreError, OSError):
                    put(backend, step.qube, step.feature, step.was)
            else:
                problems.append(str(error))
                undone.append(step)
                may_open = may_open and not step.is_policy
        else:
            done.append(step)
    if any(step.opens for step in done):
        is_overtaken = is_overtaken or not _is_still(installed, backend, if_unread=True)
    return Outcome(tuple(done), tuple(undone), tuple(problems), tuple(untold), ended, is_overtaken)


def _is_still(installed: PolicyFile, backend: Backend, *, if_unread: bool) -> bool:
    """Whether the policy file still has this text; ``if_unread`` if it cannot be read."""
    with suppress(StoreError):
        return backend.read_policy().text == installed.text
    return if_unread


def _written(backend: Backend, text: str) -> PolicyFile:
    """The policy file with the token of what we have just written. Raises `StoreError`."""
    found = backend.read_policy()
    if found.text != text:
        raise ChangedError("dom0's policy file")
    return found


class Applied(NamedTuple):
    """What the rules ask for, the outcome of the steps, and the system as it was before them."""

    plan: Plan
    outcome: Outcome
    snapshot: Snapshot


def due(snapshot: Snapshot, now: float, *, is_held: bool | None = None, known: Plan | None = None) -> Applied:
    """What `reconcile` would do now; ``known`` is an earlier plan. Nothing is done."""
    planned = snapshot.plan(now, is_held=is_held, known=known)
    return Applied(planned, Outcome(differences(planned, snapshot.inventory, snapshot.installed)), snapshot)


def reconcile(
    backend: Backend,
    now: float,
    *,
    is_held: bool | None = None,
    read: Snapshot | None = None,
    known: Plan | None = None,
) -> Applied:
    """Make policy and configuration what the stored rules ask for; the caller holds the lock.

    What could not be done is in the outcome. If somebody changes policy meanwhile without our lock, all is
    looked at again. ``is_held`` puts everything on hold, or lifts the hold. ``read`` is the system with its
    configurations, if the caller has read it under the same lock; ``known`` is an earlier plan. Raises
    `StoreError` if the qubes cannot be read.
    """
    outcome, untold, stopped, overtaken, unsure = Outcome(), set[Place](), set[Key](), 0, 0
    while True:
        snapshot, read = read or look(backend, with_config=True), None
        planned = known = snapshot.plan(now, is_held=is_held, known=known)
        # Whoever began a hold may have been killed before any call was ended.
        ends_all = planned.is_held and not is_held
        inventory = snapshot.inventory
        steps = differences(planned, inventory, snapshot.installed, untold, stopped, ends_all=ends_all)
        problem = None if is_held else snapshot.installed.problem
        if problem is not None:
            # Everything may be on hold: only close, and only what needs no policy.
            steps = tuple(step for step in steps if step.narrows)
        taken = carry_out(steps, backend, snapshot.installed)
        outcome = taken.after(outcome)
        if problem is not None:
            problem = f"dom0's policy cannot be read, and stays as it is: {problem}"
            outcome = outcome._replace(problems=(problem, *outcome.problems))
        overtaken += taken.is_overtaken
        failed = {(step.qube, step.key) for step, _ in outcome.untold}
        ending = switched(planned, inventory, stopped)
        doubts = unconfirmed(ending, backend)
        confirmed = _keys(ending) - {parse_nft_key(doubt.key) for doubt in doubts}
        is_settled = failed == untold and not outcome.is_overtaken and not confirmed
        # By nft it opens without a policy that would differ if its rule went or a hold began meanwhile.
        # Whoever did that closed what was there, so whatever came later is closed by another look.
        lets_in = {at for at, value in taken.told.items() if value and is_nft_key(at[1])} - ending.keys()
        unsure += bool(lets_in)
        if _LOOKS in (overtaken, unsure) or (is_settled and not lets_in):
            break
        stopped |= confirmed
        # What a listener could not be told is closed: policy would allow more than it knows of, or less.
        untold = failed
        # The hold to be lifted is the one that was seen; a newer one stays.
        is_held = is_held or None
    return Applied(planned, _with_problems(outcome, doubts), snapshot)


def _with_problems(outcome: Outcome, doubts: Iterable[Unconfirmed]) -> Outcome:
    """The same with the doubts that keep rules from changing their mode, and with what could not be told."""
    problems = (
        f"{doubt.qube} has not confirmed that {doubt.key} is closed{doubt.said and ': '}{doubt.said}. "
        f"The forward opens over qrexec once it has, or once {doubt.qube} is shut down"
        for doubt in doubts
    )
    untold = [step for step, _ in outcome.untold]
    errors = [error for _, error in outcome.untold]
    return outcome._replace(
        undone=(*untold, *outcome.undone), problems=(*errors, *outcome.problems, *problems)
    )
