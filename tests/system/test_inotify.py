# SPDX-License-Identifier: GPL-2.0-or-later
"""Notices of the kernel, which has queued them when the call that causes them returns: nobody waits here."""

import ctypes
import errno
import os
import select
from collections.abc import Iterator
from pathlib import Path

import pytest

from qubes_fwd_qrexec.system.inotify import (
    IN_CLOSE_WRITE,
    IN_CREATE,
    IN_DELETE,
    IN_IGNORED,
    IN_ISDIR,
    IN_MOVED_FROM,
    IN_MOVED_TO,
    Inotify,
)


@pytest.fixture
def inotify() -> Iterator[Inotify]:
    made = Inotify()
    yield made
    made.close()


def test_what_happens_in_a_directory_is_told_in_its_order(inotify: Inotify, tmp_path: Path) -> None:
    number = inotify.add(tmp_path)
    assert inotify.read() == []
    (tmp_path / "ä").write_text("x")
    (tmp_path / "ä").rename(tmp_path / "b")
    (tmp_path / "b").unlink()
    (tmp_path / "c").mkdir()
    assert inotify.read() == [
        (number, IN_CREATE, "ä"),
        (number, IN_CLOSE_WRITE, "ä"),
        (number, IN_MOVED_FROM, "ä"),
        (number, IN_MOVED_TO, "b"),
        (number, IN_DELETE, "b"),
        (number, IN_CREATE | IN_ISDIR, "c"),
    ]


def test_more_notices_than_one_read_takes(inotify: Inotify, tmp_path: Path) -> None:
    inotify.add(tmp_path)
    names = [f"{number:0200}" for number in range(600)]
    for name in names:
        (tmp_path / name).mkdir()
    assert [notice.name for notice in inotify.read()] == names


def test_its_descriptor_can_be_polled(inotify: Inotify, tmp_path: Path) -> None:
    inotify.add(tmp_path)
    assert select.select([inotify], [], [], 0)[0] == []
    (tmp_path / "a").touch()
    assert select.select([inotify], [], [], 0)[0] == [inotify]


def test_the_same_directory_has_the_same_number_until_it_is_removed(inotify: Inotify, tmp_path: Path) -> None:
    number = inotify.add(tmp_path)
    assert inotify.add(tmp_path) == number
    inotify.remove(number)
    inotify.remove(number)
    (tmp_path / "a").touch()
    assert [notice.mask for notice in inotify.read()] == [IN_IGNORED]


def test_what_cannot_be_watched_is_named(inotify: Inotify, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError) as missing:
        inotify.add(tmp_path / "missing")
    assert missing.value.filename == str(tmp_path / "missing")
    with pytest.raises(NotADirectoryError):
        inotify.add(tmp_path / "file")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EMFILE])
def test_a_limit_that_is_reached_says_where_it_is_set(code: int) -> None:
    ctypes.set_errno(code)
    with pytest.raises(OSError, match=r"see fs\.inotify in sysctl") as caught:
        Inotify._checked(-1, None)
    assert caught.value.errno == code


def test_nothing_stays_open(tmp_path: Path) -> None:
    made = Inotify()
    fd = made.fileno()
    assert not os.get_inheritable(fd)
    made.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
