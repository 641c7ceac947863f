# SPDX-License-Identifier: GPL-2.0-or-later
"""A keeper over an nft and a listener that say what they are told to say."""

import time
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path

from qubes_fwd_qrexec.common import report
from qubes_fwd_qrexec.common.values import Binding, Proto
from qubes_fwd_qrexec.firewall import keeper
from qubes_fwd_qrexec.firewall.cutting import Cutter
from qubes_fwd_qrexec.firewall.forwards import Forwards
from qubes_fwd_qrexec.firewall.inforce import InForce
from qubes_fwd_qrexec.firewall.nfttool import Nft
from qubes_fwd_qrexec.firewall.rule import Family, NftError
from qubes_fwd_qrexec.firewall.tables import CUSTOM_FORWARD, CUSTOM_INPUT, Seen, SeenTable
from qubes_fwd_qrexec.firewall.wanted import Firewall
from qubes_fwd_qrexec.system.sockdiag import SocketsError

OPEN, CLOSED = report.Firewall.OPEN, report.Firewall.CLOSED
BINDINGS = frozenset((ip_address("127.0.0.1"), port) for port in (80, 81))
LISTENING = frozenset((Proto.TCP, *binding) for binding in BINDINGS)


WITH_TABLE = Seen(SeenTable({CUSTOM_INPUT: (), CUSTOM_FORWARD: ()}))


def places(*families: Family) -> dict[Family, Seen]:
    return dict.fromkeys(families, WITH_TABLE)


class FakeNft(Nft):
    """A firewall with one family's table, which may refuse so many transactions."""

    def __init__(self, *, refusals: int = 0, there: tuple[Family, ...] = (Family.IP,)) -> None:
        super().__init__("/nonexistent")
        self.refusals = refusals
        self.there = there
        self.given: list[str] = []

    def look(self) -> dict[Family, Seen]:
        return {family: WITH_TABLE if family in self.there else Seen() for family in Family}

    def carry_out(self, transaction: str) -> None:
        if self.refusals:
            self.refusals -= 1
            raise NftError("gone meanwhile")
        self.given.append(transaction)


class FakeSockets:
    """Where the listener listens, or why that is not known."""

    def __init__(self, said: frozenset[Binding] | SocketsError = BINDINGS) -> None:
        self.said = said
        self.times = 0

    def __call__(self, proto: Proto) -> frozenset[Binding]:
        self.times += 1
        if isinstance(self.said, SocketsError):
            raise self.said
        return self.said


def a_keeper(
    forwards: Forwards,
    fake: FakeNft,
    *,
    sockets: FakeSockets | None = None,
    state: Path | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> keeper.Keeper:
    return keeper.Keeper(
        forwards, InForce(Firewall(fake), Cutter(lambda *_: 0)), sockets or FakeSockets(), state, clock
    )
