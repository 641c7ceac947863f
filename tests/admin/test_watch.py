# SPDX-License-Identifier: GPL-2.0-or-later
"""The loop over a lab and its real news, where each wait that would last ends by the next act of a script."""

import io
import json
import os
import signal
import socket
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from worlds import ADD, NOW, Command, Hands, rule

from qubes_fwd_qrexec.admin import policy
from qubes_fwd_qrexec.admin.backend import Changes
from qubes_fwd_qrexec.admin.clock import Alarm
from qubes_fwd_qrexec.admin.ending import Ending
from qubes_fwd_qrexec.admin.inventory import Inventory
from qubes_fwd_qrexec.admin.labstore import LabStore
from qubes_fwd_qrexec.admin.plan import plan
from qubes_fwd_qrexec.admin.render import Style
from qubes_fwd_qrexec.admin.session import Session
from qubes_fwd_qrexec.admin.watch import (
    BURST_S,
    QUIET_S,
    RETRY_FIRST_S,
    Watcher,
    _ready,
    differing,
    next_end,
    states,
    watch,
)
from qubes_fwd_qrexec.errors import StoreError
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.qube import QubeState
from qubes_fwd_qrexec.rules import BrokenRule
from qubes_fwd_qrexec.values import QubeName

Act = Callable[[], object]
END: Act = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
CONFIG = "vm-config.fwd.work.web"


class SilentAlarm(Alarm):
    """An alarm that remembers what it was set to, and never rings."""

    def __init__(self) -> None:
        super().__init__()
        self.wall: float | None = None

    def set(self, wall: float | None) -> None:
        self.wall = wall


class Played:
    """The news of a lab; where nothing would come, the next act is played, and at last SIGTERM."""

    def __init__(self, stage: "Stage", inner: Changes) -> None:
        self._stage = stage
        self._inner = inner

    def wait(self, timeout_s: float | None) -> bool:
        stage = self._stage
        stage.waits.append(timeout_s)
        stage.alarms_at_waits.append(stage.alarm.wall)
        if stage.news_trouble is not None:
            raise StoreError(stage.news_trouble)
        if self._inner.wait(0):
            return True
        if timeout_s is None:
            stage.play()
            return self._inner.wait(0)
        return False


class Stage(LabStore):
    """A lab as the backend of a `Watcher`, with the time in the test's hands.

    ``looks`` has one entry for each look at the inventory, the number of acts that had been played by then.
    """

    def __init__(self, lab: LabDirectory) -> None:
        super().__init__(lab)
        self.lab = lab
        self.hands = Hands()
        self.looks: list[int] = []
        self.waits: list[float | None] = []
        self.alarms_at_waits: list[float | None] = []
        self.rests: list[float] = []
        self.news_trouble: str | None = None
        self.trouble: str | None = None
        self.on_rest: Act = lambda: None
        self.out, self.err = io.StringIO(), io.StringIO()
        self.alarms: list[float | None] = []
        self._acts: list[Act] = []
        self._played = 0
        self.alarm: SilentAlarm

    def inventory(self, *, with_config: bool = True) -> Inventory:
        self.looks.append(self._played)
        if self.trouble is not None:
            raise StoreError(self.trouble)
        return super().inventory(with_config=with_config)

    def changes(self, wakers: Sequence[int] = ()) -> "PlayedContext":
        assert len(wakers) == 2
        return PlayedContext(self, super().changes(wakers))

    def play(self) -> None:
        self.alarms.append(self.alarm.wall)
        self._played += 1
        (self._acts.pop(0) if self._acts else END)()

    def _rest(self, descriptors: Iterable[int], timeout_s: float) -> None:
        self.rests.append(timeout_s)
        self.hands.pass_by(timeout_s)
        self.on_rest()

    def run(self, *acts: Act, is_json: bool = False) -> None:
        """Watch until all acts have been played and nothing is left to be done."""
        self._acts = list(acts)
        session = Session(self, 0.0, {}, io.StringIO(), self.out, self.err, Style(), is_json)
        with Ending() as ending, SilentAlarm() as alarm:
            self.alarm = alarm
            Watcher(
                session,
                self.hands.clock(),
                alarm,
                ending,
                elapsed=lambda: self.hands.elapsed,
                rest=self._rest,
            ).run()

    @property
    def is_open(self) -> bool:
        """In policy and at the listener alike."""
        is_allowed = bool(policy.allowing(self.read_policy().text or ""))
        assert is_allowed == (CONFIG in self.lab.features("sys-net"))
        return is_allowed


