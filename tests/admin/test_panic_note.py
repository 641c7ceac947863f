# SPDX-License-Identifier: GPL-2.0-or-later
"""Panic's note in the policy file: nobody opens anything until it is through, and it can always be ended."""

import io

import pytest
from faulty import CONTESTED, EVERYTHING, REVOKE, TRY, Faulty, Panic, allowed
from worlds import NOW, Command, content

from qubes_fwd_qrexec.admin import policy
from qubes_fwd_qrexec.admin.labstore import LabStore
from qubes_fwd_qrexec.admin.session import Session
from qubes_fwd_qrexec.admin.tables import Style
from qubes_fwd_qrexec.errors import StoreError
from qubes_fwd_qrexec.lab.directory import LabDirectory

WHY = "'qvm-forward panic' closed everything and is not through"


class Killed(BaseException):
    """SIGKILL, of which nobody is told."""


def note(lab: LabDirectory) -> bool:
    text = (lab.policy_dir / "30-forward.policy").read_text()
    return bool(policy.panic_notes(text))


def leave_note(lab: LabDirectory, text: str = policy.PANIC) -> None:
    """What a panic leaves that was killed after its first write."""
    (lab.policy_dir / "30-forward.policy").write_text(policy.text((), NOW, notes=[text]))


def reconcile(lab: LabDirectory) -> None:
    """What `watch` does, without the lock: as dom0's does while panic is in a management qube."""
    out, err = io.StringIO(), io.StringIO()
    Session(LabStore(lab), NOW, {}, io.StringIO(), out, err, Style(), False).reconcile()


def killed_at(step: int, lab: LabDirectory, panic: Panic, *refused: str) -> None:
    steps: list[str] = []

    def kill(entry: str) -> None:
        steps.append(entry)
        if len(steps) == step + 1:
            raise Killed

    with pytest.raises(Killed):
        panic(Faulty(lab, *refused, before=kill))


@pytest.mark.parametrize("step", range(2, len(EVERYTHING)))
def test_after_its_first_write_nothing_opens_wherever_panic_is_killed(
    forward: Command, opened: LabDirectory, panic: Panic, step: int
) -> None:
    killed_at(step, opened, panic)
    forward("apply")
    assert allowed(opened) == frozenset()
    assert panic(Faulty(opened)).status == 0
    assert not note(opened)
    assert forward("enable", "work", "web").status == 0
    assert len(allowed(opened)) == 1


@pytest.mark.parametrize("step", range(2, len(CONTESTED)))
def test_so_it_is_where_somebody_else_has_the_lock(
    forward: Command, opened: LabDirectory, panic: Panic, step: int
) -> None:
    killed_at(step, opened, panic, TRY)
    forward("apply")
    assert allowed(opened) == frozenset()
    assert (panic(Faulty(opened)).status, note(opened)) == (0, False)


def test_what_has_another_lock_opens_nothing_at_any_moment(opened: LabDirectory, panic: Panic) -> None:
    """The panic of a management qube, and dom0's watch."""
    seen: list[int] = []

    def play_watch(entry: str) -> None:
        reconcile(opened)
        seen.append(len(allowed(opened)))

    assert panic(Faulty(opened, before=play_watch)).status == 0
    assert seen[:2] == [2, 2]
    assert set(seen[2:]) == {0}
    assert (allowed(opened), note(opened)) == (frozenset(), False)


def test_apply_that_comes_before_panic_to_the_lock_opens_nothing_and_says_why(
    forward: Command, opened: LabDirectory, panic: Panic
) -> None:
    seen: list[str] = []

    def interfere(entry: str) -> None:
        if entry == TRY:
            seen.append(forward("apply").err)
            assert allowed(opened) == frozenset()

    assert panic(Faulty(opened, before=interfere)).status == 0
    assert seen[0].splitlines() == [
        f"qvm-forward: {name} is refused. {WHY}; if it does not run any more, say it again. After that "
        f"'qvm-forward enable {name}' opens this one."
        for name in ("personal tcp-81", "work web")
    ]


def test_everybody_else_keeps_the_note_closes_and_opens_nothing(
    forward: Command, opened: LabDirectory
) -> None:
    opened.set_feature("vault", "forward.old", opened.features("personal")["forward.tcp-81"])
    leave_note(opened)
    assert forward("apply").status == 1
    assert opened.vm_config("sys-net") == {}
    for command in ("disable personal tcp-81", "remove personal tcp-81", "set work web comment=x"):
        result = forward(*command.split())
        assert (result.status, result.err) == (0, "")
        assert (allowed(opened), note(opened)) == (frozenset(), True)
    assert forward("apply", "--dry-run").out == "Nothing to change: all is as the rules ask for.\n"


@pytest.mark.parametrize(
    "command", ["add vault 83 --from any --via sys-net", "enable personal tcp-81", "confirm work web"]
)
def test_what_would_open_is_refused_before_anything_is_stored(
    forward: Command, opened: LabDirectory, command: str
) -> None:
    opened.set_feature(
        "work", "forward.web", opened.features("work")["forward.web"].replace("path=", "path=vault,")
    )
    forward("disable", "personal", "tcp-81")
    leave_note(opened)
    before = content(opened)
    result = forward(*command.split())
    assert result.status == 1
    assert WHY in result.err
    assert content(opened) == before


