# SPDX-License-Identifier: GPL-2.0-or-later
"""The way of a forward as text: from left to right, from top to bottom, open and closed."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import NOW, OURS, qube, rule, world

from qubes_fwd_qrexec.admin import policy
from qubes_fwd_qrexec.admin.backend import NEW, PolicyFile
from qubes_fwd_qrexec.admin.inventory import Inventory
from qubes_fwd_qrexec.admin.plan import plan
from qubes_fwd_qrexec.admin.states import Verdict
from qubes_fwd_qrexec.admin.views.picture import picture
from qubes_fwd_qrexec.admin.views.showing import all_findings
from qubes_fwd_qrexec.common.rules import NamedRule


def drawn(
    named: NamedRule,
    width: int | None = None,
    inventory: Inventory | None = None,
    *,
    installed: str | None = None,
) -> str:
    inventory = inventory or world()
    planned = plan([named], inventory, NOW)
    text = policy.text(planned) if installed is None else installed
    (forward,) = planned
    found = all_findings(forward, planned, PolicyFile(text, NEW), NOW)
    is_allowed = found[-1].verdict is not Verdict.STOPS
    return picture(forward, inventory, is_allowed=is_allowed, width=width)


WEB = rule("dstports=8080 srchosts=192.168.0.0/16")
WIDE = """\
  +----------------+          +---------+        +----------------+
  | LAN            |  outer   | sys-net |  mux   | work           |
  | 192.168.0.0/16 | -------> | port 80 | =====> | 127.0.0.1:8080 |
  +----------------+          +---------+        +----------------+
"""
NARROW = """\
  LAN, 192.168.0.0/16
    | outer
    v
  sys-net, port 80
    # mux
    v
  work, 127.0.0.1:8080
"""


def test_the_way_of_an_open_forward() -> None:
    # The sys-net of a real system provides network.
    assert drawn(WEB) == drawn(WEB, 67) == WIDE
    assert drawn(WEB, 66) == NARROW


@pytest.mark.parametrize(("proto", "port"), [("udp", "udp port 80"), ("both", "tcp+udp ports 80-81")])
def test_what_is_more_than_tcp_is_named(proto: str, port: str) -> None:
    ports = "80-81" if "ports" in port else "80"
    drawing = drawn(rule(f"proto={proto} srcports={ports}"))
    assert f"| {port} |" in drawing
    assert " mux " in drawing


def test_qubes_are_shown_by_name() -> None:
    named = rule("srchosts=10.138.0.0/16,personal,@tag:games forwardtype=internal")
    assert drawn(named, 60).startswith("  qubes, 10.138.0.0/16, personal, @tag:games\n")


def test_a_closed_forward_is_cut_and_says_why() -> None:
    closed = rule("dstports=8080 enabled=no")
    assert drawn(closed) == (
        "  +---------+          +---------+             +----------------+\n"
        "  | LAN     |  outer   | sys-net |  disabled   | work           |\n"
        "  | anybody | ---X---> | port 80 | =====X====> | 127.0.0.1:8080 |\n"
        "  +---------+          +---------+             +----------------+\n"
    )
    assert "    # disabled\n    X\n" in drawn(closed, 30)


def test_at_a_loopback_address_the_clients_are_in_the_exposed_qube() -> None:
    local = rule("dstports=8080 srchosts=127.0.0.1 listen=127.0.0.1")
    assert drawn(local) == (
        "  +--------------+             +-----------+        +----------------+\n"
        "  | sys-net      |  loopback   | sys-net   |  mux   | work           |\n"
        "  | 127.0.0.1/32 | ----------> | 127.0.0.1 | =====> | 127.0.0.1:8080 |\n"
        "  |              |             | port 80   |        |                |\n"
        "  +--------------+             +-----------+        +----------------+\n"
    )


def test_without_policy_the_call_is_cut_and_the_port_open() -> None:
    lines = drawn(WEB, installed="").splitlines()
    assert "sys-net |  no policy" in lines[1]
    assert "---> | port 80 | =====X=====> |" in lines[2]


@pytest.mark.parametrize(
    ("name", "row"),
    [("sys-net", "---X---> | port 80 | ==X==> |"), ("work", "---> | port 80 | ==X==> |")],
)
def test_a_halted_qube_says_so_and_cuts_what_needs_it(name: str, row: str) -> None:
    known = world().qubes[next(key for key in world().qubes if key == name)]
    text = drawn(WEB, inventory=world(known._replace(is_running=False)))
    assert row in text
    assert "| halted " in text


def test_a_target_that_is_started_by_connections_is_reached() -> None:
    halted = world(qube("work", "sys-firewall", features=OURS, is_running=False))
    assert "X" not in drawn(rule("autostart=yes"), inventory=halted)


def test_who_connects_and_where_it_listens() -> None:
    text = drawn(rule("forwardtype=internal listen=10.137.0.6 srcports=80-82"))
    assert "| qubes " in text
    assert "  vifs   " in text
    assert "| 10.137.0.6 " in text
    assert "| ports 80-82 " in text
    assert "| clients " in drawn(rule("via=personal"))


def test_a_rule_without_exposed_qube_is_drawn_too() -> None:
    text = drawn(rule(target="vault"))
    assert "| no qube |  refused " in text
    assert "| gone " in drawn(rule("via=gone"))


def test_many_networks_are_counted() -> None:
    networks = ",".join(f"10.{n}.0.0/16" for n in range(9))
    text = drawn(rule(f"srchosts={networks}"))
    assert "| 10.3.0.0/16 |" in text
    assert "10.4.0.0" not in text
    assert "| and 5 more " in text


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 120), st.sampled_from(["", "listen=2001:db8:ffff:ffff:ffff:ffff:ffff:ffff"]))
def test_it_is_ascii_and_never_wider_than_the_terminal(width: int, more: str) -> None:
    text = drawn(rule(f"srcports=60000-60010 {more}", name="a", target="work"), width)
    assert all(c == "\n" or " " <= c <= "~" for c in text)
    assert max(map(len, text.splitlines())) <= max(width, 24)
