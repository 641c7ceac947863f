# SPDX-License-Identifier: GPL-2.0-or-later
"""What qubes say of forwards by nft, and that a rule goes over qrexec only when its packets are stopped."""

from dataclasses import replace

import pytest
from memory import NO_FORWARDS, Memory, applied
from worlds import NOW, nft_world, qube, rule

from qubes_fwd_qrexec.admin import nftpath, policy
from qubes_fwd_qrexec.admin.answers import AnswerError, NotRunningError
from qubes_fwd_qrexec.admin.apply import Kind
from qubes_fwd_qrexec.admin.backend import PolicyFile
from qubes_fwd_qrexec.admin.confirming import (
    Lack,
    Unconfirmed,
    ask_all,
    forwarding,
    judged,
    unconfirmed,
    widens,
)
from qubes_fwd_qrexec.admin.hold import hold
from qubes_fwd_qrexec.admin.inventory import Inventory
from qubes_fwd_qrexec.common.config import Side
from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.common.nftconfig import NftConfig
from qubes_fwd_qrexec.common.nftreport import NftReport, PathReport, Why
from qubes_fwd_qrexec.common.report import Problem
from qubes_fwd_qrexec.common.services import NFT_SERVICE
from qubes_fwd_qrexec.common.values import QubeName, Sources

WORK, FIREWALL, NET = PATH = (QubeName("work"), QubeName("sys-firewall"), QubeName("sys-net"))
BY_NFT, OVER_QREXEC = rule("mode=nft"), rule("mode=qrexec")
KEY, FEATURE = "nft.work.web", "vm-config.nft.work.web"
CONFIGS = dict(nftpath.configs(BY_NFT, Sources.parse("any"), PATH, Side.OUTER, nft_world()))
CONFIG = CONFIGS[NET]


def reports(config: NftConfig = CONFIG, **more: object) -> NftReport:
    """A qube that has the forward in force."""
    forward = PathReport(key=KEY, digest=config.digest)
    return replace(NO_FORWARDS, forwards=(replace(forward, **more),))


def by_nft() -> Memory:
    """A system in which the forward goes by nft, though its rule says otherwise now."""
    backend = Memory(nft_world())
    for name, config in CONFIGS.items():
        backend.qubes[name][FEATURE] = str(config)
    return backend


@pytest.mark.parametrize(
    ("answer", "lack"),
    [
        (reports(), None),
        (NotRunningError("halted"), None),
        (NO_FORWARDS, Lack.NOT_IN_FORCE),
        (reports(digest="0" * 16), Lack.OTHER_IN_FORCE),
        (replace(NO_FORWARDS, problem="nft: it hangs"), Lack.NO_WORD),
        (replace(NO_FORWARDS, left_out=1), Lack.NO_WORD),
        (reports(digest=None, why=Why.NO_TABLE), Why.NO_TABLE),
        (reports(digest=None, why=Why.FAILED), Why.FAILED),
        (replace(reports(), versions=frozenset((4,))), Lack.NO_FAMILY),
        (AnswerError("no", ExitStatus.NO_SERVICE), Lack.NO_SERVICE),
        (AnswerError("it hangs"), Lack.NO_ANSWER),
    ],
)
def test_a_forward_is_in_force_where_the_qube_says_exactly_that(
    answer: NftReport | AnswerError, lack: str | None
) -> None:
    found = judged(NET, KEY, CONFIG, answer)
    assert (None if found is None else found.lack) == lack
    assert found is None or found.is_opening


@pytest.mark.parametrize(
    ("answer", "lack"),
    [
        (NO_FORWARDS, None),
        (NotRunningError("halted"), None),
        (reports(digest=None, why=Why.OVER), None),
        (AnswerError("no", ExitStatus.NO_SERVICE), None),
        (reports(), Lack.STILL_IN_FORCE),
        (reports(digest="0" * 16), Lack.STILL_IN_FORCE),
        (reports(digest=None, why=Why.OVER, draining=True), Lack.DRAINS),
        # Where nft fails, what was there may be there still.
        (replace(NO_FORWARDS, problem="nft: it hangs"), Lack.STILL_IN_FORCE),
        # It may be among those that are not named.
        (replace(NO_FORWARDS, left_out=1), Lack.STILL_IN_FORCE),
        (replace(reports(digest=None, why=Why.OVER), left_out=1), None),
        (AnswerError("it hangs"), Lack.NO_ANSWER),
    ],
)
def test_a_forward_is_closed_where_the_qube_says_so_or_cannot_have_it(
    answer: NftReport | AnswerError, lack: str | None
) -> None:
    found = judged(NET, KEY, None, answer)
    assert (None if found is None else found.lack) == lack
    assert found is None or not found.is_opening


