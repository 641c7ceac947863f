# SPDX-License-Identifier: GPL-2.0-or-later
"""What guards a forward, each with its own verdict: a rule's reason names only the first that stops it.

Nothing is decided here. The plan has decided; this says of every guard what it sees, for `show`.
"""

from enum import StrEnum
from typing import Any, NamedTuple

from qubes_fwd_qrexec.common.config import Service, Side

from . import policy
from .backend import PolicyVerdict
from .expiry import print_expire
from .inventory import Inventory
from .states import Forward, Plan


class Verdict(StrEnum):
    OK = "ok"
    NOTE = "note"
    STOPS = "stops"


class Guard(NamedTuple):
    """One guard; ``text`` says what it found, and where it stops the forward also the way out."""

    name: str
    verdict: Verdict
    text: str

    def as_json(self) -> dict[str, Any]:
        return {"guard": self.name, "verdict": self.verdict, "text": self.text}


def guards(
    forward: Forward,
    planned: Plan,
    inventory: Inventory,
    installed: str | None,
    now: float,
    verdict: PolicyVerdict | None = None,
) -> tuple[Guard, ...]:
    """All guards of a forward, in the order of the way; ``installed`` is dom0's policy file as it is, and
    ``verdict`` what its whole policy says of a live one."""
    found = [] if forward.source.rule.enabled else [_switch(forward)]
    found += [
        _sources(forward),
        *_side(forward),
        _path(forward),
        _owner(forward),
        _tunnel(forward, inventory),
    ]
    return (*found, _expiry(forward, now), _policy(forward, planned, installed, verdict))


def _switch(forward: Forward) -> Guard:
    return Guard("switch", Verdict.STOPS, f"disabled; 'qvm-forward enable {forward.source}' opens it")


def _sources(forward: Forward) -> Guard:
    sources = forward.source.rule.sources
    if sources.anyone:
        return Guard("sources", Verdict.NOTE, "anybody who can reach the port may connect")
    return Guard("sources", Verdict.OK, f"{str(sources).replace(',', ', ')} may connect, nobody else")


# The tunnel of a marked qube is on its outer side, too.
_SIDES = {
    Side.OUTER: "by {0}'s own network devices, or its VPN's; from no other qube",
    Side.UPLINK: "by {0}'s uplink to its netvm; not from qubes behind {0}",
    Side.VIFS: "from qubes that have {0} as their netvm; not from outside",
}


def _side(forward: Forward) -> list[Guard]:
    if forward.side is None:
        return []
    return [Guard("side", Verdict.OK, f"{forward.side}: {_SIDES[forward.side].format(forward.exposed)}")]


def _path(forward: Forward) -> Guard:
    rule, confirm = forward.source.rule, f"'qvm-forward confirm {forward.source}'"
    way = " - ".join((forward.source.target, *forward.chain)) if forward.chain else "no netvm"
    if rule.follow_netvm:
        return Guard("path", Verdict.OK, f"{way}; the rule follows every change")
    if rule.path is None:
        return Guard("path", Verdict.NOTE, f"{way}; none was recorded, so a change is not seen: {confirm}")
    if rule.path == forward.chain:
        return Guard("path", Verdict.OK, f"{way}, as it was agreed to")
    agreed = " - ".join((forward.source.target, *rule.path)) if rule.path else "no netvm"
    text = f"{way} now, but agreed to was {agreed}"
    # Where more than that is needed, the reason says it.
    is_enough = forward.ways_out[:1] == (("qvm-forward", "confirm", *forward.source[:2]),)
    return Guard("path", Verdict.STOPS, f"{text}; {confirm} agrees to this one" if is_enough else text)


def _owner(forward: Forward) -> Guard:
    owner, target = forward.source.rule.owner, forward.source.target
    confirm = f"'qvm-forward confirm {forward.source}'"
    if owner == target:
        return Guard("owner", Verdict.OK, f"made for {target}")
    if owner is None:
        return Guard("owner", Verdict.NOTE, f"not recorded, so a clone is not told from {target}: {confirm}")
    return Guard(
        "owner", Verdict.STOPS, f"made for {owner} and inherited; {confirm} makes it one of {target}"
    )


