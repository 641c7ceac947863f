# SPDX-License-Identifier: GPL-2.0-or-later
"""The service ``qubes.ForwardStatus``: the status of this qube's forwards, for dom0, which alone may call it.

Without an argument it reports what this qube's listener says, and the live calls to this qube as a target.
That is the state now: dom0 asks once after a change, and what has to catch up is waited for here, a moment.
``+PORT`` also tries whether a server of this qube takes a connection on that port, ``+proxy.PORT`` whether it
seems to expect a PROXY header, and ``+tcp.PORT`` or ``+udp.PORT`` looks whether one listens at more than a
loopback address, as a forward by nft needs it.
``+fwd.TARGET.NAME`` sends a connection through that forward of the listener, all the way to the target's
server. With ``+clients`` the listener also says who is connected.
"""

import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from qubes_fwd_qrexec import __version__
from qubes_fwd_qrexec.common import report
from qubes_fwd_qrexec.common.allowance import Calls
from qubes_fwd_qrexec.common.clientreport import CLIENTS
from qubes_fwd_qrexec.common.config import is_forward_key, parse_key
from qubes_fwd_qrexec.common.errors import ConfigError, TextError
from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.common.report import (
    Answer,
    CallsReport,
    FirewallReport,
    ListenerReport,
    QubeReport,
    ReportError,
    Trial,
)
from qubes_fwd_qrexec.common.services import STATUS_SERVICE
from qubes_fwd_qrexec.common.values import Proto, parse_port
from qubes_fwd_qrexec.system import bugs
from qubes_fwd_qrexec.system.cleanstart import start_clean
from qubes_fwd_qrexec.system.logs import one_line

from .callnotes import Kind, Note, RevocationError, directory, living
from .callstart import TICKS_PER_S
from .listenersockets import CLIENTS as CLIENTS_SOCKET
from .listenersockets import STATUS, TRY, ask, listener_directory
from .servertrials import look_at, try_header, try_port

# Where the program that opens this qube's firewall writes its `FirewallReport`.
FIREWALL_STATE = "/run/qubes-forward-nft/state"
FIREWALL_STATE_VARIABLE = "QUBES_FORWARD_NFT_STATE"
# With this flag the service manager starts the listener: at the qube's start, and again when it has failed.
STARTS = "/run/qubes-service/qubes-forward-listener"
STARTS_VARIABLE = "QUBES_FORWARD_LISTENER_STARTS"
# A server on this machine answers at once.
# How long a listener may take to start: what it waits for is QubesDB, and a second after a failure.
START_S = 2.0
# The firewall's program looks twice in a second. One that has not for three seconds does not run.
FIREWALL_S = 1.0
_LOOK_S = 0.02
# The word in front of a port whose server is tried for a PROXY header.
HEADER = "proxy"


class Places(NamedTuple):
    """Where this qube's programs leave what is reported.

    The listener's sockets, the notes of calls, the state of the firewall; and what is there where a listener
    is started by itself.
    """

    listener: Path
    notes: Path
    firewall: Path
    starts: Path


def places() -> Places:
    firewall = os.environ.get(FIREWALL_STATE_VARIABLE, FIREWALL_STATE)
    starts = os.environ.get(STARTS_VARIABLE, STARTS)
    return Places(listener_directory(), directory(), Path(firewall), Path(starts))


def answer(untrusted_argument: str, place: Places, rest: Callable[[float], None] = time.sleep) -> QubeReport:
    """The report that an argument asks for. Raises `TextError` for an invalid one.

    ``rest`` is how it waits: up to `START_S` for a listener that starts, and `FIREWALL_S` for the firewall.
    """
    trial = _try(untrusted_argument, place.listener)
    starting = place.listener / STATUS, place.starts
    _wait_while(lambda: not starting[0].exists() and starting[1].exists(), START_S, rest)
    names = (CLIENTS_SOCKET, STATUS) if untrusted_argument == CLIENTS else (STATUS,)
    listener, problem = _listener([place.listener / name for name in names])
    if listener is not None:
        since = time.time()
        _wait_while(lambda: 0 < since - _looked_at(place.firewall) < 3 * FIREWALL_S, FIREWALL_S, rest)
    return QubeReport(
        program=__version__,
        listener=listener,
        listener_problem=problem,
        calls=_calls(place.notes),
        bugs=bugs.left(place.notes),
        trial=trial,
        firewall=_firewall(place.firewall),
    )


