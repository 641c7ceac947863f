# SPDX-License-Identifier: GPL-2.0-or-later
"""A forward that is held back and comes back by itself: nobody gets its port meanwhile, nor loses his own."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from worlds import ADD, Command, content, rule

from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.values import QubeName

FIRST = ("add", "personal", "80", "--from", "any", "--name", "a")
WAITS = (
    "Rule personal a is {} now, and comes back to port 80 of sys-net by itself as soon as it may; take "
    "another port or listen address, or remove or disable that rule."
)


def set_netvm(lab: LabDirectory, name: str, netvm: str | None) -> None:
    lab.write_qube(replace(lab.qube(name), netvm=None if netvm is None else QubeName(netvm)))


def suspend(forward: Command, lab: LabDirectory) -> None:
    set_netvm(lab, "personal", None)


def elsewhere(forward: Command, lab: LabDirectory) -> None:
    set_netvm(lab, "personal", "sys-vpn")


def follow(forward: Command, lab: LabDirectory) -> None:
    forward("set", "personal", "a", "follow-netvm=yes")
    set_netvm(lab, "personal", None)


def name_it(forward: Command, lab: LabDirectory) -> None:
    forward("set", "personal", "a", "via=sys-net")
    set_netvm(lab, "personal", None)


def mark(forward: Command, lab: LabDirectory) -> None:
    lab.set_feature("personal", "forward.tunnel", "1")


def dangle(forward: Command, lab: LabDirectory) -> None:
    set_netvm(lab, "personal", "gone")


HELD: list[tuple[Callable[[Command, LabDirectory], None], str]] = [
    (suspend, "suspended"),
    (elsewhere, "suspended"),
    (follow, "refused"),
    (name_it, "suspended"),
    (mark, "refused"),
    (dangle, "refused"),
]


@pytest.mark.parametrize(("hold", "state"), HELD)
def test_the_port_of_a_forward_that_comes_back_by_itself_is_not_free(
    forward: Command, lab: LabDirectory, hold: Callable[[Command, LabDirectory], None], state: str
) -> None:
    forward(*FIRST)
    hold(forward, lab)
    forward("apply")
    assert lab.vm_config("sys-net") == {}
    before = content(lab)
    result = forward(*ADD)
    assert (result.status, result.out) == (1, "")
    assert f"work web was not added. {WAITS.format(state)}" in result.err
    assert content(lab) == before
    result = forward("import", stdin="work web action=forward srcports=80 srchosts=any\n")
    assert f"nothing was imported, as work web would be in conflict. {WAITS.format(state)}" in result.err
    assert content(lab) == before
    assert forward(*ADD, "--disabled").status == 0
    assert f"work web was not enabled. {WAITS.format(state)}" in forward("enable", "work", "web").err
    assert forward("set", "work", "web", "srcports=81", "dstports=81", "enabled=yes").status == 0
    result = forward("set", "work", "web", "srcports=80", "dstports=80")
    assert f"work web was not changed. {WAITS.format(state)}" in result.err
    assert forward("disable", "personal", "a").status == 0
    assert forward("set", "work", "web", "srcports=80", "dstports=80").status == 0


def test_who_comes_back_only_when_somebody_says_so_holds_nothing(forward: Command, lab: LabDirectory) -> None:
    """Disposables and clones have rules of others, and there may be any number of them."""
    lab.set_feature("personal", "forward.a", str(rule("owner=office", target="personal").rule))
    lab.set_feature("personal", "forward.b", str(rule("expire=1", target="personal").rule))
    lab.set_feature("personal", "forward.c", str(rule("enabled=no", target="personal").rule))
    assert forward(*ADD).status == 0


@pytest.mark.parametrize("argv", [("enable", "personal", "a"), ("set", "personal", "a", "enabled=yes")])
def test_one_that_is_held_back_itself_does_not_get_in_line_for_a_port_that_is_taken(
    forward: Command, lab: LabDirectory, argv: tuple[str, ...]
) -> None:
    forward(*FIRST, "--disabled")
    forward(*ADD)
    suspend(forward, lab)
    result = forward(*argv)
    assert result.status == 1
    assert (
        "Rule work web has port 80 of sys-net, to which this one would come back by itself, as it is only "
        "suspended; take another port"
    ) in result.err


def test_two_rules_of_one_target_for_different_ways_take_turns(forward: Command, lab: LabDirectory) -> None:
    """Refusing that would make it impossible to have a forward with and without a VPN, each agreed to."""
    forward(*ADD)
    set_netvm(lab, "work", "sys-net")
    assert forward("add", "work", "80:8080", "--from", "10.0.0.0/8", "--name", "near").status == 0
    assert [entry["state"] for entry in forward("list", "--json").json["forwards"]] == ["active", "suspended"]
    set_netvm(lab, "work", "sys-firewall")
    assert forward("apply").status == 0
    assert [entry["state"] for entry in forward("list", "--json").json["forwards"]] == ["suspended", "active"]
    assert "follow-netvm" not in lab.features("work")["forward.near"]
    result = forward("set", "work", "near", "follow-netvm=yes")
    assert "Rule work web has port 80 of sys-net already" in result.err


def test_what_met_before_hinders_no_other_change(forward: Command, lab: LabDirectory) -> None:
    forward(*FIRST)
    suspend(forward, lab)
    lab.set_feature("work", "forward.web", str(rule("path=sys-firewall,sys-net").rule))
    assert forward("set", "work", "web", "comment=x").status == 0
    assert forward("set", "personal", "a", "comment=x").status == 0
    text = forward("export").out
    assert forward("import", stdin=text).status == 0


def test_an_exact_import_may_have_what_there_was_where_it_comes_from(
    forward: Command, lab: LabDirectory
) -> None:
    text = "version 2\n" + "".join(
        f"{line}\n"
        for line in (
            f"personal a {rule('path=sys-vpn,sys-firewall,sys-net', target='personal').rule}",
            f"work web {rule('path=sys-firewall,sys-net').rule}",
        )
    )
    assert forward("import", stdin=text).status == 0


def test_what_is_open_stays_open_when_another_one_comes_back(forward: Command, lab: LabDirectory) -> None:
    """Both claim the port by then: nobody refuses what Qubes itself does, and what was stored by hand."""
    forward(*FIRST)
    suspend(forward, lab)
    forward("apply")
    lab.set_feature("work", "forward.web", str(rule("path=sys-firewall,sys-net").rule))
    assert forward("apply").status == 0
    assert lab.vm_config("sys-net").keys() == {"fwd.work.web"}
    set_netvm(lab, "personal", "sys-firewall")
    opened = content(lab)
    for command in (("list",), ("plan",), ("apply", "--dry-run"), ("apply",)):
        assert "Rule work web has port 80 of sys-net already" in "".join(forward(*command)[1:])
    assert content(lab) == opened
    forward("disable", "work", "web")
    assert lab.vm_config("sys-net").keys() == {"fwd.personal.a"}
