# SPDX-License-Identifier: GPL-2.0-or-later
"""More clients and more targets than there are qrexec calls, in a lab whose programs are processes."""

import select
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from processes import BOUND_S, TARGET, Connection, Way, assert_reset, open_world

CLIENTS = 16
TRIES = 20


@contextmanager
def answering(way: Way) -> Iterator[None]:
    """A server that answers one byte with another, and ends."""
    over = threading.Event()

    def serve() -> None:
        with ExitStack() as stack, suppress(OSError):
            while not over.is_set():
                if not select.select([way.server], [], [], 0.1)[0]:
                    continue
                far = stack.enter_context(way.server.accept()[0])
                far.settimeout(BOUND_S)
                if far.recv(1) == b"x":
                    far.sendall(b"y")
                far.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def all_are_served(clients: list[socket.socket]) -> bool:
    """Each has its byte and an end of file, and none an abort; each leaves as soon as it has both.

    The bound is on a wait for the next of them, and not on all together.
    """
    left, answers = dict.fromkeys(clients, b""), []
    for client in clients:
        client.sendall(b"x")
    while left and (ready := select.select(list(left), [], [], BOUND_S)[0]):
        for client in ready:
            data = client.recv(2)
            left[client] += data
            if not data:
                answers.append(left.pop(client))
                client.close()
    return answers == [b"y"] * len(clients)


@pytest.mark.parametrize("knobs", [{"calls_per_target": 6}, {"vchans_per_caller": 6}, {"begun_at_once": 2}])
def test_all_are_served_where_few_calls_fit(tmp_path: Path, knobs: dict[str, int]) -> None:
    """A stock target takes few, or a qube has room for few: none is refused, and no byte is lost."""
    with open_world(tmp_path) as world, ExitStack() as stack:
        way = world.forward("call")
        world.turn(**knobs)
        world.start_listener(exposed__callwaits__WAIT_S=CLIENTS * BOUND_S)
        with answering(way):
            assert all_are_served([stack.enter_context(way.client()) for _ in range(CLIENTS)])
        assert world.said("refuse") == 0


def test_a_single_call_takes_half_the_room_of_another(tmp_path: Path) -> None:
    """Three of 17 pages, where two calls with buffers of the client's own size, of 33 each, have room."""
    with open_world(tmp_path) as world, ExitStack() as stack:
        way = world.forward("call")
        world.turn(vchans_per_caller=2)
        world.start_listener()
        connections = [stack.enter_context(way.connect()) for _ in range(3)]
        for connection in connections:
            connection.echo()


def test_more_targets_than_calls_are_served_one_after_the_other(tmp_path: Path) -> None:
    """A mux call that is idle is let go when another one is wanted, and one in use is not."""
    with open_world(tmp_path) as world, ExitStack() as stack:
        ways = [world.forward("mux") for _ in range(6)]
        world.start_listener(exposed__listeneroptions__CALLS_MAX=2)
        first = stack.enter_context(ways[0].connect())
        first.echo()
        for way in ways[1:] * 2:
            with way.connect() as connection:
                connection.echo()
            first.echo()


@pytest.mark.parametrize("transport", ["mux", "call"])
def test_idle_connections_of_one_client_in_all_mux_calls_keep_no_other_client_out(
    tmp_path: Path, transport: str
) -> None:
    with open_world(tmp_path) as world, ExitStack() as stack:
        ways = [world.forward("mux") for _ in range(3)]
        late = world.forward(transport)
        world.start_listener(exposed__listeneroptions__CALLS_MAX=3)
        idle = [stack.enter_context(way.connect("127.0.0.1")) for way in ways]
        for connection in idle:
            connection.echo()
        with late.connect("127.0.0.2") as connection:
            connection.echo()
        assert_reset(idle[0].client)
        for connection in idle[1:]:
            connection.echo()


def silent_connection(way: Way) -> Connection:
    """Through to the server, however slowly calls begin here: one that is too late is made again."""
    for _ in range(TRIES):
        with ExitStack() as undo:
            client = undo.enter_context(way.client())
            if way.server in select.select([way.server, client], [], [], BOUND_S)[0]:
                connection = Connection(client, way.server.accept()[0])
                undo.pop_all()
                return connection
    raise AssertionError("no call is through in time")


def test_a_call_on_which_both_are_silent_goes_on_and_one_that_hangs_ends(tmp_path: Path) -> None:
    with open_world(tmp_path) as world:
        silent, hanging = world.forward("call"), world.forward("call")
        world.turn(hang=(f"{TARGET}/qubes.ForwardTCP+{hanging.target_port}",))
        world.start_listener(options=("--call-timeout=3",))
        with silent_connection(silent) as connection, hanging.client() as other:
            assert_reset(other)
            connection.echo()
