# SPDX-License-Identifier: GPL-2.0-or-later
"""Asking the firewall's program what is in force: the socket, and who asks there for dom0."""

import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from helpers import BOUND_S

from qubes_fwd_qrexec.common.document import REPORT_MAX_BYTES, dump
from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.common.nftreport import NftReport, PathReport
from qubes_fwd_qrexec.firewall import ask as asking
from qubes_fwd_qrexec.firewall.ask import DIRECTORY, SilentError, ask
from qubes_fwd_qrexec.firewall.asked import ASK, Asked, AskedError, answer
from qubes_fwd_qrexec.system.unixsockets import socket_address

REPORT = NftReport(program="1.0", versions=frozenset((4,)), forwards=(PathReport(key="nft.work.web"),))
NOTHING = ("true",)


@contextmanager
def answering(path: Path, said: bytes) -> Iterator[None]:
    """A program that says this to whoever asks first."""
    with socket.socket(socket.AF_UNIX) as listening, socket_address(path) as address:
        listening.bind(address)
        listening.listen()
        listening.settimeout(BOUND_S)

        def serve() -> None:
            with closing(listening.accept()[0]) as asker:
                asker.settimeout(BOUND_S)
                asker.sendall(said)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            thread.join()


def test_who_asks_gets_the_report_and_nobody_but_root_can(tmp_path: Path) -> None:
    path = tmp_path / ASK
    with Asked(path) as asked:
        assert path.stat().st_mode & 0o777 == 0o600
        assert asked.take() == []
        with socket.socket(socket.AF_UNIX) as asker:
            asker.settimeout(BOUND_S)
            with socket_address(path) as address:
                asker.connect(address)
            answer(asked.take(), REPORT)
            with asker.makefile("rb") as said:
                assert NftReport.parse(said.read()) == REPORT
    assert not path.exists()


def test_who_is_gone_or_does_not_read_keeps_nobody_waiting(tmp_path: Path) -> None:
    long = NftReport(program="1.0", versions=frozenset(), forwards=REPORT.forwards * 10_000)
    with Asked(tmp_path / ASK) as asked, socket_address(tmp_path / ASK) as address:
        with socket.socket(socket.AF_UNIX) as gone:
            gone.connect(address)
        with socket.socket(socket.AF_UNIX) as idle:
            idle.connect(address)
            answer(asked.take(), long)


def test_a_place_where_no_socket_can_be_made_is_named(tmp_path: Path) -> None:
    with pytest.raises(AskedError, match=r"nobody could ask what is in force: .*: No such file"):
        Asked(tmp_path / "missing" / ASK)


def test_what_the_program_says_is_passed_on_as_it_is(tmp_path: Path) -> None:
    with answering(tmp_path / ASK, dump(REPORT.as_json())):
        assert asking.answer(tmp_path / ASK, NOTHING) == dump(REPORT.as_json())


def test_an_answer_has_a_bound(tmp_path: Path) -> None:
    with answering(tmp_path / ASK, b"x" * (REPORT_MAX_BYTES + 1)), pytest.raises(OSError, match="not end"):
        ask(tmp_path / ASK)


def test_a_program_that_hangs_is_waited_for_a_moment(tmp_path: Path) -> None:
    with (
        Asked(tmp_path / ASK),
        pytest.raises(OSError, match="timed out"),
    ):
        ask(tmp_path / ASK, 0.01)


def test_a_program_that_does_not_run_is_started(tmp_path: Path) -> None:
    """By a command that returns when it is ready."""
    path = tmp_path / ASK
    starting = (
        "import socket,sys,os\ns=socket.socket(socket.AF_UNIX)\ns.bind(sys.argv[1])\ns.listen()\n"
        "if os.fork(): sys.exit()\nos.closerange(0,3)\nc,_=s.accept()\nc.sendall(b'ready')\n"
    )
    given = (sys.executable, "-c", starting, str(path))
    assert asking.answer(path, given, BOUND_S) == b"ready"


def test_a_program_that_runs_has_all_the_time_to_answer(tmp_path: Path) -> None:
    with Asked(tmp_path / ASK), pytest.raises(SilentError, match="does not answer: timed out"):
        asking.answer(tmp_path / ASK, NOTHING, 0.01)


@pytest.mark.parametrize(
    ("start", "patience_s", "why"),
    [
        (NOTHING, BOUND_S, "it does not run; qvm-service QUBE qubes-forward-nft on"),
        (("false",), BOUND_S, "cannot be started"),
        (("sh", "-c", "echo no such unit >&2; exit 5"), BOUND_S, "cannot be started: no such unit"),
        (("/nonexistent",), BOUND_S, "cannot be started: /nonexistent: No such file"),
        (("sleep", "60"), 0.01, "not ready within 0.01 s"),
    ],
)
def test_why_there_is_no_answer_is_said(
    tmp_path: Path, start: tuple[str, ...], patience_s: float, why: str
) -> None:
    with pytest.raises(SilentError, match=why):
        asking.answer(tmp_path / ASK, start, patience_s)


def test_the_service_prints_the_report_or_says_why_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    monkeypatch.setattr(sys, "argv", ["qubes-forward-nft-ask", ""])
    monkeypatch.setenv(asking.DIRECTORY_VARIABLE, str(tmp_path))
    with answering(tmp_path / ASK, b"said\n"):
        assert asking.main() == 0
    assert capfdbinary.readouterr().out == b"said\n"
    assert asking.main() == ExitStatus.TROUBLE
    assert capfdbinary.readouterr().err.startswith(b"qubes-forward-nft: ")
    monkeypatch.setattr(sys, "argv", ["qubes-forward-nft-ask", "work"])
    assert asking.main() == ExitStatus.BAD_ARGUMENT


def test_the_socket_is_where_it_is_looked_for() -> None:
    unit = (Path(__file__).parents[2] / "systemd" / "qubes-forward-nft.service").read_text()
    assert f"RuntimeDirectory={DIRECTORY.name}\n" in unit
    assert DIRECTORY.parent == Path("/run")
