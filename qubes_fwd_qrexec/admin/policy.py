# SPDX-License-Identifier: GPL-2.0-or-later
"""The plan to dom0's qrexec policy: exact lines for what is live, and nothing else.

No line has a wildcard but the closing ones, which deny. Of `Service.CONNECT_TCP`, which is the
user's, nothing is said but the lines of forwards that go over it.
"""

import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from qubes_fwd_qrexec.config import REVOKE_SERVICE, STATUS_SERVICE, Service
from qubes_fwd_qrexec.errors import TextError
from qubes_fwd_qrexec.rules import Transport
from qubes_fwd_qrexec.values import QubeName, TargetPorts, parse_qube_name, yes_no

from .states import Forward

NAME = "30-forward"
# Only dom0 may end tunnels and ask how forwards are, and policy does not apply to dom0's own calls.
CLOSING = tuple(
    f"{service}  *  @anyvm  @anyvm  deny  notify=no"
    for service in (REVOKE_SERVICE, STATUS_SERVICE, Service.FORWARD_TCP)
)
_HEADER = """\
# This file is written by qvm-forward, and edits in it are lost.
# Change the rules instead: see 'qvm-forward list' and qvm-forward(1).
"""
# Two texts that differ in this line alone say the same.
_WRITTEN = "# Written "
# With a colon, which no qube's name has: a forward's own comment begins with that of its target.
_PANIC = "# Panic:"
PANIC = f"{_PANIC} nothing may be opened before 'qvm-forward panic' is through."


class Tunnel(NamedTuple):
    """A tunnel that a line allows: its target, and what `qubes.ForwardRevoke` is to be told to end it."""

    target: QubeName
    argument: str

    @property
    def source(self) -> str:
        """The exposed qube."""
        return self.argument.partition("+")[2]


def tunnel_of(line: str) -> Tunnel | None:
    """The tunnel that one of our own lines allows; None for a call's line, and for what others wrote."""
    words = line.split()
    if len(words) < 5 or words[0] != Service.FORWARD_TCP or words[4] != "allow":
        return None
    _, argument, source, target, *_ = words
    ports, _, kind = argument.removeprefix("+").partition("+")
    if kind != "tunnel":
        return None
    try:
        return tunnel(parse_qube_name(target), TargetPorts.parse(ports), parse_qube_name(source))
    except TextError:
        return None


def tunnels(lines: Iterable[str]) -> frozenset[Tunnel]:
    """All tunnels that these lines allow."""
    return frozenset(tunnel for line in lines if (tunnel := tunnel_of(line)) is not None)


def tunnel(target: QubeName, ports: TargetPorts, source: QubeName) -> Tunnel:
    return Tunnel(target, f"{ports}+{source}")


def lines(forward: Forward) -> tuple[str, ...]:
    """The lines that one forward needs; none if it is not live."""
    config = forward.config
    if config is None:
        return ()
    if config.transport is Transport.TUNNEL:
        arguments = [f"{config.target_ports.brief()}+tunnel"]
    else:
        arguments = [str(port) for port in config.target_ports]
    autostart = yes_no(forward.source.rule.autostart)
    return tuple(
        f"{config.service}  +{argument}  {forward.exposed}  {config.target}  allow  "
        f"autostart={autostart}  notify=no"
        for argument in arguments
    )


def text(
    forwards: Iterable[Forward],
    written_at: float | None,
    *,
    withheld: frozenset[str] = frozenset(),
    notes: Iterable[str] = (),
) -> str:
    """The whole file. ``written_at`` is in UNIX seconds, None for the file as it is installed.

    ``withheld`` lines are left out: those whose forward could not be opened after all. ``notes`` are
    comments that are kept for whoever writes it next.
    """
    live = [forward for forward in forwards if forward.config is not None]
    if written_at is None:
        dated = "as installed, without any forward."
    else:
        count = f"{len(live)} forward{'' if len(live) == 1 else 's'}"
        dated = f"at {_utc(written_at)}, for {count}."
    parts = [f"{_HEADER}{_WRITTEN}{dated}\n", *(f"{note}\n" for note in notes)]
    done: set[str] = set(withheld)
    for forward in live:
        rule = forward.source.rule
        parts.append(
            f"\n# {forward.source}: {rule.listen_ports.worded()} of {forward.exposed} to "
            f"{rule.target_ports.worded()}\n"
        )
        # Two forwards to the same port of a target from the same qube share a line.
        parts += [f"{line}\n" for line in lines(forward) if line not in done]
        done.update(lines(forward))
    parts.append("\n# Whatever no line above allows is denied.\n")
    parts += [f"{line}\n" for line in CLOSING]
    return "".join(parts)


def allowing(policy: str | None) -> frozenset[str]:
    """The lines of a policy file that are in force, all but the closing ones, in one spelling."""
    return frozenset(line for line in _effective(policy or "") if line not in CLOSING)


def panic_notes(policy: str | None) -> tuple[str, ...]:
    """The lines by which panic says that it is not through, whatever else they say: doubt closes."""
    return tuple(line for line in (policy or "").split("\n") if line.startswith(_PANIC))


def is_same(some: str | None, other: str | None) -> bool:
    """Whether two files say the same, whenever they were written."""
    if some is None or other is None:
        return some is other
    return _undated(some) == _undated(other)


def _effective(policy: str) -> Iterator[str]:
    for line in policy.splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            yield "  ".join(line.split())


def _undated(policy: str) -> list[str]:
    return [line for line in policy.split("\n") if not line.startswith(_WRITTEN)]


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
