# SPDX-License-Identifier: GPL-2.0-or-later
"""Changes as values: what they refuse, what they return, and what the commands make of it."""

from dataclasses import replace

import pytest
from memory import Memory
from worlds import ADD, NOW, Command, content, world

from qubes_fwd_qrexec.admin import changing
from qubes_fwd_qrexec.admin.apply import Outcome
from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.changing import System
from qubes_fwd_qrexec.admin.snapshot import ByName, look
from qubes_fwd_qrexec.admin.states import Cause, NotOpenError, State
from qubes_fwd_qrexec.common.errors import RefusedError, UsageError
from qubes_fwd_qrexec.common.options import Option
from qubes_fwd_qrexec.common.report import ListenerReport, Problem, QubeReport, dump
from qubes_fwd_qrexec.common.rules import ForwardRule
from qubes_fwd_qrexec.common.services import REVOKE_SERVICE
from qubes_fwd_qrexec.common.values import QubeName, RuleName
from qubes_fwd_qrexec.lab.directory import LabDirectory

WORK, VAULT, WEB = QubeName("work"), QubeName("vault"), RuleName("web")
RULE = ForwardRule.parse("action=forward srcports=80 srchosts=any")
HELPS = "; 'qvm-forward diagnose work web' says what helps"
HELD = dump(
    QubeReport(
        program="1",
        listener=ListenerReport(
            since=1, forwards=(), problems=(Problem("fwd.work.web", "the port is in use by nginx"),)
        ),
    ).as_json()
)


def options(**texts: str) -> list[Option]:
    return [Option(name, text, f"option {name!a}") for name, text in texts.items()]


def test_a_change_returns_what_was_and_what_is(store: Backend) -> None:
    added = changing.add(System(store, NOW), WORK, RULE, WEB)
    assert (added.keys, added.plan_before.forwards, added.is_applied) == (((WORK, WEB),), (), True)
    disabled = changing.disable(System(store, NOW), ByName("work", ["web"]))
    assert disabled.plan_before.forwards == tuple(added.forwards)
    assert [forward.state for forward in disabled.forwards] == [State.DISABLED]
    removed = changing.remove(System(store, NOW, is_applied=False), ByName("work", ["web"]))
    assert (removed.forwards, removed.plan.forwards, removed.outcome) == ([], (), Outcome())


def test_a_system_with_a_change_still_knows_where_this_program_runs(store: Backend) -> None:
    snapshot = look(store)
    inside = snapshot._replace(inventory=snapshot.inventory._replace(here=VAULT))
    assert inside.changed({(WORK, WEB): str(RULE)}).inventory.here == VAULT


def test_what_is_refused_names_the_rule_and_its_finding(store: Backend, lab: LabDirectory) -> None:
    changing.add(System(store, NOW), WORK, RULE, WEB)
    before = content(lab)
    with pytest.raises(NotOpenError) as refused:
        changing.add(System(store, NOW), VAULT, replace(RULE, via=QubeName("sys-net")))
    assert (refused.value.finding.cause, refused.value.forward.named.target) == (Cause.CONFLICT, "vault")
    assert content(lab) == before


def test_what_would_be_closed_for_good_is_not_added(store: Backend, lab: LabDirectory) -> None:
    before = content(lab)
    with pytest.raises(NotOpenError) as refused:
        changing.add(System(store, NOW), VAULT, RULE)
    assert refused.value.finding.cause is Cause.NO_NETVM
    assert content(lab) == before


def test_what_is_closed_already_may_be_changed_but_not_into_what_is_closed_elsewhere_or_otherwise(
    store: Backend, lab: LabDirectory
) -> None:
    changing.add(System(store, NOW), WORK, RULE, WEB)
    store.set_feature(WORK, "forward.web", f"{replace(RULE, owner=WORK, via=QubeName('fedora-42'))}")
    changed = changing.set_options(System(store, NOW), ByName("work", ["web"]), options(comment="x"))
    assert [forward.cause for forward in changed.forwards] == [Cause.UNFIT_QUBE]
    for via, cause in (("debian-12", Cause.UNFIT_QUBE), ("nowhere", Cause.NO_SUCH_QUBE)):
        with pytest.raises(NotOpenError) as refused:
            changing.set_options(System(store, NOW), ByName("work", ["web"]), options(via=via))
        assert refused.value.finding.cause is cause
    large = "action=forward srcports=1000-1300 srchosts=any transport=call owner=work"
    store.set_feature(WORK, "forward.web", large)
    with pytest.raises(NotOpenError) as refused:
        changing.set_options(System(store, NOW), ByName("work", ["web"]), options(mode="nft", transport=""))
    assert refused.value.finding.cause is Cause.NFT_SWITCHED_OFF


