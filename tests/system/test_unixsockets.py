# SPDX-License-Identifier: GPL-2.0-or-later
"""Asking at a UNIX socket; tests/exposed/test_statussockets.py has long paths."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import BOUND_S

from qubes_fwd_qrexec.system.unixsockets import ask, open_unix_listening


@contextmanager
def answering(path: Path, said: bytes, question: bytes = b"") -> Iterator[None]:
    """Somebody who hears this question, says this and closes."""
    listening = open_unix_listening(path, 0o600, 1)
    listening.settimeout(BOUND_S)

    def serve() -> None:
        connection, _ = listening.accept()
        with connection, connection.makefile("rb") as asked:
            connection.settimeout(BOUND_S)
            assert asked.read(len(question)) == question
            connection.sendall(said)

    with listening:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            thread.join()


@pytest.mark.parametrize("question", [b"", b"who?\n"])
@pytest.mark.parametrize("said", [b"", b"12", b"x" * 100_000])
def test_what_is_said_until_the_end_is_the_answer(tmp_path: Path, question: bytes, said: bytes) -> None:
    with answering(tmp_path / "s", said, question):
        assert ask(tmp_path / "s", question, BOUND_S, 100_000) == said


def test_no_more_is_read_than_the_bound(tmp_path: Path) -> None:
    with answering(tmp_path / "s", b"123"), pytest.raises(OSError, match="does not end"):
        ask(tmp_path / "s", b"", BOUND_S, 2)


def test_nobody_is_waited_for_longer_than_was_said(tmp_path: Path) -> None:
    with open_unix_listening(tmp_path / "s", 0o600, 1), pytest.raises(TimeoutError):
        ask(tmp_path / "s", b"", 0.01, 2)


def test_where_nobody_listens_it_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ask(tmp_path / "s", b"", BOUND_S, 2)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "s"))
    with pytest.raises(ConnectionRefusedError):
        ask(tmp_path / "s", b"", BOUND_S, 2)