class PlayedContext(AbstractContextManager[Played]):
    def __init__(self, stage: Stage, inner: AbstractContextManager[Changes]) -> None:
        self._stage = stage
        self._inner = inner

    def __enter__(self) -> Played:
        return Played(self._stage, self._inner.__enter__())

    def __exit__(self, *_: object) -> None:
        self._inner.__exit__(None, None, None)


@pytest.fixture
def stage(lab: LabDirectory, forward: Command) -> Stage:
    """A lab with one rule, not yet applied."""
    assert forward(*ADD, "--no-apply").status == 0
    return Stage(lab)


def set_netvm(lab: LabDirectory, netvm: str | None = None) -> None:
    lab.write_qube(replace(lab.qube("work"), netvm=None if netvm is None else QubeName(netvm)))


def test_it_applies_when_it_starts(stage: Stage) -> None:
    assert not stage.is_open
    stage.run()
    assert stage.is_open


def test_a_netvm_that_changes_closes_the_forward_and_says_so(stage: Stage) -> None:
    stage.run(lambda: set_netvm(stage.lab))
    assert not stage.is_open
    lines = stage.out.getvalue().splitlines()
    assert lines[0].startswith("policy: from now on qubes.ForwardTCP +8080+tunnel sys-net work allow")
    assert lines[1].startswith("sys-net: listen for fwd.work.web: ")
    assert lines[2].startswith(
        "work web was active and is suspended. The netvms of work were sys-firewall - "
    )
    assert lines[3].startswith("policy: no longer qubes.ForwardTCP +8080+tunnel sys-net work allow")
    assert lines[-1] == "sys-net: stop listening for fwd.work.web"
    assert stage.err.getvalue() == ""


def test_it_settles_after_one_more_look(stage: Stage) -> None:
    stage.run(lambda: set_netvm(stage.lab), lambda: set_netvm(stage.lab, "sys-firewall"))
    assert stage.is_open
    assert stage.looks == [0, 0, 1, 1, 2, 2]


def test_a_burst_is_one_reconciliation(stage: Stage) -> None:
    def burst() -> None:
        for _ in range(25):
            set_netvm(stage.lab)
            set_netvm(stage.lab, "sys-firewall")

    stage.run(burst)
    assert stage.looks == [0, 0, 1]
    assert stage.out.getvalue().count("\n") == 2  # what it did when it started


def test_news_that_never_ends_is_cut_short(stage: Stage) -> None:
    looked_after_s: list[float] = []
    waited_s: list[float] = []
    inventory = stage.inventory

    class Endless(Played):
        def wait(self, timeout_s: float | None) -> bool:
            if timeout_s is None:
                waited_s.clear()
            else:
                assert timeout_s <= QUIET_S
                assert sum(waited_s) + timeout_s <= BURST_S + 0.001
                waited_s.append(0.15)
                stage.hands.pass_by(0.15)
            return True

    def look(*, with_config: bool = True) -> Inventory:
        looked_after_s.append(stage.hands.elapsed)
        if len(looked_after_s) == 4:
            END()
        return inventory()

    stage.inventory = look  # type: ignore[method-assign]
    stage.changes = lambda wakers=(): FakeContext(Endless(stage, None))  # type: ignore[method-assign, assignment, arg-type]
    stage.run()
    gaps = [later - earlier for earlier, later in pairwise(looked_after_s)]
    assert all(BURST_S <= gap <= BURST_S + 0.15 for gap in gaps)


class FakeContext(AbstractContextManager[Changes]):
    def __init__(self, changes: Changes) -> None:
        self._changes = changes

    def __enter__(self) -> Changes:
        return self._changes

    def __exit__(self, *_: object) -> None:
        pass


def test_a_policy_file_that_somebody_edits_is_written_again(stage: Stage) -> None:
    path = stage.lab.policy_dir / f"{policy.NAME}.policy"
    stage.run(lambda: path.write_text("* * @anyvm @anyvm allow\n"))
    assert stage.is_open
    assert policy.is_same(path.read_text(), policy.text(plan_of(stage), NOW))


