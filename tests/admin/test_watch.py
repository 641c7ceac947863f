# SPDX-License-Identifier: GPL-2.0-or-later
"""The loop of `watch` makes true what the rules ask for, after each change."""

import json
import shutil
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import pairwise

import pytest
import schema
from stages import END, Played, Stage, set_netvm
from worlds import NOW, rule

from qubes_fwd_qrexec.admin import policy
from qubes_fwd_qrexec.admin.backend import Changes
from qubes_fwd_qrexec.admin.inventory import Inventory
from qubes_fwd_qrexec.admin.plan import plan
from qubes_fwd_qrexec.admin.snapshot import look
from qubes_fwd_qrexec.admin.views.applying import differing
from qubes_fwd_qrexec.admin.watch import BURST_S, QUIET_S
from qubes_fwd_qrexec.common.rules import BrokenRule
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.lab.qube import QubeState


def test_it_applies_when_it_starts(stage: Stage) -> None:
    assert not stage.is_open
    stage.run()
    assert stage.is_open


def test_a_netvm_that_changes_closes_the_forward_and_says_so(stage: Stage) -> None:
    stage.run(lambda: set_netvm(stage.lab))
    assert not stage.is_open
    lines = stage.out.getvalue().splitlines()
    assert lines[0].startswith("policy: from now on qubes.ForwardTCP +8080+mux sys-net work allow")
    assert lines[1].startswith("sys-net: listen for fwd.work.web: ")
    assert lines[2].startswith(
        "work web was active and is suspended. The netvms of work were sys-firewall - "
    )
    assert lines[3].startswith("policy: no longer qubes.ForwardTCP +8080+mux sys-net work allow")
    assert lines[-1] == "sys-net: stop listening for fwd.work.web"
    assert stage.err.getvalue() == ""


def test_it_settles_after_one_more_look(stage: Stage) -> None:
    stage.run(lambda: set_netvm(stage.lab), lambda: set_netvm(stage.lab, "sys-firewall"))
    assert stage.is_open
    assert stage.looks == [0, 0, 1, 1, 2, 2]


def test_a_burst_is_one_reconciliation(stage: Stage) -> None:
    def burst() -> None:
        for _ in range(25):
            set_netvm(stage.lab)
            set_netvm(stage.lab, "sys-firewall")

    stage.run(burst)
    assert stage.looks == [0, 0, 1]
    assert stage.out.getvalue().count("\n") == 2  # what it did when it started


def test_news_that_never_ends_is_cut_short(stage: Stage) -> None:
    looked_after_s: list[float] = []
    waited_s: list[float] = []
    inventory = stage.inventory

    class Endless(Played):
        def wait(self, timeout_s: float | None) -> bool:
            assert timeout_s is not None
            if timeout_s > QUIET_S:
                waited_s.clear()
            else:
                assert sum(waited_s) + timeout_s <= BURST_S + 0.001
                waited_s.append(0.15)
                stage.hands.pass_by(0.15)
            return True

    def look(*, with_config: bool = True) -> Inventory:
        looked_after_s.append(stage.hands.elapsed)
        if len(looked_after_s) == 4:
            END()
        return inventory()

    stage.inventory = look  # type: ignore[method-assign]
    stage.changes = lambda wakers=(): FakeContext(Endless(stage, None))  # type: ignore[method-assign, assignment, arg-type]
    stage.run()
    gaps = [later - earlier for earlier, later in pairwise(looked_after_s)]
    assert all(BURST_S <= gap <= BURST_S + 0.15 for gap in gaps)


class FakeContext(AbstractContextManager[Changes]):
    def __init__(self, changes: Changes) -> None:
        self._changes = changes

    def __enter__(self) -> Changes:
        return self._changes

    def __exit__(self, *_: object) -> None:
        pass


def test_a_policy_file_that_somebody_edits_is_written_again(stage: Stage) -> None:
    path = stage.lab.policy_dir / f"{policy.NAME}.policy"
    stage.run(lambda: path.write_text("* * @anyvm @anyvm allow\n"))
    assert stage.is_open
    assert path.read_text() == policy.text(plan_of(stage))


def plan_of(stage: Stage) -> object:
    return look(stage).plan(NOW)


