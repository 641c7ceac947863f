# SPDX-License-Identifier: GPL-2.0-or-later
"""Targets that fail and calls that are lost, with every program a process: who sees what, what is left."""

import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from loop_time import SLOWNESS
from processes import Connection, Way, World, assert_reset, kill, open_world, until, with_constants

from bench.memory import open_files
from qubes_fwd_qrexec.exposed.callwaits import AGAIN_S

KILLS = 12
CLIENTS = 20


@contextmanager
def at_least(least_s: float) -> Iterator[None]:
    """No load makes it sooner. That it is soon enough is held by `start_slowly`, or by clocks elsewhere."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began >= least_s


def start_slowly(world: World, *mux_calls: str) -> None:
    """The listener and the services of these, with all timers of their loops a hundred times as slow.

    What comes within BOUND_S all the same waits for none: it takes a second only where there is other load.
    """
    for mux_call in mux_calls:
        world.serve_with(mux_call, *with_constants("service", slowness=SLOWNESS))
    world.start_listener(slowness=SLOWNESS)


# A service that is not to be had


class Failing:
    """A way for each of its tests, since the log of a forward remembers, and so does what was refused."""

    def __init__(self, world: World, transport: str) -> None:
        self.world = world
        self.transport = transport
        self.ways = {trouble: world.forward(transport) for trouble in TROUBLES}
        # However long all clients of a test take, dom0 is not asked again before, and nobody waits for that.
        world.start_listener(
            exposed__callwaits__AGAIN_S=1000.0,
            exposed__callwaits__WAIT_S=0.1,
            system__logs__REPEAT_S=1000.0,  # nor is anything said again
        )

    def service(self, way: Way) -> str:
        return way.mux_call if self.transport == "mux" else f"qubes.ForwardTCP+{way.target_port}"


def refuse(world: World, service: str) -> None:
    """In front of what was written for the forwards."""
    policy = world.lab.policy_dir / "20-user.policy"
    name, _, argument = service.partition("+")
    policy.write_text(f"{name} +{argument} @anyvm @anyvm deny notify=no\n")


def lack(world: World, service: str) -> None:
    """An agent reports this, too, if the service's interpreter is missing."""
    world.serve_with(service, "/bin/true")
    place = world.lab.qube_dir("work").service_dirs[0] / service
    place.write_text("#!/nonexistent\n")


def break_down(world: World, service: str) -> None:
    world.serve_with(service, "/bin/true")
    (world.lab.qube_dir("work").service_dirs[0] / service).chmod(0o644)


TROUBLES: dict[str, tuple[Callable[[World, str], None], str]] = {
    "126": (refuse, "dom0's policy refuses the call"),
    "127": (lack, "the target does not have the service"),
    "125": (break_down, "the call failed"),
}


@pytest.fixture(scope="module", params=["mux", "call"])
def failing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Failing]:
    with open_world(tmp_path_factory.mktemp("failing")) as world:
        yield Failing(world, request.param)


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_call_that_fails_is_an_abort_and_dom0_is_left_alone_for_a_while(
    failing: Failing, trouble: str
) -> None:
    """docs/behaviours.md, 23 and 24. A single call's 125 is not remembered: a server that starts is found
    at once."""
    world, way = failing.world, failing.ways[trouble]
    fail, words = TROUBLES[trouble]
    service = failing.service(way)
    calls = world.calls()
    fail(world, service)
    with way.client() as first:
        assert_reset(first)
    is_left_alone = failing.transport == "mux" or trouble != "125"
    for _ in range(CLIENTS):
        with way.client() as client:
            assert_reset(client)
    assert world.said(words) == 1
    until(lambda: world.calls() <= calls)
    if is_left_alone:
        assert world.asked(service) == 1
    if trouble == "126":
        (world.lab.policy_dir / "20-user.policy").unlink()
        world.reload()  # as with a new policy: what was refused before is forgiven
        with way.connect_again() as connection:
            connection.echo()
        assert world.asked(service) <= 2


def test_each_trouble_has_words_of_its_own() -> None:
    assert len({words for _, words in TROUBLES.values()}) == len(TROUBLES)


# A target that does not answer

_SILENT = "import os, sys\nwhile os.read(0, 65536): pass"


def test_a_target_that_never_says_hello_is_a_failure_in_time(tmp_path: Path) -> None:
    """docs/behaviours.md, 26, with 1 s instead of 30: the call hangs before the target, or in it."""
    with open_world(tmp_path) as world:
        hanging, silent = world.forward(), world.forward()
        world.turn(hang=(f"work/{hanging.mux_call}",))
        world.serve_with(silent.mux_call, sys.executable, "-c", _SILENT)
        world.start_listener(exposed__muxpool__OPEN_S=1.0, exposed__muxpool__HELLO_S=1.0)
        for way in hanging, silent:
            with at_least(0.9), ExitStack() as stack:
                clients = [stack.enter_context(way.client()) for _ in range(5)]
                for client in clients:
                    assert_reset(client)
        until(lambda: not world.clients and not world.services)
        assert world.said("HELLO within 1") + world.said("within 1 s") >= 2


