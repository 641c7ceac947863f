# SPDX-License-Identifier: GPL-2.0-or-later
import logging
import os
import socket
from pathlib import Path

import pytest

from qubes_fwd_qrexec.system import logs
from qubes_fwd_qrexec.system.logs import LINE_MAX, REPEAT_S, RateLimit, one_line, start_logging, warn


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
    monkeypatch.setattr(logs, "_JOURNAL", place)
    start_logging(is_called=True)
    logging.getLogger("t").error("nobody listens")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(place)
        journal.setblocking(False)
        for number in range(2000):  # more than anybody keeps who does not read
            logging.getLogger("t").error("line %d", number)
        assert journal.recv(1000) == f"<11>qubes-forward-service[{os.getpid()}]: error: line 0".encode()
    assert capfd.readouterr() == ("", "")
