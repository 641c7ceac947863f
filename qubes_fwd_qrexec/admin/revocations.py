# SPDX-License-Identifier: GPL-2.0-or-later
"""The calls by which dom0 ends tunnels: which are due, and how none is forgotten.

A tunnel outlives the policy that allowed it. When policy is closed, nothing else tells any more that its
tunnels are to be ended; so the same write that closes leaves a note of each in the policy file, as a
comment, which is struck out when the call is done. Whoever comes next finds what is still due, whether
the call failed or its caller was killed.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from qubes_fwd_qrexec.config import ListenerConfig
from qubes_fwd_qrexec.errors import ConfigError, TextError
from qubes_fwd_qrexec.rules import OnExpire, Transport
from qubes_fwd_qrexec.values import QubeName, TargetPorts, parse_qube_name

from . import policy
from .inventory import CONFIG_PREFIX, Inventory
from .policy import Tunnel

_NOTE = "# Tunnels still to be ended: "
_DRAIN = f"+{OnExpire.DRAIN}"


class Revocation(NamedTuple):
    """A call to a target that ends tunnels at once, or lets them drain: take nothing new."""

    tunnel: Tunnel
    drains: bool = False

    @property
    def target(self) -> QubeName:
        return self.tunnel.target

    @property
    def argument(self) -> str:
        """Of `qubes.ForwardRevoke`: ``8080-8080+sys-net``, or with ``+drain`` behind it."""
        return f"{self.tunnel.argument}{_DRAIN if self.drains else ''}"

    def note(self) -> str:
        """A line of the policy file, which policy itself takes for a comment."""
        return f"{_NOTE}{self.target} {self.argument}"

    def words(self) -> str:
        """For people."""
        ports, source = self.tunnel.argument.split("+")
        verb = (
            f"let the tunnels of {source} end by themselves,"
            if self.drains
            else f"end the tunnels of {source}"
        )
        return f"{self.target}: {verb} to {TargetPorts.parse(ports).worded()}"


def noted(text: str | None) -> frozenset[Revocation]:
    """What a policy file says is still due; what is no note of ours says nothing."""
    lines = (text or "").splitlines()
    found = (_read(line.removeprefix(_NOTE)) for line in lines if line.startswith(_NOTE))
    return frozenset(revocation for revocation in found if revocation is not None)


def _read(text: str) -> Revocation | None:
    target, _, argument = text.partition(" ")
    ports, _, source = argument.removesuffix(_DRAIN).partition("+")
    try:
        tunnel = policy.tunnel(parse_qube_name(target), TargetPorts.parse(ports), parse_qube_name(source))
    except TextError:
        return None
    return Revocation(tunnel, argument.endswith(_DRAIN))


def struck_out(text: str, done: Iterable[Revocation]) -> str:
    """A policy file without the notes of what is done."""
    notes = {revocation.note() for revocation in done}
    return "".join(line for line in text.splitlines(keepends=True) if line.rstrip("\n") not in notes)


def due(installed: str | None, wanted: str, inventory: Inventory) -> list[Revocation]:
    """What is to be ended when the ``installed`` policy becomes the ``wanted`` one.

    The tunnels that were allowed and are no more, and those that are noted. A line that only changes, in
    its autostart, stays allowed. Where all the forwards that shared a tunnel said on-expire=drain, its
    connections go on and no new one is taken.
    """
    allowed = policy.tunnels(policy.allowing(wanted))
    over = policy.tunnels(policy.allowing(installed)) - allowed
    endings = _endings(inventory)
    fresh = {Revocation(tunnel, endings.get(tunnel) == {OnExpire.DRAIN}) for tunnel in over}
    old = {revocation for revocation in noted(installed) if revocation.tunnel not in allowed | over}
    return sorted(running(fresh | old, inventory))


def running(revocations: Iterable[Revocation], inventory: Inventory) -> Iterator[Revocation]:
    """Those whose target runs: one that is halted, or gone, has no tunnels."""
    for revocation in revocations:
        qube = inventory.get(revocation.target)
        if qube is not None and qube.is_running:
            yield revocation


def _endings(inventory: Inventory) -> Mapping[Tunnel, set[OnExpire]]:
    """What becomes of connections at the end, for each tunnel that a listener was told to open."""
    endings: dict[Tunnel, set[OnExpire]] = {}
    for tunnel, on_expire in configured(inventory):
        endings.setdefault(tunnel, set()).add(on_expire)
    return endings


def configured(inventory: Inventory) -> Iterator[tuple[Tunnel, OnExpire]]:
    """The tunnels that listeners were told to open. What they cannot read says nothing."""
    for exposed, key, value in inventory.told():
        try:
            config = ListenerConfig.parse(key.removeprefix(CONFIG_PREFIX), value)
        except ConfigError:
            continue
        if config.transport is Transport.TUNNEL:
            yield policy.tunnel(config.target, config.target_ports, exposed), config.on_expire