def test_why_a_configuration_is_refused_is_what_the_qube_says() -> None:
    answer = replace(NO_FORWARDS, refused=(Problem(key=KEY, text="option 'x': unknown"),))
    assert judged(NET, KEY, CONFIG, answer) == Unconfirmed(
        NET, KEY, Lack.NOT_IN_FORCE, True, "option 'x': unknown"
    )


def test_each_qube_is_asked_once_and_only_where_it_is_about_packets() -> None:
    backend = by_nft()
    backend.reports = {NET: reports(), WORK: reports(CONFIGS[WORK])}
    told: dict[tuple[QubeName, str], str | None] = {(qube, KEY): str(CONFIGS[qube]) for qube in PATH}
    told |= {(NET, "nft.work.other"): None, (WORK, "fwd.work.web"): "x"}
    assert [(each.qube, each.lack) for each in unconfirmed(told, backend)] == [(FIREWALL, Lack.NOT_IN_FORCE)]
    assert sorted(backend.log) == [f"call {qube} qubes.ForwardNft" for qube in sorted(PATH)]
    backend.log.clear()
    assert unconfirmed({(WORK, "fwd.work.web"): None}, backend) == ()
    assert backend.log == []


def test_an_answer_that_cannot_be_read_confirms_nothing() -> None:
    backend = Memory(nft_world())
    backend.reports[NET] = replace(NO_FORWARDS, program="\x00")
    assert isinstance(ask_all(backend, [NET])[NET], AnswerError)


def test_a_rule_that_changes_to_qrexec_opens_when_all_have_confirmed_that_packets_are_stopped() -> None:
    backend = by_nft()
    outcome = applied(backend, OVER_QREXEC)
    assert outcome.problems == ()
    sets = [f"set {qube} {FEATURE}" for qube in (NET, FIREWALL, WORK)]
    removes = [f"remove {qube} {FEATURE}" for qube in (NET, FIREWALL, WORK)]
    calls = [f"call {qube} qubes.ForwardNft" for qube in PATH]
    assert backend.log[1:4] == sets
    assert sorted(backend.log[4:7]) == sorted(calls)
    assert backend.log[7:] == [*removes, "policy 1", "set sys-net vm-config.fwd.work.web"]


def test_until_then_it_stays_closed_and_every_apply_asks_again() -> None:
    backend = by_nft()
    backend.reports[FIREWALL] = reports(CONFIGS[FIREWALL])
    for _ in range(2):
        outcome = applied(backend, OVER_QREXEC)
        (problem,) = outcome.problems
        assert problem.startswith(
            "sys-firewall has not confirmed that nft.work.web is closed. The forward opens"
        )
        assert not any(step.opens for step in outcome.done)
        over = NftConfig.parse(KEY, backend.qubes[NET][FEATURE])
        assert (over.expire, over.on_expire) == (1, "cut")
    backend.reports[FIREWALL] = reports(digest=None, why=Why.OVER)
    outcome = applied(backend, OVER_QREXEC)
    assert outcome.problems == ()
    assert Kind.OPEN_POLICY in {step.kind for step in outcome.done}
    assert not any(FEATURE in features for features in backend.qubes.values())


def test_what_is_closed_anyway_waits_for_nobody() -> None:
    backend = by_nft()
    backend.reports[FIREWALL] = AnswerError("it hangs")
    outcome = applied(backend, rule("mode=qrexec enabled=no"))
    assert outcome.problems == ()
    assert [step.qube for step in outcome.done if step.kind is Kind.REMOVE_CONFIG] == [NET, FIREWALL, WORK]


def test_a_qube_that_cannot_be_told_closes_the_forward_everywhere() -> None:
    for refused in (f"set sys-net {FEATURE}", f"set sys-firewall {FEATURE}", f"set work {FEATURE}"):
        backend = Memory(nft_world())
        backend.refuses = refused.__eq__
        outcome = applied(backend, BY_NFT)
        assert outcome.problems == (f"cannot {refused}",)
        assert not any(FEATURE in features for features in backend.qubes.values())


