# SPDX-License-Identifier: GPL-2.0-or-later
"""The checks of one rule by itself. All of them are made, whatever an earlier one has found.

The first finding that stops the rule decides its state: a disabled rule is disabled, whatever else is wrong.
"""

from collections.abc import Collection, Iterator
from ipaddress import ip_network

from qubes_fwd_qrexec.common.config import ListenerConfig, Service, Side
from qubes_fwd_qrexec.common.errors import ConfigError, TextError
from qubes_fwd_qrexec.common.rules import ForwardRule, ForwardType, Mode, NamedRule, Proxy, Transport
from qubes_fwd_qrexec.common.values import IPNetwork, Proto, QubeName, Sources

from . import nftpath
from .inventory import (
    ADMIN,
    DISPOSABLE,
    OFFER_PREFIX,
    QREXEC_FEATURE,
    REMOTE,
    TEMPLATE,
    TUNNEL_FEATURE,
    Chain,
    Inventory,
    Qube,
)
from .states import Cause, Config, Finding, Forward, LetIn, Verdict

# transport=call needs a policy line for each port, and dom0 reads the whole policy anew after a change.
CALL_PORTS_MAX = 256
Configs = tuple[tuple[QubeName, Config], ...]
# What Qubes' installer calls its netvm that is no tunnel: qubes-mgmt-salt-dom0-virtual-machines.
_STOCK_FIREWALL = "sys-firewall"


def judged(named: NamedRule, inventory: Inventory, now: float, stock: Collection[QubeName]) -> Forward:
    """What becomes of a rule at ``now`` (UNIX seconds), whatever ports others have; see `plan` for both."""
    rule, chain = named.rule, inventory.chain(named.target)
    listener = listener_of(rule, chain)
    side = inventory.side(listener, rule.forward_type)
    forward = Forward(named, (*_of_rule(rule, now),), chain.qubes, listener, side, _mode(rule))
    target, exposed = inventory.get(named.target), inventory.get(listener or "")
    problem = inventory.unread(named.target, listener, *chain.qubes, *rule.sources.qubes)
    if problem is not None:
        return forward.with_finding(Finding(Cause.UNREADABLE_QUBE, detail=problem))
    if target is None:
        return forward.with_finding(Finding(Cause.NO_SUCH_QUBE, qube=named.target, case="target"))
    unfit = [*_unfit(target, "target", inventory)]
    misplaced = [*_misplaced(named, listener, chain, inventory)]
    findings = [*forward.findings, *unfit, *_owner(rule, target), *_path(rule, target, chain, inventory)]
    findings += misplaced
    if not unfit and forward.mode is Mode.QREXEC:
        service, transport, found = _carrier(rule, target, inventory, stock)
        forward = forward._replace(service=service, transport=transport)
        findings += found
    configs: Configs = ()
    if exposed is not None and side is not None and not misplaced:
        findings.append(Finding(Cause.SIDE, exposed.name, side))
        findings += _tunnel(forward, target, exposed, side, inventory)
        if not exposed.is_running:
            findings.append(Finding(Cause.EXPOSED_HALTED, exposed.name, case=forward.mode))
        if not (target.is_running or rule.autostart):
            findings.append(Finding(Cause.TARGET_HALTED, target.name, case=forward.mode))
        sources, let_in, found = resolved(named, exposed.name, inventory)
        forward = forward._replace(sources=sources, let_in=let_in)
        findings += found
        told = _by_nft if forward.mode is Mode.NFT else _over_qrexec
        configs, found = told(forward, exposed.name, side, inventory)
        findings += found
    forward = forward._replace(findings=tuple(findings))
    return forward if forward.stops else forward._replace(configs=configs)


def _mode(rule: ForwardRule) -> Mode:
    """How a rule's traffic travels. Stored undecided it goes over qrexec: no update opens an IP path."""
    return Mode.NFT if rule.mode is Mode.NFT else Mode.QREXEC


def listener_of(rule: ForwardRule, chain: Chain) -> QubeName | None:
    """Where a rule asks to be exposed, whether or not that is possible."""
    if rule.via is not None or chain.problem is not None or not chain.qubes:
        return rule.via
    return chain.qubes[-1 if rule.forward_type is ForwardType.EXTERNAL else 0]


