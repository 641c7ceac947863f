# SPDX-License-Identifier: GPL-2.0-or-later
"""The process for all calls for one connection, with a test as the program that hands them over."""

import errno
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from helpers import BOUND_S, no_fds_left, port_of
from loop_time import LoopClock

from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.relay.copy import LOOK_S, abort
from qubes_fwd_qrexec.relay.loop import Loop
from qubes_fwd_qrexec.system import bugs
from qubes_fwd_qrexec.target import singleservice
from qubes_fwd_qrexec.target.callnotes import living
from qubes_fwd_qrexec.target.handover import listen_on
from qubes_fwd_qrexec.target.singleservice import HANDOVER_S, SingleService


class Call:
    """A call from outside: the program's connection, and the agent's ends of the three descriptors."""

    def __init__(self, bench: "Bench") -> None:
        self._bench = bench
        self._undo = ExitStack()
        self.program = self._undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        self.program.connect(str(bench.path))
        self.program.setblocking(False)
        self.stdin, self._its_stdin = map(self._undo.enter_context, socket.socketpair())
        self.stdout, self._its_stdout = map(self._undo.enter_context, socket.socketpair())
        self.stdout.setblocking(False)
        self.stderr, self._its_stderr = os.pipe()
        self._undo.callback(os.close, self.stderr)

    def hand_over(self, port: str, caller: str = "sys-net", agent: str = "") -> None:
        words = f"1 {port} {caller} {agent or os.environ['QREXEC_AGENT_PID']}"
        fds = [self._its_stdin.fileno(), self._its_stdout.fileno(), self._its_stderr]
        socket.send_fds(self.program, [words.encode()], fds)
        self._its_stdin.close()
        self._its_stdout.close()
        os.close(self._its_stderr)
        self._its_stderr = -1

    def status(self) -> int:
        """Turn until the program is told; -1 if it never will be."""
        told: list[bytes] = []

        def is_told() -> bool:
            try:
                told.append(self.program.recv(2))
            except BlockingIOError:
                return False
            except ConnectionResetError:
                told.append(b"")
            return True

        self._bench.until(is_told)
        return told[0][0] if told[0] else -1

    def said(self) -> str:
        """The last line on stderr, which has ended."""
        with open(os.dup(self.stderr)) as stderr:
            return stderr.read().splitlines()[-1]

    def close(self) -> None:
        if self._its_stderr >= 0:
            os.close(self._its_stderr)
            self._its_stderr = -1
        self._undo.close()


class Bench:
    """The service, turned by the test; its clock stands still."""

    def __init__(self, path: Path, **options: float) -> None:
        self.path = path
        self.listening = listen_on(path)
        self.service = SingleService(self.listening, **options)  # type: ignore[arg-type]
        self.clock = LoopClock()
        self._undo = ExitStack()

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + BOUND_S
        while not condition():
            assert time.monotonic() < deadline, "it does not come true"
            self.service.loop.run_once(0.01)

    def turn(self) -> None:
        for _ in range(3):
            self.service.loop.run_once(0)

    def call(self) -> Call:
        call = Call(self)
        self._undo.callback(call.close)
        return call

    def connect(self, server: socket.socket) -> tuple[Call, socket.socket]:
        """A call, and the server's end of its connection."""
        call = self.call()
        call.hand_over(str(port_of(server)))
        far = self._undo.enter_context(self.accept(server))
        return call, far

    def accept(self, server: socket.socket) -> socket.socket:
        found: list[socket.socket] = []

        def is_there() -> bool:
            try:
                found.append(server.accept()[0])
            except BlockingIOError:
                return False
            return True

        self.until(is_there)
        found[0].setblocking(False)
        return found[0]

    def is_aborted(self, sock: socket.socket) -> bool:
        def has_ended() -> bool:
            try:
                assert sock.recv(1) == b""
            except BlockingIOError:
                return False
            except ConnectionResetError:
                return True
            raise AssertionError("a clean end")

        self.until(has_ended)
        return True

    def close(self) -> None:
        self.service.stop()
        self.service.stop()
        self.turn()
        self._undo.close()
        self.service.loop.close()
        self.clock.let_go()


