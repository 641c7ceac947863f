# SPDX-License-Identifier: GPL-2.0-or-later
"""What the window does, and says of it, is what the command line does and says."""

from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest
from answered import REPORT, listening
from answering import Answering
from faulty import Faulty, allowed
from test_status_clients import ONE
from worlds import ADD, NOW, Command, content

from qubes_fwd_qrexec.admin.backend import Backend, ChangedError
from qubes_fwd_qrexec.admin.seen import NotAsSeenError, Seen
from qubes_fwd_qrexec.admin.snapshot import look
from qubes_fwd_qrexec.admin.states import Key, NotOpenError
from qubes_fwd_qrexec.admin.views.connected import Client
from qubes_fwd_qrexec.common.clientreport import CutReport
from qubes_fwd_qrexec.common.errors import RefusedError, UsageError
from qubes_fwd_qrexec.common.options import Option
from qubes_fwd_qrexec.common.rules import ForwardRule
from qubes_fwd_qrexec.common.values import QubeName, RuleName
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.window.model import actions
from qubes_fwd_qrexec.window.model.actions import Done, error_lines

WORK, WEB = QubeName("work"), RuleName("web")
KEY: Key = (WORK, WEB)
RULE = ForwardRule.parse("action=forward srcports=80 dstports=8080 srchosts=192.168.0.0/16")
Act = Callable[[Backend], Done]


def seen(backend: Backend, key: Key = KEY) -> Seen:
    return Seen.of(look(backend), key)


def add(backend: Backend) -> Done:
    return actions.add(backend, NOW, WORK, RULE, WEB, seen(backend))


def edit(backend: Backend, *options: Option) -> Done:
    return actions.edit(backend, NOW, KEY, options, seen(backend))


CHANGES: list[tuple[list[tuple[str, ...]], Act, tuple[str, ...]]] = [
    ([], add, ADD),
    (
        [ADD],
        lambda backend: edit(backend, Option("comment", "x", ""), Option("expire", f"{NOW + 60}", "")),
        ("set", "work", "web", "comment=x", f"expire={NOW + 60}"),
    ),
    ([ADD], lambda backend: edit(backend, Option("comment", "", "")), ("set", "work", "web", "comment=")),
    (
        [(*ADD, "--expire", "1h")],
        lambda backend: actions.extend(backend, NOW, KEY, seen(backend), 300),
        ("set", "work", "web", "--extend", "5m"),
    ),
    ([ADD], lambda b: actions.disable(b, NOW, KEY, seen(b)), ("disable", "work", "web")),
    ([ADD], lambda b: actions.enable(b, NOW, KEY, seen(b)), ("enable", "work", "web")),
    ([(*ADD, "--disabled")], lambda b: actions.enable(b, NOW, KEY, seen(b)), ("enable", "work", "web")),
    ([ADD], lambda b: actions.confirm(b, NOW, KEY, seen(b)), ("confirm", "work", "web")),
    ([ADD], lambda b: actions.remove(b, NOW, {KEY: seen(b)}), ("remove", "work", "web")),
    ([ADD], lambda b: actions.apply(b, NOW), ("apply",)),
    ([(*ADD, "--no-apply")], lambda b: actions.apply(b, NOW), ("apply",)),
    ([ADD], lambda b: actions.mark(b, NOW, "sys-net"), ("tunnel", "mark", "sys-net")),
    ([ADD], lambda b: actions.mark(b, NOW, "nowhere"), ("tunnel", "mark", "nowhere")),
    ([ADD], lambda b: actions.cut(b, NOW, KEY, None), ("cut", "work", "web")),
    (
        [ADD, ("panic",)],
        lambda b: actions.resume(b, NOW, look(b).plan(NOW, is_held=False)),
        ("resume",),
    ),
    ([ADD], lambda b: actions.resume(b, NOW, look(b).plan(NOW)), ("resume",)),
]


