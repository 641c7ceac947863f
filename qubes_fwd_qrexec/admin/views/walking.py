# SPDX-License-Identifier: GPL-2.0-or-later
"""What the steps of diagnose are made of: each is a `Check`, and the first that stops ends the walk."""

from qubes_fwd_qrexec.admin import policy
from qubes_fwd_qrexec.admin.answers import AnswerError
from qubes_fwd_qrexec.admin.inventory import CONFIG_PREFIX, Inventory
from qubes_fwd_qrexec.admin.snapshot import Snapshot
from qubes_fwd_qrexec.admin.states import Finding, Forward, Verdict
from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.common.values import QubeName

from . import reasons
from .tables import Check

Remedy = tuple[str, ...]
"""What helps, which names facts in braces and commands by number; and then these commands."""

NOT_APPLIED = "not-applied"
INSTALL: Remedy = (
    "install or update qubes-fwd-qrexec in {template}, shut {template} down, and start {qube} again",
)


class StoppedError(Exception):
    """The walk ends here; ``check`` says why."""

    def __init__(self, check: Check) -> None:
        super().__init__(check.text)
        self.check = check


class Stops:
    """Makes the ends of one forward's walk, and fills facts about it into what helps."""

    def __init__(self, forward: Forward, inventory: Inventory) -> None:
        self._forward = forward
        self._inventory = inventory

    def stopped(
        self, step: str, cause: str, text: str, row: Remedy, qube: QubeName | None = None, **more: str
    ) -> StoppedError:
        """``qube`` is the qube that lacks something, if any does."""
        template = None if qube is None else self._inventory.qubes[qube].template or qube
        target, name, *_ = self._forward.named
        facts: dict[str, object] = {"target": target, "name": name, "exposed": self._forward.exposed}
        facts |= {"qube": qube, "template": template, **more}
        remedy, *commands = row
        ways_out = tuple(tuple(word.format(**facts) for word in command.split()) for command in commands)
        remedy = remedy.format(*(f"'{' '.join(words)}'" for words in ways_out), **facts)
        return StoppedError(Check(step, Verdict.STOPS, text, cause, remedy, ways_out))

    def planned(self, step: str, found: Finding) -> StoppedError:
        """The plan has found what stops this step."""
        ways_out = reasons.ways_out(self._forward, found)
        quoted = [f"'{' '.join(words)}'" for words in ways_out]
        # Where somebody has to agree after something else, that is the last.
        last = quoted.pop() if len(ways_out) > 1 and ways_out[-1][1] == "confirm" else None
        remedy = " or ".join(quoted) if last is None else f"{' or '.join(quoted)}, then {last}"
        text = f"{self._forward.named} is {self._forward.state}. {reasons.sentence(self._forward, found)}"
        return StoppedError(Check(step, Verdict.STOPS, text, found.cause, remedy, ways_out))


def applied(snapshot: Snapshot, forward: Forward, stops: Stops) -> Check:
    """That dom0's policy and what qubes are told are as the rule asks for. Raises `StoppedError`."""
    allowed = policy.allowing(snapshot.installed.text)
    needed = policy.lines(forward) if snapshot.installed.is_read else ()
    lacking = [f"dom0's policy lacks '{line}'" for line in needed if line not in allowed]
    for qube, config in reversed(forward.configs):
        told = snapshot.inventory.qubes[qube].features.get(f"{CONFIG_PREFIX}{config.key}")
        if told != str(config):
            lacking.append(f"{qube} has {'no' if told is None else 'another'} configuration for it")
    if lacking:
        raise stops.stopped("applied", NOT_APPLIED, "; ".join(lacking), ("{0}", "qvm-forward apply"))
    return ok("applied", "dom0's policy and what the qubes are told match the rule")


def helps(qube: QubeName, error: AnswerError) -> str:
    """What to do about a qube that does not answer."""
    if error.status == ExitStatus.REFUSED and not error.way_out:
        return f"{qube} may not take any more calls: wait until some have ended, or restart it"
    return error.way_out or f"check {qube}, or restart it"


def ok(step: str, text: str) -> Check:
    return Check(step, Verdict.OK, text)


def unknown(step: str, text: str) -> Check:
    return Check(step, "unknown", text)