@contextmanager
def serving(tmp_path: Path, **options: float) -> Iterator[Bench]:
    with no_fds_left():
        bench = Bench(tmp_path / "socket", **options)
        try:
            yield bench
        finally:
            bench.close()


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setenv("QUBES_FORWARD_RUN_DIR", str(tmp_path / "run"))
    with serving(tmp_path) as made:
        yield made


def echo(bench: Bench, call: Call, far: socket.socket) -> None:
    for source, sink in ((call.stdin, far), (far, call.stdout)):
        source.send(b"x")
        bench.until(lambda sink=sink: is_readable(sink))
        assert sink.recv(2) == b"x"


def is_readable(sock: socket.socket) -> bool:
    try:
        return bool(sock.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False


def test_calls_are_served_beside_each_other_and_each_has_a_note(
    bench: Bench, server: socket.socket, tmp_path: Path
) -> None:
    calls = [bench.connect(server) for _ in range(3)]
    assert {note.pid for note in living(tmp_path / "run")} == {os.getpid()}
    assert len(living(tmp_path / "run")) == 3
    for call, far in calls:
        echo(bench, call, far)
    (first, far), *others = calls
    abort(far)
    assert first.status() == ExitStatus.SERVER_RESET
    for call, far in others:
        echo(bench, call, far)
    assert len(living(tmp_path / "run")) == 2


def test_what_is_no_call_is_refused_and_others_are_served(bench: Bench, server: socket.socket) -> None:
    rude = bench.call()
    rude.program.send(b"garbage")
    assert rude.status() == ExitStatus.TROUBLE
    echo(bench, *bench.connect(server))


@pytest.mark.parametrize(
    ("port", "caller", "status", "words"),
    [
        ("80-90+mux", "sys-net", ExitStatus.BAD_ARGUMENT, "a mux call has a process of its own"),
        ("080", "sys-net", ExitStatus.BAD_ARGUMENT, "argument '080'"),
        ("80", "../x", ExitStatus.TROUBLE, "'../x'"),
    ],
)
def test_a_call_for_something_else_is_refused_with_a_reason(
    bench: Bench, port: str, caller: str, status: int, words: str
) -> None:
    call = bench.call()
    call.hand_over(port, caller)
    assert call.status() == status
    assert words in call.said()


def test_a_program_that_hands_nothing_over_is_given_up_on(bench: Bench) -> None:
    mute = bench.call()
    bench.turn()
    bench.clock.advance(HANDOVER_S - 0.1)
    bench.turn()
    with pytest.raises(BlockingIOError):
        mute.program.recv(1)
    bench.clock.advance(0.1)
    assert mute.status() == ExitStatus.TROUBLE


def test_a_call_has_all_its_time_once_it_is_handed_over(bench: Bench, server: socket.socket) -> None:
    call, far = bench.connect(server)
    bench.clock.advance(HANDOVER_S)
    bench.turn()
    echo(bench, call, far)


def test_a_program_that_ends_before_or_afterwards_ends_its_call(bench: Bench, server: socket.socket) -> None:
    early = bench.call()
    bench.turn()
    early.close()
    call, far = bench.connect(server)
    call.program.close()
    assert bench.is_aborted(far)
    assert call.stdout.recv(1) == b""


def test_calls_above_the_bound_are_refused_and_places_come_back(
    tmp_path: Path, server: socket.socket
) -> None:
    with serving(tmp_path, calls_max=1) as bench:
        call, far = bench.connect(server)
        second = bench.call()
        assert second.status() == -1
        abort(far)
        assert call.status() == ExitStatus.SERVER_RESET
        echo(bench, *bench.connect(server))


def test_a_call_that_is_over_leaves_nothing_behind_that_would_be_kept_for_minutes(
    bench: Bench, server: socket.socket
) -> None:
    """With a hundred calls a second it would be what fills this process's memory."""
    call, far = bench.connect(server)
    far.close()
    bench.until(lambda: bench.service.loop.timers_left == 2)  # the relay's, and the call's
    call.stdin.close()
    assert call.status() == os.EX_OK
    bench.clock.advance(LOOK_S)
    bench.turn()
    assert bench.service.loop.timers_left == 0


def test_stopping_lets_calls_finish_and_a_second_time_aborts_them(
    bench: Bench, server: socket.socket
) -> None:
    call, far = bench.connect(server)
    bench.service.stop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as late:
        assert late.connect_ex(str(bench.path)) == errno.ECONNREFUSED
    echo(bench, call, far)
    bench.service.stop()
    assert bench.is_aborted(far)
    assert call.status() == ExitStatus.TROUBLE


def test_what_has_not_finished_by_the_deadline_is_aborted(tmp_path: Path, server: socket.socket) -> None:
    with serving(tmp_path, drain_s=60) as bench:
        call, far = bench.connect(server)
        bench.service.stop()
        bench.clock.advance(59)
        echo(bench, call, far)
        bench.clock.advance(1)
        assert bench.is_aborted(far)


def test_it_ends_when_it_has_had_no_call_for_a_while_and_not_before(
    tmp_path: Path, server: socket.socket
) -> None:
    with serving(tmp_path, idle_s=300) as bench:
        call, far = bench.connect(server)
        bench.clock.advance(301)
        echo(bench, call, far)
        assert bench.listening.fileno() >= 0
        abort(far)
        assert call.status() == ExitStatus.SERVER_RESET
        bench.clock.advance(299)
        bench.turn()
        assert bench.listening.fileno() >= 0
        bench.clock.advance(1)
        bench.turn()
        assert bench.listening.fileno() < 0


def test_one_that_nobody_would_start_again_never_ends_for_want_of_calls(bench: Bench) -> None:
    bench.clock.advance(1e6)
    bench.turn()
    assert bench.listening.fileno() >= 0
    assert bench.service.loop.timers_left == 0


@pytest.mark.usefixtures("bugs_are_wanted")
def test_a_bug_in_one_call_ends_that_call_and_is_reported_to_dom0(
    bench: Bench, server: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    kept, kept_far = bench.connect(server)

    def fail(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(singleservice, "call_start", fail)
        call = bench.call()
        call.hand_over(str(port_of(server)))
        assert call.status() == ExitStatus.TROUBLE
    assert bugs.left(tmp_path / "run") == 1
    echo(bench, kept, kept_far)
    echo(bench, *bench.connect(server))


class Short(socket.socket):
    """It accepts nothing, as there are no descriptors left."""

    tries = 0

    def accept(self) -> tuple[socket.socket, object]:
        Short.tries += 1
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_without_descriptors_it_waits_and_then_goes_on(
    tmp_path: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Short, "tries", 0)
    listening = Short(fileno=listen_on(tmp_path / "socket").detach())
    listening.setblocking(False)
    monkeypatch.setattr("test_singleservice.listen_on", lambda _: listening)
    with serving(tmp_path) as bench:
        call = bench.call()
        call.hand_over(str(port_of(server)))
        bench.turn()
        bench.turn()
        assert Short.tries == 1
        bench.clock.advance(0.5)
        monkeypatch.setattr(Short, "accept", socket.socket.accept)
        with bench.accept(server) as far:
            echo(bench, call, far)


def test_what_waits_for_descriptors_can_be_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listening = Short(fileno=listen_on(tmp_path / "socket").detach())
    listening.setblocking(False)
    monkeypatch.setattr("test_singleservice.listen_on", lambda _: listening)
    with serving(tmp_path) as bench:
        bench.call()
        bench.turn()
        bench.service.stop()
        bench.clock.advance(0.5)
        bench.turn()


def test_a_connection_that_the_kernel_cannot_watch_is_refused(
    bench: Bench, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "watch_for", refuse)
        assert bench.call().status() == -1
    echo(bench, *bench.connect(server))