def is_over(rule: ForwardRule, now: float) -> bool:
    """Whether a rule has expired at ``now`` (UNIX seconds)."""
    return rule.has_ended or (rule.expire is not None and rule.expire <= now)


def _of_rule(rule: ForwardRule, now: float) -> Iterator[Finding]:
    if not rule.enabled:
        yield Finding(Cause.DISABLED)
    if is_over(rule, now):
        yield Finding(Cause.EXPIRED)
    else:
        yield Finding(Cause.IN_TIME)
    yield Finding(Cause.ANYBODY if rule.sources.anyone else Cause.SOURCES)


def _unfit(qube: Qube, case: str, inventory: Inventory) -> Iterator[Finding]:
    if qube.klass in (ADMIN, TEMPLATE, REMOTE):
        yield Finding(Cause.UNFIT_QUBE, qube=qube.name, detail=qube.klass, case=case)
    elif not inventory.feature(qube.name, QREXEC_FEATURE):
        yield Finding(Cause.UNFIT_QUBE, qube=qube.name, detail=QREXEC_FEATURE, case=case)


def _owner(rule: ForwardRule, target: Qube) -> Iterator[Finding]:
    """Clones and disposables have the features of the qube that they were made from, including its rules."""
    if rule.owner == target.name:
        yield Finding(Cause.OWN)
    elif rule.owner is not None or target.klass == DISPOSABLE:
        yield Finding(Cause.CLONED, detail=target.klass)
    else:
        yield Finding(Cause.NO_OWNER)
    if target.template_for_dispvms and rule.owner is not None:
        yield Finding(Cause.NO_DISPOSABLES)


def _path(rule: ForwardRule, target: Qube, chain: Chain, inventory: Inventory) -> Iterator[Finding]:
    if chain.problem is not None:
        last = chain.qubes[-1] if chain.qubes else target.name
        yield Finding(Cause.NETVM_BROKEN, qube=last, detail=chain.problem)
    elif rule.follow_netvm:
        yield Finding(Cause.FOLLOWS)
    elif rule.path is None:
        yield Finding(Cause.NO_PATH)
    elif rule.path == chain.qubes:
        yield Finding(Cause.AGREED)
    else:
        was = listener_of(rule, Chain(rule.path))
        side = inventory.side(was, rule.forward_type)
        if side is not None and side is not Side.VIFS and was in rule.path[-1:]:
            side = Side.OUTER  # it had no netvm then, whatever it has now
        yield Finding(Cause.NETVM_CHANGED, qube=was, side=side)


def _misplaced(
    named: NamedRule, listener: QubeName | None, chain: Chain, inventory: Inventory
) -> Iterator[Finding]:
    """What keeps the exposed qube from listening."""
    exposed = inventory.get(listener or "")
    if listener is None and chain.problem is None:
        yield Finding(Cause.NO_NETVM, case=_mode(named.rule))
    elif listener is not None and exposed is None:
        yield Finding(Cause.NO_SUCH_QUBE, qube=listener, case="exposed")
    elif listener == named.target:
        yield Finding(Cause.UNFIT_QUBE, qube=listener, case="itself")
    elif exposed is not None:
        yield from _unfit(exposed, "exposed", inventory)


