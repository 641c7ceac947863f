# SPDX-License-Identifier: GPL-2.0-or-later
"""Notes of tunnels, and the RPC that ends whom it finds noted."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from noted import PORTS, SOURCE, Tunnel, names, spoil_mode

from qubes_fwd_qrexec import revocation
from qubes_fwd_qrexec.revocation import (
    RevocationError,
    allowed_s,
    argument,
    noted,
    revoke,
)
from qubes_fwd_qrexec.rules import OnExpire
from qubes_fwd_qrexec.values import QubeName, TargetPorts


@contextmanager
def held(path: Path) -> Iterator[None]:
    """A note as a living process holds it."""
    with open(path, "w", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def test_the_tunnels_that_fit_are_ended_and_no_other(place: Path) -> None:
    with (
        Tunnel(place) as one,
        Tunnel(place) as two,
        Tunnel(place, TargetPorts(8080, 8089)) as other_ports,
        Tunnel(place, source="work") as other_source,
    ):
        assert revoke(PORTS, SOURCE, place) == 2
        assert (one.status, two.status) == (-signal.SIGTERM, -signal.SIGTERM)
        assert other_ports.lives
        assert other_source.lives
        assert revoke(PORTS, SOURCE, place) == 0
        assert names(place) == sorted([other_ports.note.name, other_source.note.name])


def test_tunnels_that_are_to_drain_are_told_that_and_lose_their_right_to_start(place: Path) -> None:
    with Tunnel(place) as one, Tunnel(place, source="work") as other:
        assert revoke(PORTS, SOURCE, place, OnExpire.DRAIN) == 1
        assert one.status == -signal.SIGUSR1
        assert other.lives
    assert (place / f"revoked+{argument(PORTS, SOURCE)}").exists()


def test_a_note_goes_with_its_tunnel(place: Path) -> None:
    with noted(PORTS, SOURCE, place):
        assert names(place) == [f"8080-8090+sys-net+{os.getpid()}"]
    assert names(place) == []
    with pytest.raises(KeyError), noted(PORTS, SOURCE, place):
        raise KeyError
    assert names(place) == []


def test_a_note_that_outlived_its_process_is_removed_and_nobody_is_ended(place: Path) -> None:
    with Tunnel(place) as dead, Tunnel(place, source="work") as dead_of_another:
        for tunnel in (dead, dead_of_another):
            tunnel.process.kill()
            tunnel.process.wait()
        assert len(names(place)) == 2
        assert revoke(PORTS, SOURCE, place) == 0
        assert names(place) == []


def test_a_living_process_is_not_taken_for_the_dead_one_whose_number_it_has(place: Path) -> None:
    with Tunnel(place, source="work") as living:
        (place / f"8080-8090+sys-net+{living.process.pid}").touch()
        assert revoke(PORTS, SOURCE, place) == 0
        assert living.lives
        assert names(place) == [living.note.name]


def test_a_note_that_is_held_for_a_process_that_is_gone_ends_nobody(place: Path) -> None:
    with Tunnel(place) as gone:
        gone.process.kill()
        gone.process.wait()
        with held(gone.note):
            assert revoke(PORTS, SOURCE, place) == 0


def test_two_revocations_at_once_do_not_take_each_other_for_the_tunnel(place: Path) -> None:
    with Tunnel(place, source="work") as living:
        stale = place / f"8080-8090+sys-net+{living.process.pid}"
        stale.touch()
        with open(stale, encoding="ascii") as other:
            fcntl.flock(other, fcntl.LOCK_SH)
            assert revoke(PORTS, SOURCE, place) == 0
        assert living.lives


def test_a_note_is_never_seen_before_it_is_held(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks in between would take it for a dead one's and remove it."""
    seen: list[list[str]] = []
    flock = fcntl.flock

    def look_and_flock(fd: int, operation: int) -> None:
        seen.append([name for name in names(place) if not name.startswith(".")])
        # A revocation at the worst moment; in another process, for it may not wait for this one.
        if operation & fcntl.LOCK_EX:
            done = subprocess.run(
                [sys.executable, "-m", "qubes_fwd_qrexec.revocation", argument(PORTS, QubeName("work"))],
                env=os.environ | {revocation.DIRECTORY_VARIABLE: str(place)},
                check=False,
            )
            assert done.returncode == 0
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", look_and_flock)
    with noted(PORTS, SOURCE, place):
        assert seen == [[]]
        assert names(place) == [f"8080-8090+sys-net+{os.getpid()}"]


def test_a_tunnel_that_starts_while_it_is_revoked_ends_itself(place: Path) -> None:
    """This process is older than the revocation, as one that Python still starts would be."""
    assert revoke(PORTS, SOURCE, place) == 0
    with (
        pytest.raises(RevocationError, match="revoked by dom0 while it started"),
        noted(PORTS, SOURCE, place),
    ):
        pytest.fail("it was let in")
    assert names(place) == []
    with noted(PORTS, QubeName("work"), place), noted(TargetPorts(8080, 8080), SOURCE, place):
        assert len(names(place)) == 2


def test_a_tunnel_that_starts_after_a_revocation_is_let_in(place: Path) -> None:
    revoke(PORTS, SOURCE, place)
    revoked_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    while time.clock_gettime(time.CLOCK_BOOTTIME) < revoked_s + 1 / os.sysconf("SC_CLK_TCK"):
        pass  # the kernel tells the start of a process in ticks
    with Tunnel(place) as tunnel:
        assert revoke(PORTS, SOURCE, place) == 1
        assert tunnel.status == -signal.SIGTERM


