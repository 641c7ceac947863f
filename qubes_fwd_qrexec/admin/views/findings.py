# SPDX-License-Identifier: GPL-2.0-or-later
"""All findings about a forward in words, and what dom0's policy says now.

The sentence that stands for a forward elsewhere names only the first finding that stops it.
"""

from qubes_fwd_qrexec.admin import policy
from qubes_fwd_qrexec.admin.backend import PolicyFile, PolicyVerdict
from qubes_fwd_qrexec.admin.states import Cause, Finding, Forward, Plan, Verdict
from qubes_fwd_qrexec.common.config import Side
from qubes_fwd_qrexec.common.rules import Mode

from . import entrance, reasons, travel
from .tables import Check
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


def shown(
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
            text = "dom0 does not allow the call yet; 'qvm-forward apply' sees to it"
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
    return Check("policy", Verdict.STOPS, f"{policy.NAME}.policy allows nothing of it")
