# SPDX-License-Identifier: GPL-2.0-or-later
"""From the plan to dom0's qrexec policy: exact lines for what is live, and nothing else.

Only the closing lines, which deny, have wildcards. `Service.CONNECT_TCP` belongs to the user: it gets lines
for the forwards that use it, and no closing line.
"""

import re
from collections.abc import Container

from qubes_fwd_qrexec.common.allowance import Calls
from qubes_fwd_qrexec.common.config import ListenerConfig, Service
from qubes_fwd_qrexec.common.errors import TextError
from qubes_fwd_qrexec.common.rules import Transport
from qubes_fwd_qrexec.common.services import CUT_SERVICE, NFT_SERVICE, REVOKE_SERVICE, STATUS_SERVICE
from qubes_fwd_qrexec.common.values import Proto, QubeName, TargetPorts, parse_qube_name, yes_no

from .states import Forward, Plan

NAME = "30-forward"
OURS = (Service.FORWARD_TCP, Service.FORWARD_UDP)
# Only dom0 may cut connections, end calls and ask how forwards are, and its own calls policy does not judge.
CLOSING = tuple(
    f"{service}  *  @anyvm  @anyvm  deny  notify=no"
    for service in (CUT_SERVICE, NFT_SERVICE, REVOKE_SERVICE, STATUS_SERVICE, *OURS)
)
_HEADER = """\
# This file is written by qvm-forward, and edits in it are lost.
# Change the rules instead: see 'qvm-forward list' and qvm-forward(1).
"""
# With a colon, which no qube's name has: a forward's own comment begins with that of its target.
_HOLD = "# Held:"
HOLD = f"{_HOLD} nothing is allowed before 'qvm-forward resume'."
_SINCE = re.compile(r"(?<=resume'\.) Since [0-9]+\.[0-9]+\.$", re.ASCII | re.MULTILINE)
# Qubes' parser reads with universal newlines, so a carriage return ends a comment, and nothing else does.
_LINE_ENDS = re.compile(r"\r\n|\r|\n")


def calls_of(line: str) -> tuple[QubeName, Calls] | None:
    """The target and the calls of our services that a line allows; None for any that we would not write."""
    words = line.split()
    if len(words) < 5 or words[0] not in OURS or words[4] != "allow":
        return None
    service, argument, source, target, *_ = words
    proto = Service(service).proto
    ports, _, kind = argument.removeprefix("+").partition("+")
    if kind != Transport.MUX and (kind or proto is Proto.UDP):
        return None
    try:
        return parse_qube_name(target), Calls(TargetPorts.parse(ports), parse_qube_name(source), proto)
    except TextError:
        return None


def lines(forward: Forward) -> tuple[str, ...]:
    """The lines that one forward needs, of each protocol its own; none if it is not live, or goes by nft."""
    return tuple(line for config in forward.listener_configs for line in lines_of(forward, config))


def lines_of(forward: Forward, config: ListenerConfig) -> tuple[str, ...]:
    """The lines that one protocol of a live forward needs."""
    autostart, ports = yes_no(forward.named.rule.autostart), config.target_ports
    is_mux = config.transport is Transport.MUX
    return tuple(
        f"{config.service}  +{argument}  {forward.exposed}  {config.target}  allow  "
        f"autostart={autostart}  notify=no"
        for argument in ([f"{ports.brief()}+mux"] if is_mux else map(str, ports))
    )


def text(planned: Plan, *, withheld: Container[str] = ()) -> str:
    """The whole file; ``withheld`` lines are left out."""
    parts = [_HEADER, f"{HOLD}\n" if planned.is_held else ""]
    # Two forwards to the same port of a target from the same qube share a line.
    done: set[str] = set()
    for forward in planned.live:
        needed = lines(forward)
        if not needed:
            continue
        rule = forward.named.rule
        parts.append(
            f"\n# {forward.named}: {rule.listen_ports.worded()} of {forward.exposed} to "
            f"{rule.target_ports.worded()}\n"
        )
        parts += [f"{line}\n" for line in needed if line not in done and line not in withheld]
        done.update(needed)
    parts.append("\n# Whatever no line above allows is denied.\n")
    parts += [f"{line}\n" for line in CLOSING]
    return "".join(parts)


def hold_text(now: float) -> str:
    """The whole file of a hold that begins at ``now``.

    No earlier hold has the same text, so whoever is about to lift one that they read does not lift this one.
    """
    return text(Plan((), is_held=True)).replace(HOLD, f"{HOLD} Since {now:.6f}.")


def is_written(installed: str | None, wanted: str) -> bool:
    """Whether the file says what it should, whenever its hold began."""
    return _SINCE.sub("", installed or "") == wanted


def allowing(policy: str | None) -> frozenset[str]:
    """The lines of a policy file that are in force, with blanks normalized, but without the closing ones."""
    there = ("  ".join(line.split()) for line in _LINE_ENDS.split(policy or ""))
    return frozenset(line for line in there if line and not line.startswith("#") and line not in CLOSING)


def targets(policy: str | None) -> frozenset[QubeName]:
    """The targets to which a policy file allows calls of our services."""
    return frozenset(call[0] for line in allowing(policy) if (call := calls_of(line)) is not None)


def stock_targets(policy: str | None) -> frozenset[QubeName]:
    """The targets that are called over the stock service alone."""
    if Service.CONNECT_TCP not in (policy or ""):
        return frozenset()
    calls = [words for line in allowing(policy) if len(words := line.split()) > 3]
    stock, ours = (
        {words[3] for words in calls if words[0] == service}
        for service in (Service.CONNECT_TCP, Service.FORWARD_TCP)
    )
    return frozenset(map(QubeName, stock - ours))


def is_held(policy: str | None) -> bool:
    """Whether everything is held. The rest of that line is not read: in doubt, nothing opens."""
    text = policy or ""
    return _HOLD in text and any(line.strip().startswith(_HOLD) for line in _LINE_ENDS.split(text))