def _carrier(
    rule: ForwardRule, target: Qube, inventory: Inventory, stock: Collection[QubeName]
) -> tuple[Service | None, Transport, list[Finding]]:
    """Service and transport by what the target has, those of TCP for both; no service if it cannot answer."""
    name, offers = target.name, inventory.offers(target.name, Service.FORWARD_TCP)
    *_, installed_in = inventory.with_templates(name)
    system = inventory.other_system(name)
    has_own = f"{OFFER_PREFIX}{Service.FORWARD_TCP}" in target.features
    # What its template offers now is not what it was started with.
    is_older = name in stock and target.is_running and not has_own
    found: list[Finding] = []
    if rule.proto is not Proto.TCP:
        if not inventory.offers(name, Service.FORWARD_UDP):
            case, lack = ("udp-system", system) if system else ("udp", "update" if offers else "")
            found.append(Finding(Cause.NO_SERVICE, installed_in.name, detail=lack, case=case))
        elif is_older:
            found.append(Finding(Cause.NO_SERVICE, installed_in.name, detail="older", case="udp"))
    if rule.proto is Proto.UDP:
        return None if found else Service.FORWARD_UDP, Transport.MUX, found
    if offers and not is_older:
        mux_or_call = Transport.CALL if rule.transport is Transport.CALL else Transport.MUX
        return Service.FORWARD_TCP, mux_or_call, found
    if system and not inventory.offers(name, Service.CONNECT_TCP):
        return None, rule.transport, [*found, Finding(Cause.NO_SERVICE, detail=system, case="system")]
    stock_only = Finding(Cause.STOCK_SERVICE, installed_in.name, detail="older" if offers else system)
    if rule.transport is Transport.MUX or rule.proxy is not Proxy.OFF:
        asked = "transport=mux" if rule.proxy is Proxy.OFF else "proxy"
        return None, rule.transport, [*found, stock_only._replace(cause=Cause.NO_SERVICE, case=asked)]
    return Service.CONNECT_TCP, Transport.CALL, [*found, stock_only]


def _tunnel(
    forward: Forward, target: Qube, exposed: Qube, side: Side, inventory: Inventory
) -> Iterator[Finding]:
    tunnel = inventory.nearest_tunnel(target.name)
    if tunnel is None or tunnel.is_behind:
        yield from _perhaps_tunnels(forward, inventory)
    if tunnel is None:
        yield Finding(Cause.NO_TUNNEL)
    elif not inventory.is_bypassed(tunnel, exposed.name, side):
        yield Finding(Cause.WITHIN_TUNNEL, exposed.name, mark=tunnel)
    elif forward.named.rule.bypass_tunnel:
        yield Finding(Cause.BYPASSES_TUNNEL, mark=tunnel)
    else:
        if tunnel.qube == exposed.name:
            way_out = "beside"
        elif tunnel.qube != target.name:
            way_out = "nowhere" if inventory.qubes[tunnel.qube].netvm is None else "at"
        else:
            way_out = "behind" if target.provides_network and not tunnel.is_behind else "nowhere"
        yield Finding(Cause.TUNNEL, qube=exposed.name, mark=tunnel, case=way_out)


def _perhaps_tunnels(forward: Forward, inventory: Inventory) -> Iterator[Finding]:
    """The netvms up to the exposed qube that might be tunnels, as far as dom0 can see.

    They have a netvm themselves, are not the stock firewall, and nobody has said what they are.
    """
    for name in forward.chain:
        qube = inventory.qubes[name]
        if qube.netvm and name != _STOCK_FIREWALL and TUNNEL_FEATURE not in qube.features:
            yield Finding(Cause.PERHAPS_TUNNEL, name)
        if name == forward.exposed:
            return


def _over_qrexec(
    forward: Forward, exposed: QubeName, side: Side, _: Inventory
) -> tuple[Configs, list[Finding]]:
    """The listener's configuration for each protocol, and a finding if one is too large."""
    named, service, sources = forward.named, forward.service, forward.sources
    transport, ports = forward.transport, len(named.rule.listen_ports)
    if service is None or sources is None:
        return (), []
    if transport is Transport.CALL and ports > CALL_PORTS_MAX:
        return (), [Finding(Cause.TOO_LARGE, number=ports, case="ports")]
    carriers = {Proto.TCP: (service, transport), Proto.UDP: (Service.FORWARD_UDP, Transport.MUX)}
    each = (carriers[proto] for proto in named.rule.proto.each)
    try:
        return tuple((exposed, ListenerConfig.of_rule(*named, sources, *by, side)) for by in each), []
    except ConfigError as error:
        return (), [Finding(Cause.TOO_LARGE, detail=str(error), case="bytes")]


