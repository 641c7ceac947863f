# SPDX-License-Identifier: GPL-2.0-or-later
"""From plan to steps, and the steps taken: in order, again without effect, and safely where one fails."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from worlds import NOW, rule, world

from qubes_fwd_qrexec.admin import policy
from qubes_fwd_qrexec.admin.apply import Kind, Outcome, Step, carry_out, differences
from qubes_fwd_qrexec.admin.backend import NEW, Backend, PolicyFile
from qubes_fwd_qrexec.admin.inventory import Inventory
from qubes_fwd_qrexec.admin.plan import plan
from qubes_fwd_qrexec.errors import StoreError
from qubes_fwd_qrexec.rules import NamedRule
from qubes_fwd_qrexec.values import QubeName


class Memory:
    """A backend in memory that logs each change, and refuses the changes that it is told to."""

    def __init__(self, inventory: Inventory) -> None:
        self.qubes = {name: dict(qube.features) for name, qube in inventory.qubes.items()}
        self._inventory = inventory
        self.policy: str | None = None
        self.log: list[str] = []
        self.refuses: Callable[[str], bool] = lambda entry: False

    def _do(self, entry: str) -> None:
        if self.refuses(entry):
            raise StoreError(f"cannot {entry}")
        self.log.append(entry)

    def inventory(self, *, with_config: bool = True) -> Inventory:
        old = self._inventory.qubes
        return Inventory({n: old[n]._replace(features=dict(f)) for n, f in self.qubes.items()})

    def set_feature(self, qube: QubeName, key: str, value: str) -> None:
        self._do(f"set {qube} {key}")
        self.qubes[qube][key] = value

    def call(self, qube: QubeName, service: str) -> None:
        self._do(f"call {qube} {service}")

    def remove_feature(self, qube: QubeName, key: str) -> None:
        self._do(f"remove {qube} {key}")
        self.qubes[qube].pop(key, None)

    def read_policy(self) -> PolicyFile:
        return PolicyFile(self.policy, NEW if self.policy is None else self.policy)

    def replace_policy(self, text: str, token: str) -> None:
        assert token == self.read_policy().token
        allowed = len(policy.allowing(text))
        self._do(f"policy {allowed}")
        self.policy = text

    @contextmanager
    def locked(self) -> Iterator[None]:
        yield


def steps(backend: Backend, *rules: NamedRule) -> tuple[Step, ...]:
    inventory = backend.inventory()
    return differences(plan(rules, inventory, NOW), inventory, backend.read_policy(), NOW)


def applied(backend: Memory, *rules: NamedRule) -> Outcome:
    backend.log.clear()
    return carry_out(steps(backend, *rules), backend)


CONFIG = "vm-config.fwd.work.web"
WEB, SSH = rule("dstports=8080"), rule("srcports=22", target="personal", name="ssh")
SSH_CONFIG = "vm-config.fwd.personal.ssh"
REVOKE = "call work qubes.ForwardRevoke+8080-8080+sys-net"


def test_opening_writes_policy_before_the_listener() -> None:
    backend = Memory(world())
    assert applied(backend, WEB).problems == ()
    assert backend.log == ["policy 1", f"set sys-net {CONFIG}"]
    assert "srcports=80-80 dstports=8080-8080" in backend.qubes[QubeName("sys-net")][CONFIG]


def test_closing_writes_policy_then_ends_tunnels_then_tells_the_listener() -> None:
    backend = Memory(world())
    applied(backend, WEB)
    applied(backend)
    assert backend.log == ["policy 0", REVOKE, f"remove sys-net {CONFIG}"]
    assert policy.is_same(backend.policy, policy.text([], NOW))


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
    assert backend.qubes[QubeName("sys-net")] == {"vm-config.mine": "1", "fwd.x.y": "1"}


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
    assert backend.log == ["policy 2", f"remove sys-net {CONFIG}", "policy 1"]
    assert [line.split()[1] for line in policy.allowing(backend.policy)] == ["+22"]
    assert outcome.problems == (
        f"cannot set sys-net {CONFIG}",
        "what was to be opened for it is closed in dom0's policy again",
    )
    assert [step.kind for step in outcome.undone] == [Kind.SET_CONFIG]


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


def test_if_closing_again_fails_too_it_is_said() -> None:
    backend = Memory(world())
    backend.refuses = lambda entry: entry.startswith("set") or entry == "policy 0"
    outcome = applied(backend, WEB)
    assert outcome.problems[-1] == "dom0's policy could not be closed again either: cannot policy 0"


def test_while_something_could_not_be_closed_nothing_is_opened() -> None:
    backend = Memory(world())
    applied(backend, WEB)
    backend.refuses = lambda entry: entry.startswith("remove")
    outcome = applied(backend, SSH)
    assert policy.allowing(backend.policy) == frozenset()
    assert [step.kind for step in outcome.undone] == [Kind.REMOVE_CONFIG, Kind.OPEN_POLICY, Kind.SET_CONFIG]
    assert outcome.problems[-1] == "nothing new was opened because of that"


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
    assert [word for step in first for word in step.words()] == [
        "policy: from now on qubes.ForwardTCP +8080+tunnel sys-net work allow autostart=no notify=no",
        f"sys-net: listen for fwd.work.web: {value}",
    ]
    line = "qubes.ForwardTCP  +8080+tunnel  sys-net  work  allow  autostart=no  notify=no"
    assert [step.as_json() for step in first] == [
        {"step": "open-policy", "remove": [], "add": [line]},
        {"step": "set-config", "qube": "sys-net", "feature": CONFIG, "was": None, "value": backend_value},
    ]
    carry_out(first, backend)
    changed = steps(backend, rule("dstports=8080 srchosts=10.0.0.0/8"))
    assert changed[0].words()[0].startswith("sys-net: change how it listens for fwd.work.web: version=1")
    gone = steps(backend)
    assert [word for step in gone for word in step.words()] == [
        "policy: no longer qubes.ForwardTCP +8080+tunnel sys-net work allow autostart=no notify=no",
        "work: end the tunnels of sys-net to port 8080",
        "sys-net: stop listening for fwd.work.web",
    ]
    assert gone[1].as_json() == {"step": "revoke", "qube": "work", "tunnels": "8080-8080+sys-net"}
    assert gone[2].as_json() == {"step": "remove-config", "qube": "sys-net", "feature": CONFIG, "was": value}


@pytest.mark.parametrize("before", [None, "", "# edited\n"])
def test_a_missing_or_edited_file_is_written_anew(before: str | None) -> None:
    backend = Memory(world())
    backend.policy = before
    (step,) = steps(backend)
    assert step.words() == ["policy: write the file, which allows the same as before"]
    carry_out([step], backend)
    assert policy.is_same(backend.policy, policy.text([], NOW))


def revocations(backend: Backend, *rules: NamedRule) -> list[tuple[str, str]]:
    return [(step.qube, step.value) for step in steps(backend, *rules) if step.kind is Kind.REVOKE]


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
    (words,) = Step(Kind.REVOKE, drained[0][1], qube=QubeName("work")).words()
    assert words == "work: let the tunnels of sys-net end by themselves, to port 8080"


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


def test_tunnels_that_cannot_be_ended_are_reported_and_hold_up_nothing() -> None:
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
    ]
    assert outcome.problems == (
        f"cannot {REVOKE}. dom0's policy is closed, but tunnels that sys-net has to work may take "
        "connections for 300 s more, and those that are open go on; 'qvm-forward apply' does not try again, "
        "and shutting work down ends them",
    )
    assert [(step.kind, step.value) for step in outcome.undone] == [(Kind.REVOKE, "8080-8080+sys-net")]
    assert steps(backend, SSH) == ()


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
