# SPDX-License-Identifier: GPL-2.0-or-later
"""From plan to steps, and the steps taken: in order, again without effect, and safely where one fails."""

import pytest
from memory import Memory, applied, steps
from worlds import NOW, rule, world

from qubes_fwd_qrexec.admin import policy
from qubes_fwd_qrexec.admin.apply import Kind, carry_out
from qubes_fwd_qrexec.admin.plan import plan
from qubes_fwd_qrexec.admin.states import Plan
from qubes_fwd_qrexec.admin.views.steps import as_json
from qubes_fwd_qrexec.admin.views.steps import words as in_words
from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.common.values import QubeName

CONFIG = "vm-config.fwd.work.web"
UDP_CONFIG = "vm-config.udp.work.web"
WEB, SSH = rule("dstports=8080"), rule("srcports=22", target="personal", name="ssh")
SSH_CONFIG = "vm-config.fwd.personal.ssh"
REVOKE = "call work qubes.ForwardRevoke"


def test_opening_writes_policy_before_the_listener() -> None:
    backend = Memory(world())
    assert applied(backend, WEB).problems == ()
    assert backend.log == ["policy 1", f"set sys-net {CONFIG}"]
    assert "srcports=80-80 dstports=8080-8080" in backend.qubes[QubeName("sys-net")][CONFIG]


def test_closing_writes_policy_then_ends_mux_calls_then_tells_the_listener() -> None:
    backend = Memory(world())
    applied(backend, WEB)
    applied(backend)
    assert backend.log == ["policy 0", REVOKE, f"remove sys-net {CONFIG}"]
    assert backend.policy == policy.text(Plan(()))


def test_closing_comes_before_opening() -> None:
    backend = Memory(world())
    applied(backend, WEB)
    applied(backend, SSH)
    assert backend.log == [
        "policy 0",
        REVOKE,
        f"remove sys-net {CONFIG}",
        "policy 1",
        f"set sys-net {SSH_CONFIG}",
    ]


def test_tcp_and_udp_of_one_rule_are_opened_and_closed_apart() -> None:
    backend = Memory(world())
    applied(backend, rule("dstports=8080 proto=udp"))
    assert backend.log == ["policy 1", f"set sys-net {UDP_CONFIG}"]
    backend.log.clear()
    applied(backend, rule("dstports=8080 proto=both"))
    assert backend.log == ["policy 2", f"set sys-net {CONFIG}"]
    backend.log.clear()
    applied(backend, WEB)
    assert backend.log == ["policy 1", REVOKE, f"remove sys-net {UDP_CONFIG}"]


def test_a_second_time_changes_nothing() -> None:
    backend = Memory(world())
    applied(backend, WEB, SSH)
    assert steps(backend, WEB, SSH) == ()


def test_what_no_rule_asks_for_is_removed_on_every_qube() -> None:
    backend = Memory(world())
    for name in backend.qubes:
        backend.qubes[name]["vm-config.fwd.old.rule"] = "x"
    applied(backend)
    assert not any("vm-config.fwd.old.rule" in features for features in backend.qubes.values())


def test_other_features_are_left_alone() -> None:
    backend = Memory(world())
    backend.qubes[QubeName("sys-net")] |= {"vm-config.mine": "1", "fwd.x.y": "1"}
    applied(backend)
    assert backend.qubes[QubeName("sys-net")] == {
        "qrexec": "1",
        "vm-config.mine": "1",
        "fwd.x.y": "1",
    }


def test_lines_that_others_wrote_into_the_file_go() -> None:
    backend = Memory(world())
    backend.policy = "qubes.ForwardTCP * sys-net work allow\n"
    applied(backend)
    assert policy.allowing(backend.policy) == frozenset()


def test_narrower_sources_do_not_wait_for_what_is_to_be_opened() -> None:
    backend = Memory(world())
    applied(backend, WEB)
    applied(backend, rule("dstports=8080 srchosts=10.0.0.0/8"), SSH)
    assert backend.log == [f"set sys-net {CONFIG}", "policy 2", f"set sys-net {SSH_CONFIG}"]


def test_if_policy_cannot_be_written_nothing_is_done() -> None:
    backend = Memory(world())
    backend.refuses = lambda entry: entry.startswith("policy")
    outcome = applied(backend, WEB)
    assert backend.log == []
    assert outcome.problems == ("cannot policy 1",)
    assert [step.kind for step in outcome.undone] == [Kind.OPEN_POLICY, Kind.SET_CONFIG]


