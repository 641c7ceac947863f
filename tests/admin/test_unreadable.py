# SPDX-License-Identifier: GPL-2.0-or-later
"""One qube that cannot be read: nothing opens in doubt for it, the rest is closed and shown, it is named."""

from typing import Any

import pytest
from fake_admin import FakeQubes, empty_answer
from faulty import allowed
from worlds import ADD, Command

from qubes_fwd_qrexec.admin.qubes.store import QubesStore
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.store import LabStore


def fail(qubesd: FakeQubes, qube: str, method: str, arg: str | None = None) -> None:
    """Calls whose names begin so fail within qubesd from now on."""

    def refuse(called: Any) -> None:
        if called.dest == qube and called.method.startswith(method) and arg in (None, called.arg):
            raise empty_answer()

    qubesd.fails = refuse


@pytest.fixture
def qubes(dom0: FakeQubes) -> FakeQubes:
    return dom0


@pytest.fixture
def run(qubes: FakeQubes, over: Command) -> Command:
    return lambda *argv: over(QubesStore(qubes.root), *argv)


@pytest.mark.parametrize("method", ["admin.vm.property.Get", "admin.vm.tag.List", "admin.vm.feature.List"])
def test_another_qube_that_cannot_be_read_keeps_nothing_from_closing(
    run: Command, qubes: FakeQubes, lab: LabDirectory, method: str
) -> None:
    run(*ADD)
    fail(qubes, "vault", method)
    result = run("remove", "work", "web")
    assert (result.status, allowed(lab), lab.vm_config("sys-net")) == (0, frozenset(), {})
    assert result.out == "Forward work web is removed and closed.\n"
    assert result.err.count("at vault: ") == 1


def test_apply_does_not_say_of_what_it_could_not_read_that_it_is_as_the_rules_ask_for(
    run: Command, qubes: FakeQubes
) -> None:
    run(*ADD)
    fail(qubes, "vault", "admin.vm.feature.List")
    for result in (run("apply"), run("apply", "--dry-run")):
        assert result.status == 1
        assert result.out == "Nothing to change: what could be read is as the rules ask for.\n"


def test_its_own_forwards_are_closed_and_shown_as_refused(
    run: Command, qubes: FakeQubes, lab: LabDirectory
) -> None:
    run(*ADD)
    run("add", "vault", "81", "--from", "any", "--via", "sys-net")
    fail(qubes, "vault", "admin.vm.property.Get")
    assert run("apply").status == 1
    assert len(allowed(lab)) == 1
    shown = {
        entry["qube"]: (entry["state"], entry["cause"]) for entry in run("list", "--json").json["forwards"]
    }
    assert shown == {"work": ("active", "open"), "vault": ("refused", "unreadable-qube")}
    assert run("add", "vault", "82", "--from", "any", "--via", "sys-net").status == 1


@pytest.mark.parametrize("unread", ["sys-net", "sys-firewall", "fedora-42"])
def test_a_qube_on_the_way_or_a_template_is_needed_too(
    run: Command, qubes: FakeQubes, lab: LabDirectory, unread: str
) -> None:
    run(*ADD)
    unread = lab.qube("work").template or unread if unread == "fedora-42" else unread
    fail(qubes, unread, "admin.vm.property.Get")
    run("apply")
    assert (allowed(lab), lab.vm_config("sys-net")) == (frozenset(), {})


def test_a_rule_that_cannot_be_read_closes_what_else_its_qube_has(
    run: Command, qubes: FakeQubes, lab: LabDirectory
) -> None:
    run(*ADD)
    run("add", "work", "81", "--from", "any", "--name", "odd")
    fail(qubes, "work", "admin.vm.feature.Get", "forward.odd")
    result = run("apply")
    assert (result.status, allowed(lab), lab.vm_config("sys-net")) == (1, frozenset(), {})
    assert "admin.vm.feature.Get+forward.odd at work: " in result.err


def test_a_qubesd_that_is_gone_closes_nothing(run: Command, qubes: FakeQubes, lab: LabDirectory) -> None:
    run(*ADD)

    def refuse(called: Any) -> None:
        if called.dest == "vault" or any(call.dest == "vault" for call in qubes.calls):
            raise empty_answer()

    qubes.fails = refuse
    assert run("apply").status == 1
    assert len(allowed(lab)) == 1


def test_a_qube_whose_mark_cannot_be_read_is_unknown(
    run: Command, qubes: FakeQubes, lab: LabDirectory
) -> None:
    run(*ADD)
    lab.set_feature("sys-firewall", "forward.tunnel", "")
    fail(qubes, "sys-firewall", "admin.vm.feature.Get", "forward.tunnel")
    run("apply")
    assert allowed(lab) == frozenset()
    assert QubeName("sys-firewall") in QubesStore().inventory().qubes


@pytest.mark.parametrize("where", ["features/forward.bad", "features", "qube.json"])
def test_in_a_lab_it_keeps_nothing_from_closing_either(over: Command, lab: LabDirectory, where: str) -> None:
    store = LabStore(lab)
    over(store, *ADD)
    path = lab.qube_dir("vault").root / where
    if path.is_file():
        path.write_text("{")
    elif path.is_dir():
        path.rename(path.with_name("elsewhere"))
        path.write_text("no directory")
    else:
        path.mkdir()
    shown = over(store, "list")
    assert (shown.status, " active " in shown.out) == (0, True)
    result = over(store, "remove", "work", "web")
    assert (result.status, allowed(lab), lab.vm_config("sys-net")) == (0, frozenset(), {})
    assert "/qubes/vault/" in result.err
    assert over(store, "panic").out.startswith("Everything is closed and held")
