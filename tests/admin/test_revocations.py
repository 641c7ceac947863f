# SPDX-License-Identifier: GPL-2.0-or-later
"""Tunnels whose policy is gone are ended, and what could not be done is not forgotten."""

import pytest
from memory import Memory, applied, steps
from worlds import NOW, rule, world

from qubes_fwd_qrexec.admin import policy
from qubes_fwd_qrexec.admin.apply import Kind, carry_out, differences
from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.inventory import Inventory
from qubes_fwd_qrexec.admin.plan import plan
from qubes_fwd_qrexec.admin.revocations import Revocation
from qubes_fwd_qrexec.admin.revocations import noted as read_notes
from qubes_fwd_qrexec.rules import NamedRule
from qubes_fwd_qrexec.values import QubeName, TargetPorts

CONFIG = "vm-config.fwd.work.web"
WEB, SSH = rule("dstports=8080"), rule("srcports=22", target="personal", name="ssh")
SSH_CONFIG = "vm-config.fwd.personal.ssh"
REVOKE = "call work qubes.ForwardRevoke+8080-8080+sys-net"


def revocations(backend: Backend, *rules: NamedRule) -> list[tuple[str, str]]:
    found = (step.revocation for step in steps(backend, *rules))
    return [(due.target, due.argument) for due in found if due is not None]


@pytest.mark.parametrize(
    ("after", "ended"),
    [
        ([], True),
        ([rule("dstports=8080 enabled=no")], True),
        ([rule(f"dstports=8080 expire={NOW}")], True),
        ([rule("dstports=8080 owner=office")], True),
        ([rule("dstports=8080 path=sys-vpn,sys-net")], True),
        ([rule("dstports=8081")], True),
        ([rule("srcports=80-81 dstports=8080-8081")], True),
        ([rule("dstports=8080 forwardtype=internal")], True),
        ([rule("dstports=8080 transport=call")], True),
        ([rule("dstports=8080", target="hidden")], True),
        ([WEB], False),
        ([rule("dstports=8080 autostart=yes")], False),
        ([rule("dstports=8080 srchosts=10.0.0.0/8")], False),
        ([rule("srcports=81 dstports=8080")], False),
        ([rule("dstports=8080 expire=2000000000 comment=x proxy=v2")], False),
        ([rule("dstports=8080", name="renamed")], False),
        ([rule("srcports=81 dstports=8080", name="other")], False),
    ],
)
def test_tunnels_are_ended_exactly_if_their_line_is_gone(after: list[NamedRule], ended: bool) -> None:
    backend = Memory(world())
    applied(backend, WEB)
    assert revocations(backend, *after) == ([("work", "8080-8080+sys-net")] if ended else [])


def test_tunnels_that_another_rule_shares_stay_until_that_is_gone_too() -> None:
    backend = Memory(world())
    other = rule("srcports=81 dstports=8080", name="other")
    applied(backend, WEB, other)
    assert revocations(backend, other) == []
    applied(backend, other)
    assert revocations(backend) == [("work", "8080-8080+sys-net")]


def test_each_tunnel_of_many_is_ended_by_itself() -> None:
    backend = Memory(world())
    more = [rule("srcports=1-9", name="range"), rule("forwardtype=internal", name="inner")]
    applied(backend, WEB, *more)
    assert revocations(backend, WEB) == [("work", "1-9+sys-net"), ("work", "80-80+sys-firewall")]


def test_a_call_leaves_no_tunnel_to_end() -> None:
    backend = Memory(world())
    applied(backend, SSH, rule("transport=call"))
    assert revocations(backend) == []


def test_a_halted_or_vanished_target_has_no_tunnels_and_is_not_called() -> None:
    backend = Memory(world())
    applied(backend, WEB)
    inventory = backend.inventory()
    halted = inventory.qubes[QubeName("work")]._replace(is_running=False)
    gone = {name: qube for name, qube in inventory.qubes.items() if name != "work"}
    for other in (Inventory({**inventory.qubes, halted.name: halted}), Inventory(gone)):
        found = differences(plan([], other, NOW), other, backend.read_policy(), NOW)
        assert Kind.REVOKE not in {step.kind for step in found}


