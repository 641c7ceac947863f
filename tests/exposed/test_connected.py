# SPDX-License-Identifier: GPL-2.0-or-later
"""Which clients are told of when there are too many; tests/test_listener_clients.py has real ones."""

import math
import time
from dataclasses import dataclass, field
from ipaddress import ip_address

from udp_bench import udp_config

from qubes_fwd_qrexec.common.clientreport import CLIENTS_MAX
from qubes_fwd_qrexec.common.config import ListenerConfig
from qubes_fwd_qrexec.common.values import Binding, Proto
from qubes_fwd_qrexec.exposed.connected import clients


@dataclass
class Client:
    port: int
    address: str = "192.0.2.1"
    moved_at: float = 0.0
    since: float = 0.0
    sent: int = 1
    received: int = 2
    ends_at: float = math.inf

    @property
    def peer(self) -> Binding:
        return ip_address(self.address), self.port


@dataclass
class Forward:
    live: list[Client]
    config: ListenerConfig = field(default_factory=udp_config)


def test_those_that_moved_last_come_first_and_the_rest_is_counted() -> None:
    first = Forward([Client(1, moved_at=10), Client(2, moved_at=30), Client(3, moved_at=20)])
    second, closed = Forward([Client(4, moved_at=25)]), Forward([Client(5, moved_at=5)])
    told, left_out = clients([first, second], [closed], 4)
    assert [client.port for client in told] == [2, 4, 3, 1]
    assert left_out == 1


def test_a_zone_that_cannot_be_said_is_left_out() -> None:
    told, _ = clients([Forward([Client(1, "fe80::1%eth0", 2), Client(2, "fe80::1%a b", 1)])], [])
    assert [str(client.address) for client in told] == ["fe80::1%eth0", "fe80::1"]


def test_nobody_is_nobody() -> None:
    assert clients([], []) == ((), 0)


def test_no_more_are_told_than_one_answer_may_have() -> None:
    many = Forward([Client(port) for port in range(1, CLIENTS_MAX + 11)])
    told, left_out = clients([many], [])
    assert (len(told), left_out) == (CLIENTS_MAX, 10)


def test_times_are_of_the_wall_clock_and_in_whole_seconds() -> None:
    client = Forward([Client(1, since=900.0, moved_at=992.5)])
    earliest = int(time.time()) - 100
    (told,), _ = clients([client], [], clock=lambda: 1000.0)
    assert earliest <= told.since <= time.time() - 100
    assert (told.idle_s, told.sent, told.received, told.proto) == (7, 1, 2, Proto.UDP)


def test_what_may_only_finish_is_said_to_drain() -> None:
    still_open = Forward([Client(1, moved_at=2), Client(2, moved_at=1, ends_at=99)])
    told, _ = clients([still_open], [Forward([Client(3)])])
    assert [client.is_draining for client in told] == [False, True, True]


def test_bytes_that_move_meanwhile_make_nobody_idle_for_less_than_nothing() -> None:
    (told,), _ = clients([Forward([Client(1, moved_at=7.0)])], [], clock=lambda: 6.0)
    assert told.idle_s == 0