def test_what_is_closed_until_somebody_confirms_it_is_not_refused(store: Backend) -> None:
    changing.add(System(store, NOW), WORK, RULE, WEB)
    changed = changing.set_options(System(store, NOW), ByName("work", ["web"]), options(path="personal"))
    assert [forward.cause for forward in changed.forwards] == [Cause.NETVM_CHANGED]


@pytest.mark.parametrize(
    ("texts", "wrong"),
    [
        ({"expire": "soon"}, ("expire",)),
        ({"bogus": "1"}, ("bogus",)),
        ({"bogus": ""}, ("bogus",)),
        ({"srcports": "80-81"}, ("srcports", "dstports")),
        ({"srchosts": ""}, ("srchosts",)),
        ({"listen": "::1", "srchosts": "10.0.0.0/8"}, ("listen", "srchosts")),
    ],
)
def test_an_error_has_the_names_of_the_options_that_are_wrong(
    store: Backend, texts: dict[str, str], wrong: tuple[str, ...]
) -> None:
    changing.add(System(store, NOW), WORK, RULE, WEB)
    with pytest.raises(UsageError) as error:
        changing.set_options(System(store, NOW), ByName("work", ["web"]), options(**texts))
    assert error.value.options == wrong


def test_a_rule_that_is_over_already_is_not_added(store: Backend) -> None:
    with pytest.raises(UsageError) as error:
        changing.add(System(store, NOW), WORK, replace(RULE, expire=NOW))
    assert error.value.options == ("expire",)


def test_set_refuses_if_the_rule_is_no_longer_what_the_user_saw(forward: Command, lab: LabDirectory) -> None:
    forward(*ADD)
    seen = lab.feature("work", "forward.web") or ""
    assert forward("set", "work", "web", "comment=a", "--was", seen).status == 0
    before = content(lab)
    result = forward("set", "work", "web", "comment=b", "--was", seen)
    assert (result.status, result.out) == (1, "")
    now = lab.feature("work", "forward.web")
    assert f"work web was not changed: it is not what you saw, but '{now}'" in result.err
    assert content(lab) == before
    # The order of the options does not matter.
    other = " ".join(sorted((now or "").replace(" comment=a", "").split())) + " comment=a"
    assert forward("set", "work", "web", "comment=b", "--was", other).status == 0
    result = forward("set", "work", "web", "comment=c", "--was", "nonsense")
    assert (
        result.status,
        "--was: 'nonsense' at column 1: an option is written name=value" in result.err,
    ) == (
        2,
        True,
    )


def test_several_rules_change_all_or_none(store: Backend, lab: LabDirectory) -> None:
    changing.add(System(store, NOW), WORK, RULE, WEB)
    before = content(lab)
    with pytest.raises(RefusedError, match="has no forward 'other', only web"):
        changing.disable(System(store, NOW), ByName("work", ["web", "other"]))
    assert content(lab) == before


def test_only_what_differs_is_written() -> None:
    memory = Memory(world())
    for name, port in (("web", 80), ("ssh", 22)):
        line = ForwardRule.parse(f"action=forward srcports={port} srchosts=any")
        changing.add(System(memory, NOW), WORK, line, RuleName(name))
    changing.disable(System(memory, NOW), ByName("work", ["ssh"]))
    memory.log.clear()
    changed = changing.disable(System(memory, NOW), ByName(None, ["*"]))
    assert [name for _, name in changed.keys] == ["ssh", "web"]
    assert [entry for entry in memory.log if " forward." in entry] == ["set work forward.web"]


def test_the_json_of_a_removal_says_what_was_removed_and_ended(forward: Command) -> None:
    forward(*ADD)
    data = forward("remove", "work", "web", "--json").json
    assert data["removed"] == [{"qube": "work", "name": "web"}]
    assert (data["forwards"], data["applied"], data["goes_on"]) == ([], True, [])
    assert "close-policy" in [step["step"] for step in data["steps"]]


def test_a_change_tells_it_and_does_not_fail(
    forward: Command, store: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked: list[bool] = []

    def answer(store: Backend, qube: QubeName, service: str, *_: object) -> bytes:
        if service == REVOKE_SERVICE:
            return b"version=1 ended=0 draining=0\n"
        with store.locked():  # or else this would be waited for in vain
            locked.append(True)
        return HELD

    monkeypatch.setattr(type(store), "ask", answer)
    note = f"Note: sys-net does not have it open: the port is in use by nginx{HELPS}.\n"
    added = forward(*ADD)
    assert (added.status, note in added.out) == (0, True)
    changed = forward("set", "work", "web", "comment=x", "--json")
    assert (changed.status, changed.json["forwards"][0]["warnings"][0]) == (0, note[6:-2])
    for words in (("disable", "work", "web"), ("set", "work", "web", "comment=y", "--no-apply")):
        locked.clear()
        assert "Note: sys-net" not in forward(*words).out
        assert not locked
    assert note in forward("enable", "work", "web").out
    assert note in forward("confirm", "work", "web").out
