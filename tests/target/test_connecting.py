# SPDX-License-Identifier: GPL-2.0-or-later
"""Connecting in a loop: to a server that answers at once, and to one that does not."""

import errno
import os
import socket
from collections.abc import Iterator

import pytest
from helpers import free_port, listening_socket, no_fds_left, port_of
from loop_time import LoopClock
from service_bench import full_server

from qubes_fwd_qrexec.relay.loop import Loop
from qubes_fwd_qrexec.target import connecting
from qubes_fwd_qrexec.target.connecting import Connecting
from qubes_fwd_qrexec.target.localserver import CONNECT_TIMEOUT_S, RETRY_S
from qubes_fwd_qrexec.target.servers import LOCALHOSTS, ServerAddress


class Tried(Connecting):
    """Keeps what came of it."""

    def __init__(self, loop: Loop, port: int) -> None:
        super().__init__(loop, port)
        self.ends: list[socket.socket | OSError] = []

    def _connected(self, sock: socket.socket) -> None:
        self.ends.append(sock)

    def _not_connected(self, trouble: OSError) -> None:
        self.ends.append(trouble)

    def fail(self) -> None:
        raise AssertionError("there was a bug")

    @property
    def trouble(self) -> OSError:
        (end,) = self.ends
        assert isinstance(end, OSError)
        return end

    def close(self) -> None:
        (end,) = self.ends
        assert isinstance(end, socket.socket)
        end.close()


@pytest.fixture
def loop() -> Iterator[Loop]:
    with no_fds_left():
        made = Loop()
        yield made
        assert (made.timers_left, made.watched) == (0, frozenset())
        made.close()


@pytest.fixture
def clock() -> Iterator[LoopClock]:
    made = LoopClock()
    yield made
    made.let_go()


def test_a_server_that_answers_at_once_costs_no_turn_and_no_timer(loop: Loop) -> None:
    with listening_socket() as server:
        tried = Tried(loop, port_of(server))
        tried.start(LOCALHOSTS)
        assert (loop.timers_left, loop.watched) == (0, frozenset())
        tried.close()


def test_the_next_address_is_tried_and_the_first_trouble_is_told(loop: Loop) -> None:
    with listening_socket("::1") as server:
        tried = Tried(loop, port_of(server))
        tried.start(LOCALHOSTS)
        tried.close()
    tried = Tried(loop, free_port())
    tried.start([LOCALHOSTS[0], ServerAddress(socket.AF_UNIX, "/nonexistent")])
    assert tried.trouble.errno == errno.ECONNREFUSED


def test_without_an_address_there_is_nothing_to_connect_to(loop: Loop) -> None:
    tried = Tried(loop, 80)
    tried.start(())
    assert tried.trouble.errno == errno.ENOENT


def test_one_that_does_not_answer_has_its_time_and_no_more(loop: Loop, clock: LoopClock) -> None:
    with full_server() as port:
        tried = Tried(loop, port)
        tried.start(LOCALHOSTS)
        assert loop.timers_left == 1
        clock.advance(CONNECT_TIMEOUT_S - 0.1)
        loop.run_once(0)
        assert tried.ends == []
        clock.advance(0.1)
        loop.run_once(0)
        assert tried.trouble.errno == errno.ETIMEDOUT


def test_one_that_answers_later_is_noticed(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connecting, "has_answered", lambda _: False)
    with listening_socket() as server:
        tried = Tried(loop, port_of(server))
        tried.start(LOCALHOSTS)
        assert tried.ends == []
        loop.run_once(0)
        tried.close()


def test_one_that_cannot_be_waited_for_is_a_trouble_like_others(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(loop, "watch_for", refuse)
    with full_server() as port:
        tried = Tried(loop, port)
        tried.start(LOCALHOSTS[:1])
        assert tried.trouble.errno == errno.ENOSPC


def test_a_server_that_was_there_and_aborted_is_not_looked_for_elsewhere(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def aborted(*_: object) -> None:
        raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))

    monkeypatch.setattr(connecting, "check_answered", aborted)
    with listening_socket() as server, listening_socket("::1", port_of(server)) as other:
        other.setblocking(False)
        tried = Tried(loop, port_of(server))
        tried.start(LOCALHOSTS)
        assert tried.trouble.errno == errno.ECONNRESET
        with pytest.raises(BlockingIOError):
            other.accept()


def test_a_unix_server_whose_queue_is_full_is_tried_again(
    loop: Loop, unix_server: socket.socket, clock: LoopClock
) -> None:
    path = unix_server.getsockname()
    unix_server.listen(0)
    with socket.socket(socket.AF_UNIX) as filler:
        filler.connect(path)
        tried = Tried(loop, 80)
        tried.start([ServerAddress(socket.AF_UNIX, path)])
        clock.advance(RETRY_S)
        loop.run_once(0)
        assert tried.ends == []
        unix_server.accept()[0].close()
        clock.advance(RETRY_S)
        loop.run_once(0)
        tried.close()


@pytest.mark.parametrize("is_unix", [False, True])
def test_one_that_is_given_up_leaves_nothing_and_hears_nothing(
    loop: Loop, unix_server: socket.socket, *, is_unix: bool
) -> None:
    unix_server.listen(0)
    with socket.socket(socket.AF_UNIX) as filler, full_server() as port:
        filler.connect(unix_server.getsockname())
        tried = Tried(loop, port)
        tried.start([ServerAddress(socket.AF_UNIX, unix_server.getsockname())] if is_unix else LOCALHOSTS)
        tried.give_up()
        assert (loop.timers_left, loop.watched, tried.ends) == (0, frozenset(), [])
