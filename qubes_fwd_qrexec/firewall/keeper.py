# SPDX-License-Identifier: GPL-2.0-or-later
"""The program that opens the exposed qube's firewall for its forwards, and for nothing else.

It reads the same configuration as the listener and takes no orders from it: an attacker who takes over the
listener, which talks to the network, opens no port that way. It listens to nobody and needs CAP_NET_ADMIN.

It opens only those configured ports on which the listener itself listens, according to the kernel
(`sockdiag`): if another program of the qube has the port, a rule would expose that program. In doubt it lets
nobody in.

It looks again whenever anybody changes nftables, so a firewall that is loaded anew is open again before
anybody notices. When it ends, it removes everything it added.
"""

import argparse
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

from qubes_fwd_qrexec import __version__
from qubes_fwd_qrexec.common import report
from qubes_fwd_qrexec.common.config import ListenerConfig, parse_key
from qubes_fwd_qrexec.common.errors import ConfigError, ForwardError, TextError
from qubes_fwd_qrexec.common.report import FORWARDS_MAX, FirewallReport
from qubes_fwd_qrexec.common.values import Binding, QubeName, RuleName, parse_number
from qubes_fwd_qrexec.system.cleanstart import start_clean
from qubes_fwd_qrexec.system.configsource import ConfigSource, FileSource
from qubes_fwd_qrexec.system.lifetime import Expiry
from qubes_fwd_qrexec.system.logs import RateLimit, one_line, start_logging, warn
from qubes_fwd_qrexec.system.notify import notify, reloading
from qubes_fwd_qrexec.system.qubesdbsource import open_qubesdb
from qubes_fwd_qrexec.system.sockdiag import DIRECTORY, SocketsError, listening, owner

from . import chain
from .chain import Family, NftError
from .nfttool import Changes, Nft

# In the directory that the service manager made: a `FirewallReport`.
STATE = "state"
_logger = logging.getLogger(__name__)

# How soon it notices an expiry, or a change of the configuration or of the listener's ports; as the listener.
LOOK_S = 0.5
# The least time between two looks at the firewall: endless changes by others cost three short programs each.
GAP_S = 0.2
# Others may change the firewall between our look and our change; then we look again.
_TRIES = 3
_STOP = {signal.SIGTERM, signal.SIGINT}

# linux/uidgid.h: the last one is none.
_UID_MAX = 2**32 - 2

_Name = tuple[QubeName, RuleName]