def _try(untrusted_argument: str, place: Path) -> Trial | None:
    if untrusted_argument in ("", CLIENTS):
        return None
    proto, dot, port = untrusted_argument.partition(".")
    if dot and proto == HEADER:
        return try_header(parse_port(port))
    # A key of UDP begins with that word, too, and has two dots.
    if dot and proto in Proto.BOTH.each and "." not in port:
        return look_at(Proto(proto), parse_port(port))
    if is_forward_key(untrusted_argument):
        try:
            parse_key(untrusted_argument)
        except ConfigError as error:
            raise TextError(untrusted_argument, "fwd.TARGET.NAME") from error
        try:
            untrusted = ask(place / TRY, f"{untrusted_argument}\n".encode("ascii"))
            return Trial.parse(untrusted)
        except (OSError, ReportError) as error:
            return Trial(Answer.FAILED, "", one_line(f"the listener does not answer: {error}"))
    return try_port(parse_port(untrusted_argument))


def _wait_while(is_behind: Callable[[], bool], bound_s: float, rest: Callable[[float], None]) -> None:
    for _ in range(round(bound_s / _LOOK_S)):
        if not is_behind():
            return
        rest(_LOOK_S)


def _listener(sockets: Iterable[Path]) -> tuple[ListenerReport | None, str | None]:
    """The report of the first of these, or why the listener gives none; neither where none runs."""
    for path in sockets:
        try:
            return ListenerReport.parse(ask(path)), None
        except (FileNotFoundError, ConnectionRefusedError):
            continue  # a listener that runs since before an update may lack one
        except OSError as error:
            return None, one_line(f"the listener does not answer: {error.strerror or error}")
        except ReportError as error:
            return None, one_line(f"the listener's answer cannot be read: {error}")
    return None, None


def _looked_at(state: Path) -> float:
    """When the firewall's program last looked at what the listener has open; 0 if that is unknown."""
    try:
        return state.stat().st_mtime
    except OSError:
        return 0.0


def _firewall(path: Path) -> FirewallReport:
    try:
        with path.open("rb") as file:
            return FirewallReport.parse(file.read(report.REPORT_MAX_BYTES + 1))
    except (OSError, ReportError):
        return FirewallReport()


def _calls(place: Path) -> tuple[CallsReport, ...]:
    """The live calls of our service, by caller and ports."""
    try:
        notes = living(place)
    except RevocationError:
        return ()
    by_calls: dict[Calls, list[Note]] = {}
    for note in notes:
        by_calls.setdefault(note.calls, []).append(note)
    found = [_counted(calls, by_calls[calls]) for calls in sorted(by_calls, key=str)]
    return tuple(found)[: report.CALLS_MAX]


def _counted(calls: Calls, notes: list[Note]) -> CallsReport:
    drains = [note.until for note in notes if note.until]
    now_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    return CallsReport(
        source=calls.caller,
        ports=calls.ports,
        mux_calls=sum(note.kind is not Kind.SINGLE for note in notes),
        singles=sum(note.kind is Kind.SINGLE for note in notes),
        draining=len(drains),
        drain_left_s=max(0, math.ceil(max(drains) / TICKS_PER_S - now_s)) if drains else None,
        proto=calls.proto,
    )


def main() -> int:
    """The RPC: ``argv[1]`` is its argument, and the report goes to stdout."""
    start_clean()
    try:
        argument = sys.argv[1] if len(sys.argv) == 2 else ""
        asked = answer(argument, places())
    except TextError as error:
        print(f"{STATUS_SERVICE}: {error}"[:200], file=sys.stderr)
        return ExitStatus.BAD_ARGUMENT
    try:
        sys.stdout.buffer.write(report.dump(asked.as_json()))
        sys.stdout.buffer.flush()
    except OSError:
        return ExitStatus.TROUBLE
    return os.EX_OK


if __name__ == "__main__":
    sys.exit(main())
