# SPDX-License-Identifier: GPL-2.0-or-later
"""Which targets are told what is allowed from now on, what they are told, and what becomes of it."""

from threading import Barrier

import pytest
from bounds import BOUND_S
from memory import Memory, applied, steps
from worlds import NOW, qube, rule, world

from qubes_fwd_qrexec.admin.answers import AnswerError, NotRunningError, waiting
from qubes_fwd_qrexec.admin.apply import Kind, differences
from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.inventory import Inventory
from qubes_fwd_qrexec.admin.plan import plan
from qubes_fwd_qrexec.admin.revoking import Ended, allowances, revoke, serving, targets_of
from qubes_fwd_qrexec.admin.views import steps as views
from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.common.rules import NamedRule
from qubes_fwd_qrexec.common.values import QubeName

CONFIG = "vm-config.fwd.work.web"
WEB, SSH = rule("dstports=8080"), rule("srcports=22", target="personal", name="ssh")
NOTHING = "version=1 drains=keep\n"
WORK = QubeName("work")


def told(backend: Backend, *rules: NamedRule) -> dict[str, str]:
    """What each target would be told if exactly these rules were there."""
    return {
        target: str(allowance)
        for step in steps(backend, *rules)
        for target, allowance in step.allowances.items()
    }


@pytest.mark.parametrize(
    ("after", "keeps"),
    [
        ([], ""),
        ([rule("dstports=8080 enabled=no")], ""),
        ([rule(f"dstports=8080 expire={NOW}")], ""),
        ([rule("dstports=8080 owner=office")], ""),
        ([rule("dstports=8080 path=sys-vpn,sys-net")], ""),
        ([rule("dstports=8081")], "keep 8081-8081 sys-net\n"),
        ([rule("srcports=80-81 dstports=8080-8081")], "keep 8080-8081 sys-net\n"),
        ([rule("dstports=8080 forwardtype=internal")], "keep 8080-8080 sys-firewall\n"),
        ([rule("dstports=8080", target="hidden")], ""),
        ([rule("dstports=8080 proto=udp")], "keep udp 8080-8080 sys-net\n"),
        ([rule("dstports=8080 proto=both")], None),
        ([WEB], None),
        ([rule("dstports=8080 autostart=yes")], None),
        ([rule("dstports=8080 srchosts=10.0.0.0/8")], None),
        ([rule("srcports=81 dstports=8080")], None),
        ([rule("dstports=8080 expire=2000000000 comment=x proxy=v2")], None),
        ([rule("dstports=8080", name="renamed")], None),
        ([rule("srcports=81 dstports=8080", name="other")], None),
    ],
)
def test_a_target_is_told_exactly_if_a_line_of_it_is_gone(after: list[NamedRule], keeps: str | None) -> None:
    backend = Memory(world())
    applied(backend, WEB)
    assert told(backend, *after) == ({} if keeps is None else {"work": f"{NOTHING}{keeps}"})


def test_what_another_rule_shares_or_allows_is_kept() -> None:
    backend = Memory(world())
    other = rule("srcports=81 dstports=8080", name="other")
    more = rule("srcports=1-2 transport=call", name="calls")
    applied(backend, WEB, other, more, rule("srcports=9", name="nine"))
    assert told(backend, other, more, rule("srcports=9", name="nine")) == {}
    assert told(backend, other, more) == {
        "work": f"{NOTHING}keep 1-1 sys-net\nkeep 2-2 sys-net\nkeep 8080-8080 sys-net\n"
    }


def test_single_calls_of_our_service_are_ended_too() -> None:
    backend = Memory(world())
    applied(backend, rule("transport=call"))
    (step,) = [step for step in steps(backend) if step.kind is Kind.REVOKE]
    assert views.words(step) == ["work: end connections that are not allowed any more"]


def test_calls_of_the_stock_service_cannot_be_ended() -> None:
    backend = Memory(world())
    applied(backend, SSH)
    assert told(backend) == {}


def test_a_halted_or_vanished_target_is_not_called() -> None:
    backend = Memory(world())
    applied(backend, WEB)
    inventory = backend.inventory()
    halted = inventory.qubes[WORK]._replace(is_running=False)
    gone = {name: qube for name, qube in inventory.qubes.items() if name != "work"}
    for other in (Inventory({**inventory.qubes, halted.name: halted}), Inventory(gone)):
        found = differences(plan([], other, NOW), other, backend.read_policy())
        assert Kind.REVOKE not in {step.kind for step in found}


def test_calls_of_a_rule_that_drains_have_an_hour() -> None:
    backend = Memory(world())
    draining = rule("dstports=8080 on-expire=drain")
    applied(backend, draining)
    drained = {"work": f"{NOTHING}drain 8080-8080 sys-net 3600\n"}
    assert told(backend) == drained
    assert told(backend, rule(f"dstports=8080 on-expire=drain expire={NOW}")) == drained
    assert told(backend, draining) == {}
    (step,) = [step for step in steps(backend) if step.kind is Kind.REVOKE]
    assert views.words(step) == [
        "work: end connections that are not allowed any more, but let those to port 8080 end by themselves"
    ]


