# SPDX-License-Identifier: GPL-2.0-or-later
"""What the user saw is what is changed: if anything else is there, nothing is stored, and he is told both."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from worlds import ADD, NOW, Command

from qubes_fwd_qrexec.admin import changing
from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.changing import Changed, System
from qubes_fwd_qrexec.admin.importing import import_document
from qubes_fwd_qrexec.admin.seen import NotAsSeenError, Seen
from qubes_fwd_qrexec.admin.snapshot import look
from qubes_fwd_qrexec.admin.states import Key
from qubes_fwd_qrexec.common.exchange import parse_lines
from qubes_fwd_qrexec.common.options import Option
from qubes_fwd_qrexec.common.rules import ForwardRule
from qubes_fwd_qrexec.common.values import QubeName, RuleName
from qubes_fwd_qrexec.lab.directory import LabDirectory

WORK, WEB = QubeName("work"), RuleName("web")
KEY: Key = (WORK, WEB)
RULE = ForwardRule.parse("action=forward srcports=80 srchosts=any")

CHANGES: dict[str, Callable[[System], Changed]] = {
    "changed": lambda system: changing.set_options(system, [KEY], [Option("comment", "x", "comment")]),
    "enabled": lambda system: changing.enable(system, [KEY]),
    "disabled": lambda system: changing.disable(system, [KEY]),
    "confirmed": lambda system: changing.confirm(system, [KEY]),
    "removed": lambda system: changing.remove(system, [KEY]),
}


@pytest.fixture
def seen(forward: Command, store: Backend) -> Seen:
    """A rule as it was shown."""
    assert forward(*ADD).status == 0
    return Seen.of(look(store), KEY)


def refused(store: Backend, seen: Seen, change: Callable[[System], Changed]) -> NotAsSeenError:
    """What is said, after nothing was stored."""
    before = look(store).stored
    with pytest.raises(NotAsSeenError) as error:
        change(System(store, NOW, seen={KEY: seen}))
    assert look(store).stored == before
    return error.value


@pytest.mark.parametrize("done", CHANGES)
def test_what_is_as_the_user_saw_it_is_changed(seen: Seen, store: Backend, done: str) -> None:
    CHANGES[done](System(store, NOW, seen={KEY: seen}))


@pytest.mark.parametrize("done", CHANGES)
def test_no_change_meets_a_rule_that_another_one_has_changed(
    seen: Seen, store: Backend, lab: LabDirectory, done: str
) -> None:
    line = f"{lab.feature('work', 'forward.web')} comment=other"
    store.set_feature(WORK, "forward.web", line)
    error = refused(store, seen, CHANGES[done])
    assert str(error) == f"work web was not {done}: it is not what you saw, but '{line}'"
    assert (error.key, error.saw, error.now) == (KEY, seen, Seen(line, seen.netvms))


@pytest.mark.parametrize("done", CHANGES)
def test_no_change_meets_a_rule_whose_netvms_have_changed(
    seen: Seen, store: Backend, lab: LabDirectory, done: str
) -> None:
    lab.write_qube(replace(lab.qube("work"), netvm=QubeName("sys-vpn")))
    error = refused(store, seen, CHANGES[done])
    assert str(error) == (
        f"work web was not {done}: the netvms of work were sys-firewall - sys-net when you looked, and "
        "are sys-vpn - sys-firewall - sys-net now"
    )
    assert error.now.netvms == ("sys-vpn", "sys-firewall", "sys-net")
    lab.write_qube(replace(lab.qube("work"), netvm=None))
    assert str(refused(store, seen, CHANGES[done])).endswith(
        "sys-firewall - sys-net when you looked, and are none now"
    )


@pytest.mark.parametrize("done", CHANGES)
def test_no_change_meets_a_rule_that_is_gone(seen: Seen, store: Backend, done: str) -> None:
    store.remove_feature(WORK, "forward.web")
    error = refused(store, seen, CHANGES[done])
    assert str(error) == f"work web was not {done}: it no longer exists"
    assert error.now == Seen(None, seen.netvms)


def add(system: System) -> Changed:
    return changing.add(system, WORK, RULE, WEB)


def test_a_rule_is_added_with_the_netvms_that_the_user_saw(store: Backend, lab: LabDirectory) -> None:
    seen = Seen.of(look(store), KEY)
    assert seen == Seen(None, (QubeName("sys-firewall"), QubeName("sys-net")))
    lab.write_qube(replace(lab.qube("work"), netvm=QubeName("sys-net")))
    error = refused(store, seen, add)
    assert str(error).startswith("work web was not added: the netvms of work were")
    (added,) = add(System(store, NOW, seen={KEY: error.now})).forwards
    assert added.named.rule.path == ("sys-net",)


def test_a_rule_that_was_made_meanwhile_is_not_added_again(seen: Seen, store: Backend) -> None:
    error = refused(store, seen._replace(line=None), add)
    assert str(error) == f"work web was not added: there is one already, '{seen.line}'"


def test_an_import_is_refused_for_a_rule_that_is_not_as_it_was_seen(seen: Seen, store: Backend) -> None:
    document = parse_lines(f"version 2\nwork ssh {RULE}\n")
    gone = seen._replace(line=None)
    refused(store, gone, lambda system: import_document(system, document).changed)


def test_a_rule_that_cannot_be_read_is_removed_only_as_it_was_seen(store: Backend) -> None:
    store.set_feature(WORK, "forward.WEB", "broken ~")
    key: Key = (WORK, "WEB")
    seen = Seen.of(look(store), key)
    assert seen.line == "broken ~"
    with pytest.raises(NotAsSeenError, match=r"work WEB was not removed: .* but 'broken ~'"):
        changing.remove(System(store, NOW, seen={key: seen._replace(line="broken")}), [key])
    assert changing.remove(System(store, NOW, seen={key: seen}), [key]).keys == (key,)


def test_rules_of_several_qubes_are_removed_or_switched_together_or_not_at_all(
    seen: Seen, store: Backend
) -> None:
    store.set_feature(QubeName("personal"), "forward.ssh", f"{RULE}")
    other: Key = (QubeName("personal"), "ssh")
    both = {KEY: seen, other: Seen.of(look(store), other)}
    assert changing.disable(System(store, NOW, seen={KEY: seen}), [*both]).keys == (KEY, other)
    before = look(store).stored
    for change in (changing.enable, changing.remove):
        with pytest.raises(NotAsSeenError):
            change(System(store, NOW, seen=both), [*both])
        assert look(store).stored == before
    both = {key: Seen.of(look(store), key) for key in both}
    assert changing.remove(System(store, NOW, seen=both), [*both]).keys == (KEY, other)
    assert not look(store).stored
