# SPDX-License-Identifier: GPL-2.0-or-later
"""Entries for the journal: their form, and that nobody waits for one to be read."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from qubes_fwd_qrexec.system.journal import is_journal, write_entry


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "journal"))
        sock.setblocking(False)
        yield sock


def test_an_entry_has_a_field_on_each_line(journal: socket.socket) -> None:
    assert write_entry({"MESSAGE": "hello = you", "FORWARD": "work.web"}, journal.getsockname())
    assert journal.recv(1000) == b"MESSAGE=hello = you\nFORWARD=work.web\n"


def test_who_does_not_read_or_is_not_there_is_not_waited_for(journal: socket.socket) -> None:
    place = journal.getsockname()
    while write_entry({"MESSAGE": "nobody reads"}, place):
        pass
    journal.recv(1000)
    assert write_entry({"MESSAGE": "there is room again"}, place)
    journal.close()
    assert not write_entry({"MESSAGE": "nobody is there"}, place)
    assert not write_entry({"MESSAGE": "nor was there ever"}, f"{place}-missing")


def test_a_descriptor_is_the_journal_only_if_it_is_the_file_that_the_unit_was_given(tmp_path: Path) -> None:
    with (tmp_path / "stderr").open("w") as file:
        status = os.fstat(file.fileno())
        assert is_journal(file.fileno(), f"{status.st_dev}:{status.st_ino}")
        for other in (
            None,
            "",
            "x",
            f"{status.st_dev}:{status.st_ino + 1}",
            f"{status.st_dev + 1}:{status.st_ino}",
        ):
            assert not is_journal(file.fileno(), other)
