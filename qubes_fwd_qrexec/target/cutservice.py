# SPDX-License-Identifier: GPL-2.0-or-later
"""The service ``qubes.ForwardCut+KEY``: cuts clients of one forward of this exposed qube, for dom0 alone.

It runs as root, since nobody else may ask that of the listener. Which clients comes on a line of stdin
(`WhichClients`), where it is in no log of policy; without a line nothing is cut, as whoever called may have
died. The answer is a `CutReport`.
"""

import os
import sys
from pathlib import Path

from qubes_fwd_qrexec.common.clientreport import WHICH_MAX_BYTES, CutReport, WhichClients
from qubes_fwd_qrexec.common.config import ForwardKey, parse_key
from qubes_fwd_qrexec.common.document import ReportError, dump
from qubes_fwd_qrexec.common.errors import ConfigError, TextError
from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.common.services import CUT_SERVICE
from qubes_fwd_qrexec.system.cleanstart import start_clean
from qubes_fwd_qrexec.system.logs import one_line

from .listenersockets import CUT, NONE_RUNS, STATUS, ask, listener_directory

_OLD = "the listener was started before it could cut clients; restart it, or its qube"


def cut(place: Path, key: ForwardKey, which: WhichClients) -> CutReport:
    """Ask the listener whose sockets are there."""
    try:
        return CutReport.parse(ask(place / CUT, f"{key} {which}\n".encode("ascii")))
    except (FileNotFoundError, ConnectionRefusedError):
        return CutReport(0, _OLD if (place / STATUS).exists() else NONE_RUNS)
    except OSError as error:
        return CutReport(0, one_line(f"the listener does not answer: {error.strerror or error}"))
    except ReportError as error:
        return CutReport(0, one_line(f"the listener's answer cannot be read: {error}"))


def _which(untrusted: bytes) -> WhichClients:
    untrusted_line, end, rest = untrusted.decode("ascii", "backslashreplace").partition("\n")
    if not end or rest:
        expected = "one line: nothing for all clients, ADDRESS or ADDRESS:PORT"
        raise TextError(untrusted_line[:WHICH_MAX_BYTES], expected)
    return WhichClients.parse(untrusted_line)


def main() -> int:
    """The RPC: ``argv[1]`` is the key of a forward."""
    start_clean()
    try:
        key = parse_key(sys.argv[1] if len(sys.argv) == 2 else "")
        which = _which(sys.stdin.buffer.read(WHICH_MAX_BYTES + 1))
    except (ConfigError, TextError) as error:
        print(f"{CUT_SERVICE}: {error}"[:200], file=sys.stderr)
        return ExitStatus.BAD_ARGUMENT
    try:
        sys.stdout.buffer.write(dump(cut(listener_directory(), key, which).as_json()))
        sys.stdout.buffer.flush()
    except OSError:
        return ExitStatus.TROUBLE
    return os.EX_OK


if __name__ == "__main__":
    sys.exit(main())