def test_what_is_narrowed_is_narrowed_from_the_exposed_qube_before_anything_opens() -> None:
    backend = Memory(nft_world())
    applied(backend, rule("mode=nft srchosts=10.0.0.0/8"))
    outcome = applied(
        backend, rule("mode=nft srchosts=10.0.0.0/9"), rule("mode=nft srcports=81", name="more")
    )
    assert outcome.problems == ()
    more = "vm-config.nft.work.more"
    assert backend.log == [
        *(f"set {qube} {FEATURE}" for qube in (NET, FIREWALL, WORK)),
        *(f"set {qube} {more}" for qube in PATH),
    ]
    backend.refuses = f"set sys-firewall {FEATURE}".__eq__
    outcome = applied(backend, rule("mode=nft srchosts=10.0.0.0/10"))
    assert outcome.problems == (f"cannot set sys-firewall {FEATURE}",)
    assert not any(FEATURE in features for features in backend.qubes.values())


def test_packets_are_stopped_though_no_qube_can_be_told_what_is_allowed_now() -> None:
    backend = Memory(nft_world())
    applied(backend, rule("mode=nft srchosts=10.0.0.0/8"))
    backend.refuses = lambda entry: entry.startswith("set ") or entry == f"remove sys-firewall {FEATURE}"
    outcome = applied(backend, rule("mode=nft srchosts=10.0.0.0/9"))
    assert f"cannot remove sys-firewall {FEATURE}" in outcome.problems
    # The others of its path have closed it.
    assert [qube for qube in PATH if FEATURE in backend.qubes[qube]] == [FIREWALL]
    assert outcome.told == {(NET, KEY): None, (WORK, KEY): None}


class Unreadable(Memory):
    """dom0's policy cannot be read any more, so everything may be on hold."""

    is_readable = True

    def read_policy(self) -> PolicyFile:
        if not self.is_readable:
            raise StoreError("cannot read policy")
        return super().read_policy()


@pytest.mark.parametrize(
    ("now", "is_told"),
    [
        ("srchosts=10.0.0.0/9 expire=1893456000", True),
        ("srchosts=10.0.0.0/8 expire=1893455000", True),
        ("srchosts=10.0.0.0/7 expire=1893456000", False),
        ("srchosts=11.0.0.0/9 expire=1893456000", False),
        ("srchosts=10.0.0.0/8 expire=1893457000", False),
        ("srchosts=10.0.0.0/8", False),
    ],
)
def test_where_everything_may_be_on_hold_no_more_packets_are_let_through(now: str, is_told: bool) -> None:
    backend = Unreadable(nft_world())
    applied(backend, rule("mode=nft srchosts=10.0.0.0/8 expire=1893456000"))
    backend.is_readable = False
    outcome = applied(backend, rule(f"mode=nft {now}"))
    assert list(outcome.told) == [(qube, KEY) for qube in (NET, FIREWALL, WORK)] * is_told
    assert "dom0's policy cannot be read, and stays as it is: cannot read policy" in outcome.problems


def test_what_a_qube_cannot_have_read_lets_nothing_through_yet() -> None:
    assert widens(KEY, "version=0", str(CONFIG))


class HeldMeanwhile(Memory):
    """Somebody puts everything on hold while the qubes are being read."""

    def inventory(self, *, with_config: bool = True) -> Inventory:
        if self.policy is None:
            self.policy = policy.hold_text(NOW)
        return super().inventory(with_config=with_config)


def test_no_packet_passes_once_everything_is_held() -> None:
    backend = HeldMeanwhile(nft_world())
    outcome = applied(backend, BY_NFT)
    assert not any(step.opens for step in outcome.done)
    assert not any(entry.startswith("set ") for entry in backend.log)


class Meanwhile(Memory):
    """Somebody without the lock closes everything just before the next configuration is set: they hold it, or
    they remove the rule.
    """

    closing = ""

    def set_feature(self, qube: QubeName, key: str, value: str) -> None:
        closing, self.closing = self.closing, ""
        if closing == "hold":
            self.policy = policy.hold_text(NOW)
        elif closing == "remove":
            self.remove_feature(WORK, "forward.web")
        for told in PATH if closing else ():
            self.remove_feature(told, FEATURE)
        super().set_feature(qube, key, value)


@pytest.mark.parametrize("closing", ["hold", "remove"])
@pytest.mark.parametrize("before", ["10.0.0.0/9", ""])
def test_what_others_closed_meanwhile_does_not_stay_open(closing: str, before: str) -> None:
    backend = Meanwhile(nft_world())
    if before:
        applied(backend, rule(f"mode=nft srchosts={before}"))
    backend.closing = closing
    outcome = applied(backend, rule("mode=nft srchosts=10.0.0.0/8"))
    assert (outcome.problems, backend.closing) == ((), "")
    assert not any(FEATURE in features for features in backend.qubes.values())
    assert set(outcome.told.values()) == {None}


