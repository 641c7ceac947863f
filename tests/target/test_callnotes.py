# SPDX-License-Identifier: GPL-2.0-or-later
"""Notes of living calls: there as long as the call, and nothing left of those that could not begin."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from bounds import BOUND_S
from hypothesis import given
from hypothesis import strategies as st
from noted import MINE, OTHER_SOURCE, PORTS, SOURCE, Call, just_now, names, spoil_mode
from rule_strategies import qube_names

from qubes_fwd_qrexec.common.allowance import Calls
from qubes_fwd_qrexec.common.values import TargetPorts
from qubes_fwd_qrexec.target.callnotes import Kind, Note, RevocationError, left_note, living

numbers = st.integers(0, 10**12)
ports = st.tuples(st.integers(1, 65535), st.integers(1, 65535)).map(lambda p: TargetPorts(min(p), max(p)))


@st.composite
def notes(draw: st.DrawFn) -> Note:
    kind = draw(st.sampled_from(Kind))
    calls = Calls(draw(ports), draw(qube_names), kind.proto)
    return Note(kind, calls, *(draw(numbers) for _ in range(4)))


@given(notes())
def test_a_note_that_is_left_is_read(note: Note) -> None:
    assert Note.parse(str(note)) == note
    assert len(str(note)) < 255


FOREIGN = [
    "x",
    "8080-8090+sys-net+1",
    "mux+8080-8090+sys-net+1.0+5",
    "mux+8080-8090+sys-net+1.0+5+0+0",
    "mux+8080-8090+sys-net+1+5+0",
    "mux+8080-8090+sys-net+01.0+5+0",
    "mux+8080-8090+sys-net+1.0+-5+0",
    "mux+8080+sys-net+1.0+5+0",
    "other+8080-8090+sys-net+1.0+5+0",
    ".mux+8080-8090+sys-net+1.0+5+0",
    "mux+8080-8090+sys-net+1.0+5+0.tmp",
    "mux+8080-8090+sys net+1.0+5+0",
    "mux+8080-8090+sys-net+\u0661.0+5+0",
]


@pytest.mark.parametrize("name", FOREIGN)
def test_any_other_name_is_no_note(name: str) -> None:
    assert Note.parse(name) is None


def test_files_of_others_are_not_touched(place: Path) -> None:
    place.mkdir(mode=0o700)
    for name in FOREIGN:
        (place / name).touch()
    assert living(place) == []
    assert names(place) == sorted(FOREIGN)


def test_a_note_goes_with_its_call(place: Path) -> None:
    start = just_now()
    with left_note(Kind.SINGLE, MINE, start, place, 3) as held:
        assert names(place) == [f"call+8080-8090+sys-net+{os.getpid()}.3+{start.boot_ticks}+0"]
        held.set_until(start.boot_ticks + 5)
        assert living(place) == [held.note]
        assert held.note.until == start.boot_ticks + 5
    assert names(place) == []
    with pytest.raises(KeyError), left_note(Kind.SINGLE, MINE, start, place):
        raise KeyError
    assert names(place) == []


def test_a_note_that_outlived_its_process_is_removed(place: Path) -> None:
    with Call(place) as dead:
        dead.process.kill()
        dead.process.wait()
        assert len(names(place)) == 1
        assert living(place) == []
        assert names(place) == []


@contextmanager
def odd_note(place: Path, make: Callable[[Path], object]) -> Iterator[None]:
    place.mkdir(mode=0o700, exist_ok=True)
    make(place / "mux+8080-8090+sys-net+1.0+5+0")
    yield


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/etc/passwd")])
def test_what_is_no_file_is_nobodys_note_and_holds_nobody_up(
    place: Path, make: Callable[[Path], object]
) -> None:
    with odd_note(place, make), Call(place, OTHER_SOURCE) as call:
        code = (
            "import sys; from pathlib import Path; from qubes_fwd_qrexec.target.callnotes import living\n"
            "print(len(list(living(Path(sys.argv[1])))))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(place)], timeout=BOUND_S, stdout=subprocess.PIPE
        )
        assert done.stdout == b"1\n"
        assert call.lives


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file away")
def test_a_file_of_another_user_is_no_note(place: Path) -> None:
    def make(path: Path) -> None:
        path.touch()
        os.chown(path, 1000, -1)

    with odd_note(place, make):
        assert living(place) == []
        assert len(names(place)) == 1


def test_two_who_look_at_once_do_not_take_each_other_for_the_process(place: Path) -> None:
    place.mkdir(mode=0o700)
    stale = place / "mux+8080-8090+sys-net+1.0+5+0"
    stale.touch()
    with open(stale, encoding="ascii") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert living(place) == []


def test_a_note_is_never_seen_before_it_is_held(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks in between would take it for a dead one's and remove it."""
    seen: list[list[str]] = []
    flock = fcntl.flock

    def look_and_flock(fd: int, operation: int) -> None:
        if operation & fcntl.LOCK_EX:
            seen.append([name for name in names(place) if not name.startswith(".")])
            assert living(place) == []
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", look_and_flock)
    with left_note(Kind.MUX, MINE, just_now(), place):
        assert seen == [[]]
        assert len(names(place)) == 1


