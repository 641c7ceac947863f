# SPDX-License-Identifier: GPL-2.0-or-later
"""Forwards by nft that come and go beside live traffic, while firewalls and interfaces are made anew.

Along a path of qubes in network namespaces (`bench.road`) each qube runs the firewall's program. Forwards
are opened, narrowed, set to expire and removed; flows of allowed clients and of others go on all the time,
and so do packets that no rule ever allows. Whatever passes is judged (`traffic`).
"""

import signal
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import trio

from bench.processes import BenchError
from bench.road import (
    ALLOWED,
    BESIDE_FIREWALL,
    BESIDE_WORK,
    EDGES,
    EVERYBODY,
    FIREWALL,
    LAN,
    NET,
    PATH,
    WORK,
    Road,
    address,
    open_road,
    told,
)
from qubes_fwd_qrexec.common.nftconfig import NftConfig
from qubes_fwd_qrexec.common.values import Proto, Sources
from qubes_fwd_qrexec.lab.stockrules import Shape

from .findings import PROBLEMS_MAX, Findings
from .firewalls import Firewall
from .permits import Permit
from .traffic import Kind, Traffic, clock

_PROTOS = (Proto.TCP, Proto.UDP, Proto.TCP, Proto.UDP)
# Exposed ports, and the target's; none of one is among the other's. The last of each is nobody's.
_EXPOSED, _OWN = 20_100, 20_200
_PORTS = tuple(first + n for first in (_EXPOSED, _OWN) for n in range(len(_PROTOS) + 1))
_PAUSE_S = (0.05, 1.5)
_OPENINGS = ("one network", "all networks", "one network for a while", "all networks for a while")
_EXPIRE_S = (1, 4)
# Calm comes so often, and then what is open must be reached.
_CALM_EACH_S = 15.0
_CALM_S = 120.0
_LOOK_S = 0.05
# What was over before that is judged no more.
_MEMORY_S = 60.0


class _Slot:
    """One exposed port, whose forward changes."""

    def __init__(self, number: int, proto: Proto, grace_s: float) -> None:
        self.number = number
        self.proto = proto
        self.permits = {"lan": Permit(grace_s), "refused": Permit(grace_s)}
        self.config: dict[str, NftConfig] = {}

    def open_for(self) -> str:
        """Whoever is let in now."""
        if self.permits["refused"].allows(clock()):
            return "all networks"
        return "one network" if self.permits["lan"].allows(clock()) else "nobody"

    def told(self, sources: Sources, expire: int | None) -> dict[str, NftConfig]:
        return told(
            f"soak-{self.number}",
            self.proto,
            _EXPOSED + self.number,
            _OWN + self.number,
            sources,
            expire,
        )


