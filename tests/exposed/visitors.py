# SPDX-License-Identifier: GPL-2.0-or-later
"""Connections that only count, for the tests of limits."""

from ipaddress import IPv4Address, ip_address
from itertools import count

from qubes_fwd_qrexec.common.rules import NO_LIMITS, Limits
from qubes_fwd_qrexec.common.values import IPAddress
from qubes_fwd_qrexec.exposed.limits import (
    Account,
    NotAdmitted,
    Process,
)

ONE, OTHER = IPv4Address("192.0.2.1"), IPv4Address("192.0.2.2")
# As much memory as the most connections need.
PLENTY = 1 << 40


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Visitor:
    """A connection that only counts; later ones have moved bytes later."""

    _turns = count()

    def __init__(self, client: IPAddress) -> None:
        self.client = client
        self.moved_at = float(next(self._turns))
        self.has_made_room = False

    def make_room(self) -> None:
        assert not self.has_made_room
        self.has_made_room = True


def account(text: str = "", process: Process | None = None, clock: Clock | None = None) -> Account:
    limits = Limits.parse(text) if text else NO_LIMITS
    return Account(limits, process or Process(memory=lambda: PLENTY), clock or Clock())


def numbered(number: int) -> IPAddress:
    return ip_address(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")


def enter(counting: Account, *clients: IPAddress) -> list[NotAdmitted | None]:
    return [counting.admit(Visitor(client)) for client in clients]


def let_in(counting: Account, *clients: IPAddress) -> list[Visitor]:
    visitors = [Visitor(client) for client in clients]
    assert [counting.admit(visitor) for visitor in visitors] == [None] * len(visitors)
    return visitors
