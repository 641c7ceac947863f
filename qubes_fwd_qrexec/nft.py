# SPDX-License-Identifier: GPL-2.0-or-later
"""The program that opens the exposed qube's firewall for its forwards, and for nothing else.

It reads the same configuration as the listener, and not what the listener says: who takes the listener
over, which talks to the network, opens no port by that. It listens to nobody and needs CAP_NET_ADMIN.

It looks again whenever anybody has changed nftables, so a firewall that is loaded anew is open again
before anybody notices. When it ends, nothing of it is left.
"""

import argparse
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from . import __version__, nftchain
from .config import ListenerConfig, parse_key
from .configsource import ConfigSource, Source
from .errors import ConfigError, ForwardError
from .lifetime import Expiry
from .logs import RateLimit, one_line, start_logging, warn
from .nftchain import Family, NftError
from .nfttool import Changes, Nft
from .notify import notify, reloading
from .qubesdbsource import open_qubesdb
from .values import QubeName, RuleName

# In the directory that the service manager made: "open", or "closed" while nothing can be let in.
STATE = "state"
_logger = logging.getLogger(__name__)

# How soon a change of the configuration, or an expiry, is noticed: as in the listener.
_LOOK_S = 0.5
# Between two looks at the firewall: who changes it without end costs three short programs in this time.
_GAP_S = 0.2
# What we have looked at may be gone when we change it; then we look again.
_TRIES = 3
_STOP = {signal.SIGTERM, signal.SIGINT}

_Name = tuple[QubeName, RuleName]


