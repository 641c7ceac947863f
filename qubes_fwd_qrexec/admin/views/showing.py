# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands that show: list, show, plan, policy; and apply, which shows what it changes."""

from argparse import Namespace
from dataclasses import replace
from typing import Any

from qubes_fwd_qrexec.admin import policy
from qubes_fwd_qrexec.admin.apply import differences
from qubes_fwd_qrexec.admin.inventory import CONFIG_PREFIX
from qubes_fwd_qrexec.admin.judged import judged
from qubes_fwd_qrexec.admin.reconcile import apply as applied
from qubes_fwd_qrexec.admin.snapshot import Snapshot
from qubes_fwd_qrexec.admin.states import Cause, Forward, Plan, State, Verdict
from qubes_fwd_qrexec.common.rules import BrokenRule

from . import reasons, render
from .plans import forward_as_json, plan_as_json
from .session import Session
from .steps import as_json, words
from .tables import Style, escaped


def list_rules(args: Namespace, session: Session) -> int:
    """All forwards as a table."""
    snapshot = session.look()
    planned = selected(args.qube, snapshot, session.now)
    verdicts = judged(planned.live, session.backend, snapshot.installed.text)
    if session.is_json:
        data = plan_as_json(planned)
        for entry, forward in zip(data["forwards"], planned, strict=True):
            verdict = verdicts.get(forward.source[:2])
            entry["is_allowed"] = verdict.is_allowed if verdict is not None else False
            if args.qube:
                entry["roles"] = render.roles_of(forward, args.qube)
        session.say_json(data)
        return 0
    session.say(f"{reasons.HELD}.\n" if planned.is_held else "")
    session.say(render.table(planned, session.now, session.style, args.qube))
    for (target, name), verdict in verdicts.items():
        if verdict.is_allowed is False:
            session.say(f"{target} {name}: dom0 denies its calls: {escaped(verdict.reason)}.\n")
    return 0


def explain(args: Namespace, session: Session) -> int:
    """What becomes of each forward, and why."""
    planned = selected(args.qube, session.look(), session.now)
    if session.is_json:
        session.say_json(plan_as_json(planned))
        return 0
    parts = [render.explained(forward, session.style) for forward in planned]
    parts += [render.broken_line(rule, session.style) for rule in planned.broken]
    session.say(f"{reasons.HELD}.\n\n" if planned.is_held else "")
    session.say("\n".join(parts) or "No forwards.\n")
    return 0


def selected(qubes: list[str], snapshot: Snapshot, now: float) -> Plan:
    """The plan, or the part of it that passes through one of some qubes in any role."""
    planned = snapshot.plan(now)
    if not qubes:
        return planned
    for qube in qubes:
        snapshot.check_qube(qube)
    return replace(
        planned,
        forwards=tuple(f for f in planned if render.roles_of(f, qubes)),
        broken=tuple(rule for rule in planned.broken if rule.target in qubes),
    )


def show(args: Namespace, session: Session) -> int:
    """All about one forward: its way as a picture, all findings, and what follows from its rule."""
    from . import findings
    from .picture import picture

    snapshot = session.look()
    entry = snapshot.find(args.qube, args.name)
    if isinstance(entry, BrokenRule):
        return _show_broken(entry, session)
    planned = snapshot.plan(session.now)
    forward = planned.find(entry.target, entry.name)
    if forward is None:
        return 1
    installed = snapshot.installed.text
    verdict = judged([forward], session.backend, installed).get(forward.source[:2])
    found = findings.shown(forward, planned, installed, session.now, verdict)
    lines = policy.lines(forward)
    config = None if forward.config is None else f"{CONFIG_PREFIX}{forward.config.key}"
    if session.is_json:
        data: dict[str, Any] = forward_as_json(forward)
        data |= {"findings": [one.as_json() for one in found]}
        data |= {"line": str(entry.rule), "policy": list(lines), "config": None}
        if config is not None:
            data["config"] = {"qube": forward.exposed, "feature": config, "value": str(forward.config)}
        session.say_json(data)
        return 0
    session.say(render.explained(forward, session.style))
    is_allowed = found[-1].verdict is not Verdict.STOPS
    drawn = picture(forward, snapshot.inventory, is_allowed=is_allowed, width=session.style.width)
    session.say(f"\n{drawn}\n{findings.text(found, session.style)}\n")
    session.say(f"rule:\n  {entry.rule}\n")
    session.say("policy:\n" + ("".join(f"  {line}\n" for line in lines) or "  none\n"))
    session.say(f"listener at {forward.exposed}:\n" if config else "listener:\n")
    session.say(f"  {config} = {forward.config}\n" if config else "  none\n")
    return 0


def _show_broken(rule: BrokenRule, session: Session) -> int:
    if session.is_json:
        session.say_json(plan_as_json(Plan((), (rule,)))["broken"][0])
    else:
        session.say(render.broken_line(rule, session.style))
        session.say(f"rule:\n  {escaped(rule.text)}\n")
    return 0


def print_policy(args: Namespace, session: Session) -> int:
    """The policy that the rules ask for."""
    snapshot = session.look()
    installed = snapshot.installed.text
    text = policy.text(snapshot.plan(session.now))
    is_installed = installed == text
    if session.is_json:
        session.say_json({"policy": text, "installed": installed, "is_installed": is_installed})
        return 0
    session.say(text)
    if not is_installed:
        session.warn("the policy in force says otherwise; 'qvm-forward apply' writes this one")
    return 0


def apply(args: Namespace, session: Session) -> int:
    """Make it so, or with --dry-run say what that would change."""
    if args.dry_run:
        snapshot = session.look(with_config=True)
        planned = snapshot.plan(session.now)
        steps = differences(planned, snapshot.inventory, snapshot.installed)
    else:
        with session.backend.locked():
            planned, outcome, snapshot = applied(session.backend, session.now)
            session.warn_unread(snapshot)
            steps = outcome.done
    # Each was named when it was looked at.
    is_unread = any(qube.problem is not None for qube in snapshot.inventory.qubes.values())
    refused = [f for f in planned if f.state is State.REFUSED]
    if session.is_json:
        data = {"dry_run": args.dry_run, "steps": [as_json(step) for step in steps]}
        session.say_json(data | plan_as_json(planned))
    elif not steps:
        what = "what could be read" if is_unread else "all"
        session.say(f"Nothing to change: {what} is as the rules ask for.\n")
    else:
        session.say("This would change:\n" if args.dry_run else "Changed:\n")
        session.say("".join(f"  {word}\n" for step in steps for word in words(step)))
    if not session.is_json:
        # Not of clones and disposables: there may be many, and their forwards never were open.
        closed = (f for f in planned if f.cause is Cause.NETVM_CHANGED)
        session.say("".join(f"{f.source} is suspended. {reasons.sentence(f)}\n" for f in closed))
    for forward in refused:
        session.warn(_refusal(forward))
    for rule in planned.broken:
        session.warn(render.broken_line(rule, Style()).rstrip("\n"))
    return 1 if refused or planned.broken or is_unread else 0


def _refusal(forward: Forward) -> str:
    return f"{forward.source} is refused. {reasons.sentence(forward)}"