def test_a_tunnel_that_is_let_in_says_when_dom0_allowed_it(place: Path) -> None:
    assert allowed_s(PORTS, SOURCE, place) == 0
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    with Tunnel(place):
        begun_s = allowed_s(PORTS, SOURCE, place)
        assert now - 1 / os.sysconf("SC_CLK_TCK") <= begun_s <= time.clock_gettime(time.CLOCK_BOOTTIME)
        assert allowed_s(TargetPorts(8080, 8080), SOURCE, place) == 0
        assert allowed_s(PORTS, QubeName("work"), place) == 0
        with Tunnel(place):
            assert allowed_s(PORTS, SOURCE, place) >= begun_s
    assert allowed_s(PORTS, SOURCE, place) >= begun_s


def test_a_tunnel_that_was_revoked_allows_nobody_anything(place: Path) -> None:
    revoke(PORTS, SOURCE, place)
    with pytest.raises(RevocationError), noted(PORTS, SOURCE, place):
        pytest.fail("it was let in")
    assert allowed_s(PORTS, SOURCE, place) == 0


def test_a_spoiled_word_of_what_is_allowed_allows_nothing(place: Path) -> None:
    place.mkdir(mode=0o700)
    mark = place / f"allowed+{argument(PORTS, SOURCE)}"
    mark.write_text("for ever")
    assert allowed_s(PORTS, SOURCE, place) == 0
    mark.unlink()
    mark.mkdir()
    assert allowed_s(PORTS, SOURCE, place) == 0


FOREIGN = [
    "8080-8090+sys-net",
    "8080-8090+sys-net+x",
    "8080-8090+sys-net+01",
    "8080-8090+sys-net+-1",
    "8080-8090+sys-net+1+2",
    "08080-8090+sys-net+1",
    "8090-8080+sys-net+1",
    "8080+sys-net+1",
    "8080-8090+sys net+1",
    "8080-8090+sys-net+\u0661",
    ".8080-8090+sys-net+1",
    "8080-8090+sys-net+1.tmp",
    "x",
]


def test_files_of_others_are_not_touched(place: Path) -> None:
    place.mkdir(mode=0o700)
    for name in FOREIGN:
        (place / name).touch()
    (place / "directory").mkdir()
    assert revoke(PORTS, SOURCE, place) == 0
    assert names(place) == sorted([*FOREIGN, "directory"])


def test_a_note_that_cannot_be_read_is_reported_and_the_others_end(place: Path, tmp_path: Path) -> None:
    with Tunnel(place) as tunnel:
        target = tmp_path / "of-somebody-else"
        target.touch()
        (place / "8080-8090+sys-net+1").symlink_to(target)
        with pytest.raises(RevocationError, match=r"8080-8090\+sys-net\+1: Too many levels"):
            revoke(PORTS, SOURCE, place)
        assert tunnel.status == -signal.SIGTERM
        assert target.exists()


def test_the_directory_is_made_for_its_user_alone(place: Path) -> None:
    before = os.umask(0)
    try:
        with noted(PORTS, SOURCE, place):
            assert place.stat().st_mode & 0o777 == 0o700
            note = place / f"{argument(PORTS, SOURCE)}+{os.getpid()}"
            assert note.stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)


def spoil_kind(place: Path) -> None:
    place.touch()


def spoil_link(place: Path) -> None:
    place.with_name("real").mkdir(mode=0o700)
    place.symlink_to("real")


def spoil_parent(place: Path) -> None:
    place.parent.rmdir()


@pytest.mark.parametrize("spoil", [spoil_mode, spoil_kind, spoil_link, spoil_parent])
def test_where_notes_are_not_safe_no_tunnel_begins_and_none_is_ended(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    place = tmp_path / "parent" / "notes"
    place.parent.mkdir()
    spoil(place)
    with pytest.raises(RevocationError, match="notes"), noted(PORTS, SOURCE, place):
        pytest.fail("it was let in")
    with pytest.raises(RevocationError, match="notes"):
        revoke(PORTS, SOURCE, place)


def test_a_missing_directory_is_named_and_why_it_cannot_be_made(tmp_path: Path) -> None:
    """A qube that runs on after the installation, before anything has made it."""
    place = tmp_path / "parent" / "notes"
    words = f"{place}: the directory for notes of tunnels is missing, and cannot be made: No such file"
    with pytest.raises(RevocationError, match=words), noted(PORTS, SOURCE, place):
        pytest.fail("it was let in")
    with pytest.raises(RevocationError, match=words):
        revoke(PORTS, SOURCE, place)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a directory away")
def test_a_directory_of_another_user_is_not_used(place: Path) -> None:
    place.mkdir(mode=0o700)
    os.chown(place, 1000, -1)
    with pytest.raises(RevocationError, match="must belong to the user"), noted(PORTS, SOURCE, place):
        pytest.fail("it was let in")


def test_a_tunnel_that_cannot_be_noted_is_refused_with_a_reason(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    words = "No space left on device; dom0 could not end this tunnel"
    with pytest.raises(RevocationError, match=words), noted(PORTS, SOURCE, place):
        pytest.fail("it was let in")
    assert names(place) == []


def test_a_spoiled_mark_refuses_the_tunnel(place: Path) -> None:
    place.mkdir(mode=0o700)
    (place / f"revoked+{argument(PORTS, SOURCE)}").write_text("soon")
    with pytest.raises(RevocationError, match="not a time"), noted(PORTS, SOURCE, place):
        pytest.fail("it was let in")
    assert revoke(PORTS, SOURCE, place) == 0
    assert float((place / f"revoked+{argument(PORTS, SOURCE)}").read_text()) > 0
