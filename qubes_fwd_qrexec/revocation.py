# SPDX-License-Identifier: GPL-2.0-or-later
"""How dom0 ends the tunnels of a forward at once: ``qubes.ForwardRevoke+PORTS+SOURCE``, in the target.

A tunnel outlives the policy that allowed it, and its lease ends only new streams. So each tunnel of the
target leaves a note in a directory of this qube: which ports, for which caller, which process. The RPC,
which only dom0 may call, finds the notes that fit and asks those processes to end.
"""

import fcntl
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import ForwardError, TextError
from .exitstatus import ExitStatus
from .values import QubeName, TargetPorts, parse_number, parse_qube_name

SERVICE = "qubes.ForwardRevoke"
# Made by the package (tmpfiles.d), for the user that qrexec services run as; a lab names another.
DIRECTORY = "/run/qubes-forward"
DIRECTORY_VARIABLE = "QUBES_FORWARD_RUN_DIR"
_NOTE = re.compile(r"(?P<ports>[0-9-]+)\+(?P<source>[^+]+)\+(?P<pid>[0-9]+)\Z")


class RevocationError(ForwardError):
    """A tunnel cannot be noted, or a revocation not be understood."""


def directory() -> Path:
    """Where this qube's tunnels leave their notes."""
    return Path(os.environ.get(DIRECTORY_VARIABLE, DIRECTORY))


def argument(ports: TargetPorts, source: QubeName) -> str:
    """What the RPC is called with to end all tunnels to exactly these ports that ``source`` has opened."""
    return f"{ports}+{source}"


def parse_argument(untrusted_argument: str) -> tuple[TargetPorts, QubeName]:
    """Raises `TextError`."""
    ports, plus, source = untrusted_argument.partition("+")
    if not plus:
        raise TextError(untrusted_argument, "N-M+QUBE")
    return TargetPorts.parse(ports), parse_qube_name(source)


@contextmanager
def noted(ports: TargetPorts, source: str, place: Path) -> Iterator[None]:
    """Leave a note about this process for as long as the block runs.

    The process holds a lock on its note, so that a note outlived by a crash is never taken for another
    process of the same number. Raises `RevocationError`: a tunnel that could not be ended must not be.
    """
    path = place / f"{ports}+{source}+{os.getpid()}"
    try:
        with suppress(FileExistsError):
            place.mkdir(mode=0o700)
        note = open(path, "w", encoding="ascii")  # noqa: SIM115 - closed below
    except OSError as error:
        raise RevocationError(f"{path}: {error.strerror}; dom0 could not end this tunnel") from error
    try:
        fcntl.flock(note, fcntl.LOCK_EX)
        yield
    finally:
        path.unlink(missing_ok=True)
        note.close()


def revoke(ports: TargetPorts, source: QubeName, place: Path) -> int:
    """End the tunnels to these ports that ``source`` has opened; how many they were."""
    ended = 0
    try:
        notes = list(place.iterdir())
    except FileNotFoundError:
        return 0
    for path in notes:
        fits = _NOTE.match(path.name)
        if fits and fits["ports"] == str(ports) and fits["source"] == source and _is_held(path):
            with suppress(ProcessLookupError):
                os.kill(parse_number(fits["pid"]), signal.SIGTERM)
                ended += 1
    return ended


def _is_held(path: Path) -> bool:
    """Whether the process that left the note still lives; the note of a dead one is removed."""
    try:
        with open(path, encoding="ascii") as note:
            fcntl.flock(note, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


def main() -> int:
    """The RPC: ``argv[1]`` is its argument. Says on stdout how many tunnels were ended."""
    try:
        ports, source = parse_argument(sys.argv[1] if len(sys.argv) == 2 else "")
    except TextError as error:
        print(f"{SERVICE}: {error}", file=sys.stderr)
        return ExitStatus.BAD_ARGUMENT
    print(revoke(ports, source, directory()))
    return os.EX_OK


if __name__ == "__main__":
    sys.exit(main())
