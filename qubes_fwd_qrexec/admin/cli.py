# SPDX-License-Identifier: GPL-2.0-or-later
"""qvm-forward, dom0's one command: from the command line to the functions that do it.

Exit status: 0 done, 1 it could not be done, 2 the command line was wrong.
"""

import importlib
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import TextIO

from qubes_fwd_qrexec.errors import ForwardError

from . import parser
from .locate import open_backend
from .session import Session, UsageError
from .tables import Style

# Each command is imported when it is asked for: half of the time until it starts would go into the others.
_COMMANDS = {
    "add": ("changing", "add"),
    "set": ("changing", "set_options"),
    "remove": ("changing", "remove"),
    "enable": ("changing", "enable"),
    "disable": ("changing", "disable"),
    "confirm": ("changing", "confirm"),
    "list": ("showing", "list_rules"),
    "show": ("showing", "show"),
    "status": ("status", "status"),
    "diagnose": ("diagnose", "diagnose"),
    "plan": ("showing", "explain"),
    "apply": ("showing", "apply"),
    "watch": ("watch", "watch"),
    "policy": ("showing", "print_policy"),
    "tunnel": ("tunnelmarks", "tunnel"),
    "panic": ("panic", "panic"),
    "export": ("exchanging", "export_rules"),
    "import": ("exchanging", "import_rules"),
}


def _command(name: str) -> Callable[[Namespace, Session], int]:
    module, function = _COMMANDS[name]
    command: Callable[[Namespace, Session], int] = getattr(
        importlib.import_module(f".{module}", __package__), function
    )
    return command


def run(
    argv: Sequence[str],
    *,
    environ: Mapping[str, str],
    now: float,
    stdin: TextIO,
    out: TextIO,
    err: TextIO,
    style: Style,
) -> int:
    """One command, with everything that it may look at given; returns the exit status.

    Raises `SystemExit` for what argparse settles itself: usage errors, --help and --version.
    """
    arguments = parser.build()
    if argv[:1] == ["__complete"]:
        from . import complete

        out.write("".join(f"{word}\n" for word in complete.candidates(arguments, argv[1:], environ)))
        return 0
    args = arguments.parse_args(argv)
    try:
        backend = open_backend(args.lab, environ)
        session = Session(backend, now, environ, stdin, out, err, style, args.json)
        return _command(args.command)(args, session)
    except UsageError as error:
        err.write(f"qvm-forward {args.command}: {error}\n")
        return 2
    except ForwardError as error:
        err.write(f"qvm-forward {args.command}: {error}\n")
        return 1


def _style(out: TextIO, environ: Mapping[str, str]) -> Style:
    """Width and colours of where the output goes; see no-color.org for NO_COLOR."""
    if not out.isatty():
        return Style()
    try:
        width = int(environ.get("COLUMNS", "")) or None
    except ValueError:
        try:
            width = os.get_terminal_size(out.fileno()).columns or None
        except OSError:
            width = None
    return Style(width, not environ.get("NO_COLOR") and environ.get("TERM") != "dumb")


def main(argv: Sequence[str] | None = None) -> int:
    """The program."""
    try:
        status = run(
            sys.argv[1:] if argv is None else argv,
            environ=os.environ,
            now=time.time(),
            stdin=sys.stdin,
            out=sys.stdout,
            err=sys.stderr,
            style=_style(sys.stdout, os.environ),
        )
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has seen enough; nothing may be flushed to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