def plan_of(stage: Stage) -> object:
    session = Session(stage, NOW, {}, io.StringIO(), io.StringIO(), io.StringIO(), Style(), False)
    return session.look().plan(NOW)


def test_listeners_that_somebody_else_configured_are_removed(stage: Stage) -> None:
    stage.run(lambda: stage.lab.set_feature("personal", "vm-config.fwd.old.rule", "x"))
    assert "vm-config.fwd.old.rule" not in stage.lab.features("personal")


def test_what_was_left_half_done_is_finished(stage: Stage) -> None:
    stage.run()
    path = stage.lab.policy_dir / f"{policy.NAME}.policy"
    path.unlink()  # closed, and killed before the listener was told
    set_netvm(stage.lab)
    stage.run()
    assert not stage.is_open


# Time


@pytest.fixture
def expiring(stage: Stage) -> Stage:
    """The rule ends in an hour."""
    line = stage.lab.features("work")["forward.web"]
    stage.lab.set_feature("work", "forward.web", f"{line} expire={NOW + 3600}")
    return stage


def test_a_rule_ends_at_its_time(expiring: Stage) -> None:
    expiring.run(lambda: expiring.hands.pass_by(3599.9), lambda: expiring.hands.pass_by(0.1))
    assert not expiring.is_open
    assert expiring.alarms == [NOW + 3600, NOW + 3600, None]
    assert "work web was active and is expired." in expiring.out.getvalue()


def test_a_rule_ends_in_time_though_the_clock_was_set_back(expiring: Stage) -> None:
    hands = expiring.hands

    def set_back() -> None:
        hands.wall -= 7200

    expiring.run(set_back, lambda: hands.pass_by(3600))
    assert not expiring.is_open
    assert expiring.alarms == [NOW + 3600, NOW + 3600 - 7200, None]
    assert expiring.err.getvalue() == (
        "qvm-forward: the clock was set back by 7200 s; rules end as if it had not been, until "
        "'qvm-forward watch' starts again\n"
    )


def test_a_rule_ends_when_the_machine_resumes_after_its_time(expiring: Stage) -> None:
    def suspend() -> None:
        expiring.hands.elapsed += 4000  # and the wall clock is not right yet

    expiring.run(suspend)
    assert not expiring.is_open


def test_a_rule_ends_when_the_clock_is_set_past_its_end(expiring: Stage) -> None:
    def set_forward() -> None:
        expiring.hands.wall += 4000

    expiring.run(set_forward)
    assert not expiring.is_open


def test_an_end_that_comes_while_it_works_is_not_slept_over(expiring: Stage) -> None:
    inventory = expiring.inventory

    def slow(*, with_config: bool = True) -> Inventory:
        if not expiring.looks:
            expiring.hands.pass_by(4000)
        return inventory()

    expiring.inventory = slow  # type: ignore[method-assign]
    expiring.run()
    assert expiring.alarms_at_waits[0] == NOW + 3600  # that is past: it rings at once


def test_a_new_end_is_noticed(expiring: Stage) -> None:
    line = expiring.lab.features("work")["forward.web"]

    def sooner() -> None:
        new = line.replace(f"expire={NOW + 3600}", f"expire={NOW + 60}")
        expiring.lab.set_feature("work", "forward.web", new)

    expiring.run(sooner, lambda: expiring.hands.pass_by(60))
    assert not expiring.is_open
    assert expiring.alarms == [NOW + 3600, NOW + 60, None]


def test_only_the_ends_of_enabled_rules_to_come_are_waited_for(stage: Stage) -> None:
    rules = [
        rule("expire=1"),
        rule(f"expire={NOW}", name="now"),
        rule(f"expire={NOW + 5} enabled=no", name="disabled"),
        rule(f"expire={NOW + 20}", name="later"),
        rule(f"expire={NOW + 10}", name="next", target="nowhere"),
        rule(name="never"),
    ]
    assert next_end(plan(rules, stage.inventory(), NOW), NOW) == NOW + 10
    assert next_end(plan([], stage.inventory(), NOW), NOW) is None


# Troubles