def test_tunnels_of_a_rule_that_drains_are_told_to_drain() -> None:
    backend = Memory(world())
    draining = rule("dstports=8080 on-expire=drain")
    applied(backend, draining)
    drained = [("work", "8080-8080+sys-net+drain")]
    assert revocations(backend) == drained
    assert revocations(backend, rule(f"dstports=8080 on-expire=drain expire={NOW}")) == drained
    assert revocations(backend, rule("dstports=8081 on-expire=drain")) == drained
    assert revocations(backend, draining) == []
    (step,) = [step for step in steps(backend) if step.kind is Kind.REVOKE]
    assert step.words() == ["work: let the tunnels of sys-net end by themselves, to port 8080"]


def test_what_cuts_is_cut_also_where_another_rule_that_ends_too_would_drain() -> None:
    backend = Memory(world())
    applied(backend, WEB, rule("srcports=81 dstports=8080 on-expire=drain", name="other"))
    assert revocations(backend) == [("work", "8080-8080+sys-net")]


def test_tunnels_are_ended_also_where_the_listeners_configuration_is_lost_or_unreadable() -> None:
    backend = Memory(world())
    applied(backend, rule("dstports=8080 on-expire=drain"))
    backend.qubes[QubeName("sys-net")][CONFIG] = "junk"
    assert revocations(backend) == [("work", "8080-8080+sys-net")]
    del backend.qubes[QubeName("sys-net")][CONFIG]
    assert revocations(backend) == [("work", "8080-8080+sys-net")]


NOTE = "# Tunnels still to be ended: work 8080-8080+sys-net"


def test_what_is_due_is_noted_by_the_write_that_closes_and_struck_out_when_done() -> None:
    backend = Memory(world())
    applied(backend, WEB)
    notes: list[bool] = []

    def look(entry: str) -> bool:
        notes.append(NOTE in (backend.policy or "").splitlines())
        return False

    backend.refuses = look
    assert applied(backend).problems == ()
    assert backend.log == ["policy 0", REVOKE, f"remove sys-net {CONFIG}", "policy 0"]
    assert notes == [False, True, True, True]
    assert policy.is_same(backend.policy, policy.text([], NOW))
    assert steps(backend) == ()


def test_whoever_is_killed_after_the_policy_was_closed_leaves_the_rest_to_the_next() -> None:
    class Killed(BaseException):
        """As SIGKILL, nothing catches it."""

    def kill(entry: str) -> bool:
        if entry == REVOKE:
            raise Killed
        return False

    backend = Memory(world())
    applied(backend, rule("dstports=8080 on-expire=drain"), SSH)
    backend.refuses = lambda entry: kill(entry.removesuffix("+drain"))
    with pytest.raises(Killed):
        applied(backend, SSH)
    backend.refuses = lambda entry: False
    assert applied(backend, SSH).problems == ()
    assert backend.log == [f"{REVOKE}+drain", f"remove sys-net {CONFIG}", "policy 1"]


def test_tunnels_that_cannot_be_ended_hold_up_nothing_and_are_ended_by_the_next_apply() -> None:
    backend = Memory(world())
    ranged = rule("srcports=1-9", name="range")
    applied(backend, WEB, ranged)
    backend.refuses = lambda entry: entry == REVOKE
    outcome = applied(backend, SSH)
    assert backend.log == [
        "policy 0",
        "call work qubes.ForwardRevoke+1-9+sys-net",
        "remove sys-net vm-config.fwd.work.range",
        f"remove sys-net {CONFIG}",
        "policy 1",
        f"set sys-net {SSH_CONFIG}",
        "policy 1",
    ]
    assert outcome.problems == (
        f"cannot {REVOKE}. dom0's policy is closed, but tunnels that sys-net has to work may take "
        "connections for 300 s more, and those that are open go on, until 'qvm-forward apply' can end them "
        "or work is shut down",
    )
    assert [step.words() for step in outcome.undone] == [["work: end the tunnels of sys-net to port 8080"]]
    assert noted(backend) == [NOTE]
    applied(backend, SSH)
    assert (backend.log, noted(backend)) == ([], [NOTE])
    backend.refuses = lambda entry: False
    assert applied(backend, SSH).problems == ()
    assert (backend.log, noted(backend)) == ([REVOKE, "policy 1"], [])


