# SPDX-License-Identifier: GPL-2.0-or-later
"""Words for what forwards carry and refuse: the connections of TCP, and the packets and flows of UDP."""

from collections.abc import Mapping

from qubes_fwd_qrexec.common.values import Proto

_TRAFFIC = {Proto.TCP: "connections", Proto.UDP: "UDP packets"}
_LIVE = {
    Proto.TCP: ("connection", "connections"),
    Proto.UDP: ("UDP flow", "UDP flows"),
    Proto.BOTH: ("connection or UDP flow", "connections and UDP flows"),
}
# By the words that are counted: those of a rule's options, of `refusals`, and of the exposed qube.
# qvm-forward-list(1) says more of each.
REFUSED = {
    "srchosts": "from sources that are not allowed",
    "side": "from the wrong side",
    "connections": "over the connection limit",
    "per-source": "over the per-client limit",
    "rate": "over the rate limit",
    "process": "over the listener's own limit",
    "made-room": "ended to make room",
    "policy": "denied by dom0",
    "no-service": "without our service in the target",
    "server": "without a server",
    "busy": "with too many waiting",
    "no-call": "without a call to the target",
    "full": "for lack of room",
    "old": "that waited too long",
    "kernel": "that came too fast",
    "refused": "right behind a refusal",
    "target": "in the target",
    "late": "after the end of their flow",
    "unsent": "that could not be sent",
    "too-long": "that were too long",
    "to-many": "by broadcast or multicast",
}


def traffic(proto: Proto) -> str:
    """What comes in: ``connections``, ``UDP packets``, or both."""
    return " and ".join(_TRAFFIC[each] for each in proto.each)


def live(proto: Proto, number: int | None) -> str:
    """So many connections or flows: ``1 connection``, ``2 UDP flows``; without a number if that is None."""
    one, more = _LIVE[proto]
    return more if number is None else f"{number} {one if number == 1 else more}"


def named(proto: Proto) -> str:
    """The protocol's name with a trailing space; empty for TCP alone, which is not named."""
    return "" if proto is Proto.TCP else f"{'+'.join(proto.each)} "


def refused(counts: Mapping[str, int]) -> str:
    """How many of each reason; empty if none. Unknown words, from a newer listener, stay as they are."""
    return ", ".join(f"{count} {REFUSED.get(why, why)}" for why, count in sorted(counts.items()) if count)
