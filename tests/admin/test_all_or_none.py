# SPDX-License-Identifier: GPL-2.0-or-later
"""Several rules are stored or none; and each command that changes something has the lock for itself."""

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from faulty import Faulty
from memory import Memory, applied
from stages import Stage
from worlds import ADD, Command, content, rule, world

from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.common.exchange import parse_lines
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.lab.directory import LabDirectory

RULES = "".join(f"work r{i} action=forward srcports={80 + i} srchosts=any\n" for i in range(4))


class Failing:
    """A backend's writes fail: the one of the named qube and key, or all from that one on."""

    def __init__(self, store: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
        self._store: Any = type(store)
        self._monkeypatch = monkeypatch

    def __call__(
        self, at: str, *, is_for_good: bool = False, takes_effect: bool = False, only_removals: bool = False
    ) -> None:
        """``takes_effect``: what is set is set, and fails all the same."""
        real_set, real_remove = self._store.set_feature, self._store.remove_feature
        failed: list[str] = []

        def fails(entry: str) -> bool:
            if (entry == at and not failed) or (failed and is_for_good):
                failed.append(entry)
                return True
            return False

        def set_feature(store: Backend, qube: QubeName, key: str, value: str) -> None:
            is_failing = not only_removals and fails(f"{qube} {key}")
            if takes_effect or not is_failing:
                real_set(store, qube, key, value)
            if is_failing:
                raise StoreError("qubesd is gone")

        def remove_feature(store: Backend, qube: QubeName, key: str) -> None:
            if fails(f"{qube} {key}"):
                raise StoreError("qubesd is gone")
            real_remove(store, qube, key)

        self._monkeypatch.setattr(self._store, "set_feature", set_feature)
        self._monkeypatch.setattr(self._store, "remove_feature", remove_feature)


@pytest.fixture
def failing(store: Backend, monkeypatch: pytest.MonkeyPatch) -> Failing:
    return Failing(store, monkeypatch)


def test_what_cannot_be_put_back_is_named_with_the_way_out(forward: Command, failing: Failing) -> None:
    failing("work forward.r2", is_for_good=True)
    result = forward("import", "-", stdin=RULES)
    assert result.status == 1
    assert result.err == (
        "qvm-forward import: qubesd is gone.\n"
        "Not undone, and in force with the next 'qvm-forward apply':\n"
        "  work r0 (new)\n  work r1 (new)\n"
        "'qvm-forward remove' removes what is new, 'qvm-forward import --replace' restores the rest\n"
    )


def test_where_nothing_may_be_written_nothing_is_left_to_be_put_back(
    forward: Command, lab: LabDirectory, failing: Failing
) -> None:
    before = content(lab)
    failing("work forward.web", is_for_good=True)
    result = forward(*ADD)
    assert (result.status, result.err) == (1, "qvm-forward add: qubesd is gone\n")
    assert content(lab) == before


def test_an_interrupt_leaves_no_half(forward: Command, over: Command, lab: LabDirectory) -> None:
    assert forward("import", "-", stdin=RULES).status == 0
    before = content(lab)
    interrupted: list[str] = []

    def interrupt(entry: str) -> None:
        if entry == "set work forward.r2" and not interrupted:
            interrupted.append(entry)
            raise KeyboardInterrupt

    result = over(Faulty(lab, before=interrupt), "disable", "work", "r0", "r1", "r2", "r3")
    assert (result.status, result.out) == (130, "")
    assert result.err == "qvm-forward disable: interrupted: nothing was changed\n"
    assert content(lab) == before


@pytest.fixture
def _heard() -> Iterator[None]:
    """SIGINT interrupts, also where it is ignored, as in what a script has started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_heard")
def test_who_presses_ctrl_c_twice_leaves_no_half_either(
    forward: Command, over: Command, lab: LabDirectory
) -> None:
    assert forward("import", "-", stdin=RULES).status == 0
    before = content(lab)
    done: list[str] = []

    def interrupt(entry: str) -> None:
        done.append(entry)
        if "set work forward.r2" in done:
            os.kill(os.getpid(), signal.SIGINT)

    result = over(Faulty(lab, before=interrupt), "disable", "work", "r0", "r1", "r2", "r3")
    assert result.status == 130
    assert result.err == "qvm-forward disable: interrupted: nothing was changed\n"
    assert done[-3:] == [f"set work forward.r{number}" for number in range(3)]
    assert content(lab) == before


@pytest.mark.parametrize(
    ("at", "left"),
    [
        ("inventory", "nothing was changed"),
        (
            "policy",
            "the change is stored, and not all of it may be in force; 'qvm-forward apply' completes it",
        ),
        ("judge", "the change is stored, and in force; 'qvm-forward status' shows what came of it"),
    ],
)
def test_whoever_interrupts_a_change_hears_what_is_left_of_it(
    forward: Command, over: Command, lab: LabDirectory, at: str, left: str
) -> None:
    def interrupt(entry: str) -> None:
        if entry.startswith(at):
            raise KeyboardInterrupt

    result = over(Faulty(lab, before=interrupt), *ADD)
    assert (result.status, result.out) == (130, "")
    assert result.err == f"qvm-forward add: interrupted: {left}\n"
    is_stored = lab.feature("work", "forward.web") is not None
    assert is_stored == ("stored" in left)
    assert forward("apply").status == 0
    assert ("web" in forward("list").out) == is_stored


def test_of_a_change_that_is_held_nobody_hears_that_it_is_in_force(
    forward: Command, over: Command, lab: LabDirectory
) -> None:
    class Interrupted(Faulty):
        def unwatched(self) -> str | None:
            raise KeyboardInterrupt

    forward(*ADD)
    assert forward("panic").status == 0
    result = over(Interrupted(lab), "disable", "work", "web")
    assert result.err == (
        "qvm-forward disable: interrupted: the change is stored, and everything is held; "
        "'qvm-forward status' shows what came of it\n"
    )


def test_a_rule_and_a_mark_that_cannot_be_put_back_are_told_with_what_they_were(
    forward: Command, lab: LabDirectory, failing: Failing
) -> None:
    forward(*ADD)
    old = lab.feature("work", "forward.web")
    failing("work forward.zz", is_for_good=True)
    text = "sys-vpn tunnel yes\n" + "".join(
        f"work {name} action=forward srcports={port} srchosts=any\n"
        for name, port in (("web", 90), ("zz", 91))
    )
    result = forward("import", "--replace", stdin=text)
    assert result.err.splitlines()[2:-1] == ["  sys-vpn tunnel no", f"  work web {old}"]
    read = parse_lines("".join(f"{line.strip()}\n" for line in result.err.splitlines()[2:-1]))
    assert ([str(entry.rule) for entry in read.rules], read.tunnels) == ([old], {"sys-vpn": False})


@pytest.mark.parametrize("takes_effect", [False, True])
def test_each_is_put_back_though_one_cannot_be(
    forward: Command, lab: LabDirectory, failing: Failing, takes_effect: bool
) -> None:
    """The first of those to be put back is one; the rest are taken away all the same."""
    failing("work forward.r2", takes_effect=takes_effect)
    failing("work forward.r0", only_removals=True)
    result = forward("import", "-", stdin=RULES)
    assert sorted(key for key in lab.features("work") if key.startswith("forward.")) == ["forward.r0"]
    assert "\n  work r0 (new)\n" in result.err
    assert "work r1" not in result.err


@pytest.mark.parametrize("takes_effect", [False, True])
@pytest.mark.parametrize("at", ["r0", "r2", "r3"])
def test_nothing_is_stored_if_one_write_fails_whether_it_took_effect_or_not(
    forward: Command, lab: LabDirectory, failing: Failing, takes_effect: bool, at: str
) -> None:
    before = content(lab)
    failing(f"work forward.{at}", takes_effect=takes_effect)
    result = forward("import", "-", stdin=RULES)
    assert (result.status, result.err) == (1, "qvm-forward import: qubesd is gone\n")
    assert content(lab) == before


def test_a_replaced_rule_is_again_what_it_was_if_a_later_write_fails(
    forward: Command, lab: LabDirectory, failing: Failing
) -> None:
    forward(*ADD)
    before = content(lab)
    failing("work forward.z", takes_effect=True)
    text = (
        "work web action=forward srcports=90 srchosts=any\nwork z action=forward srcports=91 srchosts=any\n"
    )
    assert forward("import", "--replace", stdin=text).status == 1
    assert content(lab) == before


def test_removed_rules_are_there_again_if_one_cannot_be_removed(
    forward: Command, lab: LabDirectory, failing: Failing
) -> None:
    forward(*ADD)
    forward("add", "work", "81", "--from", "any", "--name", "more")
    before = content(lab)
    failing("work forward.more")
    assert forward("remove", "work", "web", "more").status == 1
    assert content(lab) == before


def test_a_listener_that_may_not_have_heard_is_told_again_what_it_was_told() -> None:
    class Deaf(Memory):
        """It keeps what it is told, and says that it could not be told."""

        def set_feature(self, qube: QubeName, key: str, value: str) -> None:
            super().set_feature(qube, key, value)
            if "10.0.0.0/8" in value:
                raise StoreError("not delivered")

    backend = Deaf(world())
    applied(backend, rule())
    before = dict(backend.qubes[QubeName("sys-net")])
    outcome = applied(backend, rule("srchosts=10.0.0.0/8"))
    assert outcome.problems[0] == "not delivered"
    assert backend.qubes[QubeName("sys-net")] == before
    assert backend.log[:2] == ["set sys-net vm-config.fwd.work.web"] * 2


CHANGING = [
    ("add", "work", "81", "--from", "any"),
    ("set", "work", "web", "comment=x"),
    ("remove", "work", "web"),
    ("enable", "work", "web"),
    ("disable", "work", "web"),
    ("confirm", "work", "web"),
    ("apply",),
    ("tunnel", "mark", "sys-firewall"),
    ("tunnel", "unmark", "sys-firewall"),
    ("import", "-"),
]


@pytest.mark.parametrize("argv", CHANGING, ids=lambda argv: " ".join(argv[:2]))
def test_a_command_that_changes_something_waits_for_the_lock_and_names_who_has_it(
    forward: Command,
    over: Command,
    store: Backend,
    impatient: Backend,
    lab: LabDirectory,
    argv: tuple[str, ...],
) -> None:
    forward(*ADD, "--no-apply")
    lab.set_feature("sys-firewall", "forward.tunnel", "1" if "unmark" in argv else "")
    before = content(lab)
    with store.locked():
        result = over(impatient, *argv, stdin="version 2\nwork z action=forward srcports=9 srchosts=any\n")
        assert result.status == 1
        assert "another program changes this lab" in result.err or "another qvm-forward is" in result.err
        assert content(lab) == before
        assert forward("list").status == 0


@pytest.mark.parametrize("argv", CHANGING, ids=lambda argv: " ".join(argv[:2]))
def test_what_a_command_changes_it_changes_under_the_lock(
    forward: Command, over: Command, lab: LabDirectory, argv: tuple[str, ...]
) -> None:
    forward(*ADD, "--no-apply")
    lab.set_feature("sys-firewall", "forward.tunnel", "1" if "unmark" in argv else "")

    def look(entry: str) -> None:
        # What became of it, such as that another policy file denies it, may be read without the lock.
        if entry.split()[0] in ("policy", "set", "remove", "call"):
            with pytest.raises(StoreError, match="another program"), lab.locked(0):
                pass

    backend = Faulty(lab, before=look)
    over(backend, *argv)
    assert backend.log[0] == "lock"
    assert len(backend.log) > 2


def test_watch_changes_nothing_while_somebody_else_has_the_lock(stage: Stage) -> None:
    held = stage.lab.locked()
    held.__enter__()
    opened_at: list[bool] = []

    def let_go() -> None:
        opened_at.append(stage.is_open)
        if len(opened_at) == 2:
            held.__exit__(None, None, None)

    stage.on_rest = let_go
    stage.run()
    assert opened_at == [False, False]
    assert stage.is_open
    first, last = stage.err.getvalue().splitlines()
    assert first.endswith("another program changes this lab")
    assert last == "qvm-forward: all is well again"