def noted(backend: Memory) -> list[str]:
    return [line for line in (backend.policy or "").splitlines() if "still to be ended" in line]


def failed_to_end(*rules: NamedRule) -> Memory:
    """The rules were in force, and are gone; their tunnels could not be ended."""
    backend = Memory(world())
    applied(backend, *rules)
    backend.refuses = lambda entry: entry.startswith("call")
    applied(backend)
    backend.refuses = lambda entry: False
    return backend


def test_what_is_allowed_again_is_no_longer_due() -> None:
    backend = failed_to_end(WEB)
    assert revocations(backend, WEB) == []
    applied(backend, WEB)
    assert noted(backend) == []


def test_what_is_allowed_again_and_over_again_ends_as_it_was_told_last() -> None:
    backend = failed_to_end(WEB)
    applied(backend, rule("dstports=8080 on-expire=drain"))
    assert revocations(backend) == [("work", "8080-8080+sys-net+drain")]


def test_a_halted_target_has_nothing_left_to_be_ended() -> None:
    backend = failed_to_end(WEB)
    halted = backend.inventory().qubes[QubeName("work")]._replace(is_running=False)
    (step,) = differences(plan([], world(halted), NOW), world(halted), backend.read_policy(), NOW)
    assert step.kind is Kind.CLOSE_POLICY
    carry_out([step], backend, backend.read_policy())
    assert noted(backend) == []


def test_what_could_not_be_struck_out_is_said_and_ended_once_more() -> None:
    backend = Memory(world())
    applied(backend, WEB)
    backend.refuses = lambda entry: entry == "policy 0" and REVOKE in backend.log
    assert applied(backend).problems == (
        "tunnels were ended, and are still noted to be in dom0's policy file: cannot policy 0",
    )
    backend.refuses = lambda entry: False
    assert applied(backend).problems == ()
    assert (backend.log, noted(backend)) == ([REVOKE, "policy 0"], [])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "work",
        "work 8080-8080",
        "work +sys-net",
        "work 0-1+sys-net",
        "wo/rk 80-80+sys-net",
        "work 80-80+sys-net+later",
        "work 80-80+sys-net ",
    ],
)
def test_what_is_no_note_of_ours_ends_nothing(text: str) -> None:
    backend = Memory(world())
    backend.policy = f"# Tunnels still to be ended: {text}\n"
    assert revocations(backend) == []


@pytest.mark.parametrize("drains", [False, True])
def test_a_note_says_what_is_to_be_done(drains: bool) -> None:
    revocation = Revocation(policy.tunnel(QubeName("work"), TargetPorts(1, 9), QubeName("sys-net")), drains)
    assert read_notes(f"# other\n{revocation.note()}\n") == {revocation}


def test_if_policy_cannot_be_closed_no_tunnel_is_ended() -> None:
    """It would only be opened again."""
    backend = Memory(world())
    applied(backend, WEB)
    backend.refuses = lambda entry: entry.startswith("policy")
    outcome = applied(backend)
    assert backend.log == []
    assert [step.kind for step in outcome.undone] == [Kind.CLOSE_POLICY, Kind.REVOKE, Kind.REMOVE_CONFIG]
    backend.refuses = lambda entry: False
    applied(backend)
    assert REVOKE in backend.log


def test_tunnels_that_others_allowed_in_the_file_are_ended_where_the_line_names_them() -> None:
    backend = Memory(world())
    backend.policy = "qubes.ForwardTCP +22+tunnel personal work allow\nqubes.ForwardTCP * vault work allow\n"
    assert revocations(backend) == [("work", "22-22+personal")]
