# SPDX-License-Identifier: GPL-2.0-or-later
"""The ways from a client on the LAN to a server in work, through sys-net and sys-firewall (`road`)."""

from pathlib import Path
from typing import ClassVar

from qubes_fwd_qrexec.common.nftconfig import NftConfig
from qubes_fwd_qrexec.common.values import Proto
from qubes_fwd_qrexec.firewall.cutting import Cutter
from qubes_fwd_qrexec.firewall.inforce import InForce
from qubes_fwd_qrexec.firewall.nfttool import Nft
from qubes_fwd_qrexec.firewall.pathrules import Kept
from qubes_fwd_qrexec.firewall.wanted import Firewall, Wanted

from . import road
from .memory import Footprint, footprint
from .peers import MuxCall, Peer, Setting
from .processes import Child
from .road import ALLOWED, EDGES, FIREWALL, NET, PATH, WORK, Road

PORT = 8080
_LAN = EDGES[0]
_READY_S = 30.0


class Way:
    """One way from the LAN to the server in work. ``address`` is where clients connect."""

    name: ClassVar[str]
    title: ClassVar[str]
    ends: ClassVar[tuple[str, str]] = ("server", "load")
    """The programs of the bench at its ends."""

    def __init__(self, path: Road, directory: Path) -> None:
        self.road = path
        self.directory = directory
        self.address = (_LAN.net, PORT)

    def open(self) -> None:
        """Make it. Raises `BenchError`."""

    def close(self) -> None:
        """End the programs that it needs."""


class Routed(Way):
    """Plain routing to work's own address, and no firewall anywhere: what machine and bench can do."""

    name = "routed"
    title = "routed, no rules"

    def open(self) -> None:
        self.address = (road.address(WORK), PORT)
        for qube in PATH:
            self.road.places.nft(qube, "flush ruleset\n")
        vif = self.road.wires.vif(FIREWALL)
        way = f"route add {road.address(WORK)} via {road.address(FIREWALL)} dev {vif} onlink"
        self.road.places.batch([way], NET)


def recipe(qube: str, port: int = PORT, number: int = 0) -> str:
    """What Qubes' documentation has the user write into one qube (qubes-doc, firewall, "Port forwarding")."""
    sources = f"ip saddr {_LAN.network}"
    state = "ct state new,established,related counter"
    if qube == WORK:
        return f"add rule ip qubes custom-input tcp dport {port} {sources} {state} accept\n"
    to = road.address(FIREWALL if qube == NET else WORK)
    chain = f"custom-dnat-work-{number}"
    return (
        f"add chain ip qubes {chain} {{ type nat hook prerouting priority filter + 1; policy accept; }}\n"
        f'add rule ip qubes {chain} iifname "eth0" {sources} tcp dport {port} {state} dnat to {to}\n'
        f'add rule ip qubes custom-forward iifname "eth0" {sources} ip daddr {to} tcp dport {port} {state}'
        " accept\n"
    )


class Recipe(Way):
    """The rules that Qubes' documentation has users write by hand."""

    name = "recipe"
    title = "recipe by hand"

    def open(self) -> None:
        for qube in PATH:
            text = recipe(qube)
            self.road.places.nft(qube, text + text.replace("tcp", "udp").replace("work-0", "work-udp"))


class ByNft(Way):
    """Ours: mode nft."""

    name = "nft"
    title = "mode nft"

    def open(self) -> None:
        for qube in reversed(PATH):
            with self.road.within(qube):
                forwards = [told(proto, PORT)[qube] for proto in Proto.BOTH.each]
                in_force().put(Wanted(paths=tuple(map(Kept, forwards))))


class ByMux(Way):
    """Ours: mode qrexec with transport mux, over the lab's broker. The listener is in sys-net."""

    name = "mux"
    title = "qrexec, mux"
    peer: ClassVar[type[Peer]] = MuxCall

    def open(self) -> None:
        with self.road.within(WORK):
            self._lab = Child.of_module(
                "bench.labprocess", [str(self.directory / "lab"), str(PORT), "{}"], self.directory
            )
        self._client = self._lab.answer(_READY_S)["client"]
        rule = f"meta l4proto {{ tcp, udp }} th dport {PORT} accept"
        self.road.places.nft(NET, f"add rule ip qubes custom-input {rule}\n")
        setting = Setting(PORT, self._client, self.directory, _LAN.net, _LAN.network)
        command = self.peer(setting).command(PORT)
        with self.road.within(NET):
            self._listener = Child("listener", command or [], self.directory / "listener.log")

    def footprint(self) -> Footprint:
        """What its processes and the lab's use now."""
        return footprint([self._listener.pid], self._lab.pid, self._client[0])

    def close(self) -> None:
        for child in (getattr(self, "_listener", None), getattr(self, "_lab", None)):
            if child is not None:
                child.end()


WAYS: tuple[type[Way], ...] = (Routed, Recipe, ByNft, ByMux)
COMPARED = ((ByNft, Recipe), (ByNft, ByMux))


def told(proto: Proto, port: int) -> dict[str, NftConfig]:
    """What the qubes are told about one forward."""
    return road.told(f"bench-{proto}-{port}", proto, port, port, ALLOWED)


def in_force() -> InForce:
    """What a qube's program keeps; it remembers nothing of an earlier one."""
    return InForce(Firewall(Nft()), Cutter())