def test_listeners_that_somebody_else_configured_are_removed(stage: Stage) -> None:
    stage.run(lambda: stage.lab.set_feature("personal", "vm-config.fwd.old.rule", "x"))
    assert "vm-config.fwd.old.rule" not in stage.lab.features("personal")


def test_what_was_left_half_done_is_finished(stage: Stage) -> None:
    stage.run()
    path = stage.lab.policy_dir / f"{policy.NAME}.policy"
    path.unlink()  # closed, and killed before the listener was told
    set_netvm(stage.lab)
    stage.run()
    assert not stage.is_open


def test_each_rule_that_comes_goes_or_changes_is_told(stage: Stage) -> None:
    inventory = stage.inventory()
    same, moved = (rule(f"srcports={port}", name="same") for port in (81, 84))
    broken = BrokenRule(QubeName("work"), "gone", "text", "cannot be read")
    before = plan([rule(), rule("srcports=82", name="gone"), same], inventory, NOW)
    after = plan([rule("enabled=no"), rule("srcports=83", name="new"), moved], inventory, NOW)
    gone, new, changed = differing(before, after)
    assert gone == "work gone is no longer there"
    assert new.startswith("work new is new, and active. Connections to port 83 ")
    assert changed.startswith("work web was active and is disabled. 'qvm-forward enable")
    (unreadable,) = differing(before, replace(before, broken=(broken,)))
    assert unreadable == "work gone was active and is broken. cannot be read."


def test_json_has_one_object_a_line(stage: Stage) -> None:
    stage.run(lambda: set_netvm(stage.lab), is_json=True)
    schema.check(["watch", "--json"], stage.out.getvalue())
    opened, closed = map(json.loads, stage.out.getvalue().splitlines())
    assert [step["step"] for step in opened["steps"]] == ["open-policy", "set-config"]
    assert [step["step"] for step in closed["steps"]] == ["close-policy", "revoke", "remove-config"]
    assert closed["time"] == NOW
    assert closed["problems"] == []
    (news,) = closed["news"]
    assert news.startswith("work web was active and is suspended.")


def test_a_target_that_starts_when_its_rule_is_gone_is_told_that_nothing_is_allowed(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, str]] = []

    def ask(qube: QubeName, service: str, max_bytes: int, timeout_s: float | None, given: str) -> bytes:
        if qube == "work":
            told.append((qube, given))
        return b"version=1 ended=0 draining=0\n"

    monkeypatch.setattr(stage, "ask", ask)
    stage.run(
        lambda: stage.lab.set_state("work", QubeState.HALTED),
        lambda: stage.remove_feature(QubeName("work"), "forward.web"),
        lambda: stage.lab.set_state("work", QubeState.RUNNING),
    )
    first, *_, last = told
    assert first == ("work", "version=1 drains=keep\nkeep 8080-8080 sys-net\n")
    assert last == ("work", "version=1 drains=keep\n")


def test_qubes_that_are_let_in_by_name_are_followed(stage: Stage) -> None:
    """Their addresses, netvms, tags and names, as they change."""
    lab, told = stage.lab, list[str | None]()
    line = "action=forward forwardtype=internal srcports=81 srchosts=personal,@tag:games owner=work"
    lab.set_feature("work", "forward.wiki", line)

    def then(name: str, **more: object) -> None:
        value = lab.features("sys-firewall").get("vm-config.fwd.work.wiki")
        told.append(value and value.partition("srchosts=")[2])
        lab.write_qube(replace(lab.qube(name), **more))  # type: ignore[arg-type]

    stage.run(
        lambda: then("personal", ip="10.137.0.77", ip6=None),
        lambda: then("untrusted", tags=("games",), netvm=QubeName("sys-firewall"), ip6=None),
        lambda: then("untrusted", tags=()),
        lambda: then("personal", netvm=QubeName("sys-net")),
        lambda: then("personal", netvm=QubeName("sys-firewall")),
        lambda: (then("personal"), shutil.rmtree(lab.qube_dir("personal").root)),
        lambda: then("work"),
    )
    assert told == [
        "10.137.0.11/32,fd09:24ef:4179::a89:b/128",
        "10.137.0.77/32",
        "10.137.0.13/32,10.137.0.77/32",
        "10.137.0.77/32",
        None,
        "10.137.0.77/32",
        None,
    ]
    assert "work wiki was active and is refused. Nobody may connect" in stage.out.getvalue()
    assert stage.is_open
