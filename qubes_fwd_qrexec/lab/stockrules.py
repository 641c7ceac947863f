# SPDX-License-Identifier: GPL-2.0-or-later
"""The nftables rules of a stock qube, as text: what stands between a packet and a server there.

Written anew from what qubes-core-agent-linux does, not copied: network/qubes-antispoof.nft, qubes-ipv4.nft,
qubes-ipv6.nft, qubes-ipv6-disabled.nft, qubes-setup-dnat-to-ns, vif-route-qubes and qubesagent/firewall.py,
release4.2 and release4.3. `wires` loads it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

# Qubes' groups of interfaces: the uplink, and those of the qubes behind.
UPLINK_GROUP = 1
VIF_GROUP = 2
VIRTUAL_NAMESERVERS = ("10.139.1.1", "10.139.1.2")


class Shape(StrEnum):
    """Releases that differ in their rules: in the tables of qubes-firewall."""

    R4_2 = "4.2"
    R4_3 = "4.3"

    @property
    def jumps_from(self) -> str:
        """The chain that jumps to the chains of the qubes behind."""
        return "forward" if self is Shape.R4_2 else "qubes-forward"


@dataclass(frozen=True, slots=True)
class Behind:
    """A qube behind a netvm: the interface that leads to it, and its addresses."""

    vif: str
    ip: str
    ip6: str | None = None

    def addresses(self) -> tuple[tuple[str, str], ...]:
        """Each with its family."""
        return (("ip", self.ip), *([] if self.ip6 is None else [("ip6", self.ip6)]))


_ANTISPOOFING = """
table {family} qubes {{
    set downstream {{ type {kind}; }}
    set allowed {{ type ifname . {kind}; }}
    chain antispoof {{
        iifname . {family} saddr @allowed accept
        counter drop
    }}
    chain prerouting {{
        type filter hook prerouting priority raw; policy accept;
        iifgroup 2 goto antispoof
        {family} saddr @downstream counter drop
    }}
}}
"""
_BASE = """
table {family} qubes {{
    chain custom-input {{ }}
    chain custom-forward {{ }}
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        oifgroup 2 accept
        oif lo accept
        masquerade
    }}
    {more}
    chain input {{
        type filter hook input priority filter; policy drop;
        jump custom-input
        ct state invalid counter drop
        {inputs}
        counter
    }}
    chain forward {{
        type filter hook forward priority filter; policy accept;
        jump custom-forward
        ct state invalid counter drop
        ct state established,related accept
        oifgroup 2 counter drop
    }}
}}
"""
_INPUTS = """
        iifgroup 2 udp dport 68 counter drop
        ct state established,related accept
        iifgroup 2 meta l4proto icmp accept
        iif lo accept
        iifgroup 2 counter reject with icmp type host-prohibited
"""
_INPUTS_6 = """
        ct state established,related accept
        iifgroup 2 goto _icmpv6
        iif lo accept
        ip6 saddr fe80::/64 ip6 daddr fe80::/64 udp dport 546 accept
        meta l4proto ipv6-icmp accept
"""
_ICMPV6 = """
    chain _icmpv6 {
        meta l4proto != ipv6-icmp counter reject with icmpv6 type admin-prohibited
        icmpv6 type { nd-router-advert, nd-redirect } counter drop
        accept
    }
