# SPDX-License-Identifier: GPL-2.0-or-later
from ipaddress import ip_address

from qubes_fwd_qrexec.system.interfaces import interface_addresses


def test_the_loopback_has_its_two_addresses() -> None:
    assert interface_addresses("lo") == (ip_address("127.0.0.1"), ip_address("::1"))


def test_what_is_no_interface_has_none() -> None:
    assert interface_addresses("nosuch0") == ()
