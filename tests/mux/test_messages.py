# SPDX-License-Identifier: GPL-2.0-or-later
from ipaddress import IPv6Address, ip_address

import pytest

from qubes_fwd_qrexec.common.errors import LocalProtocolError
from qubes_fwd_qrexec.mux.limits import MAX_LEASE_S, MAX_STREAMS, MAX_WINDOW_BYTES, MIN_WINDOW_BYTES
from qubes_fwd_qrexec.mux.messages import REFUSAL_WHILE_DRAINING, Goaway, GoawayCode, Hello, Origin, Role

from .helpers import hello

V4 = ip_address("192.0.2.1")


def test_streams_and_lease_say_which_side_speaks():
    assert hello("listener").role is Role.LISTENER
    assert hello("target").role is Role.TARGET


def test_every_version_that_fits_may_be_offered():
    assert hello("target", max_version=0xFFFF).max_version == 0xFFFF


@pytest.mark.parametrize(
    "changes",
    [
        {"min_version": 0},
        {"min_version": 3},
        {"max_version": 65536},
        {"window_bytes": -1},
        {"window_bytes": 1},
        {"window_bytes": MIN_WINDOW_BYTES - 1},
        {"window_bytes": MAX_WINDOW_BYTES + 1},
        {"max_streams": 0},
        {"max_streams": MAX_STREAMS + 1},
        {"lease_s": 0},
        {"lease_s": MAX_LEASE_S + 1},
        {"lease_s": -1},
        {"nonce": b"short"},
    ],
)
def test_an_invalid_hello_cannot_be_made(changes):
    with pytest.raises(LocalProtocolError):
        hello("target", **changes)


def test_a_window_of_0_is_that_of_a_datagram_call():
    assert Hello(0, b"n" * 16).is_of_datagrams
    assert not hello("listener").is_of_datagrams
    assert Hello(0, b"n" * 16, max_streams=1, lease_s=1).role is Role.TARGET
    assert Hello(0, b"n" * 16).role is Role.LISTENER


@pytest.mark.parametrize("window", [MIN_WINDOW_BYTES, MAX_WINDOW_BYTES])
def test_the_bounds_of_a_window_are_inside(window):
    assert Hello(window, b"n" * 16).window_bytes == window


def test_an_origin_is_ipv4_where_it_was_mapped_and_has_no_scope():
    origin = Origin(ip_address("::ffff:192.0.2.1"), 1, ip_address("fe80::1%eth0"), 2)
    assert origin == Origin(V4, 1, IPv6Address("fe80::1"), 2)
    assert str(origin.exposed) == "fe80::1"


def test_the_first_and_the_last_port_are_inside():
    assert Origin(V4, 0, V4, 65535) != Origin(V4, 65535, V4, 0)


@pytest.mark.parametrize("ports", [(-1, 0), (65536, 0), (0, -1), (0, 65536)])
def test_an_origin_has_ports_that_can_be(ports):
    with pytest.raises(LocalProtocolError, match="0 to 65535"):
        Origin(V4, ports[0], V4, ports[1])


@pytest.mark.parametrize("code", GoawayCode)
def test_only_some_codes_begin_a_drain(code):
    assert Goaway(1, code, is_final=True).code is code
    if code in REFUSAL_WHILE_DRAINING:
        assert not Goaway(1, code, is_final=False).is_final
    else:
        with pytest.raises(LocalProtocolError, match=code.name):
            Goaway(1, code, is_final=False)
