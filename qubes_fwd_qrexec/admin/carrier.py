# SPDX-License-Identifier: GPL-2.0-or-later
"""How a forward travels: service and transport by what the target has, and what its listener is told."""

from collections.abc import Collection

from qubes_fwd_qrexec.common.config import ListenerConfig, Service, Side
from qubes_fwd_qrexec.common.errors import ConfigError
from qubes_fwd_qrexec.common.rules import NO_LIMITS, ForwardRule, Mode, NamedRule, Proto, Proxy, Transport
from qubes_fwd_qrexec.common.values import QubeName

from .abilities import Abilities
from .inventory import LINUX, OFFER_PREFIX, OS_FEATURE, Inventory, Qube
from .states import Cause
from .stops import refused

# transport=call needs a policy line for each port, and dom0 reads the whole policy anew after a change.
CALL_PORTS_MAX = 256

_NOT_YET = "this version of qvm-forward cannot do that yet"


def mode_reason(rule: ForwardRule, abilities: Abilities) -> str:
    """Why it goes over qrexec."""
    if rule.mode is not Mode.AUTO:
        return "the rule says so"
    if not abilities.nft:
        return "mode=auto, and this version has no nft mode"
    return "mode=auto"


def check_abilities(rule: ForwardRule, abilities: Abilities) -> None:
    """Raises `Stop` for what this version cannot do."""
    if rule.mode is Mode.NFT and not abilities.nft:
        raise refused(
            Cause.NOT_YET, f"The rule asks for mode=nft and {_NOT_YET}; mode=qrexec would work for TCP."
        )
    if rule.proto is Proto.UDP:
        raise refused(
            Cause.NOT_YET,
            f"The rule asks for proto=udp, which needs mode=nft, and {_NOT_YET}; only TCP works.",
        )
    if rule.transport is Transport.MUX and not abilities.mux:
        raise refused(
            Cause.NOT_YET, f"The rule asks for transport=mux and {_NOT_YET}; use transport=call or auto."
        )
    if rule.proxy is not Proxy.OFF and not abilities.proxy:
        raise refused(Cause.NOT_YET, f"The rule asks for proxy={rule.proxy} and {_NOT_YET}; use proxy=off.")
    if rule.limits != NO_LIMITS and not abilities.limits:
        raise refused(Cause.NOT_YET, f"The rule asks for limits and {_NOT_YET}; leave limits out.")


def carrier(
    rule: ForwardRule, qube: Qube, inventory: Inventory, stock: Collection[QubeName], abilities: Abilities
) -> tuple[Service, Transport, str]:
    """Service and transport, and why they were chosen. Raises `Stop` if the target cannot answer."""
    target, offer = qube.name, f"{OFFER_PREFIX}{Service.FORWARD_TCP}"
    has_ours = bool(inventory.feature(target, offer))
    missing = f"{target} does not offer {Service.FORWARD_TCP}"
    way_out = inventory.how_to_install(target)
    if has_ours and target in stock and qube.is_running and offer not in qube.features:
        has_ours = False
        missing = f"{target} has run since before its template offered {Service.FORWARD_TCP}"
        way_out = f"shut {target} down and start it again"
    system = inventory.feature(target, OS_FEATURE) or LINUX
    if not (has_ours or system == LINUX or inventory.feature(target, f"{OFFER_PREFIX}{Service.CONNECT_TCP}")):
        raise refused(
            Cause.NO_SERVICE,
            f"{target} runs {system}, which has neither {Service.FORWARD_TCP} nor {Service.CONNECT_TCP}; "
            "name a target that runs Linux.",
        )
    if not has_ours and (rule.transport is Transport.MUX or rule.proxy is not Proxy.OFF):
        asked = "proxy" if rule.proxy is not Proxy.OFF else "transport=mux"
        raise refused(
            Cause.NO_SERVICE,
            f"The rule asks for {asked} and {missing}; {way_out}, or leave {asked} out.",
        )
    if rule.transport is not Transport.CALL and abilities.mux and has_ours:
        why = "the rule says so" if rule.transport is Transport.MUX else f"{target} offers our service"
        return Service.FORWARD_TCP, Transport.MUX, why
    if has_ours:
        why = "the rule says so" if rule.transport is Transport.CALL else "this version has no mux yet"
        return Service.FORWARD_TCP, Transport.CALL, why
    return (
        Service.CONNECT_TCP,
        Transport.CALL,
        f"{missing}, so each connection goes over the stock {Service.CONNECT_TCP}: a server that ends its "
        f"sending first loses the rest of what the client sends. To mend that, {way_out}",
    )


def listener_config(
    named: NamedRule, service: Service, transport: Transport, side: Side, inventory: Inventory
) -> ListenerConfig:
    """What the listener is told. Raises `Stop` if it does not fit."""
    rule = named.rule
    if transport is Transport.CALL and len(rule.listen_ports) > CALL_PORTS_MAX:
        if service is Service.FORWARD_TCP:
            way_out = "use transport=mux"
        else:
            way_out = inventory.how_to_install(named.target)
        raise refused(
            Cause.TOO_LARGE,
            f"With one call for each connection every port needs its own policy line, and "
            f"{len(rule.listen_ports)} ports are more than {CALL_PORTS_MAX}; make the range shorter, or "
            f"{way_out}.",
        )
    try:
        return ListenerConfig.of_rule(named.target, named.name, rule, service, transport, side)
    except ConfigError as error:
        raise refused(Cause.TOO_LARGE, f"{error}.") from None
