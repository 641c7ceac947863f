# SPDX-License-Identifier: GPL-2.0-or-later
"""Somebody without our lock changes policy while a command is at work: nothing is written over that."""

from collections.abc import Callable

import pytest
from faulty import Faulty, allowed
from memory import Memory, applied, steps
from worlds import NOW, Command, rule, world

from qubes_fwd_qrexec.admin import policy
from qubes_fwd_qrexec.admin.apply import Kind, carry_out
from qubes_fwd_qrexec.admin.states import Plan
from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.common.rules import NamedRule
from qubes_fwd_qrexec.lab.directory import LabDirectory

CLOSED = policy.text(Plan(()))
WEB, SSH = rule("dstports=8080"), rule("srcports=22", target="personal", name="ssh")
CONFIG = "vm-config.fwd.work.web"
REVOKE = "call work qubes.ForwardRevoke"


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
    assert outcome.problems == ("policy: somebody else has just changed it; try again",)
    assert [step.kind for step in outcome.undone] == [Kind.OPEN_POLICY, Kind.SET_CONFIG]


def test_what_was_closed_between_two_of_our_writes_is_not_opened_again() -> None:
    backend = Rivalled(WEB)
    backend.rival = lambda entry: CLOSED if entry == REVOKE else None
    outcome = carry_out(steps(backend, SSH), backend, backend.read_policy())
    assert backend.policy == CLOSED
    assert outcome.is_overtaken
    assert outcome.problems == ("policy: somebody else has just changed it; try again",)
    assert [step.kind for step in outcome.undone] == [Kind.OPEN_POLICY, Kind.SET_CONFIG]


def test_no_line_is_withdrawn_from_what_others_wrote() -> None:
    backend = Rivalled()
    backend.refuses = lambda entry: entry.startswith("set")
    backend.rival = lambda entry: CLOSED if entry.startswith("set") else None
    outcome = applied(backend, WEB)
    assert (backend.policy, outcome.problems) == (CLOSED, (f"cannot set sys-net {CONFIG}",))


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
    assert "the change is stored, but not everything could be done: " in result.err
    assert "somebody else has just changed it; try again" in result.err


def test_a_target_that_the_look_before_could_not_tell_is_a_trouble_of_the_whole(
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
    assert rivals == ["call work"]
    assert result.status == 1
    assert len(allowed(opened)) == 2
    assert (
        "the change is stored, but not everything could be done: qubes.ForwardRevoke in work: no answer"
        in (result.err)
    )


def test_what_was_held_while_listeners_are_told_is_looked_at_again_and_closed(
    over: Command, opened: LabDirectory
) -> None:
    """Policy was written; then somebody else holds everything, and the listener is told after that."""

    def hold(entry: str) -> None:
        if entry.startswith("set sys-net"):
            (opened.policy_dir / "30-forward.policy").write_text(policy.text(Plan((), is_held=True)))

    result = over(Faulty(opened, before=hold), "add", "work", "82", "--from", "any")
    assert (result.status, "Forward work tcp-82 is stored and held." in result.out) == (0, True)
    assert (allowed(opened), opened.vm_config("sys-net")) == (frozenset(), {})


def test_what_was_held_while_listeners_alone_are_told_is_closed_too(
    over: Command, opened: LabDirectory
) -> None:
    """Policy allows the forward already, so only its listener lacks it."""
    opened.remove_feature("sys-net", "vm-config.fwd.work.web")

    def hold(entry: str) -> None:
        if entry.startswith("set sys-net"):
            (opened.policy_dir / "30-forward.policy").write_text(policy.hold_text(NOW))

    assert over(Faulty(opened, before=hold), "apply").status == 0
    assert (allowed(opened), opened.vm_config("sys-net")) == (frozenset(), {})


@pytest.mark.parametrize("text", ["", "# edited\n"])
def test_a_file_that_others_edited_before_is_replaced(text: str) -> None:
    backend = Rivalled()
    backend.policy = text
    assert applied(backend, WEB).problems == ()