def test_a_command_that_panic_has_overtaken_fails(over: Command, opened: LabDirectory) -> None:
    def interfere(entry: str) -> None:
        if entry == "policy 3":
            leave_note(opened)

    result = over(Faulty(opened, before=interfere), "add", "work", "82", "--from", "any")
    assert (result.status, allowed(opened), note(opened)) == (1, frozenset(), True)
    assert f"the rules are changed, but not everything could be done: {WHY}" in result.err


def test_no_listing_says_that_anything_is_open(forward: Command, opened: LabDirectory) -> None:
    leave_note(opened)
    for listing in ("list", "plan"):
        (personal, work) = forward(listing, "--json").json["forwards"]
        assert (personal["state"], work["cause"]) == ("refused", "panic")
        assert WHY in forward(listing).out
    assert forward("show", "work", "web", "--json").json["policy"] == []
    assert "=X=" in forward("show", "work", "web").out
    status = forward("status", "--json").json
    assert status["forwards"] == []
    assert [step["step"] for step in status["due"]] == ["remove-config"] * 2
    assert forward("status").out.startswith(
        "Nothing is open.\nNot open: 2 refused; 'qvm-forward list' says why"
    )
    diagnosis = forward("diagnose", "work", "web")
    assert (diagnosis.status, len(diagnosis.out.splitlines())) == (1, 2)
    assert diagnosis.out.splitlines()[1] == "What helps: 'qvm-forward panic'"
    printed = forward("policy")
    assert (printed.err, policy.allowing(printed.out)) == ("", frozenset())


def test_a_rule_that_cannot_be_disabled_keeps_the_note_until_it_can(
    forward: Command, opened: LabDirectory, panic: Panic
) -> None:
    result = panic(Faulty(opened, "set work"))
    assert result.status == 1
    assert result.err.splitlines()[-1] == (
        "qvm-forward: nobody opens anything until 'qvm-forward panic' is through: say it again once that is "
        "mended"
    )
    assert forward("apply").status == 1
    assert (allowed(opened), note(opened)) == (frozenset(), True)
    assert (panic(Faulty(opened)).status, note(opened)) == (0, False)


def test_a_rule_that_cannot_be_disabled_may_be_removed(
    forward: Command, opened: LabDirectory, panic: Panic
) -> None:
    assert panic(Faulty(opened, "set work")).status == 1
    assert forward("remove", "work", "web").status == 0
    assert (panic(Faulty(opened, "set work")).status, note(opened)) == (0, False)


def test_rules_that_cannot_be_read_keep_the_note(opened: LabDirectory, panic: Panic) -> None:
    assert panic(Faulty(opened, "inventory")).status == 1
    assert note(opened)


@pytest.mark.parametrize("refused", ["call", "remove", "lock"])
def test_what_can_open_nothing_does_not_keep_the_note(
    opened: LabDirectory, panic: Panic, refused: str
) -> None:
    opened.set_feature("vault", "forward.bad", "action=drop")
    panic(Faulty(opened, refused))
    assert (allowed(opened), note(opened)) == (frozenset(), False)


def test_a_last_write_that_fails_is_told(opened: LabDirectory, panic: Panic, forward: Command) -> None:
    class Stuck(Faulty):
        def _do(self, entry: str) -> None:
            if entry == "policy 0" and self.log.count("inventory") == 2:
                raise StoreError("not now")
            super()._do(entry)

    result = panic(Stuck(opened))
    assert (result.status, note(opened)) == (0, True)
    assert result.err.startswith("qvm-forward: nobody opens anything until 'qvm-forward panic' is through")
    assert panic(Stuck(opened), "--json").json["is_held"] is True
    assert (panic(Faulty(opened), "--json").json["is_held"], note(opened)) == (False, False)


def test_of_two_panics_the_last_one_takes_the_note_out(opened: LabDirectory, panic: Panic) -> None:
    seen: list[tuple[int, bool]] = []

    def second(entry: str) -> None:
        if entry == "lock":
            # The one that has the lock ends now, while the other waits for it.
            seen.append((panic(Faulty(opened)).status, note(opened)))

    backend = Faulty(opened, TRY, before=second)
    assert panic(backend).status == 0
    assert seen == [(0, False)]
    assert (allowed(opened), note(opened), backend.log.count(REVOKE)) == (frozenset(), False, 1)


@pytest.mark.parametrize("text", ["# Panic:", "# Panic:\x00\xff", "# Panic: of a newer version=2"])
def test_a_note_that_says_anything_counts_and_is_kept_as_it_is(
    forward: Command, opened: LabDirectory, panic: Panic, text: str
) -> None:
    leave_note(opened, text)
    forward("apply")
    assert allowed(opened) == frozenset()
    assert (opened.policy_dir / "30-forward.policy").read_text().count(text) == 1
    assert (panic(Faulty(opened)).status, note(opened)) == (0, False)


def test_a_qube_of_that_name_is_no_note() -> None:
    assert policy.panic_notes("# Panic web: port 80 of sys-net to port 80\n# Panic\n") == ()
    assert policy.panic_notes(policy.text((), NOW)) == ()
    assert policy.panic_notes(None) == ()
