# SPDX-License-Identifier: GPL-2.0-or-later
"""An enabled rule claims its ports while it is held back too, and nobody else gets them meanwhile."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from worlds import ADD, Command, content, rule

from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.lab.directory import LabDirectory

FIRST = ("add", "personal", "80", "--from", "any", "--name", "a")
TAKEN = (
    "Rule personal a already has port 80 of sys-net; choose another port or listen address, or remove or "
    "disable that rule."
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


@pytest.mark.parametrize("hold", [suspend, elsewhere, follow, name_it, mark, dangle])
def test_the_port_of_a_forward_that_comes_back_by_itself_is_not_free(
    forward: Command, lab: LabDirectory, hold: Callable[[Command, LabDirectory], None]
) -> None:
    forward(*FIRST)
    hold(forward, lab)
    forward("apply")
    assert lab.vm_config("sys-net") == {}
    before = content(lab)
    result = forward(*ADD)
    assert (result.status, result.out) == (1, "")
    assert f"work web was not added. {TAKEN}" in result.err
    assert content(lab) == before
    result = forward("import", stdin="work web action=forward srcports=80 srchosts=any\n")
    assert f"work web was not imported, nor was anything else. {TAKEN}" in result.err
    assert content(lab) == before
    assert forward(*ADD, "--disabled").status == 0
    assert f"work web was not enabled. {TAKEN}" in forward("enable", "work", "web").err
    assert forward("set", "work", "web", "srcports=81", "dstports=81", "enabled=yes").status == 0
    result = forward("set", "work", "web", "srcports=80", "dstports=80")
    assert f"work web was not changed. {TAKEN}" in result.err
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
    assert "Rule work web already has port 80 of sys-net; choose another port" in result.err


def test_a_rule_for_another_way_does_not_get_the_port_either(forward: Command, lab: LabDirectory) -> None:
    forward(*ADD)
    set_netvm(lab, "work", "sys-net")
    result = forward("add", "work", "80:8080", "--from", "10.0.0.0/8", "--name", "near")
    assert "work near was not added. Rule work web already has port 80 of sys-net" in result.err


def test_what_met_before_hinders_no_other_change(forward: Command, lab: LabDirectory) -> None:
    forward(*FIRST)
    suspend(forward, lab)
    lab.set_feature("work", "forward.web", str(rule("path=sys-firewall,sys-net").rule))
    assert forward("set", "work", "web", "comment=x").status == 0
    assert forward("set", "personal", "a", "comment=x").status == 0
    text = forward("export").out
    assert forward("import", stdin=text).status == 0


def test_of_two_that_qubes_tools_brought_together_the_first_by_name_has_the_port(
    forward: Command, lab: LabDirectory
) -> None:
    """Nobody refuses what Qubes itself does, nor what was stored by hand."""
    forward(*FIRST)
    suspend(forward, lab)
    lab.set_feature("work", "forward.web", str(rule("path=sys-firewall,sys-net").rule))
    assert forward("apply").status == 1
    assert lab.vm_config("sys-net") == {}
    set_netvm(lab, "personal", "sys-firewall")
    forward("apply")
    assert lab.vm_config("sys-net").keys() == {"fwd.personal.a"}
    opened = content(lab)
    for command in (("list",), ("plan",), ("apply", "--dry-run"), ("apply",)):
        assert "Rule personal a already has port 80 of sys-net" in "".join(forward(*command)[1:])
    assert content(lab) == opened
    forward("disable", "personal", "a")
    assert lab.vm_config("sys-net").keys() == {"fwd.work.web"}


DISABLED = [
    ("via=gone", "There is no qube gone to listen"),
    ("via=dom0", "dom0 is the administrative qube"),
    ("via=fedora-42", "fedora-42 is a template"),
    ("via=work", "work cannot listen for itself"),
    ("owner=personal", "owner"),
    ("path=gone,sys-net", "path"),
]


@pytest.mark.parametrize(("option", "words"), DISABLED)
@pytest.mark.parametrize("enabled", ["yes", "no"])
def test_nonsense_is_refused_for_a_disabled_rule_too(
    forward: Command, lab: LabDirectory, option: str, words: str, enabled: str
) -> None:
    forward(*ADD, *([] if enabled == "yes" else ["--disabled"]))
    before = content(lab)
    result = forward("set", "work", "web", option)
    assert result.status in (1, 2)
    assert words in result.err
    assert content(lab) == before


def test_a_refused_rule_may_be_changed_where_that_makes_it_no_worse_and_disabled(
    forward: Command, lab: LabDirectory
) -> None:
    forward(*ADD)
    mark_firewall = ("tunnel", "mark", "sys-firewall")
    forward(*mark_firewall)
    assert forward("set", "work", "web", "comment=x").status == 0
    assert forward("disable", "work", "web").status == 0
    assert forward("set", "work", "web", "comment=y").status == 0
    assert "work web was not enabled. work is behind a tunnel" in forward("enable", "work", "web").err
