# SPDX-License-Identifier: GPL-2.0-or-later
"""Inventories and rules for the tests of dom0's side."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from qubes_fwd_qrexec.admin.inventory import Inventory, Qube
from qubes_fwd_qrexec.admin.plan import plan
from qubes_fwd_qrexec.admin.states import Forward
from qubes_fwd_qrexec.common.rules import ForwardRule, NamedRule
from qubes_fwd_qrexec.common.values import QubeName, RuleName
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.system.clock import Clock

NOW = 1_800_000_000
ADD = ("add", "work", "80:8080", "--from", "192.168.0.0/16", "--name", "web")
# An export of a system without any.
NO_FORWARDS = "version 2\n"
OURS = {"supported-rpc.qubes.ForwardTCP": "1", "supported-rpc.qubes.ForwardUDP": "1"}
BY_NFT = {"supported-rpc.qubes.ForwardNft": "1", "service.qubes-forward-nft": "1"}


def qube(name: str, netvm: str | None = None, **more: Any) -> Qube:
    more.setdefault("klass", "AppVM")
    more["features"] = {"qrexec": "1", **more.get("features", {})}
    return Qube(name=QubeName(name), netvm=None if netvm is None else QubeName(netvm), **more)


def world(*extra: Qube, without: tuple[str, ...] = ()) -> Inventory:
    """The qubes of a small system; ``extra`` ones are added, or take the place of those of their name."""
    qubes = [
        qube("dom0", klass="AdminVM"),
        qube("fedora-42", klass="TemplateVM", features=OURS),
        qube("debian-12", klass="TemplateVM"),
        qube("sys-net", provides_network=True),
        qube("sys-firewall", "sys-net", provides_network=True),
        qube("sys-vpn", "sys-firewall", provides_network=True, features={"service.vpn-handler-openvpn": "1"}),
        qube("work", "sys-firewall", template=QubeName("fedora-42")),
        qube("personal", "sys-firewall", template=QubeName("debian-12")),
        qube("hidden", "sys-vpn", template=QubeName("fedora-42")),
        qube("vault", template=QubeName("fedora-42")),
        *extra,
    ]
    return Inventory({q.name: q for q in qubes if q.name not in without})


def nft_world(*extra: Qube, ip6: bool = True) -> Inventory:
    """A system whose qubes have addresses, and forward by nft."""

    def ready(name: str, number: int, netvm: str | None = None, **more: Any) -> Qube:
        more["features"] = {**OURS, **BY_NFT, **more.get("features", {})}
        six = f"fd09:24ef:4179::a89:{number:x}" if ip6 else None
        return qube(name, netvm, ip=f"10.137.0.{number}", ip6=six, **more)

    qubes = [
        ready("sys-net", 5, provides_network=True),
        ready("sys-firewall", 6, "sys-net", provides_network=True),
        ready("sys-vpn", 7, "sys-firewall", provides_network=True, features={"service.vpn-handler-x": "1"}),
        ready("work", 10, "sys-firewall"),
        ready("personal", 11, "sys-firewall"),
        ready("hidden", 12, "sys-vpn"),
        *extra,
    ]
    return Inventory({q.name: q for q in qubes})


def rule(text: str = "", target: str = "work", name: str = "web") -> NamedRule:
    """A rule with port 80 for anyone, unless ``text`` says otherwise; owned by its target."""
    options = {"action": "forward", "srcports": "80", "srchosts": "any", "owner": target}
    given = dict(part.split("=", 1) for part in text.split())
    line = " ".join(f"{key}={value}" for key, value in (options | given).items() if value)
    return NamedRule(QubeName(target), RuleName(name), ForwardRule.parse(line))


def only(named: NamedRule, inventory: Inventory | None = None) -> Forward:
    """What the plan makes of one rule by itself."""
    (forward,) = plan([named], inventory or world(), NOW)
    return forward


class Result(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Command = Callable[..., Result]


_LOCKS = ("lock", "watch.lock")


def content(lab: LabDirectory) -> dict[str, str]:
    """All that a command could change."""
    files = (path for path in lab.root.rglob("*") if path.is_file() and path.name not in _LOCKS)
    return {str(path): path.read_text() for path in files}


class Hands:
    """The time for a clock that a test moves: of the wall, and elapsed since the machine was started."""

    def __init__(self, wall: float = float(NOW), elapsed: float = 5000.0) -> None:
        self.wall = wall
        self.elapsed = elapsed

    def pass_by(self, seconds: float) -> None:
        self.wall += seconds
        self.elapsed += seconds

    def clock(self) -> Clock:
        return Clock(lambda: self.wall, lambda: self.elapsed)