def test_a_hold_asks_also_qubes_that_cannot_be_read() -> None:
    unread = (qube("strange", problem="no"), qube("halted", problem="no", is_running=False))
    assert {"strange", "halted"} & forwarding(nft_world(*unread)) == {"strange"}


@pytest.mark.parametrize(
    "answer", [replace(NO_FORWARDS, problem="nft: no"), replace(NO_FORWARDS, left_out=1)]
)
def test_a_hold_counts_on_no_answer_that_may_not_tell_all(answer: NftReport) -> None:
    backend = Memory(nft_world())
    backend.reports[NET] = answer
    (doubt,) = hold(backend, NOW).doubts
    assert (doubt.qube, doubt.lack) == (NET, Lack.STILL_IN_FORCE)
    assert doubt.said in ("nft: no", "its answer leaves out 1 forwards")


class Draining(Memory):
    """Qubes that let connections finish, until they are told that their forward is over and cuts."""

    def ask(self, qube: QubeName, service: str, *_: object, **__: object) -> bytes:
        if service == NFT_SERVICE and FEATURE in self.qubes[qube]:
            told = NftConfig.parse(KEY, self.qubes[qube][FEATURE])
            assert (told.expire, told.on_expire) == (1, "cut")
            self.reports[qube] = reports(digest=None, why=Why.OVER)
        return super().ask(qube, service, 1 << 16)


def test_a_hold_ends_what_may_finish_after_its_time() -> None:
    backend = Draining(nft_world())
    drains = reports(digest=None, why=Why.OVER, draining=True)
    backend.reports = {WORK: drains, NET: drains, FIREWALL: AnswerError("it hangs")}
    held = hold(backend, NOW)
    assert [(doubt.qube, doubt.lack) for doubt in held.doubts] == [(FIREWALL, Lack.NO_ANSWER)]
    assert (held.is_held, held.problems) == (True, ())
    assert not any(FEATURE in features for features in backend.qubes.values())


def test_what_cannot_be_told_may_finish_still() -> None:
    backend = Draining(nft_world())
    drains = reports(digest=None, why=Why.OVER, draining=True)
    backend.reports = {WORK: drains, FIREWALL: drains}
    backend.refuses = lambda entry: entry.startswith("set work ")
    held = hold(backend, NOW)
    assert {(doubt.qube, doubt.lack) for doubt in held.doubts} >= {(WORK, Lack.DRAINS)}
    assert held.problems == (f"packets: cut the connections that may finish: cannot set work {FEATURE}",)
    # The others are told all the same.
    assert f"set sys-firewall {FEATURE}" in backend.log
    assert not any(FEATURE in features for features in backend.qubes.values())


def test_a_qube_that_names_more_than_it_has_keeps_no_other_from_being_told() -> None:
    backend = Draining(nft_world(qube("a-liar", features={"service.qubes-forward-nft": "1"})))
    drains = PathReport(key=KEY, why=Why.OVER, draining=True)
    lies = tuple(replace(drains, key=f"nft.work.web-{number}") for number in range(200))
    backend.reports = {
        "a-liar": replace(NO_FORWARDS, forwards=lies),
        WORK: reports(digest=None, draining=True),
    }
    held = hold(backend, NOW)
    assert WORK not in {doubt.qube for doubt in held.doubts}
    assert len({doubt.key for doubt in held.doubts}) == 200


def test_a_system_that_cannot_be_planned_is_closed_all_the_same() -> None:
    backend = Memory(nft_world())
    applied(backend, BY_NFT)
    strange = nft_world(nft_world().qubes[FIREWALL]._replace(ip="nowhere"))
    broken = Memory(strange)
    broken.qubes = backend.qubes
    held = hold(broken, NOW)
    assert held.is_held
    assert held.problems[0].startswith("a bug in qvm-forward: ")
    assert not any(FEATURE in features for features in broken.qubes.values())


class Unremovable(Memory):
    """A qube, the exposed one, of which nothing can be taken away."""

    def remove_feature(self, qube: QubeName, key: str) -> None:
        if qube == NET:
            raise StoreError(f"{qube}: no answer")
        super().remove_feature(qube, key)


def test_where_nothing_can_be_planned_a_qube_that_cannot_be_told_keeps_no_other() -> None:
    backend = Memory(nft_world())
    applied(backend, BY_NFT)
    broken = Unremovable(nft_world(nft_world().qubes[FIREWALL]._replace(ip="nowhere")))
    broken.qubes = backend.qubes
    held = hold(broken, NOW)
    assert [qube for qube, features in broken.qubes.items() if FEATURE in features] == [NET]
    assert held.problems[1] == f"{NET}: remove {FEATURE}: {NET}: no answer"