class NftSoak:
    """A run over one path."""

    def __init__(self, road: Road, directory: Path, seed: int, grace_s: float) -> None:
        self.findings = Findings()
        self._road = road
        self._random = Random(seed)
        self._grace_s = grace_s
        self._firewalls = {qube: Firewall(road, qube, directory) for qube in PATH}
        self._slots = [_Slot(n, proto, grace_s) for n, proto in enumerate(_PROTOS)]
        self._traffic = Traffic(road, self.findings, seed)
        self._kinds = {
            (slot.number, edge.version, who): Kind(
                LAN, edge.version, slot.proto, source, edge.net, _EXPOSED + slot.number, slot.permits[who]
            )
            for slot in self._slots
            for edge in EDGES
            for who, source in (("lan", edge.lan), ("refused", edge.refused))
        }
        self._slowest_s = 0.0

    async def run(self, seconds: float) -> None:
        """Disturb for that long; then see what is left over."""
        try:
            for firewall in self._firewalls.values():
                await trio.to_thread.run_sync(firewall.start)
            sizes = [firewall.size() for firewall in self._firewalls.values()]
            async with trio.open_nursery() as nursery:
                live = list(self._kinds.values())
                nursery.start_soon(self._traffic.run, live, _never(), _PORTS)
                await self._disturb(seconds)
                await self._close_all()
                now = [firewall.size() for firewall in self._firewalls.values()]
                nursery.cancel_scope.cancel()
            self._compare(sizes, now)
        finally:
            with trio.CancelScope(shield=True):
                for firewall in self._firewalls.values():
                    await trio.to_thread.run_sync(firewall.end)
        await trio.to_thread.run_sync(self._check_left_over)

    async def _disturb(self, seconds: float) -> None:
        ends_at = clock() + seconds
        calm_at = clock() + min(_CALM_EACH_S, seconds / 2)
        while clock() < ends_at and len(self.findings.problems) < PROBLEMS_MAX:
            act = self._random.choice([*[self._change] * 12, *self._disturbances()])
            await act()
            if self._random.random() < 0.5:
                await self._ask()
            await trio.sleep(self._random.uniform(*_PAUSE_S))
            if clock() >= calm_at:
                await self._calm()
                calm_at = clock() + _CALM_EACH_S
        await self._calm()

    # What is done to forwards

    async def _change(self) -> None:
        """Another forward at a port than there was, or none."""
        slot = self._random.choice(self._slots)
        before = slot.open_for()
        what = self._random.choice((*_OPENINGS, *(["nobody"] * 2 if before != "nobody" else [])))
        expire = None
        if "while" in what:
            expire = int(time.time()) + self._random.randint(*_EXPIRE_S)
        sources = EVERYBODY if "all" in what else ALLOWED
        await self._put(slot, {} if what == "nobody" else slot.told(sources, expire), expire)
        self.findings.disturbed[f"forwards for {before} are for {what}"] += 1

    async def _put(self, slot: _Slot, wanted: dict[str, NftConfig], expire: int | None) -> None:
        """As dom0 does: what closes is written first, outermost first; what opens target first."""
        closing = wanted if slot.config and wanted else {}
        if closing and slot.config[NET].sources != closing[NET].sources:
            closing = slot.told(ALLOWED, expire)
        for qube in PATH:
            firewall = self._firewalls[qube]
            if closing:
                firewall.put(closing[qube])
            elif slot.config:
                firewall.remove(slot.config[qube])
        now = clock()
        if not closing or closing[NET].sources == ALLOWED:
            slot.permits["refused"].close(now)
        if not closing:
            slot.permits["lan"].close(now)
        if wanted:
            until = float("inf") if expire is None else now + max(0.0, expire - time.time())
            slot.permits["lan"].open(now, until)
            if wanted[NET].sources == EVERYBODY:
                slot.permits["refused"].open(now, until)
            for qube in reversed(PATH):
                self._firewalls[qube].put(wanted[qube])
        slot.config = wanted
        for permit in slot.permits.values():
            permit.forget(now - _MEMORY_S)

    async def _ask(self) -> None:
        """Ask each qube, as dom0 does after a change: then what was closed before is closed at once."""
        asked = clock()
        try:
            for qube in PATH:
                report = await trio.to_thread.run_sync(self._firewalls[qube].report)
                if report.problem is not None or report.refused:
                    self.findings.note(f"{qube}: {report.problem or report.refused}")
                    return
        except OSError as error:
            self.findings.note(f"a firewall's program does not answer: {error}")
            return
        now = clock()
        self._slowest_s = max(self._slowest_s, now - asked)
        for slot in self._slots:
            for permit in slot.permits.values():
                permit.confirm(asked, now)

    async def _close_all(self) -> None:
        for slot in self._slots:
            await self._put(slot, {}, None)
        await self._ask()

    async def _calm(self) -> None:
        """What is open for good is reached, once all is at rest."""
        await self._ask()
        wanted = {
            number: self._traffic.arrived[number]
            for number, kind in enumerate(self._kinds.values())
            if kind.permit.is_open
        }
        with trio.move_on_after(_CALM_S):
            while wanted:
                await trio.sleep(_LOOK_S)  # what others send arrives whenever it does
                wanted = {n: before for n, before in wanted.items() if self._traffic.arrived[n] == before}
        for number in wanted:
            self.findings.note(f"nothing passes, and a rule allows it: {self._traffic.kinds[number]}")
        self.findings.disturbed["calms, in which all that is allowed passes"] += 1

    # What is done to firewalls and interfaces

    def _disturbances(self) -> list[Callable[[], Awaitable[None]]]:
        return [
            partial(self._do, "qubes-firewall restarted", self._restart_service),
            partial(self._do, "firewalls loaded anew", self._reload),
            partial(self._do, "custom-forward flushed", self._flush_custom),
            partial(self._do, "vif replaced: work", partial(self._road.replug, WORK)),
            partial(self._do, "vif replaced: sys-firewall", partial(self._road.replug, FIREWALL)),
            partial(self._do, "vif replaced: a neighbour", partial(self._road.replug, BESIDE_WORK)),
            partial(self._do, "programs ended and started", partial(self._restart, signal.SIGTERM)),
            partial(self._do, "programs killed and started", partial(self._restart, signal.SIGKILL)),
        ]

    async def _do(self, what: str, act: Callable[[], None]) -> None:
        await trio.to_thread.run_sync(act)
        self.findings.disturbed[what] += 1

    def _restart_service(self) -> None:
        self._road.wires.restart_firewall_service(self._random.choice((NET, FIREWALL)))

    def _reload(self) -> None:
        self._road.wires.reload_firewall(self._random.choice(PATH))

    def _flush_custom(self) -> None:
        family = self._random.choice(("ip", "ip6"))
        self._road.places.nft(
            self._random.choice((NET, FIREWALL)), f"flush chain {family} qubes custom-forward\n"
        )

    def _restart(self, number: int) -> None:
        firewall = self._firewalls[self._random.choice(PATH)]
        firewall.end(number)
        firewall.start()

    # What is left over

    def _compare(self, before: list[tuple[int, float]], now: list[tuple[int, float]]) -> None:
        for qube, (files, kib), (files_now, kib_now) in zip(PATH, before, now, strict=True):
            print(f"firewall of {qube}: {kib / 1024:.1f} MiB at the start, {kib_now / 1024:.1f} at the end")
            if files_now > files:
                self.findings.note(f"firewall of {qube}: {files_now} open files, and {files} at the start")
        print(f"slowest answer of all three: {self._slowest_s:.2f} s")

    def _check_left_over(self) -> None:
        for firewall in self._firewalls.values():
            left = [*firewall.left_rules(), *firewall.left_files()]
            for what in left:
                self.findings.note(f"left over: {what}")
            for failure in firewall.failures():
                self.findings.note(failure)
            if firewall.qube != WORK and (count := firewall.left_connections(_PORTS[0], _PORTS[-1])):
                self.findings.note(f"left over: {firewall.qube}: {count} connections")


