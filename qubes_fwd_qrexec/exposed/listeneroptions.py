# SPDX-License-Identifier: GPL-2.0-or-later
"""The options of the program ``qubes-forward-listener``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from qubes_fwd_qrexec import __version__
from qubes_fwd_qrexec.common.config import CALLS_MAX

from . import qrexec
from .call import CallTimeouts
from .limits import PROCESS_MAX
from .muxpool import LINGER_S
from .statussockets import RUNTIME_VARIABLE

PROGRAM = "qubes-forward-listener"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the options; ends the program with a message if they are wrong."""
    options = parser()
    args = options.parse_args(arguments)
    if args.calls < 1:
        options.error(f"--calls {args.calls}: at least 1 would be right")
    if not args.call_timeout > 0:
        options.error(f"--call-timeout {args.call_timeout}: more than 0 would be right")
    if not args.linger >= 0:
        options.error(f"--linger {args.linger}: 0 or more would be right")
    if not args.idle_timeout > 0:
        options.error(f"--idle-timeout {args.idle_timeout}: more than 0 would be right")
    if args.connections is not None and args.connections < 1:
        options.error(f"--connections {args.connections}: at least 1 would be right")
    return args


def parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    options = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Listen for what dom0 has configured to be forwarded, and carry it over qrexec.",
    )
    options.add_argument(
        "--config",
        type=Path,
        metavar="PATH",
        help="directory or file with the forwards (default: this qube's QubesDB)",
    )
    options.add_argument(
        "--qrexec-client",
        default=" ".join(qrexec.CLIENT),
        metavar="COMMAND",
        help="the program that makes a qrexec call, with its options (default: %(default)s)",
    )
    options.add_argument(
        "--calls",
        type=int,
        default=CALLS_MAX,
        metavar="N",
        help="qrexec calls at once, of all forwards (default: %(default)s)",
    )
    options.add_argument(
        "--call-timeout",
        type=float,
        default=CallTimeouts().call_s,
        metavar="SECONDS",
        help="end a call that dom0 and the target have not taken within this (default: %(default)g)",
    )
    options.add_argument(
        "--linger",
        type=float,
        default=LINGER_S,
        metavar="SECONDS",
        help="keep a mux call for so long after its last connection (default: %(default)g)",
    )
    options.add_argument(
        "--status-dir",
        type=Path,
        metavar="PATH",
        help=f"where this can be asked how it is (default: the service manager's {RUNTIME_VARIABLE})",
    )
    options.add_argument(
        "--idle-timeout",
        type=float,
        default=CallTimeouts().idle_s,
        metavar="SECONDS",
        help="end a connection in which nothing has moved for so long (default: %(default)g)",
    )
    options.add_argument(
        "--connections",
        type=int,
        default=None,
        metavar="N",
        help=f"connections at once, of all forwards (default: {PROCESS_MAX}, or what memory and open files "
        "allow)",
    )
    options.add_argument(
        "--leave-drain",
        action="store_true",
        help="on SIGTERM end as soon as no port is open, and leave connections that may finish to a process "
        "that stays behind",
    )
    options.add_argument("--supervisor-fd", type=int, help=argparse.SUPPRESS)
    options.add_argument("--verbose", action="store_true", help="log more")
    options.add_argument("--version", action="version", version=__version__)
    return options
