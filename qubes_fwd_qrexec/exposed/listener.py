# SPDX-License-Identifier: GPL-2.0-or-later
"""The open forwards of an exposed qube, kept equal to its configuration.

Reloading closes what is gone, opens what is new, and does not touch connections of what stays.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import trio

from qubes_fwd_qrexec.common.clientreport import WhichClients
from qubes_fwd_qrexec.common.config import CALLS_MAX, ListenerConfig, parse_key
from qubes_fwd_qrexec.common.errors import ConfigError
from qubes_fwd_qrexec.common.report import FORWARDS_MAX, PROBLEMS_MAX, Answer, ListenerReport, Problem, Trial
from qubes_fwd_qrexec.common.values import Proto
from qubes_fwd_qrexec.relay.acceptloop import BindError
from qubes_fwd_qrexec.relay.thread import open_relay_thread
from qubes_fwd_qrexec.system.bugs import Bugs
from qubes_fwd_qrexec.system.configsource import ConfigSource, Configuration
from qubes_fwd_qrexec.system.lifetime import Expiry
from qubes_fwd_qrexec.system.logs import one_line
from qubes_fwd_qrexec.system.notify import notify, reloading

from . import qrexec
from .call import CallTimeouts
from .callwaits import CallWaits
from .connected import clients
from .connectiontable import ConnectionTable, TableMeans
from .draining import AnyForward, Draining
from .forward import Means, OpenForward
from .freshlook import FreshLook
from .limits import PROCESS_MAX, Process
from .muxpool import LINGER_S
from .openports import bindings
from .statussockets import open_status
from .supervisor import Supervisor
from .transports import Transports
from .trial import try_out
from .udpforward import OpenUdpForward
from .unopened import Unopened

_logger = logging.getLogger(__name__)
_T = TypeVar("_T")

# How soon it notices a change of the configuration, or an expiry.
LOOK_S = 0.5
# How soon it ends after its last connection.
_CARRIED_LOOK_S = 0.05
# Connections that still live after this are aborted; systemd's default TimeoutStopSec is 90 s.
DRAIN_S = 60.0


class Listener:
    """All forwards of this qube, open while `run` runs."""

    def __init__(
        self,
        source: ConfigSource,
        qrexec_client: tuple[str, ...] = qrexec.CLIENT,
        *,
        calls_max: int = CALLS_MAX,
        timeouts: CallTimeouts | None = None,
        drain_s: float = DRAIN_S,
        linger_s: float = LINGER_S,
        connections_max: int = PROCESS_MAX,
        is_whole: bool = True,
        status_dir: Path | None = None,
        supervisor: Supervisor | None = None,
        waits: CallWaits | None = None,
    ) -> None:
        """``is_whole``: start with every port of the first configuration, or not at all.

        ``supervisor``: once the ports are closed another listener may have them, and this one drains alone.

        The attribute ``forwards`` has the open ones; all their connections count against ``process``.
        """
        self.source = source
        self._qrexec_client = qrexec_client
        self._drain_s = drain_s
        self._is_whole = is_whole
        self._status_dir = status_dir
        self._supervisor = supervisor
        self._options = calls_max, timeouts or CallTimeouts(), linger_s, waits
        self.bugs = Bugs()
        self._since = int(time.time())
        self._refused: dict[str, str] = {}
        self.process = Process(connections_max)
        self.forwards: dict[str, AnyForward] = {}
        self._expired: set[tuple[str, int | None]] = set()
        # Configured but over by our clock: dom0 removes what is over, so it still considers these open.
        self._over: dict[str, str] = {}
        self._draining = Draining()
        self._unopened = Unopened()
        self._fresh = FreshLook(source, self.look, lambda: self._draining.is_cutting)
        self._stamp: object = None
        self._stopping = trio.Event()
        self._is_running = False
        self._means: Means

    @property
    def transports(self) -> Transports:
        """What carries the connections, once it runs."""
        return self._means.transports

    @property
    def problems(self) -> dict[str, str]:
        """Why entries, by their keys, are not served as configured; and why the source cannot be read."""
        lost = {} if self.source.problem is None else {str(self.source): self.source.problem}
        return lost | self._refused | self._unopened.problems | self._over

    async def run(self, *, task_status: "trio.TaskStatus[None]" = trio.TASK_STATUS_IGNORED) -> None:
        """Listen until `stop`; reports started once the ports of the first configuration are open.

        Raises `ConfigError` if the source cannot be read, and `BindError` if it ``is_whole`` and a port of
        the first configuration cannot be opened.
        """
        async with (
            open_relay_thread(self.bugs) as relays,
            open_status(self._status_dir, self) as close_status,
            trio.open_nursery() as watching,
        ):
            watching.start_soon(relays.watch)
            try:
                async with trio.open_nursery() as self._tasks:
                    transports = Transports(self._qrexec_client, relays, self._tasks, *self._options)
                    self._means = Means(transports, TableMeans(self.process))
                    try:
                        await self._listen(task_status)
                    finally:
                        self._stop_listening()
                        transports.drain()
                    if self._supervisor is not None:
                        close_status()
                        await self._supervisor.closed()
                    watching.start_soon(self._watch_while_draining)
                    await self._carried()
            finally:
                if not relays.has_failed:
                    self._end_now()
                self._is_running = False
            watching.cancel_scope.cancel()

    async def _listen(self, task_status: "trio.TaskStatus[None]") -> None:
        """Follow the configuration until `stop`."""
        self._stamp = self.source.stamp()
        self._reconcile(self.source.read(), is_whole=self._is_whole)
        self._is_running = True
        task_status.started()
        last = self._status()
        notify("READY=1", f"STATUS={last}")
        while not self._stopping.is_set():
            with trio.move_on_after(LOOK_S):
                await self._stopping.wait()
                break
            self.look()
            if (status := self._status()) != last:
                last = status
                notify(f"STATUS={status}")
        notify("STOPPING=1", "STATUS=closed, connections may finish")

    def _status(self) -> str:
        """One line for the service manager: what is open, and which entries are not."""
        problems = ", ".join(sorted(self.problems))
        return one_line(
            f"{len(self.forwards)} forwards open" + (f"; not as configured: {problems}" if problems else "")
        )

    async def follow_supervisor(self) -> None:
        """Abort everything when the supervisor has died, as the next listener needs the ports."""
        if self._supervisor is not None:
            await self._supervisor.lost()
            _logger.error("the process that started this listener has died")
            self.stop()
            self.stop()

    async def _watch_while_draining(self) -> None:
        """Go on following the configuration, as dom0 may still end connections, until the drain is over."""
        with trio.move_on_after(self._drain_s):
            while True:
                await trio.sleep(LOOK_S)
                self.look()
        self._end_now()

    async def _carried(self) -> None:
        """Wait for the last connection: it may still deliver what it got before its call was lost."""
        while any(one.connections for one in self._all_forwards() if isinstance(one, OpenForward)):  # noqa: ASYNC110
            await trio.sleep(_CARRIED_LOOK_S)

    def _of_tables(self, ask: Callable[[ConnectionTable], _T]) -> dict[ConnectionTable, _T]:
        """What all forwards of TCP answer. It is one order, as each waits for a turn of the loop."""
        tables = [one.table for one in self._all_forwards() if isinstance(one, OpenForward)]
        return self.transports.relays.do_now(lambda: {one: ask(one) for one in tables}) if tables else {}

    def _stop_listening(self) -> None:
        self._of_tables(lambda table: table.give_up(table.listening))
        for forward in self._all_forwards():
            forward.stop_listening()

    def _end_now(self) -> None:
        """Abort all connections."""
        self._of_tables(ConnectionTable.cut)
        for forward in self._all_forwards():
            if isinstance(forward, OpenUdpForward):
                forward.cut()
        self._tasks.cancel_scope.cancel()

    def look(self) -> None:
        """Do what is due: end what has expired, reload what has changed, try again what failed."""
        self._end_expired()
        self._draining.look()
        if (now := self.source.stamp()) != self._stamp:
            self._stamp = now
            self.reload()
        for key, config in self._unopened.due():
            self._try_to_open(key, config)

    def stop(self) -> None:
        """Stop listening and let connections finish for a while; called again, abort them now."""
        if self._stopping.is_set() and self._is_running:
            self._end_now()
        self._stopping.set()

    def reload(self) -> None:
        """Make the open forwards equal to the configuration; a bad entry leaves its forward as it was."""
        if not self._is_running:
            return  # `run` reads it first
        if not self._stopping.is_set():
            notify(*reloading())
        try:
            self._reconcile(self.source.read())
        except ConfigError as error:
            _logger.error("configuration not reloaded: %s", error)
        finally:
            if not self._stopping.is_set():
                notify("READY=1")

    def report(self, *, with_clients: bool = False) -> ListenerReport:
        """The status of everything now; who is connected only if that is asked for."""
        forwards = [forward for _, forward in sorted(self.forwards.items())]
        problems = sorted(self.problems.items())
        told = clients(forwards, self._draining.forwards) if with_clients else (None, 0)
        figures = self._of_tables(ConnectionTable.figures)
        return ListenerReport(
            since=self._since,
            forwards=tuple(
                one.report(figures[one.table]) if isinstance(one, OpenForward) else one.report()
                for one in forwards[:FORWARDS_MAX]
            ),
            problems=tuple(Problem(one_line(k), one_line(text)) for k, text in problems[:PROBLEMS_MAX]),
            left_out=max(0, len(forwards) - FORWARDS_MAX),
            draining=self._draining.report()[:FORWARDS_MAX],
            bugs=self.bugs.count,
            clients=told[0],
            clients_left_out=told[1],
        )

    async def look_anew(self) -> None:
        """Look at what is configured now, and return once what that ends has ended; bounded in time."""
        await self._fresh()

    async def try_out(self, untrusted_key: str) -> Trial:
        """Send a connection through a forward. Raises `ConfigError` or `TextError` for a bad key."""
        forward = self.forwards.get(str(parse_key(untrusted_key)))
        if forward is None:
            return Trial(Answer.FAILED, "", one_line(f"{untrusted_key} is not open here"))
        return await try_out(forward.config, self._means.transports)

    async def cut(self, untrusted_key: str, which: WhichClients) -> int:
        """Cut clients of a forward, also of one that drains; returns how many. Raises as `try_out` does."""
        key = str(parse_key(untrusted_key))
        found = [forward for forward in self._all_forwards() if forward.config.key == key]
        number = sum([await forward.cut_clients(which) for forward in found])
        if number:
            _logger.info("cut: %s: %d of %s", key, number, which if str(which) else "all clients")
        return number

    def _reconcile(self, found: Configuration, *, is_whole: bool = False) -> None:
        """Close what is gone, then open what is new, unless the listener stops. A bad entry is logged."""
        wanted = dict(found.forwards)
        self._unopened.forget_all()
        self._refused = {key: str(error) for key, error in sorted(found.errors.items())}
        for key, problem in self._refused.items():
            _logger.error("refused: %s", problem)
            if (kept := self.forwards.get(key)) is not None:
                wanted[key] = kept.config
        over = {key: config for key, config in wanted.items() if self._is_expired(config)}
        self._over = dict.fromkeys(over, _over_by_our_clock())
        for key in over:
            del wanted[key]
        for key in self.forwards.keys() - wanted.keys():
            self._end(key, "removed")
        if self._stopping.is_set():
            return
        self._means.transports.reconfigured(list(wanted.values()))
        self._hand_over(wanted)
        for key, config in sorted(wanted.items()):
            if is_whole:
                self._open(key, config)
            else:
                self._try_to_open(key, config)

    def _try_to_open(self, key: str, config: ListenerConfig) -> None:
        """Open a forward now, or try again later if its ports cannot be bound."""
        if self._stopping.is_set() or self._is_expired(config):
            self._unopened.forget(key)
            return
        try:
            self._open(key, config)
        except BindError as error:
            if self._unopened.failed(key, config, str(error)):
                _logger.error("%s cannot be opened: %s; this is tried again", key, error)
        else:
            self._unopened.forget(key)

    def _hand_over(self, wanted: dict[str, ListenerConfig]) -> None:
        """Close all ports that are given up before any is opened: another forward may take one, or the same
        forward at another address."""
        for key, forward in self.forwards.items():
            forward.give_up(wanted[key])
        udp = [config for config in wanted.values() if config.proto is Proto.UDP]
        needed = {binding for config in udp for binding in bindings(config)}
        for forward in self._all_forwards():
            if isinstance(forward, OpenUdpForward):
                own = wanted.get(forward.config.key) if forward in self.forwards.values() else None
                forward.make_way(needed, () if own is None else bindings(own))

    def _all_forwards(self) -> tuple[AnyForward, ...]:
        """The open ones, and those that have ended and whose connections may finish."""
        return *self.forwards.values(), *self._draining.forwards

    def _open(self, key: str, config: ListenerConfig) -> None:
        forward = self.forwards.get(key)
        if forward is None:
            kind = OpenUdpForward if config.proto is Proto.UDP else OpenForward
            forward = self.forwards[key] = kind(config, self._means)
            _logger.info("open: %s to %s", forward, config.target_ports.worded())
        elif forward.config != config or not forward.is_listening:
            forward.reconfigure(config)
            _logger.info("changed: %s to %s", forward, config.target_ports.worded())

    def _end(self, key: str, why: str) -> None:
        forward = self.forwards.pop(key)
        forward.close()
        self._draining.add(forward)
        _logger.info("closed: %s: %s", forward, why)

    def _is_expired(self, config: ListenerConfig) -> bool:
        """Whether it has expired, even if the wall clock has been set back since."""
        return (config.key, config.expire) in self._expired or Expiry(config.expire).is_over()

    def _end_expired(self) -> None:
        for key, forward in list(self.forwards.items()):
            if forward.expiry.is_over():
                self._expired.add((key, forward.config.expire))
                self._over[key] = _over_by_our_clock()
                self._end(key, "expired")


def _over_by_our_clock() -> str:
    now = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    return f"its time is over by this qube's clock, which says {now} UTC; see whether that is right"
