# SPDX-License-Identifier: GPL-2.0-or-later
"""What a preview shows is what the change does, or is refused for."""

from dataclasses import replace

import pytest
from worlds import NOW, content, world

from qubes_fwd_qrexec.admin import changing
from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.changing import System
from qubes_fwd_qrexec.admin.hold import hold
from qubes_fwd_qrexec.admin.snapshot import NewLines, Snapshot, look, read_rules
from qubes_fwd_qrexec.admin.states import Cause, NotOpenError, State
from qubes_fwd_qrexec.common.options import split
from qubes_fwd_qrexec.common.rules import ForwardRule, Mode, NamedRule
from qubes_fwd_qrexec.common.values import QubeName, RuleName
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.window.model.preview import preview

WORK, VAULT, WEB = QubeName("work"), QubeName("vault"), RuleName("web")
RULE = ForwardRule.parse("action=forward srcports=80 srchosts=any")
BY_QREXEC = replace(RULE, mode=Mode.QREXEC)


def test_a_preview_shows_what_add_would_open_and_stores_nothing(store: Backend, lab: LabDirectory) -> None:
    before = content(lab)
    snapshot = look(store)
    seen = preview(snapshot, NOW, changing.new_rule(snapshot, NOW, WORK, RULE))
    assert (seen.forward.state, seen.forward.exposed, seen.problem) == (State.ACTIVE, "sys-net", None)
    assert content(lab) == before
    added = changing.add(System(store, NOW), WORK, RULE)
    assert (added.forwards, added.decisions) == ([seen.forward], {(WORK, "tcp-80"): seen.decision})


def test_a_mode_that_is_given_is_no_decision(store: Backend) -> None:
    snapshot = look(store)
    named = changing.new_rule(snapshot, NOW, WORK, BY_QREXEC)
    assert preview(snapshot, NOW, named).decision is None


def test_a_preview_names_what_keeps_a_new_rule_closed(store: Backend) -> None:
    snapshot = look(store)
    refused = preview(snapshot, NOW, changing.new_rule(snapshot, NOW, VAULT, RULE))
    assert refused.problem == refused.forward.decisive
    assert (refused.forward.state, refused.forward.cause) == (State.REFUSED, Cause.NO_NETVM)


# What is stored first, what is changed of it, and what that is refused for.
EDITS = [
    ("", "comment=x", None),
    ("", "via=vault", None),
    ("", "via=gone", Cause.NO_SUCH_QUBE),
    ("", "srcports=81", Cause.CONFLICT),
    ("enabled=no", "srcports=81", None),
    ("enabled=no", "via=gone", Cause.NO_SUCH_QUBE),
    ("", "via=gone enabled=no", None),
    ("via=gone", "comment=x", None),
    ("via=gone", "via=away", Cause.NO_SUCH_QUBE),
    ("path=personal", "comment=x", None),
]


@pytest.mark.parametrize(("stored", "edit", "cause"), EDITS)
def test_a_preview_of_a_change_has_a_problem_where_the_change_is_refused(
    store: Backend, stored: str, edit: str, cause: Cause | None
) -> None:
    store.set_feature(WORK, "forward.web", f"{BY_QREXEC} owner=work {stored}".strip())
    store.set_feature(WORK, "forward.other", f"{BY_QREXEC} owner=work".replace("80-80", "81-81"))
    snapshot = look(store)
    old = snapshot.stored[WORK, WEB]
    assert isinstance(old, NamedRule)
    options = list(split(edit))
    rule = changing.changed_rule(snapshot.inventory, NOW, old, options)
    seen = preview(snapshot, NOW, old._replace(rule=rule))
    assert seen == preview(snapshot, NOW, old._replace(rule=rule), snapshot.plan(NOW))
    assert (seen.problem and seen.problem.cause) == cause
    if cause is None:
        (changed,) = changing.set_options(System(store, NOW), [(WORK, WEB)], options).forwards
        assert changed == seen.forward
    else:
        with pytest.raises(NotOpenError) as refused:
            changing.set_options(System(store, NOW), [(WORK, WEB)], options)
        assert refused.value.finding == seen.problem


def test_what_is_held_is_previewed_as_held_and_as_refused_where_it_would_be(store: Backend) -> None:
    hold(store, NOW)
    snapshot = look(store)
    assert snapshot.is_held
    named = (changing.new_rule(snapshot, NOW, qube, RULE) for qube in (WORK, VAULT))
    fine, refused = (preview(snapshot, NOW, each) for each in named)
    assert (fine.forward.state, fine.problem) == (State.HELD, None)
    assert refused.problem == refused.forward.decisive
    assert refused.forward.cause is Cause.NO_NETVM


def test_a_snapshot_with_changes_is_as_if_it_was_read_so() -> None:
    inventory = world()
    before = Snapshot(inventory, read_rules(inventory))
    lines = {
        (QubeName("work"), "web"): f"{RULE} owner=work",
        (QubeName("personal"), "x"): "nonsense",
        (QubeName("hidden"), "a"): str(RULE),
        (QubeName("work"), "tunnel"): "1",
    }
    each: NewLines
    for each in ({}, lines, dict.fromkeys(lines), {(QubeName("work"), "web"): str(RULE)}):
        before = before.changed(each)
        assert list(before.stored.items()) == list(read_rules(before.inventory).items())
