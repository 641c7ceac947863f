# SPDX-License-Identifier: GPL-2.0-or-later
"""Words for how a forward's traffic travels, why it does, and what that means."""

from collections import Counter
from collections.abc import Mapping

from qubes_fwd_qrexec.admin.deciding import Decision
from qubes_fwd_qrexec.admin.states import Cause, Forward, Plan
from qubes_fwd_qrexec.common.config import CALLS_MAX, ListenerConfig
from qubes_fwd_qrexec.common.rules import Mode, Proxy, Transport
from qubes_fwd_qrexec.common.values import Proto, QubeName

from .reasons import filled, sentence

# Why nothing goes by nft, in short.
_AGAINST = {
    Cause.NO_NETVM: "{target} has no netvm",
    Cause.NO_IP_PATH: "{qube} is not a netvm of {target}",
    Cause.TUNNEL: "{target} {is_tunneled}",
    Cause.NFT_BEHIND_TUNNEL: "{target} {is_tunneled}",
    Cause.NO_NFT_SERVICE: "{lacks}",
    Cause.NFT_SWITCHED_OFF: "{qube} has the service qubes-forward-nft switched off",
    Cause.NFT_AT_WHONIX: "Whonix runs in {qube}, whose own firewall refuses what is forwarded",
    Cause.NO_ADDRESS: "{qube} has no IPv{number} address",
    Cause.TOO_LARGE: "it is too large for nft",
    Cause.LINK_LOCAL: "addresses in {detail} are link-local",
    Cause.NFT_LOOPBACK: "it listens at a loopback address",
}


def mode_reason(forward: Forward) -> str:
    """Why the mode of a forward is what it is."""
    if forward.named.rule.mode is Mode.AUTO:
        return "mode=auto is decided when the rule is changed or confirmed"
    return "the rule says so"


def decision(forward: Forward, decided: Decision) -> str:
    """Why mode=auto became what it did, and the command for the other mode."""
    target, name, rule = forward.named
    reason, command = decision_reason(forward, decided), f"qvm-forward set {target} {name} mode="
    if rule.mode is Mode.NFT:
        return f"{reason}; '{command}qrexec' sends it over qrexec"
    if decided.is_at_loopback:
        return f"{reason}; '{command}nft' is faster if it listens elsewhere too"
    return f"{reason}; '{command}nft' says what nft would need"


def decision_reason(forward: Forward, decided: Decision) -> str:
    """Why mode=auto became what it did."""
    target, _, rule = forward.named
    if rule.mode is Mode.NFT:
        return f"it goes by nft, as packets can go {' - '.join((*forward.hops, target))}"
    why = f"{decided.option} is asked for"
    if decided.is_at_loopback:
        why = f"the server in {target} listens at loopback alone"
    elif decided.against is not None:
        template = _AGAINST.get(decided.against.cause, "its packets could not get there")
        why = filled(template, forward, decided.against)
    return f"it goes over qrexec, as {why}"


def safety(forward: Forward) -> str:
    """In what way a forward by nft is less safe than one over qrexec."""
    return (
        f"the network stack of {forward.named.target} itself faces the clients, every qube on the way "
        "sees the traffic, and dom0 judges the rule, not each connection"
    )


def hides_clients(forward: Forward | None) -> str | None:
    """What a server sees that is not told who its clients are, and what helps; None for others."""
    if forward is None or forward.mode is Mode.NFT or forward.named.rule.proxy is not Proxy.OFF:
        return None
    way_out = ", or use proxy=v2" if forward.transport is Transport.MUX else ""
    seen = f"the server in {forward.named.target} sees every client as 127.0.0.1"
    return f"{seen}; make it ask for a password{way_out}"


def transport_reason(forward: Forward, proto: Proto = Proto.TCP) -> str:
    """Why a forward that has a service goes over its transport, of both protocols this one."""
    stock, asked = forward.finding(Cause.STOCK_SERVICE), forward.named.rule.transport
    if proto is Proto.UDP:
        # It has mux calls alone, whatever is asked for TCP.
        asked = Transport.AUTO if asked is Transport.CALL else asked
    elif stock is not None:
        return sentence(forward, stock)
    return f"{forward.named.target} has qubes-fwd-qrexec" if asked is Transport.AUTO else "the rule says so"


def room(forward: Forward, needed: Mapping[QubeName, int], before: Mapping[QubeName, int]) -> str | None:
    """What to mind of a live forward whose qube needs more calls than it makes, and more than before."""
    if not forward.is_live or forward.exposed is None:
        return None
    calls = needed.get(forward.exposed, 0)
    if calls <= CALLS_MAX or calls <= before.get(forward.exposed, 0):
        return None
    return (
        f"the forwards of {forward.exposed} need {calls} qrexec calls, but it makes at most {CALLS_MAX} "
        "at once: idle forwards give theirs up, and while all are in use, new connections wait"
    )


def calls_needed(plan: Plan) -> Mapping[QubeName, int]:
    """How many calls each exposed qube needs if all of its forwards are in use.

    Mux calls of one protocol to the same ports of a target are one call; a rule with single calls needs at
    least one.
    """
    calls = {
        (exposed, c.target, c.service, c.target_ports, c.name if c.transport is Transport.CALL else None)
        for forward in plan.live
        for exposed, c in forward.configs
        if isinstance(c, ListenerConfig)
    }
    return Counter(exposed for exposed, *_ in calls)