def put_back(was: dict[str, str], now: dict[str, str]) -> None:
    for path in now.keys() - was.keys():
        Path(path).unlink()
    for path, text in was.items():
        if now.get(path) != text:
            Path(path).write_text(text)


@pytest.mark.parametrize(
    ("before", "act", "argv"),
    CHANGES,
    ids=[f"{'-'.join(argv[:1])}{n}" for n, (_, _, argv) in enumerate(CHANGES)],
)
def test_the_window_does_and_says_what_the_command_line_does(
    before: list[tuple[str, ...]],
    act: Act,
    argv: tuple[str, ...],
    forward: Command,
    store: Backend,
    lab: LabDirectory,
) -> None:
    for command in before:
        forward(*command)
    was = content(lab)
    done, found = act(store), content(lab)
    put_back(was, found)
    result = forward(*argv)
    assert done.lines == tuple(result.out.splitlines())
    heads = ("qvm-forward: ", f"qvm-forward {argv[0]}: ")
    said = result.err.splitlines()
    assert all(line.startswith(heads) for line in said)
    assert done.warnings == tuple(line.partition(": ")[2] for line in said)
    assert done.is_well is (result.status == 0)
    assert found == content(lab)


@pytest.mark.parametrize(
    "act",
    [
        lambda b, saw: actions.edit(b, NOW, KEY, [Option("comment", "b", "")], saw),
        lambda b, saw: actions.extend(b, NOW, KEY, saw, 60),
        lambda b, saw: actions.enable(b, NOW, KEY, saw),
        lambda b, saw: actions.disable(b, NOW, KEY, saw),
        lambda b, saw: actions.confirm(b, NOW, KEY, saw),
        lambda b, saw: actions.remove(b, NOW, {KEY: saw}),
    ],
    ids=["edit", "extend", "enable", "disable", "confirm", "remove"],
)
def test_what_is_no_longer_as_the_user_saw_it_is_left_alone_and_both_are_shown(
    act: Callable[[Backend, Seen], Done], store: Backend, forward: Command, lab: LabDirectory
) -> None:
    forward(*ADD, "--expire", "1h")
    saw = seen(store)
    forward("set", "work", "web", "comment=a")
    before = content(lab)
    with pytest.raises(NotAsSeenError) as refused:
        act(store, saw)
    first, second = error_lines(refused.value)
    assert "it is not what you saw, but 'action=forward" in first
    assert "comment=a" in first
    assert second == f"You saw: {saw.line}"
    assert content(lab) == before


def test_a_rule_that_somebody_else_has_added_is_left_alone(store: Backend, forward: Command) -> None:
    saw = seen(store)
    forward("add", "work", "81", "--from", "any", "--name", "web")
    with pytest.raises(NotAsSeenError) as refused:
        actions.add(store, NOW, WORK, RULE, WEB, saw)
    (line,) = error_lines(refused.value)
    assert line.startswith("work web was not added: there is one already")


def test_a_netvm_that_changed_after_the_user_agreed_is_not_agreed_to(
    store: Backend, forward: Command, lab: LabDirectory
) -> None:
    forward(*ADD)
    saw = seen(store)
    lab.write_qube(replace(lab.qube("work"), netvm=QubeName("sys-net")))
    with pytest.raises(NotAsSeenError) as refused:
        actions.confirm(store, NOW, KEY, saw)
    (line,) = error_lines(refused.value)
    assert line.endswith(
        "the netvms of work were sys-firewall - sys-net when you looked, and are sys-net now"
    )


def test_a_refusal_says_why_and_what_helps(store: Backend, forward: Command) -> None:
    with pytest.raises(NotOpenError) as refused:
        actions.add(store, NOW, QubeName("vault"), RULE, WEB, seen(store, (QubeName("vault"), WEB)))
    said = forward("add", "vault", "80:8080", "--from", "192.168.0.0/16", "--name", "web").err
    assert error_lines(refused.value) == (said.removeprefix("qvm-forward add: ").rstrip("\n"),)


