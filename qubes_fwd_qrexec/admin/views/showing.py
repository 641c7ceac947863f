# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands that only show: list, plan, show and policy."""

from argparse import Namespace
from dataclasses import replace
from typing import Any

from qubes_fwd_qrexec.admin import confirming, policy
from qubes_fwd_qrexec.admin.inventory import CONFIG_PREFIX
from qubes_fwd_qrexec.admin.snapshot import Snapshot
from qubes_fwd_qrexec.admin.states import Plan, Verdict
from qubes_fwd_qrexec.common.rules import BrokenRule, Mode

from . import drains, findings, nftstatus, reasons, render
from .judged import judged
from .picture import picture
from .render import broken_as_json, forward_as_json, plan_as_json
from .session import Session
from .tables import checks, escaped


def list_rules(args: Namespace, session: Session) -> int:
    snapshot = session.look()
    planned = selected(args.qube, snapshot, session.now)
    verdicts = judged(planned.live, session.backend, snapshot.installed)
    drain = drains.ask(session, snapshot, planned, args.qube)
    if session.is_json:
        data = plan_as_json(planned) | drain.as_json()
        for entry, forward in zip(data["forwards"], planned, strict=True):
            verdict = verdicts.get(forward.named[:2])
            by_nft = forward.is_live and forward.mode is Mode.NFT
            entry["is_allowed"] = verdict.is_allowed if verdict is not None else by_nft
            if args.qube:
                entry["roles"] = render.roles_of(forward, args.qube)
        session.say_json(data)
        return 0
    session.say(f"{reasons.HELD}.\n" if planned.is_held else "")
    session.say(render.table(planned, session.now, session.style, args.qube))
    for (target, name), verdict in verdicts.items():
        if verdict.is_allowed is False:
            session.say(f"{target} {name}: dom0 denies its calls: {escaped(verdict.reason)}.\n")
    if drain.left:
        session.say(f"\n{drains.table(drain.left, session.style)}")
    if drain.silent:
        session.say(f"{drains.unknown(drain.silent)}\n")
    return 0


def explain(args: Namespace, session: Session) -> int:
    planned = selected(args.qube, session.look(), session.now)
    if session.is_json:
        session.say_json(plan_as_json(planned))
        return 0
    parts = [f"{reasons.HELD}.\n"] if planned.is_held else []
    parts += [render.explained(forward, session.style) for forward in planned]
    parts += [render.broken_line(rule, session.style) for rule in planned.broken]
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
    snapshot = session.look()
    entry = snapshot.find(args.qube, args.name)
    if isinstance(entry, BrokenRule):
        if session.is_json:
            session.say_json(broken_as_json(entry))
        else:
            session.say(f"{render.broken_line(entry, session.style)}rule:\n  {escaped(entry.text)}\n")
        return 0
    planned = snapshot.plan(session.now)
    forward = next(forward for forward in planned if forward.named == entry)
    installed = snapshot.installed
    verdict = judged([forward], session.backend, installed).get(forward.named[:2])
    found = findings.shown(forward, planned, installed, session.now, verdict)
    running = [qube for qube, _ in forward.nft_configs if snapshot.inventory.qubes[qube].is_running]
    hops = nftstatus.hops(forward, confirming.ask_all(session.backend, running))
    lines = policy.lines(forward)
    configs = [(qube, f"{CONFIG_PREFIX}{config.key}", str(config)) for qube, config in forward.configs]
    if session.is_json:
        data: dict[str, Any] = forward_as_json(forward)
        data["findings"] = [
            {"check": one.name, "verdict": one.verdict, "cause": one.cause, "text": one.text}
            | {"ways_out": one.ways_out}
            for one in found
        ]
        data |= {"line": str(entry.rule), "policy": list(lines)}
        data["answers"] = [hop.as_json() for hop in hops]
        data["configs"] = [dict(zip(("qube", "feature", "value"), told, strict=True)) for told in configs]
        session.say_json(data)
        return 0
    session.say(render.explained(forward, session.style))
    is_allowed = found[-1].verdict != Verdict.STOPS
    said = nftstatus.said(hops)
    drawn = picture(forward, snapshot.inventory, is_allowed=is_allowed, said=said, width=session.style.width)
    shown = checks((*found, *nftstatus.checks(hops)), session.style)
    session.say(f"\n{drawn}\n{shown}\n")
    session.say(f"rule:\n  {entry.rule}\n")
    session.say("policy:\n" + ("".join(f"  {line}\n" for line in lines) or "  none\n"))
    for qube, feature, value in configs:
        session.say(f"{'listener' if forward.mode is Mode.QREXEC else 'firewall'} at {qube}:\n")
        session.say(f"  {feature} = {value}\n")
    session.say("" if configs else "listener:\n  none\n")
    return 0


def print_policy(args: Namespace, session: Session) -> int:
    snapshot = session.look()
    installed = snapshot.installed.text
    text = policy.text(snapshot.plan(session.now))
    is_installed = policy.is_written(installed, text)
    if session.is_json:
        session.say_json({"policy": text, "installed": installed, "is_installed": is_installed})
        return 0
    session.say(text)
    if not is_installed:
        session.warn("the policy in force says otherwise; 'qvm-forward apply' writes this one")
    return 0