def _by_nft(
    forward: Forward, exposed: QubeName, side: Side, inventory: Inventory
) -> tuple[Configs, list[Finding]]:
    """What each qube on the path is told, and what keeps packets from travelling along it."""
    named, path = forward.named, nftpath.path_to(forward.named.target, exposed, forward.chain)
    if path is None:
        return (), [Finding(Cause.NO_IP_PATH, exposed)]
    tunnel = inventory.nearest_tunnel(named.target)
    found = []
    if tunnel is not None and named.rule.bypass_tunnel and inventory.is_bypassed(tunnel, exposed, side):
        found.append(Finding(Cause.NFT_BEHIND_TUNNEL, exposed, mark=tunnel))
    found += nftpath.obstacles(named.rule, path, inventory)
    found += (Finding(Cause.HOP_HALTED, q) for q in path[1:-1] if not inventory.qubes[q].is_running)
    if forward.sources is None or any(finding.cause.verdict is Verdict.STOPS for finding in found):
        return (), found
    none_left = nftpath.without_family(named.rule, forward.sources, path, inventory)
    if none_left is not None:
        return (), [*found, none_left]
    try:
        return nftpath.configs(named, forward.sources, path, side, inventory), found
    except ConfigError as error:
        return (), [*found, Finding(Cause.TOO_LARGE, detail=str(error), case="bytes")]


def resolved(
    named: NamedRule, exposed: QubeName, inventory: Inventory
) -> tuple[Sources | None, tuple[LetIn, ...], list[Finding]]:
    """Whom a rule lets in at its exposed qube, None if that is nobody; and who of them it names.

    A qube is let in by the addresses that Qubes gave it, and only where these prove who it is: in its own
    netvm, whose antispoofing drops what the qube sends from any other address, and what others send from this
    one (docs/facts.md, F7), and if no other qube behind that has the address, as a clone may (F8).
    """
    clients = named.rule.sources
    if not clients.has_names:
        return clients.fixed, (), []
    behind, found = _behind(named, exposed, inventory)
    owners: dict[IPNetwork, set[QubeName]] = {}
    for qube in inventory.qubes.values():
        for address in _addresses(qube) if qube.netvm == exposed else ():
            owners.setdefault(address, set()).add(qube.name)
    versions = {address.version for address in named.rule.listen_addresses}
    let_in: list[LetIn] = []
    for asked, qube in behind:
        has = [address for address in _addresses(qube) if address.version in versions]
        rivals = {owner for address in has for owner in owners[address]} - {qube.name}
        let_in.append(LetIn(asked, qube.name, tuple(a for a in has if len(owners[a]) == 1)))
        if rivals or not has:
            case = "shared" if rivals else "address"
            found.append(Finding(Cause.SOURCE_NOBODY, qube.name, detail=", ".join(sorted(rivals)), case=case))
        if qube.provides_network:
            found.append(Finding(Cause.SOURCE_NETVM, qube.name))
    networks = {*clients.networks, *(address for each in let_in for address in each.addresses)}
    sources = None
    try:
        if networks:
            sources = Sources.of(networks)
        else:
            found.append(Finding(Cause.NO_SOURCE, exposed))
    except TextError as error:
        found.append(Finding(Cause.TOO_LARGE, detail=str(error), case="bytes"))
    return sources, tuple(let_in), list(dict.fromkeys(found))


def _behind(
    named: NamedRule, exposed: QubeName, inventory: Inventory
) -> tuple[list[tuple[str, Qube]], list[Finding]]:
    """The qubes behind the exposed one that a rule names, each with the name for it there; and the others."""
    target, _, rule = named
    behind: list[tuple[str, Qube]] = []
    found: list[Finding] = []
    for name in rule.sources.qubes:
        qube = inventory.get(name)
        if qube is None:
            found.append(Finding(Cause.SOURCE_NOBODY, name, case="qube"))
        elif qube.netvm != exposed:
            case = "netvm" if qube.netvm not in (None, target) else "none"
            found.append(Finding(Cause.SOURCE_ELSEWHERE, name, detail=qube.netvm or "", case=case))
        else:
            behind.append((name, qube))
    for tag in rule.sources.tags:
        tagged = [q for q in inventory.qubes.values() if tag in q.tags and q.klass not in (ADMIN, TEMPLATE)]
        behind += ((f"@tag:{tag}", qube) for qube in tagged if qube.netvm == exposed)
        if others := [qube.name for qube in tagged if qube.netvm != exposed]:
            found.append(Finding(Cause.TAG_ELSEWHERE, exposed, detail=", ".join(others), case=tag))
    return behind, found


def _addresses(qube: Qube) -> list[IPNetwork]:
    return [ip_network(address) for address in (qube.ip, qube.ip6) if address is not None]
