# SPDX-License-Identifier: GPL-2.0-or-later
"""A qube's configuration as Qubes delivers it: below ``/vm-config/`` in its QubesDB.

A thread of its own talks to QubesDB, so that a daemon which does not answer (it accepts clients before it has
the database from dom0) keeps nobody else waiting. The thread waits for changes on one handle and reads from
another: an event that arrives during a command is queued inside the handle, and does not make its descriptor
readable. Each handle is used for one connection: when the daemon has ended, the client library connects again
by itself and forgets the watch. So the first error closes a handle, and after a while there is a new one.
Until then the last configuration stays.
"""

import importlib
import logging
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Protocol, cast

from qubes_fwd_qrexec.common.entries import VALUE_MAX
from qubes_fwd_qrexec.common.errors import ConfigError

from .configsource import ENTRIES_MAX, Configuration, is_ours, parse_entries

_logger = logging.getLogger(__name__)

# Where the features vm-config.NAME are delivered (qubes-core-admin qubes/ext/vm_config.py).
_DIRECTORY = "/vm-config/"
# The qube's own name (qubes-core-admin qubes/vm/qubesvm.py, create_qdb_entries).
_NAME = "/name"
# A daemon that restarts is back in well under a second; one that stays away costs a try every 10 s.
BACKOFF_S = (0.1, 10.0)
# How long the first answer may take. The daemon answers once it has the whole database from dom0.
START_S = 10.0
# How long `close` waits for the thread, which ends at once unless the daemon hangs.
_JOIN_S = 1.0
# Up to so many events are taken together, so that many changes at once cause one read.
_BURST_MAX = 1024


class Handle(Protocol):
    """The methods of ``qubesdb.QubesDB`` that we use (qubes-core-qubesdb python/qubesdb.c)."""

    def list(self, path: str, /) -> "list[str] | None": ...
    def read(self, path: str, /) -> bytes | None: ...
    def watch(self, path: str, /) -> None: ...
    def watch_fd(self) -> int: ...
    def read_watch(self) -> str: ...
    def close(self) -> None: ...


class Module(Protocol):
    """The package ``qubesdb``; its ``DisconnectedError`` is an ``Error``."""

    @property
    def QubesDB(self) -> Callable[[], Handle]: ...  # noqa: N802 - as it is named there
    @property
    def Error(self) -> type[Exception]: ...  # noqa: N802


