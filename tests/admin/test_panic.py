# SPDX-License-Identifier: GPL-2.0-or-later
"""The command panic: everything closed whatever is wrong, in order, and what is said of what failed."""

from typing import Any

import pytest
from faulty import CONTESTED, EVERYTHING, REVOKE, Faulty, Panic, allowed, due
from worlds import NOW, Command, content

from qubes_fwd_qrexec.admin import policy
from qubes_fwd_qrexec.errors import StoreError
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.qube import QubeState


def test_policy_is_closed_before_the_lock_then_tunnels_rules_and_listeners(
    opened: LabDirectory, panic: Panic
) -> None:
    backend = Faulty(opened)
    assert panic(backend).status == 0
    assert backend.log == EVERYTHING


def test_everything_is_closed_and_the_rules_are_kept(forward: Command, opened: LabDirectory) -> None:
    result = forward("panic")
    assert (result.status, result.err) == (0, "")
    assert result.out == (
        "Everything is closed: dom0 denies every forward, and no qube is told to listen.\n"
        "2 rules disabled and kept:\n  personal tcp-81\n  work web\n"
        "'qvm-forward enable QUBE NAME' opens one again.\n"
    )
    assert allowed(opened) == frozenset()
    assert opened.vm_config("sys-net") == {}
    states = {f["qube"]: f["state"] for f in forward("list", "--json").json["forwards"]}
    assert states == {"personal": "disabled", "work": "disabled"}
    assert forward("apply").out == "Nothing to change: all is as the rules ask for.\n"


def test_enable_opens_one_by_one_to_what_was(forward: Command, opened: LabDirectory) -> None:
    before = content(opened)
    forward("panic")
    assert forward("enable", "work", "web").status == 0
    assert len(allowed(opened)) == 1
    assert forward("enable", "personal", "tcp-81").status == 0
    assert content(opened) == before


def test_a_second_panic_finds_nothing_to_do(forward: Command, opened: LabDirectory) -> None:
    forward("panic")
    before = content(opened)
    assert forward("panic", "--json").json == {
        "is_closed": True,
        "is_held": False,
        "done": ["policy: deny every call", "read all qubes, to find rules and listeners"],
        "not_done": [],
        "notes": [],
        "open_still": [],
        "disabled": [],
        "broken": [],
    }
    assert content(opened) == before


def test_policy_is_closed_though_no_qube_can_be_read(opened: LabDirectory, panic: Panic) -> None:
    backend = Faulty(opened, "inventory")
    result = panic(backend)
    assert result.status == 1
    assert allowed(opened) == frozenset()
    assert REVOKE in backend.log
    assert result.out == (
        "NOT EVERYTHING IS CLOSED.\nDone: policy: deny every call.\n"
        "Done: work: end the tunnels of sys-net to port 8080.\n"
    )
    assert "not done: read all qubes, to find rules and listeners: cannot inventory" in result.err
    assert result.err.endswith("until 'qvm-forward panic' is through: say it again once that is mended\n")


def test_unreadable_features_close_policy_all_the_same(forward: Command, opened: LabDirectory) -> None:
    (opened.qube_dir("vault").features / "x").write_bytes(b"\xff")
    result = forward("panic")
    assert result.status == 1
    assert "not done: read all qubes" in result.err
    assert allowed(opened) == frozenset()


@pytest.mark.parametrize("text", ["\x00", "qubes.ForwardTCP * @anyvm @anyvm allow\n", "nonsense\n"])
def test_whatever_the_policy_file_says_it_is_replaced(
    forward: Command, opened: LabDirectory, text: str
) -> None:
    path = opened.policy_dir / "30-forward.policy"
    path.write_text(text)
    assert forward("panic").status == 0
    assert policy.is_same(path.read_text(), policy.text((), NOW))


def test_a_policy_file_that_cannot_be_read_is_replaced_and_noted(
    forward: Command, opened: LabDirectory
) -> None:
    (opened.policy_dir / "30-forward.policy").write_bytes(b"\xff\xfe")
    result = forward("panic")
    assert result.status == 0
    assert "note: what the policy allowed could not be read" in result.err
    assert allowed(opened) == frozenset()


REFUSALS = [
    ("policy", "not done: policy: deny every call: cannot policy 0"),
    ("set personal", "not done: personal tcp-81: disable the rule: cannot set"),
    ("call", "until another panic or 'qvm-forward apply' can end them, or 'qvm-shutdown work' does"),
    ("remove sys-net vm-config.fwd.personal", "not done: sys-net: stop listening for fwd.personal.tcp-81"),
    ("lock", "this went on without the lock: cannot lock"),
]


@pytest.mark.parametrize(("refused", "words"), REFUSALS)
def test_each_step_is_tried_though_another_fails(
    opened: LabDirectory, panic: Panic, refused: str, words: str
) -> None:
    backend = Faulty(opened, refused)
    result = panic(backend)
    assert words in result.err
    assert result.status == (0 if refused == "lock" else 1)
    # What failed is tried again when all else has been.
    entries = CONTESTED if refused == "lock" else EVERYTHING
    assert [*dict.fromkeys(backend.log)] == [*dict.fromkeys(entries)]