def _never() -> list[Kind]:
    """Packets that no rule allows: past the exposed address, from neighbours, and with others' addresses."""
    no = Permit(0.0)
    last = len(_PROTOS)
    found = []
    for proto in Proto.BOTH.each:
        slot = _PROTOS.index(proto)
        for edge in EDGES:
            beyond = [address(qube, edge.version) for qube in PATH]

            def kind(
                qube: str, source: str, to: str, port: int, proto: Proto = proto, version: int = edge.version
            ) -> Kind:
                return Kind(qube, version, proto, source, to, port, no)

            for port in (_EXPOSED + last, _OWN + slot, _OWN + last):
                found.append(kind(LAN, edge.lan, edge.net, port))
            for port in (_EXPOSED + slot, _OWN + slot):
                found += [kind(LAN, edge.lan, to, port) for to in beyond[1:]]
                found += [
                    kind(qube, source, to, port)
                    for qube in (BESIDE_FIREWALL, BESIDE_WORK)
                    for source in ("", edge.lan)
                    for to in (edge.net, *beyond)
                ]
                # By its address on the LAN, which rules may allow, sys-net itself is let in at sys-firewall.
                found.append(kind(NET, beyond[0], beyond[1], port))
                found += [
                    kind(qube, own, beyond[2], port) for qube, own in zip(PATH[:2], beyond, strict=False)
                ]
    return found


async def soak(seed: int, seconds: float, grace_s: float) -> Findings:
    """A run of about ``seconds``, as root. Raises `BenchError` if the path cannot be had.

    ``grace_s``: how long after a change packets may pass that it does not allow, if no qube has been asked.
    """
    with TemporaryDirectory(prefix="fwd-soak-") as place:
        shape = Random(seed).choice(list(Shape))
        print(f"rules of Qubes {shape}", flush=True)
        with open_road(Path(place) / "lab", shape) as road:
            run = NftSoak(road, Path(place), seed, grace_s)
            try:
                await run.run(seconds)
            except BenchError as error:
                run.findings.note(str(error))
            return run.findings
