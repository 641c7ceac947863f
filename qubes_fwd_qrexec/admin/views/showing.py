# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands that only show: list, plan, show and policy; and all findings about a forward in words.

The sentence that stands for a forward elsewhere names only the first finding that stops it.
"""

from argparse import Namespace
from dataclasses import replace
from typing import Any

from qubes_fwd_qrexec.admin import confirming, policy
from qubes_fwd_qrexec.admin.backend import PolicyFile, PolicyVerdict
from qubes_fwd_qrexec.admin.inventory import CONFIG_PREFIX
from qubes_fwd_qrexec.admin.snapshot import Snapshot
from qubes_fwd_qrexec.admin.states import Cause, Finding, Forward, Plan, Verdict
from qubes_fwd_qrexec.common.config import Side
from qubes_fwd_qrexec.common.rules import BrokenRule, Mode

from . import drains, entrance, nftstatus, reasons, render, travel
from .judged import judged
from .picture import picture
from .render import broken_as_json, forward_as_json, plan_as_json
from .session import Session
from .tables import Check, checks, escaped
from .times import print_expire

# In the order of the way.
_CHECKS = (
    *("switch", "qubes", "sources", "side", "ports", "packets"),
    *("path", "owner", "tunnel", "service", "expiry", "hold"),
)
_APPLY = (("qvm-forward", "apply"),)

# Findings that are ok have no sentence in `reasons`; of the others, these say more than their sentence.
_TEXTS = {
    Cause.DISABLED: "disabled; {sentence}",
    Cause.SOURCES: "{sources} may connect, nobody else",
    Cause.FOLLOWS: "{way}; the rule follows every change",
    Cause.NO_PATH: "{way}; {sentence}",
    Cause.AGREED: "{way}, as agreed",
    Cause.OWN: "made for {target}",
    Cause.WITHIN_TUNNEL: "{exposed} {within}, {mark}",
    Cause.NO_TUNNEL: "neither {target} nor any of its netvms is marked as a tunnel",
    Cause.SIDE: "{reached}",
    Cause.IN_TIME: "{ends}",
    Cause.EXPIRED: "{ends}. {sentence}",
}
_LOOPBACK = "from {exposed} itself, as it listens at a loopback address; from nowhere else"
_TUNNEL = "outer: by {exposed}'s tunnel alone; not by its uplink, and from no other qube"
# The tunnel of a marked qube is on its outer side, too.
_SIDES = {
    Side.OUTER: "by {exposed}'s own network devices, or its VPN's; from no other qube",
    Side.UPLINK: "by {exposed}'s uplink to its netvm; not from qubes behind {exposed}",
    Side.VIFS: "from qubes that have {exposed} as their netvm; not from outside",
}


def list_rules(args: Namespace, session: Session) -> int:
    snapshot = session.look()
    planned = selected(args.qube, snapshot, session.now)
    verdicts = judged(planned.live, session.backend, snapshot.installed)
    drain = drains.ask(session, snapshot, planned, args.qube)
    if session.is_json:
        data = plan_as_json(planned) | drain.as_json()
        for entry, forward in zip(data["forwards"], planned, strict=True):
            verdict = verdicts.get(forward.named.key)
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
    verdict = judged([forward], session.backend, installed).get(forward.named.key)
    found = all_findings(forward, planned, installed, session.now, verdict)
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


def all_findings(
    forward: Forward, planned: Plan, installed: PolicyFile, now: float, verdict: PolicyVerdict | None = None
) -> tuple[Check, ...]:
    """All findings, in the order of the way; ``installed`` is dom0's policy file as it is, and
    ``verdict`` what its whole policy says of a live one."""
    found = [_shown(forward, finding, now) for finding in forward.findings if finding.cause.check]
    found.sort(key=lambda one: _CHECKS.index(one.name))
    if forward.is_live and forward.mode is Mode.NFT:
        found.append(Check("safety", Verdict.NOTE, travel.safety(forward)))
    return (*found, _policy(forward, planned, installed, verdict))


def _shown(forward: Forward, finding: Finding, now: float) -> Check:
    cause, mark, target = finding.cause, finding.mark, forward.named.target
    is_well = cause.verdict is Verdict.OK
    within = "is behind the same tunnel"
    if mark is not None and mark.qube == target:
        within = "is behind the target, which is a tunnel"
    elif mark is not None and mark.qube == forward.exposed:
        within = "is the tunnel itself"
    text = _TEXTS.get(cause, "{sentence}").format(
        sentence="" if is_well else reasons.sentence(forward, finding).rstrip("."),
        target=target,
        exposed=forward.exposed,
        sources=entrance.let_in(forward),
        way=" - ".join((target, *forward.chain)) if forward.chain else "no netvm",
        within=within,
        mark=mark,
        reached=_reached(forward),
        ends=print_expire(forward.named.rule.expire, now),
    )
    ways_out = () if is_well else reasons.ways_out(forward, finding)
    return Check(cause.check, cause.verdict, text, cause, ways_out=ways_out)


def _reached(forward: Forward) -> str:
    """From where connections come in."""
    if entrance.is_local(forward):
        return _LOOPBACK.format(exposed=forward.exposed)
    within = forward.finding(Cause.WITHIN_TUNNEL)
    mark = None if within is None else within.mark
    if forward.side is Side.OUTER and mark is not None and mark.qube == forward.exposed:
        return _TUNNEL.format(exposed=forward.exposed)
    return f"{forward.side}: {_SIDES[forward.side or Side.OUTER].format(exposed=forward.exposed)}"


def _policy(forward: Forward, planned: Plan, installed: PolicyFile, verdict: PolicyVerdict | None) -> Check:
    """What dom0 says now, which may not be what the plan asks for."""
    if forward.is_live and forward.mode is Mode.NFT:
        return Check("policy", Verdict.OK, "packets need no policy")
    allowed = policy.allowing(installed.text)
    unread = f"whether {policy.NAME}.policy allows the call is not known, as it cannot be read"
    if forward.is_live:
        if installed.is_read and not allowed.issuperset(policy.lines(forward)):
            text = "dom0 does not allow the call yet; 'qvm-forward apply' changes that"
            return Check("policy", Verdict.STOPS, text, ways_out=_APPLY)
        if verdict is None or verdict.is_allowed:
            return Check("policy", Verdict.OK, "dom0 allows the call")
        if verdict.is_allowed is False:
            return Check("policy", Verdict.STOPS, f"dom0 denies the call: {verdict.reason}")
        ours = f"{policy.NAME}.policy allows the call; whether another file denies it is not known"
        text = ours if installed.is_read else unread
        return Check("policy", Verdict.NOTE, f"{text}: {verdict.reason}")
    if not installed.is_read:
        return Check("policy", Verdict.NOTE, unread)
    # The calls by which it might go on, over whatever service it went before.
    ports, ends = forward.named.rule.target_ports, [forward.exposed, forward.named.target]
    arguments = [f"+{ports.brief()}+mux", *(f"+{port}" for port in ports)]
    needed = {line for other in planned.live for line in policy.lines(other)}
    if any(words[2:4] == ends and words[1] in arguments for words in map(str.split, allowed - needed)):
        text = "dom0 still allows the call; 'qvm-forward apply' closes it"
        return Check("policy", Verdict.NOTE, text, ways_out=_APPLY)
    return Check("policy", Verdict.STOPS, f"{policy.NAME}.policy does not allow it")