def test_a_trouble_is_told_once_and_tried_again_ever_more_slowly(stage: Stage) -> None:
    stage.trouble = "qubesd is away\nfor \x1b[1mnow"

    def after() -> None:
        if len(stage.rests) == 9:
            stage.trouble = None

    stage.on_rest = after
    stage.run()
    assert stage.is_open
    assert set(stage.rests) == {RETRY_FIRST_S}
    assert stage.err.getvalue() == (
        "qvm-forward: qubesd is away\nqvm-forward: for \\x1b[1mnow\nqvm-forward: all is well again\n"
    )
    tried_again_after = [RETRY_FIRST_S + wait for wait in stage.waits[:12] if wait not in (None, QUIET_S)]
    assert tried_again_after == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_a_change_in_trouble_is_tried_at_once_but_not_before_the_first_pause(stage: Stage) -> None:
    stage.trouble = "away"

    def mend() -> None:
        if len(stage.rests) == 4:
            stage.trouble = None
        stage.lab.set_feature("work", "forward.tunnel", str(len(stage.rests)))

    stage.on_rest = mend
    stage.run()
    assert len(stage.rests) == 4
    assert len(stage.looks) <= 4 + 3


def test_what_fails_to_be_written_is_told_and_mended(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: LabStore, qube: QubeName, key: str, value: str) -> None:
        raise StoreError("the disk is full")

    def mend() -> None:
        monkeypatch.undo()

    monkeypatch.setattr(LabStore, "set_feature", refuse)
    stage.on_rest = mend
    stage.run()
    assert stage.is_open
    first, last = stage.err.getvalue().splitlines()
    assert first.startswith(
        "qvm-forward: not everything could be done: the disk is full; what was to be opened"
    )
    assert last == "qvm-forward: all is well again"


def test_tunnels_that_could_not_be_ended_are_told_and_not_taken_for_well_again(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: LabStore, qube: QubeName, service: str) -> None:
        raise StoreError("no answer")

    monkeypatch.setattr(LabStore, "call", refuse)
    stage.run(lambda: set_netvm(stage.lab))
    assert not stage.is_open
    assert stage.rests == []
    (line,) = stage.err.getvalue().splitlines()
    assert line.startswith(
        "qvm-forward: not everything could be done: no answer. dom0's policy is closed, but"
    )


def test_news_that_is_lost_is_sought_again_and_all_is_looked_at(stage: Stage) -> None:
    def lose() -> None:
        stage.news_trouble = "qubesd sends no events"

    def mend() -> None:
        if len(stage.rests) == 3:
            set_netvm(stage.lab)
            stage.news_trouble = None

    stage.on_rest = mend
    stage.run(lose)
    assert stage.rests == [1, 2, 4]
    assert not stage.is_open
    assert stage.err.getvalue() == (
        "qvm-forward: changes are not noticed for now: qubesd sends no events\n"
        "qvm-forward: all is well again\n"
    )


def test_without_news_a_rule_ends_all_the_same(expiring: Stage) -> None:
    def lose() -> None:
        expiring.news_trouble = "no events"

    alarms: list[float | None] = []

    def after() -> None:
        alarms.append(expiring.alarm.wall)
        if len(expiring.rests) == 2:
            expiring.hands.pass_by(3600)
        if len(expiring.rests) == 3:
            END()

    expiring.on_rest = after
    expiring.run(lose)
    assert not expiring.is_open
    assert alarms == [NOW + 3600, NOW + 3600, None]


def test_an_end_that_could_not_be_acted_upon_does_not_ring_for_ever(expiring: Stage) -> None:
    def late() -> None:
        expiring.hands.pass_by(3600)
        expiring.trouble = "away"

    def mend() -> None:
        expiring.trouble = None

    expiring.on_rest = mend
    expiring.run(late)
    assert not expiring.is_open
    assert expiring.rests == [1]
    assert expiring.alarms_at_waits[expiring.waits.index(0.0)] is None


def test_after_a_trouble_the_next_one_is_tried_again_soon(stage: Stage) -> None:
    def lose() -> None:
        stage.news_trouble = "no events"

    def mend() -> None:
        if len(stage.rests) in (3, 6):
            stage.news_trouble = None

    stage.on_rest = mend
    stage.run(lose, lose)
    assert stage.rests == [1, 2, 4, 1, 2, 4]