def _tunnel(forward: Forward, inventory: Inventory) -> Guard:
    target, exposed = inventory.get(forward.source.target), inventory.get(forward.exposed or "")
    if target is None or exposed is None or forward.side is None:
        return Guard("tunnel", Verdict.NOTE, "not judged, as there is no qube that could listen")
    mark = inventory.bypassed_tunnel(target.name, exposed.name, forward.side)
    if mark is not None and forward.source.rule.bypass_tunnel:
        return Guard("tunnel", Verdict.NOTE, f"goes round the tunnel {mark}, as the rule accepts")
    if mark is not None:
        return Guard("tunnel", Verdict.STOPS, f"{exposed.name} lies outside of the tunnel {mark}")
    mark = inventory.nearest_tunnel(target.name)
    if mark is None:
        text = f"neither {target.name} nor a netvm of it is marked as a tunnel"
        if forward.hints:
            return Guard("tunnel", Verdict.NOTE, f"{text}; {'; '.join(forward.hints)}")
        return Guard("tunnel", Verdict.OK, text)
    if mark.qube == target.name:
        where = "is behind the target, which is a tunnel"
    else:
        where = "is the tunnel itself" if mark.qube == exposed.name else "is behind the same tunnel"
    return Guard("tunnel", Verdict.OK, f"{exposed.name} {where}, {mark}")


def _expiry(forward: Forward, now: float) -> Guard:
    expire = forward.source.rule.expire
    if expire is None:
        return Guard("expiry", Verdict.OK, "never")
    if expire > now:
        return Guard("expiry", Verdict.OK, print_expire(expire, now))
    way_out = f"'qvm-forward set {forward.source} expire=+8h' gives it more"
    return Guard("expiry", Verdict.STOPS, f"over since {print_expire(expire, now)}; {way_out}")


def _policy(forward: Forward, planned: Plan, installed: str | None, verdict: PolicyVerdict | None) -> Guard:
    """What dom0 says now, which may not be what the plan asks for."""
    allowed = policy.allowing(installed)
    if forward.config is not None:
        missing = [line for line in policy.lines(forward) if line not in allowed]
        if not missing and verdict is not None and verdict.is_allowed is False:
            return Guard("policy", Verdict.STOPS, f"dom0 denies the call: {verdict.reason}")
        if not missing and verdict is not None and verdict.is_allowed is None:
            text = f"{policy.NAME}.policy allows the call; whether another file denies it is not known"
            return Guard("policy", Verdict.NOTE, f"{text}: {verdict.reason}")
        if not missing:
            return Guard("policy", Verdict.OK, "dom0 allows the call")
        return Guard(
            "policy", Verdict.STOPS, "dom0 does not allow the call yet; 'qvm-forward apply' sees to it"
        )
    others = {line for other in planned.live for line in policy.lines(other)}
    if _calls(forward) & {_call(line) for line in allowed - others}:
        return Guard("policy", Verdict.NOTE, "dom0 allows the call still; 'qvm-forward apply' closes it")
    return Guard("policy", Verdict.STOPS, f"{policy.NAME}.policy allows nothing of it")


def _call(line: str) -> tuple[str, ...]:
    """Service, argument, source and target of a line of policy."""
    return tuple(line.split()[:4])


def _calls(forward: Forward) -> set[tuple[str, ...]]:
    """The calls by which a forward that is closed might go on, over whatever service it went before."""
    ports = forward.source.rule.target_ports
    ends = (str(forward.exposed), forward.source.target)
    calls = {(str(service), f"+{port}", *ends) for service in Service for port in ports}
    return calls | {(str(Service.FORWARD_TCP), f"+{ports.brief()}+mux", *ends)}