def test_a_listener_that_cannot_be_told_is_closed_in_policy_again() -> None:
    backend = Memory(world())
    applied(backend, SSH)
    backend.refuses = lambda entry: entry == f"set sys-net {CONFIG}"
    outcome = applied(backend, WEB, SSH)
    assert backend.log == ["policy 2", f"remove sys-net {CONFIG}", "policy 1", REVOKE]
    assert [line.split()[1] for line in policy.allowing(backend.policy)] == ["+22"]
    assert outcome.problems == (f"cannot set sys-net {CONFIG}",)
    assert [step.kind for step in outcome.undone] == [Kind.SET_CONFIG]


def test_a_feature_that_was_set_and_not_delivered_is_removed_again() -> None:
    backend = Memory(world())
    applied(backend, SSH)
    set_feature = backend.set_feature

    def fail(qube: QubeName, key: str, value: str) -> None:
        set_feature(qube, key, value)
        if key == CONFIG:
            raise StoreError("not delivered")

    backend.set_feature = fail  # type: ignore[method-assign]
    assert applied(backend, WEB, SSH).problems == ("not delivered",)
    assert CONFIG not in backend.qubes[QubeName("sys-net")]
    assert backend.log[:3] == ["policy 2", f"set sys-net {CONFIG}", f"remove sys-net {CONFIG}"]
    assert backend.log[3:] == ["policy 1", REVOKE]


def test_the_next_time_finishes_what_failed() -> None:
    backend = Memory(world())
    backend.refuses = lambda entry: entry.startswith("set")
    applied(backend, WEB)
    backend.refuses = lambda entry: False
    assert applied(backend, WEB).problems == ()
    assert steps(backend, WEB) == ()


def test_a_line_that_a_delivered_forward_shares_stays() -> None:
    backend = Memory(world())
    other = rule("srcports=81 dstports=8080", name="other")
    backend.refuses = lambda entry: entry == f"set sys-net {CONFIG}"
    applied(backend, WEB, other)
    assert len(policy.allowing(backend.policy)) == 1


def test_what_is_allowed_already_is_not_told_to_a_new_listener_where_policy_cannot_be_written() -> None:
    backend = Memory(world())
    applied(backend, WEB)
    backend.refuses = lambda entry: entry.startswith("policy")
    outcome = applied(backend, WEB, rule("srcports=81 dstports=8080", name="shares"), SSH)
    assert backend.log == []
    assert [step.kind for step in outcome.undone] == [Kind.OPEN_POLICY, Kind.SET_CONFIG, Kind.SET_CONFIG]


def test_if_closing_again_fails_too_it_is_said() -> None:
    backend = Memory(world())
    backend.refuses = lambda entry: entry.startswith("set") or entry == "policy 0"
    outcome = applied(backend, WEB)
    assert outcome.problems == (f"cannot set sys-net {CONFIG}", "cannot policy 0")


def test_a_listener_that_cannot_be_told_to_stop_keeps_nothing_else_from_opening() -> None:
    backend = Memory(world())
    applied(backend, WEB)
    backend.refuses = lambda entry: entry.startswith("remove")
    outcome = applied(backend, SSH)
    assert [line.split()[1] for line in policy.allowing(backend.policy)] == ["+22"]
    assert [step.kind for step in outcome.undone] == [Kind.REMOVE_CONFIG]
    assert outcome.problems == (f"cannot remove sys-net {CONFIG}",)


def test_what_cannot_be_narrowed_loses_its_policy_and_its_calls_and_all_else_goes_on() -> None:
    backend = Memory(world())
    applied(backend, WEB)
    backend.refuses = lambda entry: entry == f"set sys-net {CONFIG}"
    outcome = applied(backend, rule("dstports=8080 srchosts=10.0.0.0/8"), SSH)
    assert backend.log == [
        "policy 0",
        REVOKE,
        "policy 1",
        f"set sys-net {SSH_CONFIG}",
    ]
    assert [line.split()[1] for line in policy.allowing(backend.policy)] == ["+22"]
    assert backend.given == {"work": "version=1 drains=keep\n"}
    assert outcome.problems == (f"cannot set sys-net {CONFIG}",)


