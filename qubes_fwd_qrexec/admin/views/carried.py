# SPDX-License-Identifier: GPL-2.0-or-later
"""Words for what forwards carry: the connections of TCP, and the packets and flows of UDP."""

from qubes_fwd_qrexec.common.values import Proto

_TRAFFIC = {Proto.TCP: "connections", Proto.UDP: "UDP packets"}
_LIVE = {
    Proto.TCP: ("connection", "connections"),
    Proto.UDP: ("UDP flow", "UDP flows"),
    Proto.BOTH: ("connection or UDP flow", "connections and UDP flows"),
}


def traffic(proto: Proto) -> str:
    """What comes in: ``connections``, ``UDP packets``, or both."""
    return " and ".join(_TRAFFIC[each] for each in proto.each)


def live(proto: Proto, number: int | None) -> str:
    """So many connections or flows: ``1 connection``, ``2 UDP flows``; without a number if that is None."""
    one, more = _LIVE[proto]
    return more if number is None else f"{number} {one if number == 1 else more}"


def named(proto: Proto) -> str:
    """What tells it from TCP alone, which is not named: empty, or words that end in a space."""
    return "" if proto is Proto.TCP else f"{'+'.join(proto.each)} "