def test_what_fails_once_and_is_done_after_the_lock_has_not_failed(
    opened: LabDirectory, panic: Panic
) -> None:
    class Once(Faulty):
        def _do(self, entry: str) -> None:
            is_first = entry not in self.log
            super()._do(entry)
            if is_first and entry in ("policy 0", "inventory", REVOKE):
                raise StoreError("not yet")

    result = panic(Once(opened), "--json")
    assert (result.status, result.json["not_done"], allowed(opened)) == (0, [], frozenset())


def test_what_was_done_once_and_cannot_be_done_again_counts_if_it_is_found_closed(
    opened: LabDirectory, panic: Panic
) -> None:
    class Never(Faulty):
        def _do(self, entry: str) -> None:
            if entry == "policy 0" and entry in self.log:
                raise StoreError("not again")
            super()._do(entry)

    result = panic(Never(opened), "--json")
    assert (result.status, result.json["not_done"], allowed(opened)) == (0, [], frozenset())


def test_what_fails_twice_is_told_once(opened: LabDirectory, panic: Panic) -> None:
    data: Any = panic(Faulty(opened, "policy", "read", "call"), "--json").json
    assert [entry["what"] for entry in data["not_done"]] == [
        "policy: deny every call",
        "work: end the tunnels of sys-net to port 8080",
    ]
    assert data["notes"] == ["what the policy allowed could not be read: cannot read"]
    assert data["open_still"] == ["policy: it cannot be read (cannot read)"]


def test_what_failed_is_done_by_the_next_panic(opened: LabDirectory, panic: Panic) -> None:
    failed = panic(Faulty(opened, "policy", "set", "remove"))
    assert failed.status == 1
    assert "what is enabled opens again at the next 'qvm-forward apply'" in failed.err
    assert len(allowed(opened)) == 2
    result = panic(Faulty(opened), "--json")
    assert (result.status, result.json["is_closed"], len(result.json["disabled"])) == (0, True, 2)


def test_a_failure_is_told_to_programs_too(opened: LabDirectory, panic: Panic) -> None:
    data: Any = panic(Faulty(opened, "set work"), "--json").json
    assert data["is_closed"] is False
    assert data["not_done"] == [{"what": "work web: disable the rule", "why": "cannot set work forward.web"}]
    assert data["open_still"] == ["work web: the rule is enabled"]
    assert data["disabled"] == [{"qube": "personal", "name": "tcp-81"}]


def test_broken_rules_and_odd_configurations_hinder_nothing(forward: Command, opened: LabDirectory) -> None:
    opened.set_feature("vault", "forward.bad", "action=drop")
    opened.set_feature("sys-net", "vm-config.fwd.vault.odd", "nonsense")
    opened.set_feature("sys-net", "vm-config.other", "1")
    opened.set_feature("sys-net", "fwd.vault.odd", "of somebody else")
    result = forward("panic")
    assert result.status == 0
    assert "vault bad is no readable rule; it is left, and opens nothing.\n" in result.out
    assert opened.vm_config("sys-net") == {"other": "1"}
    assert opened.feature("sys-net", "fwd.vault.odd") == "of somebody else"
    assert opened.feature("vault", "forward.bad") == "action=drop"


def test_tunnels_that_only_the_listeners_know_of_are_ended_too(opened: LabDirectory, panic: Panic) -> None:
    """The policy was closed by a panic that went no further."""
    (opened.policy_dir / "30-forward.policy").write_text(policy.text((), NOW))
    opened.set_feature("sys-firewall", "vm-config.fwd.vault.odd", "nonsense")
    backend = Faulty(opened)
    panic(backend)
    assert REVOKE in backend.log


def test_tunnels_that_could_not_be_ended_are_ended_by_the_next_panic(
    opened: LabDirectory, panic: Panic
) -> None:
    assert panic(Faulty(opened, "call")).status == 1
    assert due(opened) == ["work: end the tunnels of sys-net to port 8080"]
    backend = Faulty(opened)
    assert panic(backend).status == 0
    assert (backend.log.count(REVOKE), due(opened)) == (1, [])


def test_tunnels_that_only_the_listeners_know_of_are_noted_where_they_cannot_be_ended(
    opened: LabDirectory, panic: Panic
) -> None:
    """Their configuration is removed all the same, and with it the last that would tell of them."""
    (opened.policy_dir / "30-forward.policy").write_text(policy.text((), NOW))
    assert panic(Faulty(opened, "call")).status == 1
    assert opened.vm_config("sys-net") == {}
    assert due(opened) == ["work: end the tunnels of sys-net to port 8080"]


def test_tunnels_that_were_to_drain_are_cut(opened: LabDirectory, panic: Panic) -> None:
    note = "# Tunnels still to be ended: vault 22-22+sys-net+drain\n"
    (opened.policy_dir / "30-forward.policy").write_text(note)
    opened.set_state("vault", QubeState.RUNNING)
    backend = Faulty(opened)
    assert panic(backend).status == 0
    assert "call vault qubes.ForwardRevoke+22-22+sys-net" in backend.log
    assert due(opened) == []


def test_no_call_is_made_to_a_halted_qube(opened: LabDirectory, panic: Panic) -> None:
    opened.set_state("work", QubeState.HALTED)
    backend = Faulty(opened)
    assert panic(backend).status == 0
    assert not any(entry.startswith("call") for entry in backend.log)