@pytest.mark.parametrize("transport", ["call", "mux"])
def test_each_call_of_a_range_drains(transport: str) -> None:
    backend = Memory(world())
    applied(backend, rule(f"srcports=1-2 transport={transport} on-expire=drain"))
    lines = ["1-2"] if transport == "mux" else ["1-1", "2-2"]
    assert told(backend) == {"work": NOTHING + "".join(f"drain {ports} sys-net 3600\n" for ports in lines)}


def test_what_cuts_is_cut_also_where_another_rule_that_ends_too_would_drain() -> None:
    backend = Memory(world())
    applied(backend, WEB, rule("srcports=81 dstports=8080 on-expire=drain", name="other"))
    assert told(backend) == {"work": NOTHING}


def test_what_the_listener_was_told_and_nobody_can_read_is_cut() -> None:
    backend = Memory(world())
    applied(backend, rule("dstports=8080 on-expire=drain"))
    backend.qubes[QubeName("sys-net")][CONFIG] = "junk"
    assert told(backend) == {"work": NOTHING}
    del backend.qubes[QubeName("sys-net")][CONFIG]
    assert told(backend) == {"work": NOTHING}


def test_a_line_of_others_that_names_no_qube_is_told_to_all_that_serve() -> None:
    backend = Memory(world())
    backend.policy = "qubes.ForwardTCP * @anyvm @anyvm allow\n"
    assert sorted(told(backend)) == ["hidden", "vault", "work"]
    backend.policy = "qubes.ForwardTCP +22 personal work allow\n"
    assert told(backend, WEB) == {"work": f"{NOTHING}keep 8080-8080 sys-net\n"}


@pytest.mark.parametrize("service", ["qubes.ForwardUDP", "*"])
def test_a_line_of_others_about_udp_is_told_to_all_that_serve(service: str) -> None:
    backend = Memory(world())
    backend.policy = f"{service} +53 @anyvm @anyvm allow\n"
    assert sorted(told(backend)) == ["hidden", "vault", "work"]


def test_one_that_serves_udp_alone_is_told_too() -> None:
    features = {"supported-rpc.qubes.ForwardUDP": "1"}
    assert serving(world(qube("dns", features=features))) == {"hidden", "vault", "work", "dns"}


def test_calls_that_carry_udp_end_apart_from_those_that_carry_tcp() -> None:
    backend = Memory(world())
    applied(backend, WEB)
    backend.policy = f"qubes.ForwardUDP +8080+mux sys-net work allow\n{backend.policy}"
    assert told(backend, WEB) == {"work": f"{NOTHING}keep 8080-8080 sys-net\n"}
    config = backend.qubes[QubeName("sys-net")][CONFIG].replace("ForwardTCP", "ForwardUDP")
    backend.qubes[QubeName("sys-net")]["vm-config.udp.work.web"] = f"{config} on-expire=drain"
    drained = "keep 8080-8080 sys-net\ndrain udp 8080-8080 sys-net 3600\n"
    assert told(backend, WEB) == {"work": f"{NOTHING}{drained}"}
    assert told(backend) == {"work": f"{NOTHING}drain udp 8080-8080 sys-net 3600\n"}


@pytest.mark.parametrize(
    ("proto", "told_of"),
    [
        ("tcp", "keep 8080-8080 sys-net\ndrain udp 8080-8080 sys-net 3600\n"),
        ("udp", "keep udp 8080-8080 sys-net\ndrain 8080-8080 sys-net 3600\n"),
        ("both", None),
    ],
)
def test_a_rule_that_forwards_less_than_both_ends_the_rest(proto: str, told_of: str | None) -> None:
    backend = Memory(world())
    applied(backend, rule("dstports=8080 proto=both on-expire=drain"))
    after = rule(f"dstports=8080 proto={proto} on-expire=drain")
    assert told(backend, after) == ({} if told_of is None else {"work": NOTHING + told_of})
    assert told(backend) == {
        "work": f"{NOTHING}drain 8080-8080 sys-net 3600\ndrain udp 8080-8080 sys-net 3600\n"
    }


def test_udp_is_named_only_where_the_target_offers_it() -> None:
    """One that knows no UDP would refuse the whole list, and end nothing."""
    backend = Memory(world())
    both = rule("dstports=8080 proto=both on-expire=drain")
    applied(backend, both)
    del backend.qubes[QubeName("fedora-42")]["supported-rpc.qubes.ForwardUDP"]
    assert told(backend, both) == {"work": f"{NOTHING}drain 8080-8080 sys-net 3600\n"}


class OlderTarget(Memory):
    """Its target was started before the template had UDP, and refuses a list that names it."""

    def ask(
        self, qube: QubeName, service: str, max_bytes: int, timeout_s: float | None = None, given: str = ""
    ) -> bytes:
        if "udp" in given:
            self.log.append(f"refused {qube}")
            raise AnswerError("status 2", ExitStatus.BAD_ARGUMENT)
        return super().ask(qube, service, max_bytes, timeout_s, given)


