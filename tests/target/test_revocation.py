# SPDX-License-Identifier: GPL-2.0-or-later
"""What dom0 allows, and what becomes of calls that it does not name."""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import KILLED_S
from noted import (
    BOUND_S,
    ENDED,
    MINE,
    OTHER_PORTS,
    OTHER_SOURCE,
    Call,
    after_a_tick,
    just_now,
    names,
    spoil_mode,
)

from qubes_fwd_qrexec.common.allowance import Allowance, Calls, Revoked
from qubes_fwd_qrexec.common.values import Proto, QubeName, TargetPorts
from qubes_fwd_qrexec.target.callnotes import Kind, Note, RevocationError, living
from qubes_fwd_qrexec.target.callservice import LEASE_S
from qubes_fwd_qrexec.target.callstart import TICKS_PER_S, CallStart, boot_ticks
from qubes_fwd_qrexec.target.revocation import RevokedError, allowed_s, judge, permitted, revoke

NOTHING = Allowance()
ALL_CUT = Allowance(cuts_drains=True)
AT = 50_000


def keep(*calls: Calls) -> Allowance:
    return Allowance(keeps=frozenset(calls))


def a_note(began: int = AT - 1, until: int = 0) -> Note:
    return Note(Kind.MUX, MINE, 1, 0, began, until)


def test_what_is_not_named_is_over() -> None:
    assert judge(a_note(), AT, NOTHING) is None
    assert judge(a_note(AT), AT, NOTHING) is None
    assert judge(a_note(), AT, keep(OTHER_PORTS, OTHER_SOURCE)) is None


def test_what_was_allowed_after_the_list_was_made_is_not_its_matter() -> None:
    for until in (0, AT + 7):
        assert judge(a_note(AT + 1, until), AT, NOTHING) == a_note(AT + 1, until)
        assert judge(a_note(AT + 1, until), AT, keep(MINE)) == a_note(AT + 1, until)


def test_what_is_kept_goes_on_also_if_it_drained() -> None:
    assert judge(a_note(), AT, keep(MINE)) == a_note()
    assert judge(a_note(until=AT + 7), AT, keep(MINE)) == a_note()


def test_a_drain_has_its_deadline_and_no_later_one() -> None:
    drain = Allowance(drains={MINE: 60})
    until = AT + 60 * TICKS_PER_S
    assert judge(a_note(), AT, drain) == a_note(until=until)
    assert judge(a_note(until=until - 1), AT, drain) == a_note(until=until - 1)
    assert judge(a_note(until=until + 1), AT, drain) == a_note(until=until)


def test_what_drains_is_not_forgotten_and_can_be_cut() -> None:
    draining = a_note(until=AT + 7)
    assert judge(draining, AT, NOTHING) == draining
    assert judge(draining, AT, ALL_CUT) is None


def test_only_calls_that_dom0_does_not_list_are_ended(place: Path) -> None:
    with (
        Call(place) as mux_call,
        Call(place, kind=Kind.SINGLE) as single,
        Call(place, OTHER_PORTS) as other_ports,
        Call(place, OTHER_SOURCE, Kind.SINGLE) as other_source,
    ):
        assert revoke(keep(OTHER_PORTS, OTHER_SOURCE), place) == Revoked(2, 0)
        assert (mux_call.status, single.status) == (ENDED, ENDED)
        assert other_ports.lives
        assert other_source.lives
        assert revoke(keep(OTHER_PORTS, OTHER_SOURCE), place) == Revoked(0, 0)
        assert len(names(place)) == 2


