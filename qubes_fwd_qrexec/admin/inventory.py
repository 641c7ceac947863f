# SPDX-License-Identifier: GPL-2.0-or-later
"""dom0's picture of all qubes, as values: what the plan is made from.

It asks nobody and changes nothing. A qube names others (netvm, template). A name may lead nowhere or in a
circle, so the walks here are bounded.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from qubes_fwd_qrexec.common.config import Service, Side, is_forward_key
from qubes_fwd_qrexec.common.nftconfig import is_nft_key
from qubes_fwd_qrexec.common.rules import ForwardType
from qubes_fwd_qrexec.common.services import NFT_SERVICE
from qubes_fwd_qrexec.common.values import QubeName

# A disposable has two in a row: the bound is for a wrong inventory.
_TEMPLATES_MAX = 32
RULE_PREFIX = "forward."
TUNNEL_FEATURE = f"{RULE_PREFIX}tunnel"
CONFIG_PREFIX = "vm-config."
OFFER_PREFIX = "supported-rpc."
# The services that a user enables for a VPN: Qubes-vpn-support, qubes-tunnel (QubesOS-contrib), and units of
# VPN programs that wait for their service.
VPN_PREFIXES = (
    "service.vpn-handler",
    "service.qubes-tunnel",
    "service.openvpn",
    "service.wireguard",
    "service.wg-quick",
)
# The Qubes service that starts the listener.
LISTENER_FEATURE = "service.qubes-forward-listener"
# The one that starts the keeper of the firewall for forwards by nft.
NFT_FEATURE = "service.qubes-forward-nft"
QREXEC_FEATURE = "qrexec"
OS_FEATURE = "os"
_MATTER = frozenset(
    {
        "whonix-gw",
        "whonix-ws",
        # Qubes gives a qube an IPv6 address if it or one of its netvms has this.
        "ipv6",
        QREXEC_FEATURE,
        OS_FEATURE,
        LISTENER_FEATURE,
        NFT_FEATURE,
        *(f"{OFFER_PREFIX}{service}" for service in (*Service, NFT_SERVICE)),
    }
)
_WHONIX_MARKS = ("tag anon-gateway", "feature whonix-gw")
ADMIN = "AdminVM"
TEMPLATE = "TemplateVM"
REMOTE = "RemoteVM"
DISPOSABLE = "DispVM"
_LINUX = "Linux"


def feature_matters(key: str, with_config: bool = True) -> bool:
    """Whether anything here depends on a feature. Qubes have a hundred others, and reading each value is a
    call.
    """
    if key.startswith(CONFIG_PREFIX):
        return with_config and is_configuration(key)
    return key in _MATTER or key.startswith((RULE_PREFIX, *VPN_PREFIXES))


def is_configuration(key: str) -> bool:
    """Whether a feature tells a qube about a forward."""
    name = key.removeprefix(CONFIG_PREFIX)
    return name != key and (is_forward_key(name) or is_nft_key(name))


class Qube(NamedTuple):
    """One qube. ``features`` are its own, as far as they matter; an empty value is Qubes' False.

    ``configured`` are the names of the features that tell it of forwards, also where their values were not
    asked for. ``label`` is the name of its colour and ``icon`` that of its icon, for those who look at it;
    both are empty where they are not known. ``problem`` says why something that matters could not be read:
    nothing is known then.
    """

    name: QubeName
    klass: str
    features: Mapping[str, str]
    netvm: QubeName | None = None
    is_running: bool = True
    ip: str | None = None
    ip6: str | None = None
    provides_network: bool = False
    template: QubeName | None = None
    template_for_dispvms: bool = False
    tags: frozenset[str] = frozenset()
    configured: frozenset[str] = frozenset()
    label: str = ""
    icon: str = ""
    problem: str | None = None


def _without_forwards(qube: Qube) -> Qube:
    left = {
        key: value
        for key, value in qube.features.items()
        if key == TUNNEL_FEATURE or not key.startswith((RULE_PREFIX, CONFIG_PREFIX))
    }
    return qube._replace(features=left, configured=frozenset())


class Chain(NamedTuple):
    """The netvms of a qube, nearest first; ``problem`` says why the walk could not be finished."""

    qubes: tuple[QubeName, ...]
    problem: str | None = None


class TunnelMark(NamedTuple):
    """Which qube is marked as a tunnel, and by what; ``is_behind``: as one that lives behind a tunnel."""

    qube: QubeName
    mark: str
    is_behind: bool = False

    def __str__(self) -> str:
        return f"{self.qube} ({self.mark})"


class Inventory(NamedTuple):
    """All qubes by name. ``here`` is the one that this program runs in, unless that is dom0 or no qube."""

    qubes: Mapping[QubeName, Qube]
    here: QubeName | None = None

    def get(self, name: str) -> Qube | None:
        return self.qubes.get(QubeName(name))

    def without_forwards(self) -> "Inventory":
        """The same but for rules and for what qubes are told of them: what a rule by itself depends on."""
        return self._replace(qubes={name: _without_forwards(qube) for name, qube in self.qubes.items()})

    def with_templates(self, name: str) -> Iterator[Qube]:
        """A qube, its template, and the template of that: a disposable is made from a qube that has one."""
        qube = self.get(name)
        for _ in range(_TEMPLATES_MAX):
            if qube is None:
                return
            yield qube
            qube = None if qube.template is None else self.qubes.get(qube.template)

    def unread(self, *names: str | None) -> str | None:
        """Why something of one of these qubes, or of its templates, could not be read; None if all could."""
        qubes = (qube for name in names if name is not None for qube in self.with_templates(name))
        return next((qube.problem for qube in qubes if qube.problem is not None), None)

    def chain(self, name: QubeName) -> Chain:
        """Walk from a qube along its netvms to the outermost one."""
        walked: list[QubeName] = []
        qube, problem = self.get(name), None
        while problem is None and qube is not None and qube.netvm is not None:
            following = self.get(qube.netvm)
            if qube.netvm in (name, *walked):
                problem = f"The netvms of {name} form a loop at {qube.netvm}; change its netvm"
            elif following is None:
                problem = f"The netvm of {qube.name}, {qube.netvm}, does not exist; set another"
            else:
                walked.append(qube.netvm)
                qube = following
        return Chain(tuple(walked), problem)

    def holder(self, name: QubeName, key: str) -> Qube | None:
        """The qube that has the feature: this one, or else the nearest of its templates that has it.

        qubes-core-admin qubes/features.py walks along all of them, too.
        """
        for qube in self.with_templates(name):
            if key in qube.features:
                return qube
        return None

    def feature(self, name: QubeName, key: str) -> str | None:
        """A feature of the qube or else of its templates, as Qubes' check_with_template finds it."""
        holder = self.holder(name, key)
        return None if holder is None else holder.features[key]

    def offers(self, name: QubeName, service: str = Service.FORWARD_TCP) -> bool:
        """Whether a qube, or the template that it is based on, has announced a service to dom0."""
        return bool(self.feature(name, f"{OFFER_PREFIX}{service}"))

    def other_system(self, name: QubeName) -> str:
        """What a qube runs instead of Linux, for which alone there is our package; empty if it runs Linux."""
        system = self.feature(name, OS_FEATURE) or _LINUX
        return "" if system == _LINUX else system

    def configurations(self) -> Iterator[tuple[QubeName, str, str]]:
        """What qubes are told of forwards: the qube, the key of a configuration, and its text."""
        for qube in self.qubes.values():
            for key, value in qube.features.items():
                if is_configuration(key):
                    yield qube.name, key.removeprefix(CONFIG_PREFIX), value

    def tunnel_marks(self, name: QubeName) -> Iterator[TunnelMark]:
        """Every mark that says that this qube is a tunnel for those behind it."""
        qube = self.qubes[name]
        if "anon-gateway" in qube.tags:
            yield TunnelMark(name, "tag anon-gateway")
        for key in ("whonix-gw", TUNNEL_FEATURE):
            if self.feature(name, key):
                yield TunnelMark(name, f"feature {key}")
        for key in sorted(qube.features):
            if key.startswith(VPN_PREFIXES) and qube.features[key]:
                yield TunnelMark(name, f"feature {key}")

    def tunnel_mark(self, name: QubeName) -> TunnelMark | None:
        """The first of these marks; one is enough."""
        return next(self.tunnel_marks(name), None)

    def nearest_tunnel(self, target: QubeName) -> TunnelMark | None:
        """The tunnel by which traffic of ``target`` leaves: its own, if it is marked itself, or else that of
        the nearest of its netvms that is marked, or else the mark that says that there must be one.
        """
        marks = filter(None, map(self.tunnel_mark, (target, *self.chain(target).qubes)))
        return next(marks, None) or self.behind_tunnel_mark(target)

    def behind_tunnel_mark(self, name: QubeName) -> TunnelMark | None:
        """The mark that says that this qube may be reached only through its tunnel."""
        if "anon-vm" in self.qubes[name].tags:
            return TunnelMark(name, "tag anon-vm", is_behind=True)
        if self.feature(name, "whonix-ws"):
            return TunnelMark(name, "feature whonix-ws", is_behind=True)
        return None

    def whonix_mark(self, name: QubeName) -> TunnelMark | None:
        """The mark of a qube that runs Whonix, whose own firewall refuses what is forwarded."""
        whonix = (mark for mark in self.tunnel_marks(name) if mark.mark in _WHONIX_MARKS)
        return next(whonix, None) or self.behind_tunnel_mark(name)

    def side(self, exposed: QubeName | None, forward_type: ForwardType) -> Side | None:
        """The side of a qube by which a forward is entered; None if there is no such qube. An internal one is
        entered from other qubes.

        An external one at a tunnel qube is entered from its tunnel, and never by the uplink that the tunnel
        hides the qubes from.
        """
        if exposed is None or exposed not in self.qubes:
            return None
        if forward_type is ForwardType.INTERNAL:
            return Side.VIFS
        if self.qubes[exposed].netvm is None or self.tunnel_mark(exposed) is not None:
            return Side.OUTER
        return Side.UPLINK

    def is_bypassed(self, tunnel: TunnelMark, exposed: QubeName, side: Side) -> bool:
        """Whether traffic by this side of ``exposed`` goes round the tunnel that is nearest to its target.

        Exposing behind the tunnel is fine, and so is any other qube that has the same tunnel on its own way
        out. At the tunnel qube itself its vifs are behind the tunnel, and its outer side is the tunnel alone
        if it has a netvm; without one its NICs are there too, and the LAN would go round it. A target that is
        a tunnel itself may be exposed behind itself alone, whatever is marked further out: qrexec goes round
        what runs in it. One that must be behind a tunnel and is not may be exposed nowhere.
        """
        if tunnel.is_behind:
            return True
        if tunnel.qube == exposed:
            return side is Side.OUTER and self.qubes[exposed].netvm is None
        return tunnel.qube not in self.chain(exposed).qubes