def test_a_value_that_is_wrong_names_its_option(store: Backend, forward: Command) -> None:
    forward(*ADD)
    with pytest.raises(UsageError) as error:
        edit(store, Option("srcports", "x", "Port"))
    assert error.value.options == ("srcports",)
    assert "Port" in error_lines(error.value)[0]


def test_rules_of_several_qubes_are_removed_in_one_change(
    store: Backend, forward: Command, lab: LabDirectory
) -> None:
    forward(*ADD)
    forward("add", "personal", "81", "--from", "any", "--name", "wiki")
    lab.set_feature("work", "forward.Bad", "nonsense")
    keys: list[Key] = [(WORK, "Bad"), (QubeName("personal"), "wiki")]
    done = actions.remove(store, NOW, {key: seen(store, key) for key in keys})
    assert done.is_well
    assert done.lines == (
        "Forward work Bad is removed and closed.",
        "Forward personal wiki is removed and closed.",
    )
    assert [key for key in lab.features("work") if key.startswith("forward.")] == ["forward.web"]
    assert len(allowed(lab)) == 1


def test_what_is_stored_and_not_in_force_is_no_error(lab: LabDirectory) -> None:
    done = add(Faulty(lab, "set sys-net"))
    assert not done.is_well
    assert any(
        line.startswith("The change is stored, but not everything could be done") for line in done.warnings
    )
    assert lab.feature("work", "forward.web") is not None


def test_what_cannot_be_read_once_the_change_is_stored_is_no_error(lab: LabDirectory) -> None:
    class Lost(Faulty):
        """A system whose policy somebody changes, and whose qubes cannot be read any more then."""

        def replace_policy(self, text: str, token: str) -> None:
            self._refused = ("inventory",)
            raise ChangedError("the policy")

    done = add(Lost(lab))
    assert done == Done((), ("The change is stored, but cannot inventory",), is_well=False)


def test_one_client_is_cut_by_its_address_and_port(lab: LabDirectory, over: Command) -> None:
    lab.set_feature("sys-net", "service.qubes-forward-listener", "1")
    cut = "qubes.ForwardCut+fwd.work.web"
    backend = Answering(
        lab, {("sys-net", "qubes.ForwardStatus+"): listening(REPORT), ("sys-net", cut): CutReport(1)}
    )
    over(backend, *ADD)
    one = Client(QubeName("sys-net"), replace(ONE, address=ip_address("fd00::5"), port=99))
    done = actions.cut(backend, NOW, KEY, one)
    assert done.is_well
    assert done.lines[0].startswith("Cut 1 connection of work web from [fd00::5]:99. ")
    assert [asked.given for asked in backend.asked if asked.service == cut] == ["[fd00::5]:99\n"]
    backend.says["sys-net", cut] = CutReport(0)
    done = actions.cut(backend, NOW, KEY, None)
    assert (done.lines, done.is_well) == ((), False)
    assert done.warnings == (
        "nobody is connected to work web; 'qvm-forward status work --clients' shows who is",
    )


def test_resume_opens_no_more_than_was_shown(store: Backend, forward: Command, lab: LabDirectory) -> None:
    forward(*ADD)
    forward("panic")
    shown = look(store).plan(NOW, is_held=False)
    forward("add", "personal", "81", "--from", "any", "--name", "wiki")
    with pytest.raises(RefusedError) as refused:
        actions.resume(store, NOW, shown)
    assert error_lines(refused.value) == (
        "nothing was opened: personal wiki would not open as you were shown",
    )
    assert not allowed(lab)


def test_an_error_of_a_file_names_it() -> None:
    assert error_lines(PermissionError(13, "Permission denied", "/x")) == ("/x: Permission denied",)
    assert error_lines(PermissionError(13, "Permission denied")) == ("Permission denied",)