class Forwards:
    """The forwards to let in now, by the configuration as it was last read."""

    def __init__(self, source: ConfigSource) -> None:
        self._source = source
        self._stamp: object = None
        self._configs: dict[_Name, ListenerConfig] = {}
        self._expiries: dict[tuple[_Name, int | None], Expiry] = {}
        self._over: set[tuple[_Name, int | None]] = set()

    def read(self) -> None:
        """Read everything anew; a bad entry leaves its forward as it was. Raises `ConfigError`."""
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
        """Whether the configuration may have changed since `read`."""
        return self._source.stamp() != self._stamp

    def active(self) -> tuple[ListenerConfig, ...]:
        """The forwards that have not expired; an expired one stays so even if the clock is set back."""
        return tuple(config for name, config in sorted(self._configs.items()) if not self._is_over(name))

    def _is_over(self, name: _Name) -> bool:
        term = (name, self._configs[name].expire)
        if self._expiries.setdefault(term, Expiry(term[1])).is_over():
            self._over.add(term)
        return term in self._over


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to let in: the active forwards, on the ports where the listener listens."""

    configs: tuple[ListenerConfig, ...] = ()
    listening: frozenset[Binding] = frozenset()

    def rules(self, family: Family) -> tuple[chain.Rule, ...]:
        return chain.rules(self.configs, family, self.listening)

    @property
    def waiting(self) -> tuple[str, ...]:
        """The keys of the forwards for which the listener does not listen on all ports."""
        waiting = (config.key for config in self.configs if chain.is_waiting(config, self.listening))
        return tuple(waiting)


class Firewall:
    """Our chain and the jump to it, in each family that has a place for them."""

    def __init__(self, nft: Nft) -> None:
        self._nft = nft

    def keep(self, wanted: Wanted) -> frozenset[Family]:
        """Let in exactly this. Returns the families that have a place for rules. Raises `NftError`."""
        for _ in range(_TRIES - 1):
            try:
                return self._keep(wanted)
            except NftError as error:
                _logger.debug("again: %s", error)
        return self._keep(wanted)

    def clear(self) -> None:
        """Remove everything that is ours. Raises `NftError`."""
        self.keep(Wanted())

    def _keep(self, wanted: Wanted) -> frozenset[Family]:
        places = self._nft.look()
        for family, seen in places.items():
            rules = wanted.rules(family)
            if todo := chain.transaction(family, rules, seen):
                self._nft.carry_out(todo)
                _logger.info("%s %s: %d rules let forwards in", family, chain.TABLE, len(rules))
        return frozenset(places)


def account(wanted: Wanted, places: Collection[Family]) -> Iterator[str]:
    """What is let in and what is not, in words for the status line."""
    waiting = wanted.waiting
    yield f"{len(wanted.configs) - len(waiting)} forwards let in"
    for family in Family:
        if wanted.rules(family) and family not in places:
            yield f"none by {family}: no table {chain.TABLE} with a chain {chain.USERS_CHAIN}"
    if waiting:
        yield f"{len(waiting)} wait for the listener to listen: {' '.join(waiting)}"


def firewall_report(wanted: Wanted, places: Collection[Family]) -> FirewallReport:
    """The same as a value for dom0."""
    if len(wanted.waiting) > FORWARDS_MAX:
        return FirewallReport()  # an incomplete list would be wrong
    words = {
        family: report.Firewall.OPEN if family in places else report.Firewall.CLOSED for family in Family
    }
    return FirewallReport(words[Family.IP], words[Family.IP6], wanted.waiting)


class Signals:
    """Readable when a signal has come: SIGTERM and SIGINT end the program, SIGHUP makes it read again."""

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
        """The signals that have come since the last call."""
        try:
            return set(self._ours.recv(4096))  # set_wakeup_fd: a byte for each, its number
        except BlockingIOError:
            return set()


_CLOSED = FirewallReport(report.Firewall.CLOSED, report.Firewall.CLOSED)


class Keeper:
    """Keeps the firewall as the configuration says, while `run` runs."""

    def __init__(
        self,
        forwards: Forwards,
        firewall: Firewall,
        sockets: Callable[[], frozenset[Binding]],
        state: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``sockets`` says where the listener listens, or raises `SocketsError`."""
        self._forwards = forwards
        self._firewall = firewall
        self._sockets = sockets
        self._state = state
        self._clock = clock
        self._limit = RateLimit()
        self.kept: Wanted | None = None
        """What is let in now; None before the first time, and after nft has failed."""
        self._kept_s = 0.0
        self._looked_at = time.time()
        self._last_status = ""
        self._trouble = ""

    def run(self, changes: Changes, signals: Signals) -> None:
        """Run until a signal ends it. Raises `ForwardError` if the start or the clean-up fails."""
        self._forwards.read()
        try:
            self._notify(self.keep(self.wanted()), is_asked=True)
            while not (asked := self.wait(changes, signals)) & _STOP:
                self.look(changes, is_asked=signal.SIGHUP in asked)
        finally:
            notify("STOPPING=1")
            self._write_state(_CLOSED)
            self._firewall.clear()

    def wait(self, changes: Changes, signals: Signals) -> set[int]:
        """Wait for a change, a signal or the next look, at least `GAP_S`. Returns the signals."""
        gap_s = max(0.0, self._kept_s + GAP_S - self._clock())
        if not select.select([signals], [], [], gap_s)[0]:
            select.select([signals.fileno(), changes.fileno()], [], [], LOOK_S - gap_s)
        return signals.take()

    def look(self, changes: Changes, *, is_asked: bool) -> None:
        """Let in what is wanted now, if that or the firewall has changed, or somebody ``is_asked`` for it."""
        self._looked_at = time.time()
        if is_asked:
            notify(*reloading())
        if is_asked or self._forwards.has_changed():
            try:
                self._forwards.read()
            except ConfigError as error:
                _logger.error("configuration not reloaded: %s", error)
        wanted = self.wanted()
        if changes.has_any() or is_asked or wanted != self.kept:
            try:
                self._notify(self.keep(wanted), is_asked=is_asked)
            except NftError as error:
                self.kept = None  # try again at the next look
                self._write_state(_CLOSED)
                warn(_logger, self._limit, "nft", str(error))
                self._notify(one_line(str(error)), is_asked=is_asked)
        if self._state is not None:
            with suppress(OSError):
                self._date(self._state)

    def wanted(self) -> Wanted:
        """What to let in: nobody, if the kernel does not say where the listener listens."""
        active = self._forwards.active()
        found: frozenset[Binding] = frozenset()
        trouble = ""
        if active:
            try:
                found = self._sockets()
            except SocketsError as error:
                trouble = str(error)
        if trouble and trouble != self._trouble:
            _logger.warning("nobody is let in: %s", trouble)
        self._trouble = trouble
        return Wanted(active, found)

    def _notify(self, status: str, *, is_asked: bool) -> None:
        """Notify the service manager, if it waits for an answer or the status is new."""
        if is_asked or status != self._last_status:
            notify("READY=1", f"STATUS={status}")
            self._last_status = status

    def keep(self, wanted: Wanted) -> str:
        """Let in what is wanted and nothing else. Returns the status in one line. Raises `NftError`."""
        self._kept_s = self._clock()
        places = self._firewall.keep(wanted)
        self.kept = wanted
        self._write_state(firewall_report(wanted, places))
        return one_line(", ".join(account(wanted, places)))

    def _write_state(self, word: FirewallReport) -> None:
        """Write the state file, for `statusservice`. A failure leaves the state unknown."""
        if self._state is None:
            return
        hidden = self._state.with_name(f".{self._state.name}")
        try:
            hidden.write_bytes(report.dump(word.as_json()))
            hidden.chmod(0o644)  # whatever the umask is: it is no secret
            self._date(hidden)
            hidden.rename(self._state)
        except OSError as error:
            warn(_logger, self._limit, "state", f"{self._state}: {error.strerror}")

    def _date(self, state: Path) -> None:
        """The file's time says when the look began that it tells of; `statusservice` waits for a new one."""
        os.utime(state, (self._looked_at, self._looked_at))


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
    parser.add_argument(
        "--listener-uid",
        type=_uid,
        metavar="UID",
        help=f"the user whose listening sockets are the listener's (default: who owns {DIRECTORY})",
    )
    parser.add_argument("--version", action="version", version=__version__)
    return parser


def _uid(text: str) -> int:
    try:
        uid = parse_number(text)
    except TextError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if uid > _UID_MAX:
        raise argparse.ArgumentTypeError(f"{text} is more than {_UID_MAX}, the last user's number")
    return uid


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    start_clean()
    start_logging()
    firewall = Firewall(Nft())
    try:
        if args.remove:
            firewall.clear()
            return 0
        with ExitStack() as stack:
            signals, changes = stack.enter_context(Signals()), stack.enter_context(Changes())
            source = FileSource(args.config) if args.config else stack.enter_context(open_qubesdb())
            place = os.environ.get("RUNTIME_DIRECTORY")
            state = None if place is None else Path(place, STATE)
            given: int | None = args.listener_uid
            # The listener's user may be another one after its next start.
            sockets = partial(listening, given) if given is not None else lambda: listening(owner())
            Keeper(Forwards(source), firewall, sockets, state).run(changes, signals)
    except ForwardError as error:
        _logger.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