@pytest.mark.parametrize("on_expire", ["cut", "drain"])
def test_one_that_runs_since_before_it_had_udp_is_told_of_tcp(on_expire: str) -> None:
    backend = OlderTarget(world())
    ssh, dns = rule("srcports=22", name="ssh"), rule(f"proto=udp on-expire={on_expire}", name="dns")
    applied(backend, WEB, ssh, dns)
    outcome = applied(backend, ssh, dns)
    assert backend.log[1:3] == ["refused work", "call work qubes.ForwardRevoke"]
    assert backend.given == {"work": f"{NOTHING}keep 22-22 sys-net\n"}
    assert outcome.ended == (Ended(WORK, 1),)
    applied(backend, dns)
    assert backend.given == {"work": NOTHING}
    applied(backend)
    assert backend.given == {"work": NOTHING}


def test_a_refusal_of_what_names_no_udp_is_the_last_word() -> None:
    backend = Memory(world())

    def refuse(entry: str) -> bool:
        backend.log.append(entry)
        raise AnswerError("status 2", ExitStatus.BAD_ARGUMENT)

    backend.refuses = refuse
    assert ended(backend) == Ended(WORK, problem="status 2")
    assert backend.log == ["call work qubes.ForwardRevoke"]


def test_more_than_a_target_reads_ends_everything() -> None:
    lines = [
        f"qubes.ForwardTCP +{port} a-name-that-is-as-long-as-can-b work allow" for port in range(1, 2000)
    ]
    assert str(allowances([WORK], lines)[WORK]) == "version=1 drains=cut\n"


def ended(backend: Memory) -> Ended:
    (found,) = revoke(allowances([WORK], ()), backend)
    return found


def test_what_a_target_has_ended_is_known() -> None:
    backend = Memory(world())
    backend.answer = b"version=1 ended=3 draining=1\n"
    assert ended(backend) == Ended(WORK, 3, 1)
    assert views.ended_words(ended(backend)) == "work: 1 call may go on for a while"
    assert views.ended_words(Ended(WORK, 3)) == ""


@pytest.mark.parametrize("error", [NotRunningError("down"), AnswerError("none", ExitStatus.NO_SERVICE)])
def test_where_nothing_can_live_nothing_is_wrong(error: StoreError) -> None:
    backend = Memory(world())

    def refuse(entry: str) -> bool:
        raise error

    backend.refuses = refuse
    assert ended(backend) == Ended(WORK)


@pytest.mark.parametrize("error", [AnswerError("status 3", 3), StoreError("no"), OSError(24, "too many")])
def test_a_target_that_is_not_reached_is_named_with_what_bounds_it(error: Exception) -> None:
    backend = Memory(world())

    def refuse(entry: str) -> bool:
        raise error

    backend.refuses = refuse
    found = ended(backend)
    assert found.problem is not None
    assert views.ended_words(found).endswith(
        "What is open to work may go on: over a mux call for at most 300 s, over a call of its own until it "
        "ends by itself or work is shut down"
    )


@pytest.mark.parametrize("answer", [b"", b"ended=1\n", b"version=2 ended=0 draining=0\n", b"\xff" * 200])
def test_an_answer_that_cannot_be_read_is_a_problem(answer: bytes) -> None:
    backend = Memory(world())
    backend.answer = answer
    assert ended(backend).problem is not None


def test_all_targets_are_told_at_once() -> None:
    together = Barrier(3, timeout=BOUND_S)

    class Slow(Memory):
        def ask(self, *args: object, **more: object) -> bytes:
            with waiting():
                together.wait()
            return self.answer

    names = [QubeName(name) for name in ("hidden", "vault", "work")]
    assert [found.target for found in revoke(allowances(names, ()), Slow(world()))] == names


def test_a_management_qube_is_not_told_by_itself_unless_calls_to_it_were_allowed() -> None:
    everywhere = {"hidden", "vault", "work"}
    assert serving(world()) == everywhere
    assert serving(world()._replace(here=WORK)) == everywhere - {"work"}
    line = "qubes.ForwardTCP +8080 sys-net work allow"
    assert targets_of([line], world()._replace(here=WORK)) == {"work"}


def test_targets_that_cannot_be_told_hold_up_nothing_and_are_a_trouble() -> None:
    backend = Memory(world())
    applied(backend, WEB)
    backend.refuses = lambda entry: entry.startswith("call")
    outcome = applied(backend, SSH)
    assert backend.log == [
        "policy 0",
        f"remove sys-net {CONFIG}",
        "policy 1",
        "set sys-net vm-config.fwd.personal.ssh",
    ]
    assert outcome.problems == ()
    assert len(views.troubles(outcome)) == 1
    assert (
        "cannot call work qubes.ForwardRevoke. What is open to work may go on" in views.troubles(outcome)[0]
    )
    backend.refuses = lambda entry: False
    assert steps(backend, SSH) == ()
    with pytest.raises(StoreError) as failure:
        views.check(outcome)
    assert "end connections" not in str(failure.value)
    assert "qvm-forward apply" not in str(failure.value)