class Forwards:
    """The forwards that are to be let in now, by the configuration as it was read last."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._stamp: object = None
        self._configs: dict[_Name, ListenerConfig] = {}
        self._expiries: dict[tuple[_Name, int | None], Expiry] = {}
        self._over: set[tuple[_Name, int | None]] = set()

    def read(self) -> None:
        """Read afresh; what was open under the name of a bad entry stays. Raises `ConfigError`."""
        self._stamp = self._source.stamp()
        found = self._source.read()
        configs = dict(found.forwards)
        for key, error in sorted(found.errors.items()):
            _logger.error("refused: %s", error)
            try:
                name = parse_key(key)
            except ConfigError:
                continue
            if name in self._configs:
                configs[name] = self._configs[name]
        self._configs = configs

    def has_changed(self) -> bool:
        """Whether the source has something new since `read`."""
        return self._source.stamp() != self._stamp

    def active(self) -> tuple[ListenerConfig, ...]:
        """Those that have not expired; what was over stays over when the clock is set back."""
        return tuple(config for name, config in sorted(self._configs.items()) if not self._is_over(name))

    def _is_over(self, name: _Name) -> bool:
        term = (name, self._configs[name].expire)
        if self._expiries.setdefault(term, Expiry(term[1])).is_over():
            self._over.add(term)
        return term in self._over


class Firewall:
    """Our chain and its jump, in each family that has a place for them."""

    def __init__(self, nft: Nft) -> None:
        self._nft = nft
        self.has_place = False
        """Whether there was a place for us when it was last looked at."""

    def keep(self, configs: tuple[ListenerConfig, ...]) -> str:
        """Make it let in exactly these; one line on how it is then. Raises `NftError`."""
        for _ in range(_TRIES - 1):
            try:
                return self._keep(configs)
            except NftError as error:
                _logger.debug("again: %s", error)
        return self._keep(configs)

    def clear(self) -> None:
        """Leave nothing. Raises `NftError`."""
        self.keep(())

    def _keep(self, configs: tuple[ListenerConfig, ...]) -> str:
        places = self._nft.look()
        self.has_place = bool(places)
        for family, seen in places.items():
            wanted = nftchain.rules(configs, family)
            if todo := nftchain.transaction(family, wanted, seen):
                self._nft.carry_out(todo)
                _logger.info("%s %s: %d rules let forwards in", family, nftchain.TABLE, len(wanted))
        return ", ".join(_account(configs, places.keys()))


def _account(configs: tuple[ListenerConfig, ...], places: Collection[Family]) -> Iterator[str]:
    yield f"{len(configs)} forwards let in"
    for family in Family:
        if nftchain.rules(configs, family) and family not in places:
            yield f"none by {family}: no table {nftchain.TABLE} with a chain {nftchain.USERS_CHAIN}"


class Signals:
    """SIGTERM and SIGINT ask us to end, SIGHUP to read again; readable when one has come."""

    def __init__(self) -> None:
        self._ours, self._theirs = socket.socketpair()
        for end in (self._ours, self._theirs):
            end.setblocking(False)
        signal.set_wakeup_fd(self._theirs.fileno())
        self._before = {n: signal.signal(n, lambda *_: None) for n in (*_STOP, signal.SIGHUP)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        self._ours.close()
        self._theirs.close()

    def fileno(self) -> int:
        return self._ours.fileno()

    def take(self) -> set[int]:
        """Those that have come since the last call."""
        try:
            return set(self._ours.recv(4096))  # set_wakeup_fd: a byte for each, its number
        except BlockingIOError:
            return set()


class Keeper:
    """Keeps the firewall as the configuration says; `run` is the whole of its life."""

    def __init__(self, forwards: Forwards, firewall: Firewall, state: Path | None = None) -> None:
        self._forwards = forwards
        self._firewall = firewall
        self._state = state
        self._limit = RateLimit()
        self._kept: tuple[ListenerConfig, ...] | None = None
        self._kept_s = 0.0
        self._told = ""

    def run(self, changes: Changes, signals: Signals) -> None:
        """Until a signal ends it. Raises `ForwardError` when it cannot be done at the start, or undone."""
        self._forwards.read()
        try:
            self._tell(self._keep(), is_asked=True)
            while not (asked := self._wait(changes, signals)) & _STOP:
                self._look(changes, is_asked=signal.SIGHUP in asked)
        finally:
            notify("STOPPING=1")
            self._leave_word("closed")
            self._firewall.clear()

    def _wait(self, changes: Changes, signals: Signals) -> set[int]:
        """For a change, the next look, or the signals that it returns; not at once after a look."""
        gap_s = max(0.0, self._kept_s + _GAP_S - time.monotonic())
        if not select.select([signals], [], [], gap_s)[0]:
            select.select([signals.fileno(), changes.fileno()], [], [], _LOOK_S)
        return signals.take()

    def _look(self, changes: Changes, *, is_asked: bool) -> None:
        if is_asked:
            notify(*reloading())
        if is_asked or self._forwards.has_changed():
            try:
                self._forwards.read()
            except ConfigError as error:
                _logger.error("configuration not reloaded: %s", error)
        if changes.has_any() or is_asked or self._forwards.active() != self._kept:
            try:
                self._tell(self._keep(), is_asked=is_asked)
            except NftError as error:
                self._kept = None  # at the next look again
                self._leave_word("closed")
                warn(_logger, self._limit, "nft", str(error))
                self._tell(one_line(str(error)), is_asked=is_asked)

    def _tell(self, status: str, *, is_asked: bool) -> None:
        """Tell the service manager, if it waits for an answer or there is news."""
        if is_asked or status != self._told:
            notify("READY=1", f"STATUS={status}")
            self._told = status

    def _keep(self) -> str:
        active = self._forwards.active()
        self._kept_s = time.monotonic()
        status = self._firewall.keep(active)
        self._kept = active
        self._leave_word("open" if self._firewall.has_place else "closed")
        return status

    def _leave_word(self, word: str) -> None:
        """For `statusservice`, which tells dom0. That it cannot be left stops nothing: it is unknown then."""
        if self._state is None:
            return
        hidden = self._state.with_name(f".{self._state.name}")
        try:
            hidden.write_text(f"{word}\n", encoding="ascii")
            hidden.chmod(0o644)  # whatever the umask is: it is no secret
            hidden.rename(self._state)
        except OSError as error:
            warn(_logger, self._limit, "state", f"{self._state}: {error.strerror}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qubes-forward-nft",
        description="Let the forwards of this qube in through its firewall, and nothing else.",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--config",
        type=Path,
        metavar="PATH",
        help="directory or file with the forwards (default: this qube's QubesDB)",
    )
    what.add_argument("--remove", action="store_true", help="remove what an earlier run has left, and end")
    parser.add_argument("--version", action="version", version=__version__)
    return parser


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    start_logging()
    firewall = Firewall(Nft())
    try:
        if args.remove:
            firewall.clear()
            return 0
        with ExitStack() as stack:
            signals, changes = stack.enter_context(Signals()), stack.enter_context(Changes())
            source = ConfigSource(args.config) if args.config else stack.enter_context(open_qubesdb())
            place = os.environ.get("RUNTIME_DIRECTORY")
            state = None if place is None else Path(place, STATE)
            Keeper(Forwards(source), firewall, state).run(changes, signals)
    except ForwardError as error:
        _logger.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
