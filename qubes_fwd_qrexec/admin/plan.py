# SPDX-License-Identifier: GPL-2.0-or-later
"""Rules and inventory to plan: for every rule where it is exposed, how it travels, and whether it may.

Nothing is read or changed here. Each rule first finds its own verdict, in the order of `_judged`; all that
are not asleep then claim their ports, and of two that claim the same the first by name has it.
"""

from collections.abc import Collection, Iterable
from dataclasses import replace

from qubes_fwd_qrexec.common.config import Side
from qubes_fwd_qrexec.common.rules import BrokenRule, ForwardRule, ForwardType, Mode, NamedRule
from qubes_fwd_qrexec.common.values import QubeName, RuleName

from .abilities import THIS_VERSION, Abilities
from .callroom import with_call_room
from .carrier import carrier, check_abilities, listener_config, mode_reason
from .conflicts import Claims
from .inventory import ADMIN, DISPOSABLE, QREXEC_FEATURE, REMOTE, TEMPLATE, Chain, Inventory, Qube
from .states import Cause, Forward, Plan, State
from .stops import Stop, command, refused
from .twins import with_twins


def plan(
    rules: Iterable[NamedRule],
    inventory: Inventory,
    now: float,
    *,
    broken: Iterable[BrokenRule] = (),
    newcomers: Collection[tuple[QubeName, RuleName]] = (),
    stock: Collection[QubeName] = (),
    abilities: Abilities = THIS_VERSION,
) -> Plan:
    """What becomes of each rule at the time ``now`` (UNIX seconds).

    ``newcomers`` names rules that are not stored yet: what conflicts with them was there first. ``stock``
    are the targets that dom0 now allows to be called over the stock service: as long as such a target runs,
    what its template has learned meanwhile is not in it.
    """
    ordered = sorted(rules, key=lambda rule: (rule.target, rule.name))
    judged = {(rule.target, rule.name): _judged(rule, inventory, now, stock, abilities) for rule in ordered}
    claims = Claims()
    for key in sorted(judged, key=lambda key: (key in newcomers, key)):
        forward = judged[key]
        home = _home(forward)
        conflict = None if home is None else claims.take(forward.source, home)
        if conflict is not None:
            judged[key] = forward._replace(conflict=conflict)
            if forward.is_live:
                judged[key] = judged[key]._replace(
                    state=State.REFUSED, cause=Cause.CONFLICT, reason=conflict.text, config=None
                )
    return Plan(tuple(with_call_room(with_twins(judged.values()))), tuple(sorted(broken)))


# These come back when somebody says so, and are judged then: the copies that clones inherit claim nothing.
_ASLEEP = frozenset((Cause.CLONED, Cause.EXPIRED, Cause.DISABLED))


def _home(forward: Forward) -> QubeName | None:
    """Where a rule claims its ports: where it was agreed to, to which it comes back by itself."""
    rule = forward.source.rule
    if forward.cause in _ASLEEP:
        return None
    agreed = rule.path is not None and not (rule.follow_netvm and forward.chain)
    return _listener(rule, Chain(rule.path if agreed and rule.path else forward.chain))


