# SPDX-License-Identifier: GPL-2.0-or-later
"""The service ``qubes.ForwardNft``: what this qube's firewall does for forwards by nft, for dom0 alone.

It runs as root, asks the firewall's program (`asked`) and prints what that says. If the program does not run,
it is started first, as far as dom0 lets it run in this qube at all.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from qubes_fwd_qrexec.common.document import REPORT_MAX_BYTES
from qubes_fwd_qrexec.common.errors import ForwardError
from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.common.services import NFT_SERVICE
from qubes_fwd_qrexec.system import unixsockets
from qubes_fwd_qrexec.system.cleanstart import start_clean

from .asked import ASK

# RuntimeDirectory= of the unit; a lab sets another one, and starts the program itself.
DIRECTORY = Path("/run/qubes-forward-nft")
DIRECTORY_VARIABLE = "QUBES_FORWARD_NFT_DIR"
_START = ("systemctl", "start", "qubes-forward-nft.service")
# For everything together: dom0 waits for 5 s. A thousand forwards take 3 s, to be started or to be told of.
PATIENCE_S = 4.5
_LAB_PATIENCE_S = 100.0


class SilentError(ForwardError):
    """The firewall's program does not answer; the text says why."""


def ask(path: Path, timeout_s: float = PATIENCE_S) -> bytes:
    """Everything that is said at a socket, within this time. Raises OSError."""
    return unixsockets.ask(path, b"", timeout_s, REPORT_MAX_BYTES)


def answer(path: Path, start: tuple[str, ...] = _START, patience_s: float = PATIENCE_S) -> bytes:
    """What the program says at this socket, within ``patience_s`` seconds. Raises `SilentError`.

    ``start`` is the command that starts it where it does not run.
    """
    deadline_s = time.monotonic() + patience_s
    try:
        return ask(path, patience_s)
    except (FileNotFoundError, ConnectionRefusedError):
        _start(start, patience_s)
    except OSError as error:
        raise SilentError(f"it does not answer: {error}") from error
    try:
        return ask(path, max(0.001, deadline_s - time.monotonic()))
    except TimeoutError as error:
        raise SilentError(f"it has been started, and does not answer within {patience_s:g} s") from error
    except OSError as error:
        raise SilentError(
            "it does not run; qvm-service QUBE qubes-forward-nft on, in dom0, lets it from the next start on"
        ) from error


def _start(command: tuple[str, ...], timeout_s: float) -> None:
    """Start the program, and return when it is ready; if it has to wait for a flag, nothing happens."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise SilentError(f"it is not ready within {timeout_s:g} s") from error
    except OSError as error:
        raise SilentError(f"it cannot be started: {command[0]}: {error.strerror}") from error
    if done.returncode != 0:
        raise SilentError(f"it cannot be started: {' '.join(done.stderr.split())}")


def main() -> int:
    """The RPC: without argument; the report goes to stdout."""
    start_clean()
    if "".join(sys.argv[1:]):
        print(f"{NFT_SERVICE} takes no argument", file=sys.stderr)
        return ExitStatus.BAD_ARGUMENT
    place = os.environ.get(DIRECTORY_VARIABLE)
    try:
        # In a lab dom0 may have more patience, and ends the call when that is over.
        said = answer(DIRECTORY / ASK) if place is None else ask(Path(place) / ASK, _LAB_PATIENCE_S)
        sys.stdout.buffer.write(said)
        sys.stdout.buffer.flush()
    except (SilentError, OSError) as error:
        print(f"qubes-forward-nft: {error}"[:200], file=sys.stderr)
        return ExitStatus.TROUBLE
    return os.EX_OK


if __name__ == "__main__":
    sys.exit(main())
