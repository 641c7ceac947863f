# SPDX-License-Identifier: GPL-2.0-or-later
"""The program that opens a qube's firewall for its forwards, and for nothing else.

It reads the same configuration as the listener and takes no orders from it: an attacker who takes over the
listener, which talks to the network, opens no port that way. It needs CAP_NET_ADMIN, and answers root alone,
who may ask what is in force (`asked`).

For the listener it opens only those configured ports on which that listens, according to the kernel
(`sockdiag`): if another program of the qube has the port, a rule would expose that program. In doubt it lets
nobody in. What passes by nft, `pathrules` says.

It looks again whenever anybody changes nftables, so a firewall that is loaded anew is open again before
anybody notices. When it ends, it removes everything it added.
"""

import argparse
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

from qubes_fwd_qrexec import __version__
from qubes_fwd_qrexec.common import report
from qubes_fwd_qrexec.common.errors import ConfigError, ForwardError, TextError
from qubes_fwd_qrexec.common.nftreport import NftReport
from qubes_fwd_qrexec.common.report import FirewallReport
from qubes_fwd_qrexec.common.values import Binding, Proto, parse_number
from qubes_fwd_qrexec.system.cleanstart import start_clean
from qubes_fwd_qrexec.system.configsource import FileSource
from qubes_fwd_qrexec.system.logs import RateLimit, one_line, start_logging, warn
from qubes_fwd_qrexec.system.notify import notify, reloading
from qubes_fwd_qrexec.system.qubesdbsource import open_qubesdb
from qubes_fwd_qrexec.system.sockdiag import DIRECTORY, SocketsError, listening, owner

from .accounts import Places, account, firewall_report, nft_report
from .asked import ASK, Asked, answer
from .cutting import NUMBERS, Cutter
from .forwards import Forwards
from .inforce import IN_FORCE, InForce
from .nfttool import Changes, Nft
from .openings import Flows, Socket
from .pathrules import Kept
from .rule import NftError
from .signals import STOP, Signals
from .wanted import Firewall, Wanted

# In the directory that the service manager made: a `FirewallReport`.
STATE = "state"
_logger = logging.getLogger(__name__)

# How soon it notices an expiry, or a change of the configuration or of the listener's ports; as the listener.
LOOK_S = 0.5
# The least time between two looks at the firewall: endless changes by others cost a few short programs each.
GAP_S = 0.2

# linux/uidgid.h: the last one is none.
_UID_MAX = 2**32 - 2

_CLOSED = FirewallReport(report.Firewall.CLOSED, report.Firewall.CLOSED)


