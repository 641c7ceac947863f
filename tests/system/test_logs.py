# SPDX-License-Identifier: GPL-2.0-or-later
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from qubes_fwd_qrexec.system import logs
from qubes_fwd_qrexec.system.logs import LINE_MAX, REPEAT_S, RateLimit, one_line, start_logging, warn


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[socket.socket]:
    """A journal's socket, which takes some entries and then is full."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "journal"))
        sock.setblocking(False)
        yield sock


@pytest.mark.parametrize("evil", ["\n", "\r", "\x1b[2J", "\u202e", "\x00", "\x85", "\udc80", "\U0001f600"])
def test_no_character_can_make_a_second_line_or_move_the_reader(evil: str) -> None:
    line = one_line(f"name {evil} end")
    assert line.isascii()
    assert line.isprintable()
    assert line.startswith("name \\")


@pytest.mark.parametrize("text", ["x" * 1_000_000, "\n" * 1_000_000, "x" * 201, "\n" * 101])
def test_no_line_is_longer_than_its_bound(text: str) -> None:
    assert len(one_line(text)) == LINE_MAX
    assert one_line(text).endswith("...")


@pytest.mark.parametrize("text", ["", "plain", "x" * 200, "\n" * 100])
def test_what_fits_is_whole(text: str) -> None:
    assert one_line(text) == text.replace("\n", "\\n")


def test_a_kind_is_logged_once_in_a_while_and_the_rest_is_counted() -> None:
    now = [100.0]
    limit = RateLimit(lambda: now[0])
    assert limit.admit("a") == 0
    assert limit.admit("a") is None
    assert limit.admit("b") == 0
    now[0] += REPEAT_S - 0.1
    assert limit.admit("a") is None
    now[0] += 0.1
    assert limit.admit("a") == 2
    now[0] += REPEAT_S
    assert limit.admit("a") == 0


def test_the_next_line_says_how_many_were_held_back(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    limit = RateLimit(lambda: now[0])
    for _ in range(3):
        warn(logging.getLogger("t"), limit, "kind", "trouble")
    now[0] = REPEAT_S
    warn(logging.getLogger("t"), limit, "kind", "trouble")
    assert caplog.messages == ["trouble", "trouble (and 2 more like it)"]


def test_what_is_not_logged_is_not_even_written(caplog: pytest.LogCaptureFixture) -> None:
    """A flood of strangers costs no text for each."""
    limit, written = RateLimit(lambda: 0.0), []

    def text() -> str:
        written.append("x")
        return "a stranger"

    for _ in range(3):
        warn(logging.getLogger("test"), limit, "stranger", text)
    assert (caplog.messages, len(written)) == (["a stranger"], 1)


def test_the_log_of_the_process_is_escaped_tracebacks_too(capfd: pytest.CaptureFixture[str]) -> None:
    start_logging()
    logging.getLogger("t").info("one\ntwo")
    logging.getLogger("t").debug("unseen")
    try:
        raise ValueError("a\n\x1b[31mb")
    except ValueError:
        logging.getLogger("t").exception("bug")
    lines = capfd.readouterr().err.splitlines()
    assert lines[:2] == ["info: one\\ntwo", "error: bug"]
    assert all(line.isprintable() for line in lines)


def test_a_verbose_log_has_more(capfd: pytest.CaptureFixture[str]) -> None:
    start_logging(is_verbose=True)
    logging.getLogger("t").debug("seen")
    assert capfd.readouterr().err == "debug: seen\n"


def test_a_called_service_logs_to_the_journal_and_not_to_its_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    place = str(tmp_path / "log")
    monkeypatch.setattr(logs, "_SYSLOG", place)
    start_logging(is_called=True)
    logging.getLogger("t").error("nobody listens")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(place)
        journal.setblocking(False)
        for number in range(2000):  # more than anybody keeps who does not read
            logging.getLogger("t").error("line %d", number)
        assert journal.recv(1000) == f"<11>qubes-forward-service[{os.getpid()}]: error: line 0".encode()
    assert capfd.readouterr() == ("", "")


FIELDS = {"FORWARD": "work.web", "FORWARD_HOW": "a\nMESSAGE=forged"}
ENTRY = {
    *("MESSAGE=info: one\\ntwo", "PRIORITY=6", "SYSLOG_IDENTIFIER=listener"),
    *("FORWARD=work.web", "FORWARD_HOW=a\\nMESSAGE=forged"),
}


def test_what_has_fields_is_an_entry_of_the_journal_that_is_our_stderr(
    journal: socket.socket, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", f"{os.fstat(2).st_dev}:{os.fstat(2).st_ino}")
    start_logging(name="listener", journal=journal.getsockname())
    logging.getLogger("t").info("one\ntwo", extra={"fields": FIELDS})
    logging.getLogger("t").info("a line")
    entry = journal.recv(4096).decode()
    assert (set(entry.splitlines()), entry[-1]) == (ENTRY, "\n")
    assert capfd.readouterr().err == "info: a line\n"


@pytest.mark.parametrize("stream", [None, "", "1:2"])
@pytest.mark.parametrize("program", ["listener", None])
def test_elsewhere_it_is_a_line_without_the_fields(
    stream: str | None,
    program: str | None,
    journal: socket.socket,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    if stream is not None:
        monkeypatch.setenv("JOURNAL_STREAM", stream)
    start_logging(name=program, journal=journal.getsockname())
    logging.getLogger("t").info("one\ntwo", extra={"fields": FIELDS})
    with pytest.raises(BlockingIOError):
        journal.recv(4096)
    assert capfd.readouterr().err == "info: one\\ntwo\n"


def test_what_a_full_or_missing_journal_does_not_take_is_a_line_of_stderr(
    journal: socket.socket, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", f"{os.fstat(2).st_dev}:{os.fstat(2).st_ino}")
    start_logging(name="listener", journal=journal.getsockname())
    while not (said := capfd.readouterr().err):
        logging.getLogger("t").info("next", extra={"fields": FIELDS})
    assert said == "info: next\n"
    start_logging(name="listener", journal=journal.getsockname() + "-missing")
    logging.getLogger("t").info("last", extra={"fields": FIELDS})
    assert capfd.readouterr().err == "info: last\n"