@pytest.mark.parametrize("was", ["proto=tcp", "proto=both srchosts=10.0.0.0/8"])
def test_of_both_protocols_the_one_that_can_be_told_stays_open(was: str) -> None:
    """TCP goes on where the listener cannot be told of UDP, whether that is new or changed."""
    backend = Memory(world())
    applied(backend, rule(f"dstports=8080 {was}"))
    backend.refuses = lambda entry: entry == f"set sys-net {UDP_CONFIG}"
    now = rule(
        "dstports=8080 proto=both srchosts=10.0.0.0/9" if "both" in was else "dstports=8080 proto=both"
    )
    outcome = applied(backend, now)
    assert [line.split()[0] for line in policy.allowing(backend.policy)] == ["qubes.ForwardTCP"]
    tcp, _ = plan([now], world(), NOW).forwards[0].listener_configs
    assert backend.qubes[QubeName("sys-net")][CONFIG] == str(tcp)
    assert outcome.problems == (f"cannot set sys-net {UDP_CONFIG}",)
    assert [step.feature for step in outcome.undone] == [UDP_CONFIG]
    backend.refuses = lambda entry: False
    assert applied(backend, now).problems == ()
    assert len(policy.allowing(backend.policy)) == 2


def test_a_narrowing_that_fails_again_and_again_opens_nothing_meanwhile() -> None:
    """As `watch` tries it: the listener is told before policy allows its calls again."""
    backend = Memory(world())
    applied(backend, WEB)
    backend.refuses = lambda entry: entry == f"set sys-net {CONFIG}"
    narrow = rule("dstports=8080 srchosts=10.0.0.0/8")
    applied(backend, narrow)
    for _ in range(2):
        assert applied(backend, narrow).problems == (f"cannot set sys-net {CONFIG}",)
        assert backend.log == []
    backend.refuses = lambda entry: False
    assert applied(backend, narrow).problems == ()
    assert backend.log == [f"set sys-net {CONFIG}", "policy 1"]


def test_if_policy_cannot_be_closed_calls_are_ended_and_listeners_told_all_the_same() -> None:
    """As with a mistake in another policy file. Nothing opens, and what could not be closed is named."""
    backend = Memory(world())
    applied(backend, WEB)
    backend.refuses = lambda entry: entry.startswith("policy")
    outcome = applied(backend, SSH)
    assert backend.log == [REVOKE, f"remove sys-net {CONFIG}"]
    assert [step.kind for step in outcome.undone] == [Kind.CLOSE_POLICY, Kind.OPEN_POLICY, Kind.SET_CONFIG]
    assert outcome.problems == ("cannot policy 0",)
    assert CONFIG not in backend.qubes[QubeName("sys-net")]


def test_waiting_forwards_are_delivered_for_the_next_start() -> None:
    inventory = world()
    halted = inventory.qubes[QubeName("sys-net")]._replace(is_running=False)
    backend = Memory(world(halted))
    applied(backend, WEB)
    assert backend.log == ["policy 1", f"set sys-net {CONFIG}"]


def test_steps_in_words_and_json() -> None:
    backend = Memory(world())
    first = steps(backend, WEB)
    value = backend_value = first[1].value
    assert [word for step in first for word in in_words(step)] == [
        "policy: from now on qubes.ForwardTCP +8080+mux sys-net work allow autostart=no notify=no",
        f"sys-net: listen for fwd.work.web: {value}",
    ]
    line = "qubes.ForwardTCP  +8080+mux  sys-net  work  allow  autostart=no  notify=no"
    assert [as_json(step) for step in first] == [
        {"step": "open-policy", "remove": [], "add": [line]},
        {"step": "set-config", "qube": "sys-net", "feature": CONFIG, "was": None, "value": backend_value},
    ]
    carry_out(first, backend, backend.read_policy())
    changed = steps(backend, rule("dstports=8080 srchosts=10.0.0.0/8"))
    assert in_words(changed[0])[0].startswith("sys-net: change how it listens for fwd.work.web: version=1")
    gone = steps(backend)
    assert [word for step in gone for word in in_words(step)] == [
        "policy: no longer qubes.ForwardTCP +8080+mux sys-net work allow autostart=no notify=no",
        "work: end connections that are not allowed any more",
        "sys-net: stop listening for fwd.work.web",
    ]
    assert as_json(gone[1]) == {"step": "revoke", "allowances": {"work": "version=1 drains=keep\n"}}
    assert as_json(gone[2]) == {"step": "remove-config", "qube": "sys-net", "feature": CONFIG, "was": value}


@pytest.mark.parametrize("before", [None, "", "# edited\n"])
def test_a_missing_or_edited_file_is_written_anew(before: str | None) -> None:
    backend = Memory(world())
    backend.policy = before
    (step,) = steps(backend)
    assert in_words(step) == ["policy: write the file, which allows the same as before"]
    carry_out([step], backend, backend.read_policy())
    assert backend.policy == policy.text(Plan(()))