class Keeper:
    """Keeps the firewall as the configuration says, while `run` runs."""

    def __init__(
        self,
        forwards: Forwards,
        in_force: InForce,
        sockets: Callable[[Proto], frozenset[Binding]],
        state: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``sockets`` says where the listener listens for a protocol, or raises `SocketsError`."""
        self._forwards = forwards
        self._in_force = in_force
        self._sockets = sockets
        self._flows = Flows(in_force.flows)
        self._state = state
        self._clock = clock
        self._limit = RateLimit()
        self.kept: Wanted | None = None
        """What is let through now; None before the first time, and after nft has failed."""
        self._places: Places = {}
        self._problem: str | None = None
        self._kept_s = 0.0
        self._looked_at = time.time()
        self._last_status = ""
        self._trouble = ""

    def run(self, changes: Changes, signals: Signals, nft: Nft, asked: Asked | None = None) -> None:
        """Run until a signal ends it. Raises `ForwardError` if the start or the clean-up fails."""
        self._forwards.read()
        try:
            self._notify(self.keep(self.wanted()), is_told=True)
            while not (told := self.wait(changes, signals, asked)) & STOP:
                waiting = asked.take() if asked else []
                self.look(changes, is_told=signal.SIGHUP in told, is_asked=bool(waiting))
                if waiting:
                    answer(waiting, self.report(nft))
        finally:
            notify("STOPPING=1")
            self._write_state(_CLOSED)
            self._in_force.clear()

    def wait(self, changes: Changes, signals: Signals, asked: Asked | None = None) -> set[int]:
        """Wait for a change, a signal, a question or the next look, at least `GAP_S`. Returns the signals."""
        gap_s = max(0.0, self._kept_s + GAP_S - self._clock())
        if not select.select([signals], [], [], gap_s)[0]:
            sources = [signals.fileno(), changes.fileno(), *([asked.fileno()] if asked else ())]
            select.select(sources, [], [], LOOK_S - gap_s)
        return signals.take()

    def look(self, changes: Changes, *, is_told: bool = False, is_asked: bool = False) -> None:
        """Let through what is wanted now, if that or the firewall has changed, or somebody asks."""
        self._looked_at = time.time()
        if is_told:
            notify(*reloading())
        if is_asked:
            self._forwards.refresh()
        if is_told or is_asked or self._forwards.has_changed():
            try:
                self._forwards.read()
            except ConfigError as error:
                _logger.error("configuration not reloaded: %s", error)
        wanted = self.wanted()
        is_due = wanted != self.kept or self._in_force.is_due
        if changes.has_any() or is_told or is_asked or is_due:
            try:
                self._notify(self.keep(wanted), is_told=is_told)
            except NftError as error:
                self._write_state(_CLOSED)
                warn(_logger, self._limit, "nft", str(error))
                self._notify(one_line(str(error)), is_told=is_told)
        if self._state is not None:
            with suppress(OSError):
                self._date(self._state)

    def wanted(self) -> Wanted:
        """What to let through: nobody to the listener, if the kernel does not say where it listens."""
        active = self._forwards.active()
        flows = self._flows.look(active)
        found: frozenset[Socket] = frozenset()
        trouble = ""
        try:
            found = self._listening({config.proto for config in (*active, *flows)})
        except SocketsError as error:
            trouble = str(error)
        if trouble and trouble != self._trouble:
            _logger.warning("nobody is let in: %s", trouble)
        self._trouble = trouble
        return Wanted(active, found, flows, self._forwards.paths())

    def _listening(self, protos: Iterable[Proto]) -> frozenset[Socket]:
        return frozenset((proto, *binding) for proto in protos for binding in self._sockets(proto))

    def _notify(self, status: str, *, is_told: bool) -> None:
        """Notify the service manager, if it waits for an answer or the status is new."""
        if is_told or status != self._last_status:
            notify("READY=1", f"STATUS={status}")
            self._last_status = status

    def keep(self, wanted: Wanted) -> str:
        """Let through what is wanted and nothing else. Returns the status in one line.

        Raises `NftError`; then what is no longer wanted is closed all the same, if that can be done, and the
        rest is tried again at the next look.
        """
        self._kept_s = self._clock()
        self.kept = None
        sure = self._in_force.sure
        try:
            self._places = self._in_force.put(wanted)
        except NftError as error:
            self._problem = str(error)
            old = tuple(kept for kept in wanted.paths if kept.config in sure)
            if old != wanted.paths:
                self._in_force.put(replace(wanted, paths=old))
            raise
        self._problem = None
        self.kept = wanted
        self._write_state(firewall_report(wanted, self._places))
        uncut = () if self._in_force.problem is None else (self._in_force.problem,)
        return one_line(", ".join((*uncut, *account(wanted, self._places))))

    def report(self, nft: Nft) -> NftReport:
        """What is in force by nft, for dom0."""
        problem = self._problem or self._in_force.problem
        counters: dict[str, tuple[int, int]] = {}
        try:
            counters = nft.counters()
        except NftError as error:
            problem = problem or str(error)
        wanted = self._forwards.paths()
        configs = {kept.config for kept in wanted}
        sure, possible = self._in_force.sure, self._in_force.configs
        return nft_report(
            # What should be gone and may not be is told, too.
            kept=[*map(Kept, possible - configs), *(kept for kept in wanted if kept.config in sure)],
            over=self._forwards.over(),
            failed=configs - sure,
            places=self._places,
            counters=counters,
            refused=self._forwards.refused,
            problem=problem,
        )

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
    nft = Nft()
    place = os.environ.get("RUNTIME_DIRECTORY")
    directory = None if place is None else Path(place)
    try:
        in_force = InForce(Firewall(nft), Cutter(), None if directory is None else directory / IN_FORCE)
        if args.remove:
            in_force.clear()
            return 0
        with ExitStack() as stack:
            signals, changes = stack.enter_context(Signals()), stack.enter_context(Changes())
            source = FileSource(args.config) if args.config else stack.enter_context(open_qubesdb())
            given: int | None = args.listener_uid

            def sockets(proto: Proto) -> frozenset[Binding]:
                # The listener's user may be another one after its next start.
                return listening(owner() if given is None else given, NUMBERS[proto])

            state = None if directory is None else directory / STATE
            keeper = Keeper(Forwards(source, in_force.configs), in_force, sockets, state)
            asked = None if directory is None else stack.enter_context(Asked(directory / ASK))
            keeper.run(changes, signals, nft, asked)
    except ForwardError as error:
        _logger.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
