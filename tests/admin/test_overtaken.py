# SPDX-License-Identifier: GPL-2.0-or-later
"""Somebody without our lock changes policy while a command is at work: nothing is written over that."""

from collections.abc import Callable

import pytest
from faulty import Faulty, allowed
from memory import Memory, applied, steps
from worlds import Command, rule, world

from qubes_fwd_qrexec.admin import policy
from qubes_fwd_qrexec.admin.apply import Kind, carry_out
from qubes_fwd_qrexec.errors import StoreError
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.rules import NamedRule

CLOSED = policy.text((), None)
WEB, SSH = rule("dstports=8080"), rule("srcports=22", target="personal", name="ssh")
REVOKE = "call work qubes.ForwardRevoke+8080-8080+sys-net"


class Rivalled(Memory):
    """Somebody else writes the policy file just before some of our own steps."""

    def __init__(self, *in_force: NamedRule) -> None:
        super().__init__(world())
        self.rival: Callable[[str], str | None] = lambda entry: None
        applied(self, *in_force)
        self.log.clear()

    def _do(self, entry: str) -> None:
        text = self.rival(entry)
        if text is not None:
            self.policy = text
        super()._do(entry)


def test_what_was_closed_since_the_differences_were_computed_is_not_opened_again() -> None:
    backend = Rivalled(WEB)
    installed, due = backend.read_policy(), steps(backend, WEB, SSH)
    backend.policy = CLOSED
    outcome = carry_out(due, backend, installed)
    assert (backend.policy, backend.log) == (CLOSED, [])
    assert outcome.is_overtaken
    assert outcome.problems == ("policy: somebody else changed it just now; try again",)
    assert [step.kind for step in outcome.undone] == [Kind.OPEN_POLICY, Kind.SET_CONFIG]


def test_what_was_closed_between_two_of_our_writes_is_not_opened_again() -> None:
    backend = Rivalled(WEB)
    backend.rival = lambda entry: CLOSED if entry == REVOKE else None
    outcome = applied(backend, SSH)
    assert backend.policy == CLOSED
    assert outcome.is_overtaken
    assert outcome.problems == ("dom0's policy file: somebody else changed it just now; try again",)
    assert [step.kind for step in outcome.undone] == [Kind.OPEN_POLICY, Kind.SET_CONFIG]


def test_no_note_is_struck_out_of_what_others_wrote() -> None:
    backend = Rivalled(WEB)
    theirs = CLOSED + "# theirs\n"
    backend.rival = lambda entry: theirs if entry.startswith("remove") else None
    assert applied(backend).is_overtaken
    assert backend.policy == theirs


def test_no_line_is_withdrawn_from_what_others_wrote() -> None:
    backend = Rivalled()
    backend.refuses = lambda entry: entry.startswith("set")
    backend.rival = lambda entry: CLOSED if entry.startswith("set") else None
    outcome = applied(backend, WEB)
    assert outcome.is_overtaken
    assert backend.policy == CLOSED
    assert outcome.problems[-1].startswith(
        "dom0's policy could not be closed again either: dom0's policy file"
    )


def test_apply_opens_nothing_while_panic_waits_for_its_lock(
    forward: Command, over: Command, opened: LabDirectory
) -> None:
    """Panic has closed policy, and disables the rules when it has the lock."""
    forward("set", "work", "web", "srchosts=any", "srcports=90", "--no-apply")
    forward("add", "vault", "83", "--from", "any", "--via", "sys-net", "--no-apply")

    def close(entry: str) -> None:
        if entry == "inventory":
            (opened.policy_dir / "30-forward.policy").write_text(CLOSED)

    result = over(Faulty(opened, before=close), "apply")
    assert result.status == 1
    assert allowed(opened) == frozenset()
    assert "somebody else closed everything in dom0's policy meanwhile, and nothing is opened again" in (
        result.err
    )
    assert "Not done: policy: from now on" in result.err


def test_what_is_to_be_closed_is_closed_though_all_else_was_closed_meanwhile(
    over: Command, opened: LabDirectory
) -> None:
    looks: list[str] = []

    def close(entry: str) -> None:
        if entry == "inventory":
            looks.append(entry)
        if len(looks) == 2 and entry == "policy 1":
            (opened.policy_dir / "30-forward.policy").write_text(CLOSED)

    opened.remove_feature("personal", "forward.tcp-81")
    result = over(Faulty(opened, before=close), "remove", "work", "web")
    assert (result.status, result.err) == (0, "")
    assert opened.vm_config("sys-net") == {}
    assert allowed(opened) == frozenset()


def test_a_change_that_others_made_meanwhile_is_looked_at_and_kept(
    forward: Command, over: Command, opened: LabDirectory
) -> None:
    """As from a management qube, whose lock is another one."""
    done: list[str] = []

    def add(entry: str) -> None:
        if entry == "policy 3" and not done:
            done.append(entry)
            line = opened.features("personal")["forward.tcp-81"].replace("srcports=81-81", "srcports=84-84")
            opened.set_feature("personal", "forward.late", line.replace("dstports=81-81", "dstports=84-84"))
            text = (opened.policy_dir / "30-forward.policy").read_text()
            (opened.policy_dir / "30-forward.policy").write_text(f"# theirs\n{text}")

    result = over(Faulty(opened, before=add), "add", "work", "82", "--from", "any")
    assert (result.status, result.err) == (0, "")
    assert len(allowed(opened)) == 4
    assert forward("apply").out == "Nothing to change: all is as the rules ask for.\n"


def test_a_policy_that_others_keep_on_changing_is_given_up(over: Command, opened: LabDirectory) -> None:
    path = opened.policy_dir / "30-forward.policy"
    rivals: list[str] = []

    def change(entry: str) -> None:
        if entry.startswith("policy"):
            rivals.append(entry)
            path.write_text(f"{path.read_text()}# theirs {len(rivals)}\n")

    result = over(Faulty(opened, before=change), "add", "work", "82", "--from", "any")
    assert result.status == 1
    assert rivals == ["policy 3"] * 3
    assert path.read_text().endswith("# theirs 3\n")
    assert "the rules are changed, but not everything could be done: " in result.err
    assert "somebody else changed it just now; try again" in result.err


def test_tunnels_that_the_look_before_could_not_end_are_its_own_problem(
    over: Command, opened: LabDirectory
) -> None:
    path = opened.policy_dir / "30-forward.policy"
    rivals: list[str] = []

    def change(entry: str) -> None:
        if entry.startswith("call"):
            if not rivals:
                path.write_text(f"{path.read_text()}# theirs\n")
            rivals.append(entry)
            raise StoreError("no answer")

    result = over(Faulty(opened, before=change), "set", "work", "web", "dstports=90")
    assert rivals == [f"{REVOKE}+drain"] * 2
    assert result.status == 1
    assert len(allowed(opened)) == 2
    assert "the rules are changed, but not everything could be done: no answer" in result.err


@pytest.mark.parametrize("text", ["", "# edited\n"])
def test_a_file_that_others_edited_before_is_replaced(text: str) -> None:
    backend = Rivalled()
    backend.policy = text
    assert applied(backend, WEB).problems == ()