def spoil_kind(place: Path) -> None:
    place.touch()


def spoil_link(place: Path) -> None:
    place.with_name("real").mkdir(mode=0o700)
    place.symlink_to("real")


def spoil_parent(place: Path) -> None:
    place.parent.rmdir()


@pytest.mark.parametrize("spoil", [spoil_mode, spoil_kind, spoil_link, spoil_parent])
def test_where_notes_are_not_safe_no_call_begins(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    place = tmp_path / "parent" / "notes"
    place.parent.mkdir()
    spoil(place)
    with pytest.raises(RevocationError, match="notes"), left_note(Kind.SINGLE, MINE, just_now(), place):
        pytest.fail("it was let in")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a directory away")
def test_a_directory_of_another_user_is_not_used(place: Path) -> None:
    place.mkdir(mode=0o700)
    os.chown(place, 1000, -1)
    with (
        pytest.raises(RevocationError, match="must belong to the user"),
        left_note(Kind.SINGLE, MINE, just_now(), place),
    ):
        pytest.fail("it was let in")


def test_the_directory_is_made_for_its_user_alone(place: Path) -> None:
    before = os.umask(0)
    try:
        with left_note(Kind.MUX, MINE, just_now(), place) as held:
            assert place.stat().st_mode & 0o777 == 0o700
            assert (place / str(held.note)).stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)


@pytest.mark.parametrize("call", ["rename", "open", "flock"])
def test_a_call_that_cannot_have_a_note_leaves_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    place.mkdir(mode=0o700)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr({"rename": Path, "open": os, "flock": fcntl}[call], call, full)
    words = "No space left on device; dom0 could not end this call"
    with pytest.raises(RevocationError, match=words), left_note(Kind.MUX, MINE, just_now(), place):
        pytest.fail("it was let in")
    monkeypatch.undo()
    assert names(place) == []


def test_a_killed_process_holds_nothing(place: Path) -> None:
    with Call(place) as call:
        assert (call.note.calls.ports, call.note.calls.caller) == (PORTS, SOURCE)
        call.process.send_signal(signal.SIGSTOP)
        assert len(living(place)) == 1


def test_a_note_that_gets_another_name_meanwhile_is_not_missed(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with left_note(Kind.MUX, MINE, just_now(), place) as held:
        listdir = os.listdir
        turns = iter((11, 12))

        def list_and_rename(path: Path) -> list[str]:
            names = listdir(path)
            if until := next(turns, 0):
                held.set_until(until)
            return names

        monkeypatch.setattr(os, "listdir", list_and_rename)
        assert living(place) == [held.note]
        assert held.note.until == 12