class QubesDBSource:
    """This qube's QubesDB; made by `open_qubesdb`."""

    def __init__(
        self,
        module: Module,
        backoff_s: tuple[float, float] = BACKOFF_S,
        ending: threading.Event | None = None,
    ) -> None:
        """``ending``: what tells the thread to end, and what it waits by between tries."""
        self.problem: str | None = None
        self._module = module
        self._backoff_s = backoff_s
        self._thread = threading.Thread(target=self._run, name="qubesdb", daemon=True)
        self._lock = threading.Lock()
        self._ending = ending or threading.Event()
        self._tried = threading.Event()
        # Guarded by the lock: what was last read, how often that changed, who asks for another read, and what
        # ends the thread's wait for changes.
        self._entries: dict[str, str | ConfigError] | ConfigError | None = None
        self._own_name = ""
        self._generation = 0
        self._asking: list[Callable[[], None]] = []
        self._waker: socket.socket | None = None

    def __str__(self) -> str:
        return "QubesDB"

    def read(self) -> Configuration:
        """Return what the thread read last. Raises `ConfigError` if it could not read the entries."""
        with self._lock:
            entries, own_name = self._entries, self._own_name
        if entries is None:
            raise ConfigError(self.problem or "QubesDB has not been read")
        if isinstance(entries, ConfigError):
            raise entries
        return parse_entries(entries, own_name)

    def stamp(self) -> object:
        """How often the entries have changed."""
        with self._lock:
            return self._generation

    def refresh(self, done: Callable[[], None]) -> None:
        """Have the thread read everything again and call ``done``. Those who ask meanwhile share a read.

        While QubesDB cannot be reached nobody waits for that.
        """
        if self.problem is not None:
            done()
            return
        with self._lock:
            self._asking.append(done)
        self._wake()

    def start(self, start_s: float = START_S) -> None:
        """Return when everything was read once. Raises `ConfigError` if that fails or takes too long."""
        self._thread.start()
        self._tried.wait(start_s)
        if self._generation == 0:
            raise ConfigError(self.problem or f"QubesDB: no answer within {start_s:g} s")

    def close(self) -> None:
        """End the thread; if it waits for an answer, it ends when that comes."""
        self._ending.set()
        self._wake()
        self._thread.join(_JOIN_S)

    def _wake(self) -> None:
        with self._lock, suppress(BlockingIOError):  # then it is about to wake up
            if self._waker is not None:
                self._waker.send(b"\0")

    def _run(self) -> None:
        # A signal must not end a command halfway; the main thread gets them all.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        woken, waker = socket.socketpair()
        with woken, waker:
            for end in (woken, waker):
                end.setblocking(False)
            with self._lock:
                self._waker = waker
            try:
                self._follow(woken)
            finally:
                with self._lock:
                    self._waker = None

    def _follow(self, woken: socket.socket) -> None:
        shortest_s, longest_s = self._backoff_s
        delay_s = shortest_s
        while not self._ending.is_set():
            try:
                with closing(self._module.QubesDB()) as watching:
                    # Watched before it is read, so that no change in between is missed.
                    watching.watch(_DIRECTORY)
                    while not self._ending.is_set():
                        self._read_for_all()
                        delay_s = shortest_s
                        _wait_for_events(watching, woken)
            except (self._module.Error, OSError) as error:
                self._lost(error)
            self._tried.set()
            self._ending.wait(delay_s)
            delay_s = min(2 * delay_s, longest_s)

    def _read_for_all(self) -> None:
        """Read everything for those who ask by now. They hear of it even if that fails."""
        with self._lock:
            asking, self._asking = self._asking, []
        try:
            self._take(self._read_all())
        finally:
            for done in asking:
                done()

    def _read_all(self) -> dict[str, str | ConfigError] | ConfigError:
        # Not with multiread, which never frees the values that it returns (python/qubesdb.c of 4.3).
        with closing(self._module.QubesDB()) as reading:
            listed = reading.list(_DIRECTORY)
            if listed is None:
                return ConfigError("QubesDB: its list of entries cannot be read")
            paths = [path for path in listed if is_ours(path.removeprefix(_DIRECTORY))]
            if len(paths) > ENTRIES_MAX:
                return ConfigError(f"QubesDB: {len(paths)} entries; at most {ENTRIES_MAX} are read")
            values = {path: reading.read(path) for path in sorted(paths)}
            untrusted_name = reading.read(_NAME)
        with self._lock:
            self._own_name = (untrusted_name or b"").decode("latin-1")
        return {
            path.removeprefix(_DIRECTORY): _text(path, untrusted_value)
            for path, untrusted_value in values.items()
            if untrusted_value is not None  # removed since the list was read
        }

    def _take(self, entries: dict[str, str | ConfigError] | ConfigError) -> None:
        if self.problem is not None:
            _logger.info("QubesDB is back")
        self.problem = None
        with self._lock:
            if self._generation == 0 or not _is_same(entries, self._entries):
                self._entries = entries
                self._generation += 1
        self._tried.set()

    def _lost(self, error: Exception) -> None:
        if self._ending.is_set():
            return
        is_news = self.problem is None
        self.problem = f"QubesDB cannot be reached: {_words(error)}"
        if is_news and self._generation:
            _logger.warning("%s; what was configured stays, until it is back", self.problem)


@contextmanager
def open_qubesdb(
    module: Module | None = None, *, start_s: float = START_S, backoff_s: tuple[float, float] = BACKOFF_S
) -> Iterator[QubesDBSource]:
    """Open this qube's QubesDB for the block, read once when it begins. Raises `ConfigError`.

    ``start_s`` bounds that first read; ``backoff_s``: the first and the longest wait between tries.
    """
    source = QubesDBSource(module or _installed(), backoff_s)
    try:
        source.start(start_s)
        yield source
    finally:
        source.close()


def _installed() -> Module:
    try:
        return cast(Module, importlib.import_module("qubesdb"))
    except ImportError as error:
        raise ConfigError(
            "QubesDB: the Python package 'qubesdb' is missing; install python3-qubesdb, or name a directory "
            "with --config"
        ) from error


def _wait_for_events(watching: Handle, woken: socket.socket) -> None:
    """Return when something below the watched directory has changed, or somebody wakes the thread.

    No further event waits then.
    """
    waiting = select.poll()
    waiting.register(watching.watch_fd(), select.POLLIN)
    waiting.register(woken, select.POLLIN)
    waiting.poll()
    waiting.unregister(woken)
    for _ in range(_BURST_MAX):
        if not waiting.poll(0):
            break
        watching.read_watch()
    with suppress(BlockingIOError):
        woken.recv(_BURST_MAX)


def _text(path: str, untrusted_value: bytes) -> str | ConfigError:
    """Latin-1 decodes any byte; what is not ASCII is refused when the entry is parsed."""
    if len(untrusted_value) > VALUE_MAX:
        return ConfigError(f"entry {path!a}: longer than the {VALUE_MAX} bytes that QubesDB takes")
    return untrusted_value.decode("latin-1")


def _is_same(one: object, other: object) -> bool:
    if isinstance(one, ConfigError) or isinstance(other, ConfigError):
        return str(one) == str(other)
    return one == other


def _words(error: Exception) -> str:
    """The client library's message: errors have a number and its meaning, or a sentence."""
    return str(error.args[-1]) if error.args else type(error).__name__