def test_a_list_is_parsed_once_for_all_calls_of_a_process(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are looked at in one go, while nothing else of that process moves."""
    parsed: list[bytes] = []
    real = Allowance.parse

    def parse(untrusted_text: bytes) -> Allowance:
        parsed.append(untrusted_text)
        return real(untrusted_text)

    monkeypatch.setattr(Allowance, "parse", parse)
    with ExitStack() as undo:
        calls = [undo.enter_context(permitted(Kind.SINGLE, MINE, just_now(), place, n)) for n in range(3)]
        for allowance in (keep(MINE, OTHER_PORTS), keep(MINE, OTHER_SOURCE)):
            assert revoke(allowance, place) == Revoked(0, 0)
            assert [call.look() for call in calls] == [True] * 3
    assert len(parsed) <= 2
    assert parsed[-1] == str(keep(MINE, OTHER_SOURCE)).encode()


def test_calls_of_udp_and_of_tcp_are_ended_and_renewed_apart(place: Path) -> None:
    udp = MINE._replace(proto=Proto.UDP)
    with Call(place) as of_tcp, Call(place, udp, Kind.UDP) as of_udp:
        assert of_udp.note.calls == udp
        tcp_s, udp_s = allowed_s(MINE, place), allowed_s(udp, place)
        with permitted(Kind.UDP, udp, just_now(), place):
            assert allowed_s(udp, place) > udp_s
        assert allowed_s(MINE, place) == tcp_s
        assert revoke(keep(udp), place) == Revoked(1, 0)
        assert of_tcp.status == ENDED
        assert of_udp.lives
        assert revoke(keep(MINE), place) == Revoked(1, 0)
        assert of_udp.status == ENDED


def test_who_does_not_obey_is_killed(place: Path) -> None:
    with Call(place, obeys=False) as deaf, Call(place) as stopped, Call(place, OTHER_SOURCE) as other:
        stopped.process.send_signal(signal.SIGSTOP)
        assert revoke(keep(OTHER_SOURCE), place, obey_s=KILLED_S) == Revoked(2, 0)
        assert deaf.status == -signal.SIGKILL
        assert stopped.status == -signal.SIGKILL
        assert other.lives


def test_who_is_killed_has_time_to_end_though_the_machine_stood_still_before(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stood_s = [0.0]
    monotonic, sleep = time.monotonic, time.sleep

    def stand_still(seconds: float) -> None:
        stood_s[0] = 10 * BOUND_S
        sleep(seconds)

    with Call(place, obeys=False) as deaf, monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: monotonic() + stood_s[0])
        patch.setattr(time, "sleep", stand_still)
        assert revoke(NOTHING, place, obey_s=BOUND_S) == Revoked(1, 0)
        assert deaf.status == -signal.SIGKILL


def test_more_than_there_may_be_at_once_are_ended(place: Path) -> None:
    with Call(place) as one, Call(place) as two, Call(place, kind=Kind.SINGLE, obeys=False) as three:
        assert revoke(NOTHING, place, obey_s=KILLED_S) == Revoked(3, 0)
        assert {one.status, two.status, three.status} <= {ENDED, -signal.SIGKILL}


def test_a_drain_is_remembered_until_it_is_cut(place: Path) -> None:
    with Call(place) as call:
        before = boot_ticks()
        assert revoke(Allowance(drains={MINE: 600}), place) == Revoked(0, 1)
        until = call.note.until
        assert before + 600 * TICKS_PER_S <= until <= boot_ticks() + 600 * TICKS_PER_S
        assert revoke(NOTHING, place) == Revoked(0, 1)
        assert call.note.until == until
        assert call.lives
        assert revoke(keep(MINE), place) == Revoked(0, 0)
        assert call.note.until == 0
        assert revoke(Allowance(drains={MINE: 600}), place) == Revoked(0, 1)
        assert revoke(ALL_CUT, place) == Revoked(1, 0)
        assert call.status == ENDED


def test_a_drain_ends_at_its_deadline_by_itself(place: Path) -> None:
    with Call(place) as call:
        assert revoke(Allowance(drains={MINE: 1}), place).ended == 0
        assert call.status == ENDED


def test_a_call_that_dom0_allowed_before_the_list_is_refused_whenever_it_begins(place: Path) -> None:
    """The calling qube can let a call that was allowed wait for as long as it likes."""
    parked = just_now()
    for start in (parked, CallStart(boot_ticks() - 1000 * TICKS_PER_S, 0.0)):
        revoke(keep(OTHER_SOURCE), place)
        for kind in Kind:
            with (
                pytest.raises(RevokedError, match="dom0 no longer allows"),
                permitted(kind, MINE, start, place),
            ):
                pytest.fail("it was let in")
        assert allowed_s(MINE, place) == -math.inf
    assert names(place) == []
    with permitted(Kind.SINGLE, OTHER_SOURCE, parked, place):
        pass
    revoke(Allowance(drains={MINE: 60}), place)
    with pytest.raises(RevokedError), permitted(Kind.MUX, MINE, parked, place):
        pytest.fail("it was let in")


def test_a_single_call_that_waited_longer_than_a_lease_is_refused_without_a_list(place: Path) -> None:
    start = just_now()
    for waited_s, is_let_in in ((LEASE_S - 60, True), (LEASE_S + 1, False)):
        waited = CallStart(start.boot_ticks - waited_s * TICKS_PER_S, start.monotonic_s - waited_s)
        expected = nullcontext() if is_let_in else pytest.raises(RevokedError, match="more than 300 s ago")
        with expected, permitted(Kind.SINGLE, MINE, waited, place):
            assert is_let_in
    assert names(place) == []


def test_a_call_that_dom0_allows_after_the_list_is_let_in(place: Path) -> None:
    revoke(NOTHING, place)
    after_a_tick()
    with permitted(Kind.MUX, MINE, just_now(), place) as permission:
        assert permission.look()
        assert permission.drain_left_s is None
    after_a_tick()
    with Call(place) as call:
        after_a_tick()
        assert revoke(NOTHING, place) == Revoked(1, 0)
        assert call.status == ENDED


def test_permission_ends_when_the_list_cannot_be_read(place: Path) -> None:
    with permitted(Kind.MUX, MINE, just_now(), place) as permission:
        assert permission.look()
        (place / "allowance").write_text("soon")
        assert not permission.look()


def test_a_mux_call_that_is_let_in_says_when_dom0_allowed_it(place: Path) -> None:
    assert allowed_s(MINE, place) == -math.inf
    start = replace_start(just_now(), -1.0)
    with permitted(Kind.MUX, MINE, start, place):
        assert allowed_s(MINE, place) == pytest.approx(start.monotonic_s, abs=1e-6)
        assert allowed_s(OTHER_PORTS, place) == -math.inf
        assert allowed_s(OTHER_SOURCE, place) == -math.inf
    older = replace_start(start, -5.0)
    with permitted(Kind.MUX, MINE, older, place):
        assert allowed_s(MINE, place) == pytest.approx(start.monotonic_s, abs=1e-6)
    newer = replace_start(start, 0.5)
    with permitted(Kind.MUX, MINE, newer, place):
        assert allowed_s(MINE, place) == pytest.approx(newer.monotonic_s, abs=1e-6)


def replace_start(start: CallStart, by_s: float) -> CallStart:
    return start._replace(monotonic_s=start.monotonic_s + by_s)


def test_a_single_call_renews_no_lease(place: Path) -> None:
    with permitted(Kind.SINGLE, MINE, just_now(), place):
        assert allowed_s(MINE, place) == -math.inf


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("x"), Path.touch])
def test_an_odd_mark_allows_nothing_and_holds_nobody_up(place: Path, make: Callable[[Path], object]) -> None:
    """A new file has the time of the wall, which is no time of a mark."""
    place.mkdir(mode=0o700)
    make(place / "allowed+8080-8090+sys-net")
    assert allowed_s(MINE, place) == -math.inf


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_mux_call_whose_lease_cannot_be_kept_is_refused_and_leaves_nothing(
    place: Path, make: Callable[[Path], object]
) -> None:
    place.mkdir(mode=0o700)
    make(place / "allowed+8080-8090+sys-net")
    with pytest.raises(RevocationError, match="lease"), permitted(Kind.MUX, MINE, just_now(), place):
        pytest.fail("it was let in")
    assert names(place) == []


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("x"), Path.touch])
def test_with_an_odd_list_nothing_is_let_in_until_dom0_says_more(
    place: Path, make: Callable[[Path], object]
) -> None:
    place.mkdir(mode=0o700)
    make(place / "allowance")
    with pytest.raises(RevocationError), permitted(Kind.SINGLE, MINE, just_now(), place):
        pytest.fail("it was let in")
    assert names(place) == []
    if not (place / "allowance").is_dir():
        assert revoke(NOTHING, place) == Revoked(0, 0)
        after_a_tick()
        with permitted(Kind.SINGLE, MINE, just_now(), place):
            pass


def test_calls_are_ended_also_where_the_list_cannot_be_written(place: Path) -> None:
    with Call(place) as call:
        (place / "allowance").mkdir()
        with pytest.raises(RevocationError, match="allowance"):
            revoke(NOTHING, place)
        assert call.status in (ENDED, -signal.SIGKILL)


def test_a_list_that_cannot_be_written_leaves_nothing(place: Path) -> None:
    place.mkdir(mode=0o700)
    (place / "allowance").mkdir()
    with pytest.raises(RevocationError):
        revoke(NOTHING, place)
    assert os.listdir(place) == ["allowance"]


@contextmanager
def full_disk(path: Path) -> Iterator[None]:
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k,mode=700", "none", path], check=True)
    try:
        with open(path / "filler", "wb", buffering=0) as filler:
            filler.write(b"x" * 65536)
        yield
    finally:
        subprocess.run(["umount", path], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_where_no_room_is_left_calls_are_noted_and_ended_all_the_same(tmp_path: Path) -> None:
    place = tmp_path / "run"
    with full_disk(place):
        for kind in Kind:
            with permitted(kind, MINE, just_now(), place):
                assert len(living(place)) == 1
        parked = just_now()
        with Call(place) as call, Call(place, OTHER_SOURCE) as kept:
            assert revoke(keep(OTHER_SOURCE), place) == Revoked(1, 0)
            assert call.status == ENDED
            assert kept.lives
        for calls in (MINE, OTHER_SOURCE):  # in doubt, what is kept too: it may be called anew
            with pytest.raises(RevokedError), permitted(Kind.SINGLE, calls, parked, place):
                pytest.fail("it was let in")
        after_a_tick()
        with permitted(Kind.SINGLE, OTHER_SOURCE, just_now(), place):
            pass
        living(place)
        names = ["allowance", "allowed+8080-8090+sys-net", "allowed+8080-8090+work", "filler"]
        assert sorted(os.listdir(place)) == names


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_list_that_has_room_only_in_part_allows_nothing(tmp_path: Path) -> None:
    place = tmp_path / "run"
    long = keep(*(Calls(TargetPorts(n, n), QubeName("a")) for n in range(1, 1000)))
    with full_disk(place):
        (place / "filler").write_bytes(b"x")
        assert revoke(long, place) == Revoked(0, 0)
        assert (place / "allowance").stat().st_size == 0


def test_where_notes_are_not_safe_dom0_hears_of_it(place: Path) -> None:
    spoil_mode(place)
    with pytest.raises(RevocationError, match="must belong to the user"):
        revoke(NOTHING, place)


def test_a_process_is_not_taken_for_the_dead_one_whose_number_it_has(place: Path) -> None:
    with Call(place, OTHER_SOURCE) as living_one:
        stale = replace(living_one.note, calls=MINE)
        (place / str(stale)).touch()
        assert revoke(keep(OTHER_SOURCE), place) == Revoked(0, 0)
        assert living_one.lives
        assert not (place / str(stale)).exists()


def test_two_lists_at_once_leave_a_whole_one(place: Path) -> None:
    place.mkdir(mode=0o700)
    command = [sys.executable, "-m", "qubes_fwd_qrexec.target.revocation"]
    env = os.environ | {"QUBES_FORWARD_RUN_DIR": str(place)}
    running = [
        subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(4)
    ]
    text = str(keep(*(Calls(TargetPorts(n, n), QubeName("a")) for n in range(1, 500)))).encode()
    for process in running:
        assert process.communicate(text, BOUND_S)[0] == b"version=1 ended=0 draining=0\n"
    assert sorted(os.listdir(place)) == ["allowance"]
    with permitted(
        Kind.SINGLE, Calls(TargetPorts(7, 7), QubeName("a")), CallStart(0, time.monotonic()), place
    ):
        pass