def test_two_troubles_are_told_each_once(stage: Stage) -> None:
    stage.trouble, stage.news_trouble = "no answer", "no events"

    def mend() -> None:
        if len(stage.rests) == 9:
            stage.trouble = stage.news_trouble = None

    stage.on_rest = mend
    stage.run()
    assert stage.is_open
    assert stage.err.getvalue().splitlines() == [
        "qvm-forward: no answer",
        "qvm-forward: changes are not noticed for now: no events",
        "qvm-forward: all is well again",
    ]


# The end


def test_a_wish_to_end_does_not_interrupt_what_has_begun(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.run()
    assert stage.is_open
    replace_policy = LabStore.replace_policy

    def ask_and_replace(self: LabStore, text: str, token: str) -> None:
        END()
        replace_policy(self, text, token)

    monkeypatch.setattr(LabStore, "replace_policy", ask_and_replace)
    set_netvm(stage.lab)
    stage.waits.clear()
    stage.run()
    assert not stage.is_open
    assert stage.waits == []


def test_a_wish_to_end_in_a_burst_or_a_pause_is_obeyed_without_another_look(stage: Stage) -> None:
    stage.trouble = "away"
    stage.on_rest = END
    stage.run()
    assert stage.looks == [0]
    assert stage.rests == [1]


def test_the_command_ends_with_status_0(lab: LabDirectory) -> None:
    class Ended(LabStore):
        def changes(self, wakers: Sequence[int] = ()) -> AbstractContextManager[Changes]:
            END()
            return super().changes(wakers)

    streams = io.StringIO(), io.StringIO(), io.StringIO()
    assert watch(Namespace(), Session(Ended(lab), 0.0, {}, *streams, Style(), False)) == 0


def test_a_pause_ends_by_a_descriptor_or_after_its_time() -> None:
    read_fd, write_fd = os.pipe()
    begun = time.monotonic()
    _ready([read_fd], 0.01)
    assert time.monotonic() - begun >= 0.01
    os.write(write_fd, b"x")
    _ready([read_fd], 3600.0)
    os.close(read_fd)
    os.close(write_fd)


# What is told


def test_each_rule_that_comes_goes_or_changes_is_told(stage: Stage) -> None:
    inventory = stage.inventory()
    same, moved = (rule(f"srcports={port}", name="same") for port in (81, 84))
    broken = BrokenRule(QubeName("work"), "gone", "text", "cannot be read")
    before = plan([rule(), rule("srcports=82", name="gone"), same], inventory, NOW)
    after = plan([rule("enabled=no"), rule("srcports=83", name="new"), moved], inventory, NOW)
    gone, new, changed = differing(states(before), states(after))
    assert gone == "work gone is no longer there"
    assert new.startswith("work new is new, and active. Connections to port 83 ")
    assert changed.startswith("work web was active and is disabled. It was disabled;")
    (unreadable,) = differing(states(before), states(replace(before, broken=(broken,))))
    assert unreadable == "work gone was active and is broken. cannot be read."


def test_json_has_one_object_a_line(stage: Stage) -> None:
    stage.run(lambda: set_netvm(stage.lab), is_json=True)
    opened, closed = map(json.loads, stage.out.getvalue().splitlines())
    assert [step["step"] for step in opened["steps"]] == ["open-policy", "set-config"]
    assert [step["step"] for step in closed["steps"]] == ["close-policy", "revoke", "remove-config"]
    assert closed["time"] == NOW
    assert closed["problems"] == []
    (news,) = closed["news"]
    assert news.startswith("work web was active and is suspended.")


def test_the_service_manager_is_told(
    expiring: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        expiring.lab.set_feature("vault", "forward.bad", "x")
        expiring.lab.set_state("personal", QubeState.HALTED)
        expiring.trouble = "away\nfor now"

        def mend() -> None:
            expiring.trouble = None

        expiring.on_rest = mend
        expiring.run()
        told = []
        manager.setblocking(False)
        while not told or told[-1] != "STOPPING=1":
            told.append(manager.recv(65536).decode())
    assert told[0] == "READY=1\nSTATUS=away\\nfor now"
    assert told[1].startswith("READY=1\nSTATUS=1 of 2 forwards open; the next ends 2027-")