def _judged(
    named: NamedRule, inventory: Inventory, now: float, stock: Collection[QubeName], abilities: Abilities
) -> Forward:
    """One rule by itself. What has been found out before the verdict is kept, for those who look."""
    rule = named.rule
    chain = Chain(()) if inventory.get(named.target) is None else inventory.chain(named.target)
    listener = _listener(rule, chain)
    found = Forward(
        source=named,
        state=State.ACTIVE,
        cause=Cause.OPEN,
        reason="",
        chain=chain.qubes,
        mode=rule.mode,
        exposed=listener,
        side=_side(rule, listener, inventory),
    )
    try:
        _check_wanted(named, now)
        problem = inventory.unread(named.target, listener, *chain.qubes)
        if problem is not None:
            raise refused(Cause.UNREADABLE_QUBE, f"Nothing opens where something is unknown: {problem}.")
        target = _target(named, inventory)
        _check_owner(named, target)
        if chain.problem is not None:
            raise refused(Cause.NETVM_BROKEN, f"{chain.problem}.")
        if _has_moved(rule, chain.qubes):
            agreed = named._replace(rule=replace(rule, path=chain.qubes))
            raise _moved(named, _judged(agreed, inventory, now, stock, abilities), inventory)
        exposed = _exposed(named, found.exposed, inventory)
        side = inventory.side(exposed.name, rule.forward_type)
        found = found._replace(notes=_notes(named, target), hints=_hints(named, exposed.name, inventory))
        found = found._replace(mode=Mode.QREXEC, mode_reason=mode_reason(rule, abilities))
        check_abilities(rule, abilities)
        service, transport, transport_reason = carrier(rule, target, inventory, stock, abilities)
        found = found._replace(service=service, transport=transport, transport_reason=transport_reason)
        found = found._replace(notes=found.notes + _tunnel_note(named, exposed.name, side, inventory))
        config = listener_config(named, service, transport, side, inventory)
    except Stop as stop:
        return found._replace(state=stop.state, cause=stop.cause, reason=stop.reason, ways_out=stop.ways_out)
    return _live(found._replace(config=config), exposed, target)


def _check_wanted(named: NamedRule, now: float) -> None:
    where = f"{named.target} {named.name}"
    if not named.rule.enabled:
        raise Stop(
            State.DISABLED,
            Cause.DISABLED,
            f"It was disabled; 'qvm-forward enable {where}' opens it again.",
            command("enable", named),
        )
    if named.rule.has_ended or (named.rule.expire is not None and named.rule.expire <= now):
        raise Stop(
            State.EXPIRED,
            Cause.EXPIRED,
            f"Its time is over; 'qvm-forward set {where} expire=+8h' gives it more, "
            f"'qvm-forward remove {where}' ends it.",
            command("set", named, "expire=+8h"),
            command("remove", named),
        )


def _target(named: NamedRule, inventory: Inventory) -> Qube:
    target = inventory.get(named.target)
    if target is None:
        raise refused(Cause.NO_SUCH_QUBE, f"There is no qube {named.target}; name one that 'qvm-ls' shows.")
    way_out = "name the qube that runs the service"
    _check_fit(target, inventory, "be the target of a forward", way_out)
    return target


_UNFIT = {
    ADMIN: "is the administrative qube and must not",
    TEMPLATE: "is a template and must not",
    REMOTE: "is a qube of another machine and cannot",
}


def _check_fit(qube: Qube, inventory: Inventory, purpose: str, way_out: str) -> None:
    why = _UNFIT.get(qube.klass)
    if why is None and not inventory.feature(qube.name, QREXEC_FEATURE):
        why = f"has no qrexec (feature {QREXEC_FEATURE}) and cannot"
    if why is not None:
        raise refused(Cause.UNFIT_QUBE, f"{qube.name} {why} {purpose}; {way_out}.")


def _check_owner(named: NamedRule, target: Qube) -> None:
    """A clone and a disposable have the features of what they were made from, its rules among them."""
    owner = named.rule.owner
    if owner == named.target or (owner is None and target.klass != DISPOSABLE):
        return
    if owner is None:
        why = f"The rule does not say for which qube it was made, and {target.name} is a disposable"
    elif target.klass == DISPOSABLE:
        why = f"The rule was made for {owner}, and {target.name} is a disposable that came by it at its birth"
    else:
        why = f"The rule was made for {owner} and came to {target.name} by cloning or renaming"
    raise Stop(
        State.SUSPENDED,
        Cause.CLONED,
        f"{why}; 'qvm-forward confirm {named}' makes it one of {target.name}, "
        f"'qvm-forward remove {named}' drops it.",
        command("confirm", named),
        command("remove", named),
    )


def _has_moved(rule: ForwardRule, chain: tuple[QubeName, ...]) -> bool:
    return rule.path is not None and rule.path != chain and not rule.follow_netvm


