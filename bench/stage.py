# SPDX-License-Identifier: GPL-2.0-or-later
"""Everything that a measurement needs, up and ready: lab, server, load and the peers."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .load import ANSWER_S
from .memory import descendants, members, open_files
from .peers import Peer, Setting
from .processes import BenchError, Child
from .processor import Usage, usage

_READY_S = 60.0
_SETTLE_S = 10.0
_BEGIN_S = 30.0
_LOOK_S = 0.005
# When nothing has changed for so long, all is up and at rest.
_STILL_S = 0.5


@dataclass(slots=True)
class Stage:
    """What `open_stage` started. ``lab`` is the lab's description of itself."""

    peers: tuple[Peer, ...]
    broker_pid: int
    client_program: str
    lab: dict[str, Any]
    _load: Child
    _other_load: Child
    _server_pid: int
    _files_at_rest: int = 0
    _is_beside: bool = False

    def ask(self, peer: Peer, order: str, within_s: float = 120.0, **details: Any) -> dict[str, Any]:
        """Have the load measure a peer; then wait until the peer's work for it is done.

        Raises `BenchError`.
        """
        request = {"order": order, "address": peer.address, **details}
        try:
            return self._load.ask(request, within_s)
        finally:
            if order != "hold":
                self.settle()

    def meter(
        self, peer: Peer, order: str, connections: int = 1, within_s: float = 120.0, **details: Any
    ) -> tuple[dict[str, Any], Usage]:
        """Have the load measure on open connections: its answer, and the processor time of that alone.

        Raises `BenchError`.
        """
        try:
            self._load.ask({"order": "begin", "address": peer.address, "count": connections}, within_s)
            before = self.usage(peer)
            answer = self._load.ask({"order": order, **details}, within_s)
            used = self.usage(peer).since(before)
            self._load.ask({"order": "finish"}, within_s)
        finally:
            self._load.ask({"order": "abort"}, within_s)
            self.settle()
        return answer, used

    @contextmanager
    def beside(self, peer: Peer, order: str, connections: int = 1, **details: Any) -> Iterator[None]:
        """What is asked in the block is beside another load's connections, which obey an order until its end.

        Raises `BenchError`.
        """
        try:
            begin = {"order": "begin", "address": peer.address, "count": connections}
            self._other_load.ask(begin, _BEGIN_S)
            self._other_load.ask({"order": order, **details}, _BEGIN_S)
            self._is_beside = True
            yield
        finally:
            self._is_beside = False
            moved = self._other_load.ask({"order": "abort"}, ANSWER_S)["moved"]
            self.settle()
        if order == "flood" and not moved:
            raise BenchError(f"{peer.name}: nothing moved beside")

    def usage(self, peer: Peer) -> Usage:
        """The processor time until now of all that carries a peer's connections."""
        found = members(peer.pids, self.broker_pid, self.client_program)
        return usage(found, (self._load.pid, self._server_pid))

    def release(self) -> None:
        """Close the connections that are held, and make every peer ready again."""
        self._load.ask({"order": "release"}, ANSWER_S)
        self.settle()
        for peer in self.peers:
            peer.wait_until_ready()
        self.settle()

    def settle(self) -> None:
        """Wait until nothing serves a connection any more, so that peers do not disturb each other.

        A connection is open files in processes, some of its own. How many there are at rest was counted
        when all was up: a mux call stays, with its call and its service.
        """
        if not self._is_beside:
            self._look_until(lambda: self._open_files() <= self._files_at_rest)

    def count_at_rest(self) -> None:
        """Wait until nothing changes any more. From now on `settle` waits for this state."""
        still_since = time.monotonic()

        def is_still() -> bool:
            nonlocal still_since
            if (now := self._open_files()) != self._files_at_rest:
                self._files_at_rest = now
                still_since = time.monotonic()
            return still_since + _STILL_S <= time.monotonic()

        self._look_until(is_still)

    def _look_until(self, is_reached: Callable[[], bool]) -> None:
        """Look repeatedly, within a bound: nothing reports which files other processes open and close."""
        deadline = time.monotonic() + _SETTLE_S
        while not is_reached() and time.monotonic() < deadline:
            time.sleep(_LOOK_S)

    def _open_files(self) -> int:
        pids = [self.broker_pid, *(pid for peer in self.peers for pid in peer.pids)]
        return sum(open_files(pid) for pid in (self._server_pid, *pids, *descendants(pids)))


@contextmanager
def open_stage(kinds: Sequence[type[Peer]], **knobs: int) -> Iterator[Stage]:
    """Start it all, in a lab with these knobs; end it all with the block. Raises `BenchError`."""
    with ExitStack() as undo:
        directory = Path(undo.enter_context(TemporaryDirectory(prefix="fwd-bench-")))

        def start(module: str, *arguments: str) -> Child:
            child = Child.of_module(module, arguments, directory)
            undo.callback(child.end)
            return child

        server = start("bench.server")
        load, other_load = start("bench.load"), start("bench.load")
        port = int(server.answer(_READY_S)["port"])
        broker = start("bench.labprocess", str(directory / "lab"), str(port), json.dumps(knobs))
        lab = broker.answer(_READY_S)
        setting = Setting(port, lab["client"], directory)
        peers = []
        for kind in kinds:
            peer = kind(setting)
            undo.callback(peer.stop)
            peer.start()
            peers.append(peer)
        stage = Stage(tuple(peers), broker.pid, lab["client"][0], lab, load, other_load, server.pid)
        stage.count_at_rest()
        yield stage
