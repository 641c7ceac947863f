# SPDX-License-Identifier: GPL-2.0-or-later
"""IP between the qubes of a lab: each running qube is joined to its netvm, and has a stock qube's firewall.

A join is what qubes-core-agent-linux makes of a Xen network device: network/setup-ip in the qube,
network/vif-route-qubes in its netvm. A qube's firewall is that of `stockrules`. Beside sys-net is the LAN,
whose host sends what is for a qube's address to sys-net, as an attacker there would. A VPN qube has a tunnel,
``tun0``, which ends at the provider as if there were nothing between.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address

from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.common.values import QubeName

from . import netns, stockrules
from .netns import EDGE, LAN, PROVIDER, Namespaces
from .qube import Qube, QubeClass
from .stockrules import Behind, Shape

_VIF_MAC = "fe:ff:ff:ff:ff:ff"
_TUNNEL_MAC, _PROVIDER_MAC = "02:00:00:00:08:02", "02:00:00:00:08:01"
_QUBE_MAC = "00:16:3e:5e:6c:00"
# vif-route-qubes: a later domain's route is preferred, and this is the last one's number.
_DOMID_MAX = 32752
# The networks that qubes-core-admin takes addresses from: qubes/config.py, vm/mix/net.py.
_LAN_ROUTES = (
    ("10.137.0.0/16", netns.EDGE_ADDRESS, netns.LAN_HOST),
    ("fd09:24ef:4179::/64", netns.EDGE_ADDRESS_IPV6, netns.LAN_HOST_IPV6),
)
_SYSCTLS = {
    "ipv4/conf/all/rp_filter": 2,
    "ipv4/conf/default/rp_filter": 2,
    "ipv4/conf/default/accept_redirects": 0,
    "ipv4/conf/default/send_redirects": 0,
}
# Addresses can be used at once.
_SYSCTLS_IPV6 = {"ipv6/conf/all/accept_dad": 0, "ipv6/conf/default/accept_dad": 0}


@dataclass(frozen=True, slots=True)
class _Join:
    """One qube behind another."""

    client: QubeName
    netvm: QubeName
    behind: Behind
    gateway: str
    gateway6: str | None


@dataclass(slots=True)
class _Work:
    """What is to be done in one qube, in this order."""

    rules: list[str] = field(default_factory=list)
    sysctls: dict[str, object] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


class Wires:
    """The wires of a lab's namespaces, which go when those go. They are the lab's `Places`."""

    why_no_ip = None

    def __init__(
        self,
        namespaces: Namespaces,
        shape: Shape = Shape.R4_3,
        is_tunnel: Callable[[QubeName], bool] = lambda name: False,
    ) -> None:
        """``is_tunnel`` says of a qube that starts whether it is a VPN qube."""
        self.kind = namespaces.kind
        self._is_tunnel = is_tunnel
        self._tunnels: dict[QubeName, int] = {}
        self._namespaces = namespaces
        self._shape = shape
        self._has_ipv6 = netns.has_ipv6()
        self._flowtables: bool | None = None
        self._running: dict[QubeName, Qube] = {}
        self._domids: dict[QubeName, int] = {}
        self._last_domid = 0
        self._joins: dict[QubeName, _Join] = {}
        self._knows_lan = False

    def namespace_fd(self, qube: str) -> int:
        return self._namespaces.namespace_fd(qube)

    def follow(self, qubes: Iterable[Qube]) -> None:
        """As `Places.follow`. A qube that was not running has the stock rules alone."""
        running = {
            qube.name: qube
            for qube in qubes
            if qube.is_running and qube.klass not in (QubeClass.ADMIN, QubeClass.TEMPLATE)
        }
        started = [qube for name, qube in running.items() if name not in self._running]
        for qube in started:
            self._last_domid += 1
            self._domids[qube.name] = self._last_domid
            if self._is_tunnel(qube.name):
                self._dig(qube)
        wanted = self._wanted(running)
        gone = [join for name, join in self._joins.items() if wanted.get(name) != join]
        new = [join for name, join in wanted.items() if self._joins.get(name) != join]
        work: defaultdict[QubeName, _Work] = defaultdict(_Work)
        if EDGE in running and not self._knows_lan:
            self._route_lan(work)
            self._knows_lan = True
        kept = running.keys() & self._running.keys()
        self._running, self._joins = running, wanted
        for qube in started:
            self._start(qube, work[qube.name])
        for netvm in sorted({join.netvm for join in (*gone, *new)} & kept):
            changes = [stockrules.vif("delete", join.behind) for join in gone if join.netvm == netvm]
            changes += [stockrules.vif("add", join.behind) for join in new if join.netvm == netvm]
            work[netvm].rules += [*changes, self._service_rules(netvm)]
        for join in new:
            self._connect(join, work[join.netvm], work[join.client])
            if join.client in kept:
                work[join.client].rules.append(self._dns_rules(join.client))
        self._carry_out(gone, new, work)

    def reload_firewall(self, name: str) -> None:
        """Load a qube's stock rules as after a boot: whatever else was in its firewall is gone."""
        qube = self._running[QubeName(name)]
        self._namespaces.nft(name, "flush ruleset\n" + self._rules(qube))

    def restart_firewall_service(self, netvm: str) -> None:
        """As ``systemctl restart qubes-firewall`` does in a netvm: its own tables are made anew."""
        self._namespaces.nft(netvm, self._service_rules(QubeName(netvm)))

    def vif(self, client: str) -> str:
        """The interface of a qube's netvm that leads to it."""
        return self._joins[QubeName(client)].behind.vif

    def _wanted(self, running: Mapping[QubeName, Qube]) -> dict[QubeName, _Join]:
        joins = {}
        for name, qube in running.items():
            _check(qube)
            netvm = None if qube.netvm is None else running.get(qube.netvm)
            if netvm is None or not netvm.provides_network or qube.ip is None or netvm.ip is None:
                continue
            ip6, gateway6 = (qube.ip6, netvm.ip6) if self._has_ipv6 else (None, None)
            if ip6 is None or gateway6 is None:
                ip6 = gateway6 = None
            behind = Behind(f"vif{self._domids[name]}.0", qube.ip, ip6)
            joins[name] = _Join(name, netvm.name, behind, netvm.ip, gateway6)
        return joins

    def _start(self, qube: Qube, work: _Work) -> None:
        work.rules += ["flush ruleset\n", self._rules(qube)]
        work.sysctls |= _SYSCTLS | (_SYSCTLS_IPV6 if self._has_ipv6 else {})
        if qube.provides_network:
            work.sysctls["ipv4/ip_forward"] = 1
            if self._has_ipv6:
                work.sysctls["ipv6/conf/all/forwarding"] = int(self._has_ipv6_in(qube))

    def _rules(self, qube: Qube) -> str:
        """All stock rules of a qube as it is now."""
        text = stockrules.base(has_ipv6=self._has_ipv6_in(qube))
        if qube.provides_network:
            text += "".join(stockrules.vif("add", one) for one in self._behind(qube.name))
            text += self._service_rules(qube.name)
        if qube.name in self._tunnels:
            text += stockrules.tunnel(has_ipv6=self._has_ipv6_in(qube))
        return text + self._dns_rules(qube.name)

    def _service_rules(self, netvm: QubeName) -> str:
        behind = self._behind(netvm)
        text = stockrules.firewall_service(self._shape, behind)
        if self._has_flowtables(netvm):
            uplink = ["eth0"] if netvm in self._joins or netvm == EDGE else []
            text += stockrules.acceleration(["lo", *uplink, *(qube.vif for qube in behind)])
        return text

    def _dns_rules(self, name: QubeName) -> str:
        if name == EDGE:
            return stockrules.dnat_dns([netns.LAN_HOST])
        return stockrules.dnat_dns(stockrules.VIRTUAL_NAMESERVERS) if name in self._joins else ""

    def _behind(self, netvm: QubeName) -> list[Behind]:
        return [join.behind for join in self._joins.values() if join.netvm == netvm]

    def _has_ipv6_in(self, qube: Qube) -> bool:
        return self._has_ipv6 and qube.ip6 is not None

    def _has_flowtables(self, qube: QubeName) -> bool:
        """Whether the kernel has them, found out once."""
        if self._flowtables is None:
            try:
                self._namespaces.nft(qube, stockrules.acceleration(["lo"]), "-c")
                self._flowtables = True
            except StoreError:
                self._flowtables = False
        return self._flowtables

    def _connect(self, join: _Join, netvm: _Work, client: _Work) -> None:
        """As vif-route-qubes in the netvm, and setup-ip in the qube."""
        vif = join.behind.vif
        metric = _DOMID_MAX - self._domids[join.client]
        netvm.sysctls[f"ipv4/conf/{vif}/proxy_arp"] = 1
        netvm.lines.append(f"link set {vif} group {stockrules.VIF_GROUP} up")
        client.lines.append(f"link set eth0 group {stockrules.UPLINK_GROUP} up")
        for (_, address), gateway in zip(
            join.behind.addresses(), (join.gateway, join.gateway6), strict=False
        ):
            size = 128 if ":" in address else 32
            nodad = " nodad" if ":" in address else ""
            netvm.lines += [
                f"neighbour add {address} dev {vif} lladdr {_QUBE_MAC} nud permanent",
                f"route add {address} dev {vif} metric {metric}",
                f"address add {gateway}/{size} dev {vif}{nodad}",
            ]
            client.lines += [
                f"address add {address}/{size} dev eth0{nodad}",
                f"neighbour add {gateway} dev eth0 lladdr {_VIF_MAC} nud permanent",
                f"route add {gateway} dev eth0",
                f"route add default via {gateway} dev eth0 onlink",
            ]

    def _route_lan(self, work: Mapping[QubeName, _Work]) -> None:
        """The LAN's host is sys-net's way out, and knows sys-net as the way to the addresses of qubes.

        Neither has to ask for the other's hardware address: a packet is sent at once, or never.
        """
        lines: dict[str, list[str]] = {LAN: [], EDGE: work[QubeName(EDGE)].lines}
        for network, edge, host in _LAN_ROUTES:
            if ":" not in network or self._has_ipv6:
                lines[LAN].append(f"route add {network} via {edge}")
                lines[EDGE].append(f"route add default via {host}")
        for name, other, addresses in (
            (LAN, EDGE, netns.EDGE_ADDRESSES),
            (EDGE, LAN, netns.LAN_ADDRESSES),
        ):
            lines[name] += [
                f"neighbour replace {address} dev eth0 lladdr {netns.MACS[other]} nud permanent"
                for address in addresses
                if ":" not in address or self._has_ipv6
            ]
        self._namespaces.batch(lines[LAN], LAN)

    def _dig(self, qube: Qube) -> None:
        """Make a qube's tunnel, if it has none yet. As VPN programs do, it leaves the default route alone."""
        if qube.name in self._tunnels:
            return
        number = self._tunnels[qube.name] = len(self._tunnels)
        here, there = self._namespaces.full_name(qube.name), self._namespaces.full_name(PROVIDER)
        inner = [(f"10.8.{number}", ".", 24, netns.PROVIDER_HOST, ("0.0.0.0/1", "128.0.0.0/1"))]
        if self._has_ipv6_in(qube):
            inner.append((f"fd08:{number:x}", "::", 64, netns.PROVIDER_HOST_IPV6, ("::/1", "8000::/1")))
        ours, its = ["link set tun0 up"], [f"link set tun{number} up"]
        for prefix, dot, size, host, halves in inner:
            nodad = " nodad" if dot == "::" else ""
            ours.append(f"address add {prefix}{dot}2/{size} dev tun0{nodad}")
            # The host's address is the only one there, so that every answer has it.
            its.append(f"address replace {host} dev lo{nodad}")
            its.append(f"route add {prefix}{dot}2 dev tun{number}")
            ours += [f"route add {half} via {prefix}{dot}1" for half in halves]
            ours.append(f"neighbour add {prefix}{dot}1 dev tun0 lladdr {_PROVIDER_MAC} nud permanent")
            its.append(f"neighbour add {prefix}{dot}2 dev tun{number} lladdr {_TUNNEL_MAC} nud permanent")
        self._namespaces.batch(
            [
                f"link add tun0 netns {here} address {_TUNNEL_MAC} type veth"
                f" peer name tun{number} netns {there} address {_PROVIDER_MAC}"
            ]
        )
        self._namespaces.batch(its, PROVIDER)
        self._namespaces.batch(ours, qube.name)

    def _carry_out(self, gone: list[_Join], new: list[_Join], work: Mapping[QubeName, _Work]) -> None:
        by_qube: defaultdict[QubeName, list[str]] = defaultdict(list)
        for join in gone:
            by_qube[join.netvm].append(f"link delete {join.behind.vif}")
        for name, lines in by_qube.items():
            self._namespaces.batch(lines, name)
        ends = [
            (join.behind.vif, self._namespaces.full_name(join.netvm), self._namespaces.full_name(join.client))
            for join in new
        ]
        self._namespaces.batch(
            f"link add {vif} netns {netvm} address {_VIF_MAC} type veth"
            f" peer name eth0 netns {client} address {_QUBE_MAC}"
            for vif, netvm, client in ends
        )
        for name, todo in work.items():
            if todo.rules:
                self._namespaces.nft(name, "".join(todo.rules))
            self._namespaces.set_sysctls(name, todo.sysctls)
            self._namespaces.batch(todo.lines, name)


def _check(qube: Qube) -> None:
    """Raises `StoreError`. `Qube.parse` takes an address of either family for either."""
    for address, version in ((qube.ip, 4), (qube.ip6, 6)):
        if address is not None and ip_address(address).version != version:
            raise StoreError(f"{qube.name}: {address} is no IPv{version} address; edit its qube.json")
