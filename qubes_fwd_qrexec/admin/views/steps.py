# SPDX-License-Identifier: GPL-2.0-or-later
"""Words and JSON for steps, for what became of them, and for what targets made of being told."""

from collections.abc import Iterable
from typing import Any

from qubes_fwd_qrexec.admin.apply import Kind, Outcome, Step
from qubes_fwd_qrexec.admin.revoking import LEASE_S, Ended
from qubes_fwd_qrexec.common.allowance import Allowance
from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.common.nftconfig import is_nft_key

from . import carried
from .tables import counted


def words(step: Step) -> list[str]:
    """For people, one change a line."""
    if step.is_policy:
        since = "no longer" if step.kind is Kind.CLOSE_POLICY else "from now on"
        lines = [f"policy: {since} {' '.join(line.split())}" for line in step.lines]
        return lines or ["policy: write the file, which allows the same as before"]
    if step.kind is Kind.REVOKE:
        return [f"{target}: {_ends(allowance)}" for target, allowance in step.allowances.items()]
    if step.kind is Kind.END_RULE:
        return [f"{step.qube} {step.key}: mark it as expired for good"]
    key = step.key
    if is_nft_key(key):
        if step.kind is Kind.REMOVE_CONFIG:
            return [f"{step.qube}: let no packets through for {key}"]
        does = "let packets through" if step.opens else "change which packets are let through"
        return [f"{step.qube}: {does} for {key}: {step.value}"]
    if step.kind is Kind.REMOVE_CONFIG:
        return [f"{step.qube}: stop listening for {key}"]
    return [f"{step.qube}: {'listen' if step.opens else 'change how it listens'} for {key}: {step.value}"]


def text(steps: Iterable[Step], *, is_preview: bool, first: Iterable[str] = ()) -> str:
    """All of them below a title, after what is ``first``; empty if there is nothing."""
    lines = "".join(f"  {word}\n" for word in (*first, *(word for step in steps for word in words(step))))
    return f"{'This would change' if is_preview else 'Changed'}:\n{lines}" if lines else ""


def _ends(allowance: Allowance) -> str:
    drains = sorted(allowance.drains, key=str)
    drained = ", ".join(f"{carried.named(calls.proto)}{calls.ports.worded()}" for calls in drains)
    text = "end connections that are not allowed any more"
    return f"{text}, but let those to {drained} end by themselves" if drained else text


def as_json(step: Step) -> dict[str, Any]:
    if step.is_policy:
        lines, is_closing = list(step.lines), step.kind is Kind.CLOSE_POLICY
        return {"step": step.kind, "remove": lines if is_closing else [], "add": [] if is_closing else lines}
    if step.kind is Kind.REVOKE:
        return {
            "step": step.kind,
            "allowances": {target: str(allowance) for target, allowance in step.allowances.items()},
        }
    found: dict[str, Any] = {"step": step.kind, "qube": step.qube, "feature": step.feature, "was": step.was}
    return found if step.kind is Kind.REMOVE_CONFIG else found | {"value": step.value}


def ended_words(ended: Ended) -> str:
    """What goes on in a target, and what bounds it. Empty if all has ended."""
    if ended.problem is not None:
        return (
            f"{ended.problem}. What is open to {ended.target} may go on: over a mux call for at most "
            f"{LEASE_S} s, over a call of its own until it ends by itself or {ended.target} is shut down"
        )
    calls = counted(ended.draining, "call")
    return f"{ended.target}: {calls} may go on for a while" if ended.draining else ""


def untold(told: Iterable[Ended]) -> list[str]:
    """Why targets could not be told, and what goes on there."""
    return [ended_words(ended) for ended in told if ended.problem is not None]


def troubles(outcome: Outcome) -> list[str]:
    """All that is not as it should be."""
    return [*outcome.problems, *untold(outcome.ended)]


def check(outcome: Outcome, error: type[StoreError] = StoreError) -> None:
    """Raises ``error`` if not all steps could be taken."""
    if not troubles(outcome):
        return
    done = "; ".join(word for step in outcome.done if step.kind is not Kind.REVOKE for word in words(step))
    undone = "; ".join(word for step in outcome.undone for word in words(step))
    text = f"not everything could be done: {'; '.join(troubles(outcome))}.\nDone: {done or 'nothing'}."
    if undone:
        text += f"\nNot done: {undone}."
    # Another apply does not tell a target that this one could not: it finds no line of policy to take away.
    if outcome.problems:
        text += "\n'qvm-forward apply' does the rest once that is fixed"
    raise error(text)
