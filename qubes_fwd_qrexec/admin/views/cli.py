# SPDX-License-Identifier: GPL-2.0-or-later
"""qvm-forward, dom0's one command: from the command line to the functions that do it.

Exit status: 0 done, 1 it could not be done, 2 the command line was wrong, 3 a fault of the program.
"""

import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, TextIO, cast

from qubes_fwd_qrexec.common.errors import ForwardError, UsageError

from . import locate, parser
from .tables import Style, escaped, terminal_size

if TYPE_CHECKING:
    from qubes_fwd_qrexec.admin.backend import Backend

_FAULT = 3
_INTERRUPTED = 130
# What Ctrl-C leaves behind of a command, where nobody knows more.
_CHANGES = ("add", "set", "remove", "enable", "disable", "confirm", "tunnel", "import")
_CONTINUES = ("apply", "panic", "resume")
_TRACE = "QVM_FORWARD_TRACE"


def command(name: str) -> Callable[[Namespace, Any], int]:
    """Imported when it is asked for: half of the time until it starts would go into the others."""
    module, function = parser.COMMANDS[name].runs.split(".")
    found: Callable[[Namespace, Any], int] = getattr(import_module(f".{module}", __package__), function)
    return found


def run(
    argv: Sequence[str],
    *,
    environ: Mapping[str, str],
    now: float,
    stdin: TextIO,
    out: TextIO,
    err: TextIO,
    style: Style,
    backend: "Backend | None" = None,
) -> int:
    """Run one command. Returns the exit status.

    Without ``backend`` the system is the one that the command line or ``environ`` names. Raises `SystemExit`
    for what argparse settles itself: usage errors, --help and --version.
    """
    if argv[:1] == ["__complete"]:
        from . import fitting

        found = fitting.complete(argv[1:], environ, now)
        out.write("".join(f"{word}\n" for word in found))
        return 0
    args = parser.parse(argv)
    # Only now, as a wrong command line and --help need none of it.
    from . import session as sessions

    try:
        system = backend or locate.open_backend(args.lab, environ)
        session = sessions.Session(system, now, environ, stdin, out, err, style, args.json, set(), args.quiet)
        # A look of status --watch comes again soon, and a line below it would scroll the screen.
        if args.verbose or (err.isatty() and not getattr(args, "watch", False)):
            from .announced import Announced

            announced = Announced(system, session.warn, is_verbose=args.verbose)
            session = session._replace(backend=cast("Backend", announced))
        return command(args.command)(args, session)
    except KeyboardInterrupt as interrupt:
        err.write(f"qvm-forward {args.command}: interrupted{_left(args.command, str(interrupt))}\n")
        return _INTERRUPTED
    except UsageError as error:
        err.write(f"qvm-forward {args.command}: {error}\n")
        return 2
    except (ForwardError, OSError) as error:
        from . import reasons

        err.write(f"qvm-forward {args.command}: {reasons.error_text(error)}\n")
        return 1


def _left(command: str, known: str) -> str:
    """What an interrupted command has left; ``known`` is what it says itself."""
    if known:
        return f": {known}"
    if command in _CHANGES:
        return ": nothing was changed"
    if command in _CONTINUES:
        return f": what was done stands, and 'qvm-forward {command}' does the rest"
    return ""


def style_of(out: TextIO, environ: Mapping[str, str]) -> Style:
    """Width and colours of where the output goes; see no-color.org for NO_COLOR."""
    terminal = terminal_size(out, environ)
    if terminal is None:
        return Style()
    has_colour = not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"
    return Style(terminal.columns or None, has_colour)


class _OutputError(Exception):
    """The output could not be written."""


class _Output:
    """The standard output. Its errors are `_OutputError`, which tells them from those of other files."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write and flush."""
        try:
            count = self._stream.write(text)
            self._stream.flush()
        except OSError as error:
            raise _OutputError(error.strerror) from error
        return count

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()


def main(argv: Sequence[str] | None = None) -> int:
    """The program."""
    # Python sets closed standard streams to None. Opened in this order, each takes the descriptor that is
    # missing, so that no file of ours does.
    has_out = sys.stdout is not None
    stdin = sys.stdin or open(os.devnull)  # noqa: SIM115
    stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    out = cast(TextIO, _Output(stdout))
    try:
        status = run(
            sys.argv[1:] if argv is None else argv,
            environ=os.environ,
            now=time.time(),
            stdin=stdin,
            out=out,
            err=stderr,
            style=style_of(stdout, os.environ),
        )
        if not has_out:
            raise _OutputError("it is closed")
    except _OutputError as error:
        # Nothing may be flushed to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
        # The reader of a pipe who closed it has seen enough.
        if not isinstance(error.__cause__, BrokenPipeError):
            stderr.write(f"qvm-forward: the output could not be written: {error}\n")
        return 1
    except KeyboardInterrupt:
        stderr.write("qvm-forward: interrupted\n")
        return _INTERRUPTED
    except Exception as error:  # noqa: BLE001  # the last place that can print a sentence instead
        return _fault(error, stderr)
    return status


def _fault(error: Exception, stderr: TextIO) -> int:
    """Print one sentence about a bug of ours, and the traceback if it is asked for."""
    if os.environ.get(_TRACE):
        import traceback

        stderr.write("".join(traceback.format_exception(error)))
    words = " ".join(str(error).split())
    text = f"{type(error).__name__}{f': {words}' if words else ''}"
    stderr.write(
        f"qvm-forward: this is a bug in qvm-forward ({escaped(text)}); changes made before it remain. "
        f"{_TRACE}=1 shows where it is\n"
    )
    return _FAULT


if __name__ == "__main__":
    sys.exit(main())
