# SPDX-License-Identifier: GPL-2.0-or-later
"""The program that dom0 calls to cut clients: what it asks of a listener, and what it says without one."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import BOUND_S

from qubes_fwd_qrexec.common import document
from qubes_fwd_qrexec.common.clientreport import WHICH_MAX_BYTES, CutReport, WhichClients
from qubes_fwd_qrexec.common.config import parse_key
from qubes_fwd_qrexec.target.cutservice import cut
from qubes_fwd_qrexec.target.listenersockets import CUT, LISTENER_DIRECTORY_VARIABLE, STATUS

KEY = parse_key("udp.work.dns")
ONE = WhichClients.parse("[fe80::1%eth0]:5000")


@contextmanager
def listener(place: Path, said: bytes) -> Iterator[list[bytes]]:
    """Answers one connection as a listener's socket would."""
    requests: list[bytes] = []
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(place / CUT))
        listening.listen()
        listening.settimeout(BOUND_S)

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                requests.append(connection.recv(200))
                connection.sendall(said)

        thread = threading.Thread(target=serve)
        thread.start()
        yield requests
        thread.join(BOUND_S)


def run(place: Path, *argument: str, given: bytes = b"\n") -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        [sys.executable, "-m", "qubes_fwd_qrexec.target.cutservice", *argument],
        input=given,
        capture_output=True,
        env=os.environ | {LISTENER_DIRECTORY_VARIABLE: str(place)},
        timeout=BOUND_S,
        check=False,
    )


def test_the_listener_is_asked_and_its_answer_is_the_answer(tmp_path: Path) -> None:
    with listener(tmp_path, document.dump(CutReport(3).as_json())) as requests:
        assert cut(tmp_path, KEY, ONE) == CutReport(3)
    assert requests == [b"udp.work.dns [fe80::1%eth0]:5000\n"]


def test_without_a_listener_nothing_is_cut_and_it_is_said_why(tmp_path: Path) -> None:
    assert cut(tmp_path, KEY, ONE) == CutReport(0, "no listener is running")
    (tmp_path / STATUS).touch()
    old = "the listener was started before it could cut clients; restart it, or its qube"
    assert cut(tmp_path, KEY, ONE) == CutReport(0, old)


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        (b"", "the answer is not JSON in ASCII"),
        (
            b'{"version":1,"cut":"\x1b"}',
            "the answer is not JSON in ASCII",
        ),
        (
            b'{"version":9,"cut":1}',
            "the answer to a cut is of version 9",
        ),
    ],
)
def test_an_answer_that_cannot_be_read_cut_nobody(tmp_path: Path, said: bytes, problem: str) -> None:
    with listener(tmp_path, said):
        done = cut(tmp_path, KEY, ONE)
    assert done.cut == 0
    assert done.problem is not None
    assert done.problem.startswith(f"the listener's answer cannot be read: {problem}")


def test_a_listener_that_may_not_be_asked_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert cut(tmp_path / "file", KEY, ONE) == CutReport(0, "the listener does not answer: Not a directory")


def test_the_program_reads_key_and_line_and_answers_on_stdout(tmp_path: Path) -> None:
    with listener(tmp_path, document.dump(CutReport(2).as_json())) as requests:
        done = run(tmp_path, "fwd.work.web", given=b"192.0.2.1\n")
    assert (done.returncode, CutReport.parse(done.stdout), done.stderr) == (0, CutReport(2), b"")
    assert requests == [b"fwd.work.web 192.0.2.1\n"]


@pytest.mark.parametrize(
    ("argument", "given", "words"),
    [
        ([], b"\n", b"qubes.ForwardCut: "),
        (["work.web"], b"\n", b"qubes.ForwardCut: "),
        (["nft.work.web"], b"\n", b"qubes.ForwardCut: "),
        (["fwd.work.web\x1b"], b"\n", b"qubes.ForwardCut: "),
        (["fwd.work.web"], b"", b"qubes.ForwardCut: '' is not one line: nothing for all clients"),
        (["fwd.work.web"], b"192.0.2.1", b"qubes.ForwardCut: '192.0.2.1' is not one line"),
        (["fwd.work.web"], b"\n\n", b"qubes.ForwardCut: '' is not one line"),
        (["fwd.work.web"], b"x\x1b\n", b"qubes.ForwardCut: 'x\\x1b' is not an IPv4 or IPv6 address"),
        (["fwd.work.web"], b"1" * (WHICH_MAX_BYTES + 1) + b"\n", b"qubes.ForwardCut: '1111"),
    ],
)
def test_what_is_not_understood_cuts_nobody(
    tmp_path: Path, argument: list[str], given: bytes, words: bytes
) -> None:
    """An answer would say that no listener is running."""
    done = run(tmp_path, *argument, given=given)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(words)
    assert done.stderr.count(b"\n") == 1
    assert b"\x1b" not in done.stderr