def test_a_server_whose_queue_is_full_is_an_abort_at_the_connect_timeout(tmp_path: Path) -> None:
    """docs/behaviours.md, 22, with half a second instead of 10 s."""
    with open_world(tmp_path) as world, ExitStack() as stack:
        way = world.forward()
        way.server.listen(0)
        world.serve_with(way.mux_call, *with_constants("service", target__connecting__CONNECT_TIMEOUT_S=0.5))
        world.start_listener()
        for _ in range(3):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(way.server.getsockname())
        with at_least(0.5), way.client() as client:
            client.sendall(b"unread")
            assert_reset(client)
        assert world.said("did not accept the connection in time") == 1
        # The mux call is as it was.
        stack.close()
        way.server.listen(128)
        way.server.accept()[0].close()
        with way.connect() as connection:
            connection.echo()
        assert world.asked(way.mux_call) == 0


def test_nobody_listening_is_an_abort_within_a_second(tmp_path: Path) -> None:
    """docs/behaviours.md, 21."""
    with open_world(tmp_path) as world:
        way = world.forward()
        start_slowly(world, way.mux_call)
        with way.connect() as connection:
            connection.echo()
            way.server.close()
            with way.client() as client:
                assert_reset(client)
            connection.echo()
        assert world.said("refused the connection") == 1


# A mux call that is lost


def kill_client(world: World) -> None:
    kill(world.clients)


def kill_service(world: World) -> None:
    kill(world.services)


LOSSES = (kill_client, kill_service, World.lose_calls)
Loss = Callable[[World], None]


class Lossy:
    def __init__(self, world: World, way: Way) -> None:
        self.world = world
        self.way = way

    def connect(self) -> Connection:
        """As with a new policy: what was lost before is forgiven."""
        self.world.reload()
        return self.way.connect_again()

    def lose(self, loss: Loss, connections: list[Connection]) -> None:
        """Everybody sees an abort, and the service ends, and no timer of theirs was waited for."""
        loss(self.world)
        for connection in connections:
            assert_reset(connection.client)
            assert_reset(connection.far)
        until(lambda: not self.world.services and not self.world.clients)

    def held(self) -> dict[str, int]:
        held = {
            "clients": len(self.world.clients),
            "services": len(self.world.services),
            "listener's files": open_files(self.world.listener),
            "broker's files": open_files(self.world.broker),
            "services' files": sum(map(open_files, self.world.services)),
        }
        # Last, as the broker has a descriptor for who asks.
        return held | {"calls": self.world.calls()}

    def at_rest(self) -> dict[str, int]:
        """What is held when nothing is still being closed: it is no less at any look of some."""
        before, now = self.held(), self.held()
        looks = 0
        while looks < 20:
            least = {name: min(before[name], now[name]) for name in now}
            looks = looks + 1 if least == before else 0
            before, now = least, self.held()
        return before


@pytest.fixture(scope="module")
def lossy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lossy]:
    with open_world(tmp_path_factory.mktemp("lossy")) as world:
        way = world.forward()
        start_slowly(world, way.mux_call)
        yield Lossy(world, way)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_a_lost_mux_call_is_an_abort_for_everybody_within_a_second(lossy: Lossy, loss: Loss) -> None:
    """docs/behaviours.md, 27 and 28."""
    with ExitStack() as stack:
        connections = [stack.enter_context(lossy.connect())]
        connections += [stack.enter_context(lossy.way.connect()) for _ in range(4)]
        for connection in connections:
            connection.echo()
        lossy.lose(loss, connections)


def test_after_many_losses_nothing_is_left(lossy: Lossy) -> None:
    """docs/behaviours.md, 28; `make soak` has more of them."""
    with lossy.connect():
        before = lossy.at_rest()
        assert before["clients"] == before["services"] == before["calls"] == 1
        lossy.lose(LOSSES[0], [])
    for number in range(KILLS):
        with lossy.connect() as connection:
            lossy.lose(LOSSES[number % len(LOSSES)], [connection])
    with lossy.connect():
        until(lambda: all(now <= before[name] for name, now in lossy.held().items()))


def test_mux_calls_that_are_lost_again_and_again_are_no_flood_of_calls(lossy: Lossy) -> None:
    """docs/behaviours.md, 28: dom0 is asked at most every two seconds."""
    world, way = lossy.world, lossy.way
    with lossy.connect() as connection:
        asked = world.asked(way.mux_call)
        lossy.lose(kill_service, [connection])
    with way.connect_again() as connection:
        began = time.monotonic()
        lossy.lose(kill_service, [connection])
    with way.connect_again():  # by many clients, one after the other
        assert time.monotonic() - began >= AGAIN_S / 2
        until(lambda: world.asked(way.mux_call) >= asked + 2)  # the broker says so when all of it is over
        assert world.asked(way.mux_call) == asked + 2


def test_without_a_report_or_a_status_it_is_no_clean_end(tmp_path: Path) -> None:
    """docs/behaviours.md, 14: a program is killed, and the kernel closes its sockets."""
    with open_world(tmp_path) as world:
        mux_call, call = world.forward("mux"), world.forward("call")
        start_slowly(world, mux_call.mux_call)
        with mux_call.connect() as first, call.connect() as second:
            first.echo()
            second.echo()
            kill(world.services)
            for connection in (first, second):
                assert_reset(connection.far)
                assert_reset(connection.client)
        with mux_call.connect_again() as first, call.connect_again() as second:
            world.kill_listener()
            for connection in (first, second):
                assert_reset(connection.client)
            assert_reset(first.far)
            assert second.far.recv(1) == b""  # raw qrexec has no other word for it