def _moved(named: NamedRule, confirmed: Forward, inventory: Inventory) -> Stop:
    """The netvms have changed; ``confirmed`` is what would be if somebody agreed to them."""
    path, chain = named.rule.path or (), confirmed.chain
    were = (
        f"The netvms of {named.target} were {_row(path)} when the rule was agreed to and are "
        f"{_row(chain)} now"
    )
    confirm, follow = command("confirm", named), command("set", named, "follow-netvm=yes")
    if not confirmed.is_live:
        return Stop(
            State.SUSPENDED,
            Cause.NETVM_CHANGED,
            f"{were}, where it would be {confirmed.state}. {confirmed.reason} After that "
            f"'qvm-forward confirm {named}' agrees to the new way.",
            *confirmed.ways_out,
            confirm,
        )
    was, would_be = (_entrance(named.rule, way, inventory) for way in (path, chain))
    moves = f", which opens it at {would_be} and no longer at {was}" if was != would_be else ""
    return Stop(
        State.SUSPENDED,
        Cause.NETVM_CHANGED,
        f"{were}; 'qvm-forward confirm {named}' agrees to the new way{moves}, and with follow-netvm=yes the "
        "rule follows every change.",
        confirm,
        follow,
    )


def _entrance(rule: ForwardRule, path: tuple[QubeName, ...], inventory: Inventory) -> str:
    """Exposed qube and side by a way, in words; the side of a qube that is gone is not known."""
    exposed = _listener(rule, Chain(path))
    if exposed is None:
        return "no qube"
    side = _side(rule, exposed, inventory)
    if side is not None and side is not Side.VIFS and exposed in path[-1:]:
        side = Side.OUTER  # it had no netvm then, whatever it has now
    return exposed if side is None else f"{exposed} ({side} side)"


def _side(rule: ForwardRule, exposed: QubeName | None, inventory: Inventory) -> Side | None:
    """None if there is no such qube."""
    if exposed is None or inventory.get(exposed) is None:
        return None
    return inventory.side(exposed, rule.forward_type)


def _listener(rule: ForwardRule, chain: Chain) -> QubeName | None:
    """Where a rule asks to be exposed, whether that can be or not."""
    if rule.via is not None or chain.problem is not None or not chain.qubes:
        return rule.via
    return chain.qubes[-1 if rule.forward_type is ForwardType.EXTERNAL else 0]


def _exposed(named: NamedRule, listener: QubeName | None, inventory: Inventory) -> Qube:
    exposed = None if listener is None else inventory.get(listener)
    if listener is None:
        raise refused(
            Cause.NO_NETVM,
            f"{named.target} has no netvm that could listen for it; name the qube that shall listen "
            "with --via QUBE (option via=QUBE).",
        )
    if exposed is None:
        raise refused(
            Cause.NO_SUCH_QUBE, f"There is no qube {listener} to listen; name another one with via=QUBE."
        )
    _check_fit(exposed, inventory, "listen", "name another qube with via=QUBE")
    if exposed.name == named.target:
        raise refused(
            Cause.UNFIT_QUBE,
            f"{exposed.name} cannot listen for itself, as qrexec connects two different qubes; "
            "name another qube with via=QUBE.",
        )
    return exposed


def _notes(named: NamedRule, target: Qube) -> tuple[str, ...]:
    notes = []
    where = f"{named.target} {named.name}"
    if named.rule.owner is None:
        notes.append(f"no owner recorded, so clones would be open too: 'qvm-forward confirm {where}'")
    if named.rule.path is None and not named.rule.follow_netvm:
        notes.append(
            f"no path recorded, so it stays open when the netvm changes: 'qvm-forward confirm {where}'"
        )
    if target.template_for_dispvms and named.rule.owner is not None:
        notes.append(
            f"it opens {target.name} itself, and disposables made from {target.name} do not get it: one that "
            f"shall be reached needs a rule of its own"
        )
    return tuple(notes)


