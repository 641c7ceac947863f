# SPDX-License-Identifier: GPL-2.0-or-later
"""Closing closes, by the program itself: it notices what is over, and leaves nothing behind that goes on."""

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from closingroad import CLOSED, PATH, Flow, Road
from helpers import BOUND_S
from wired import FIREWALL, NET, PROBLEM, V4, WORK, Wired

from qubes_fwd_qrexec.common.nftconfig import NftConfig
from qubes_fwd_qrexec.common.values import Proto
from qubes_fwd_qrexec.firewall.inforce import IN_FORCE
from qubes_fwd_qrexec.firewall.tables import OWN

pytestmark = pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))
_LOOK_S = 0.05


class Program:
    """The program in one qube, with a directory for its configuration and one as its unit has it."""

    def __init__(self, road: Road, qube: str, directory: Path) -> None:
        self._road = road
        self.qube = qube
        self._configs = directory / "config"
        self.runtime = directory / "run"
        self._told = directory / "notify"
        for place in (self._configs, self.runtime):
            place.mkdir()
        self._process: subprocess.Popen[bytes] | None = None

    def say(self, config: NftConfig | None, instead_of: NftConfig) -> None:
        """What dom0 says of a forward; None takes it away."""
        file = self._configs / instead_of.key
        if config is None:
            file.unlink()
        else:
            hidden = self._configs / ".new"
            hidden.write_text(str(config))
            hidden.rename(file)

    def start(self) -> None:
        """Returns when everything is in force."""
        self._told.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
            told.bind(str(self._told))
            told.settimeout(BOUND_S)
            with self._road.wired.places.entering(self.qube)():
                self._process = subprocess.Popen(
                    [*self._command, "--config", str(self._configs)], env=self._environment
                )
            assert b"READY=1" in told.recv(4096)

    def end(self, number: int) -> int:
        assert self._process is not None
        self._process.send_signal(number)
        status = self._process.wait(BOUND_S)
        self._process = None
        return status

    def remove(self) -> None:
        """As the unit does after its program, however that ended."""
        with self._road.wired.places.entering(self.qube)():
            subprocess.run([*self._command, "--remove"], env=self._environment, timeout=BOUND_S, check=True)

    def kill(self) -> None:
        if self._process is not None:
            self.end(signal.SIGKILL)

    @property
    def _command(self) -> list[str]:
        return [sys.executable, "-m", "qubes_fwd_qrexec.firewall.keeper"]

    @property
    def _environment(self) -> dict[str, str]:
        return os.environ | {"RUNTIME_DIRECTORY": str(self.runtime), "NOTIFY_SOCKET": str(self._told)}


Started = Callable[[str], Program]


@pytest.fixture
def road(fresh: Wired) -> Iterator[Road]:
    with ExitStack() as opened:
        yield Road(fresh, opened, Proto.TCP)


@pytest.fixture
def start(road: Road, tmp_path: Path) -> Iterator[Started]:
    """In one qube the program takes over; in the others everything stays as it is."""
    with ExitStack() as undo:

        def begin(qube: str) -> Program:
            directory = tmp_path / qube
            directory.mkdir()
            program = Program(road, qube, directory)
            undo.callback(program.kill)
            for config in (road.closed[qube], road.kept[qube]):
                program.say(config, config)
            program.start()
            return program

        yield begin


def assert_ends(qube: str, *flows: Flow) -> None:
    """A client that goes on is reset before long; if the target ends it, one that does not go on as well."""
    until_s = time.monotonic() + BOUND_S
    for flow in flows:
        while not select.select([flow.client], [], [], BOUND_S if qube == WORK else _LOOK_S)[0]:
            assert time.monotonic() < until_s
            flow.to_server(b"lost, or not yet")
        flow.assert_client_reset()


@pytest.mark.parametrize("qube", PATH)
def test_what_dom0_takes_away_is_noticed_and_ends(road: Road, start: Started, qube: str) -> None:
    program = start(qube)
    flows = road.both()
    program.say(None, road.closed[qube])
    assert_ends(qube, *flows)
    assert not road.is_open(V4)


@pytest.mark.parametrize("qube", PATH)
def test_an_end_that_comes_is_noticed(road: Road, start: Started, qube: str) -> None:
    program = start(qube)
    flows = road.both()
    program.say(replace(road.closed[qube], expire=int(time.time()) + 1), road.closed[qube])
    assert_ends(qube, *flows)
    assert not road.is_open(V4)


@pytest.mark.parametrize("qube", PATH)
def test_when_the_program_stops_all_connections_end_and_none_comes_back(
    road: Road, start: Started, qube: str
) -> None:
    """What holds them stays, with an end; it holds nothing that begins when the program runs again."""
    program = start(qube)
    flows = [*road.both(), *road.both((81, 8081))]
    assert program.end(signal.SIGTERM) == 0
    program.remove()
    if qube != WORK:
        guards = road.nft(qube, "list", "table", "ip", OWN)
        assert "meta time <" in guards
        assert "dnat" not in guards.replace("ct status dnat", "")
    assert_ends(qube, *flows)
    assert not road.is_open(V4)
    program.start()
    assert all(flow.is_alive() for flow in road.both())


@pytest.mark.parametrize("qube", [NET, FIREWALL, WORK])
@pytest.mark.parametrize("how", ["its unit clears up", "it is started again"])
def test_what_a_killed_one_let_through_ends(road: Road, start: Started, qube: str, how: str) -> None:
    """It has noted that, so a forward that is taken away meanwhile is not forgotten."""
    program = start(qube)
    flows = road.both(CLOSED)
    program.end(signal.SIGKILL)
    assert all(flow.is_alive() for flow in flows)
    assert road.closed[qube].key in (program.runtime / IN_FORCE).read_text()
    program.say(None, road.closed[qube])
    if how == "its unit clears up":
        program.remove()
    else:
        program.start()
    assert_ends(qube, *flows)