"""
_NO_IPV6 = """
table ip6 qbs-filter {
    chain input {
        type filter hook input priority filter; policy drop;
        iif lo accept
        counter
    }
    chain forward {
        type filter hook forward priority filter; policy drop;
        counter
    }
}
"""
_SERVICE = """
table {family} qubes-firewall {{
    chain forward {{
        type filter hook forward priority filter; policy drop;
        ct state established,related accept
        iifname != "vif*" accept
    }}
    chain prerouting {{ type filter hook prerouting priority raw; policy accept; }}
    chain postrouting {{ type filter hook postrouting priority raw; policy accept; }}
}}
"""


def base(*, has_ipv6: bool) -> str:
    """What each qube loads when it starts."""
    text = _ANTISPOOFING.format(family="ip", kind="ipv4_addr")
    text += _ANTISPOOFING.format(family="ip6", kind="ipv6_addr")
    text += _BASE.format(family="ip", more="", inputs=_INPUTS)
    return text + (_BASE.format(family="ip6", more=_ICMPV6, inputs=_INPUTS_6) if has_ipv6 else _NO_IPV6)


def firewall_service(shape: Shape, behind: Sequence[Behind] = ()) -> str:
    """What the service qubes-firewall of a netvm makes when it starts, whatever was there of it.

    Each qube behind may begin any connection.
    """
    text = ""
    for family in ("ip", "ip6"):
        text += f"add table {family} qubes-firewall\ndelete table {family} qubes-firewall\n"
        text += _SERVICE.format(family=family)
        if shape.jumps_from != "forward":
            text += f"add chain {family} qubes-firewall {shape.jumps_from}\n"
            text += f"add rule {family} qubes-firewall forward jump {shape.jumps_from}\n"
    text += "".join(_may_begin_anything(shape, qube) for qube in behind)
    return text + _connected(behind)


def _may_begin_anything(shape: Shape, qube: Behind) -> str:
    text = ""
    for family, address in qube.addresses():
        chain = _chain(address)
        reject = f"reject with icmp{'v6' if family == 'ip6' else ''} type admin-prohibited"
        text += f"add chain {family} qubes-firewall {chain}\n"
        text += f"add rule {family} qubes-firewall {chain} accept\n"
        text += f"add rule {family} qubes-firewall {chain} {reject}\n"
        text += f"add rule {family} qubes-firewall {shape.jumps_from} {family} saddr {address} jump {chain}\n"
    return text


def _connected(behind: Iterable[Behind]) -> str:
    """No address of a qube behind by an interface that is no vif."""
    text = ""
    by_family = [pair for qube in behind for pair in qube.addresses()]
    for family in ("ip", "ip6"):
        addresses = ", ".join(address for of, address in by_family if of == family)
        for chain, which, end in (("prerouting", "iifname", "saddr"), ("postrouting", "oifname", "daddr")):
            if addresses:
                match = f'{which} != "vif*" {family} {end} {{ {addresses} }}'
                text += f"add rule {family} qubes-firewall {chain} {match} drop\n"
    return text


def vif(verb: str, qube: Behind) -> str:
    """The qube behind comes (``add``) or goes (``delete``): what is no spoofed address."""
    return "".join(
        f'{verb} element {family} qubes allowed {{ "{qube.vif}" . {address} }}\n'
        f"{verb} element {family} qubes downstream {{ {address} }}\n"
        for family, address in qube.addresses()
    )


def dnat_dns(nameservers: Sequence[str]) -> str:
    """Where questions to Qubes' virtual nameservers go; none: they are dropped."""
    text = "add chain ip qubes dnat-dns\ndelete chain ip qubes dnat-dns\n"
    text += "add chain ip qubes dnat-dns { type nat hook prerouting priority dstnat; policy accept; }\n"
    for number, virtual in enumerate(VIRTUAL_NAMESERVERS):
        verdict = f"dnat to {nameservers[number % len(nameservers)]}" if nameservers else "drop"
        for proto in ("udp", "tcp"):
            text += f"add rule ip qubes dnat-dns ip daddr {virtual} {proto} dport 53 {verdict}\n"
    return text


def tunnel(*, has_ipv6: bool) -> str:
    """What the user's guide has for a VPN qube: nothing of the qubes behind it passes beside the tunnel."""
    families = ("ip", "ip6") if has_ipv6 else ("ip",)
    return "".join(
        f"add rule {family} qubes custom-forward {which} {UPLINK_GROUP} counter drop\n"
        for family in families
        for which in ("oifgroup", "iifgroup")
    )


def acceleration(interfaces: Iterable[str]) -> str:
    """What vif-route-qubes makes of these interfaces: known flows of the qubes behind skip all rules.

    The kernel needs NF_FLOW_TABLE for it.
    """
    devices = ", ".join(f'"{name}"' for name in interfaces)
    return (
        "add table inet qubes-nat-accel\ndelete table inet qubes-nat-accel\n"
        "table inet qubes-nat-accel {\n"
        f"flowtable qubes-accel {{ hook ingress priority filter; devices = {{ {devices} }}; }}\n"
        "chain qubes-accel {\n"
        "type filter hook forward priority filter + 5; policy accept;\n"
        "meta l4proto { tcp, udp } iifgroup 2 oifgroup 1 flow add @qubes-accel\n"
        "counter\n}\n}\n"
    )


def _chain(address: str) -> str:
    return "qbs-" + address.replace(".", "-").replace(":", "-")