def _hints(named: NamedRule, exposed: QubeName, inventory: Inventory) -> tuple[str, ...]:
    return tuple(
        f"nothing says whether {name}, which is on the way, is a tunnel: if there is a VPN or Tor in it, "
        f"mark it with 'qvm-forward tunnel mark {name}', so that no forward goes round it"
        for name in inventory.perhaps_tunnels(named.target, exposed)
    )


def _tunnel_note(named: NamedRule, exposed: QubeName, side: Side, inventory: Inventory) -> tuple[str, ...]:
    tunnel = inventory.bypassed_tunnel(named.target, exposed, side)
    if tunnel is None:
        return ()
    if named.rule.bypass_tunnel:
        return (f"bypasses the tunnel {tunnel}",)
    is_tunnel = inventory.tunnel_mark(named.target) is not None
    what = f"is a tunnel itself ({tunnel.mark})" if is_tunnel else f"is behind a tunnel, marked at {tunnel}"
    bypass = command("set", named, "bypass-tunnel=yes")
    if tunnel.qube == exposed:
        raise refused(
            Cause.TUNNEL,
            f"{named.target} {what}, and {exposed} has no netvm: nothing tells its tunnel from the LAN "
            f"beside it, which would go round the tunnel. Expose it to qubes alone with forwardtype=internal "
            f"(--internal), or accept that with bypass-tunnel=yes (--bypass-tunnel).",
            command("set", named, "forwardtype=internal"),
            bypass,
        )
    ways_out = [bypass]
    if tunnel.qube != named.target and inventory.qubes[tunnel.qube].netvm is not None:
        way_out = f"expose it at {tunnel.qube} with via={tunnel.qube} (--via {tunnel.qube})"
        ways_out.insert(0, command("set", named, f"via={tunnel.qube}"))
    elif is_tunnel and (inventory.qubes[named.target].provides_network or inventory.behind(named.target)):
        way_out = "expose it at a qube behind it with via=QUBE (--via QUBE)"
    else:
        way_out = "expose it nowhere"
    raise refused(
        Cause.TUNNEL,
        f"{named.target} {what}, and listening at {exposed} would go round "
        f"it; {way_out}, or accept that with bypass-tunnel=yes (--bypass-tunnel).",
        *ways_out,
    )


def _live(forward: Forward, exposed: Qube, target: Qube) -> Forward:
    rule = forward.source.rule
    if not exposed.is_running:
        return forward._replace(
            state=State.WAITING,
            cause=Cause.EXPOSED_HALTED,
            reason=f"{exposed.name} is halted and will listen when it starts: 'qvm-start {exposed.name}'.",
            ways_out=(("qvm-start", exposed.name),),
        )
    if not target.is_running and not rule.autostart:
        return forward._replace(
            state=State.WAITING,
            cause=Cause.TARGET_HALTED,
            reason=f"{target.name} is halted, and connections are refused until it runs: "
            f"'qvm-start {target.name}', or let connections start it with autostart=yes.",
            ways_out=(("qvm-start", target.name), command("set", forward.source, "autostart=yes")),
        )
    return forward._replace(reason=sentence(forward))


def sentence(forward: Forward) -> str:
    """What a live forward opens, and for whom."""
    rule = forward.source.rule
    # At a loopback address the qube itself alone connects, by none of its sides.
    where = f" ({forward.side} side)" if rule.listen is None else f" at {rule.listen}"
    if rule.listen is not None and not rule.listen.is_loopback:
        where += f" ({forward.side} side)"
    who = "anybody who can reach it" if rule.sources.anyone else str(rule.sources).replace(",", ", ")
    return (
        f"Connections to {rule.listen_ports.worded()} of {forward.exposed}{where} "
        f"from {who} reach "
        f"{rule.target_ports.worded()} of {forward.source.target}."
    )


def _row(path: tuple[QubeName, ...]) -> str:
    return " - ".join(path) if path else "none"
