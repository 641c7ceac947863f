# SPDX-License-Identifier: GPL-2.0-or-later
"""The start of both programs: the command line, and what must be there to show anything."""

import argparse
import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, NamedTuple

from qubes_fwd_qrexec import __version__
from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.views import locate
from qubes_fwd_qrexec.common.errors import ForwardError

from . import garbage
from .model.worker import OpenBackend

_NO_GTK = (
    "this program needs GTK 3 for Python; install python3-gobject and gtk3 (on Debian python3-gi and "
    "gir1.2-gtk-3.0)"
)

# Seconds. PyGObject gives up Python's lock around each call of GTK. While a worker computes, each call waits
# for that until Python switches: 5 ms, unless told otherwise. A list takes thousands of calls.
_SWITCH_S = 0.0001


class Start(NamedTuple):
    """What a program is started for. ``lab`` is the directory of a lab, or None for this Qubes system."""

    open_backend: OpenBackend
    lab: str | None

    def application_id(self, name: str) -> str:
        """Of a program with that id for this system, and another for each lab, so that each has its own."""
        if self.lab is None:
            return name
        return f"{name}.lab{hashlib.sha256(os.path.realpath(self.lab).encode()).hexdigest()[:16]}"


def manager() -> int:
    """The program qubes-forward-manager."""
    what = "Show and change what of this Qubes system can be reached."
    return run("qubes-forward-manager", what, "app", shows_errors=True)


def indicator() -> int:
    """The program qubes-forward-indicator."""
    what = "Show in the panel while anything of this Qubes system can be reached."
    # GTK's icons in the tray are of X11 alone.
    os.environ["GDK_BACKEND"] = "x11"
    return run("qubes-forward-indicator", what, "tray")


def run(
    name: str, what: str, module: str, argv: Sequence[str] | None = None, *, shows_errors: bool = False
) -> int:
    """Run ``begin(Start) -> int`` of a module of this package, which has GTK.

    Returns the exit status: 2 for a wrong command line, 1 where it cannot start. It says why on stderr; one
    that ``shows_errors`` also in a dialog, if stderr is no terminal, since it was started from a menu then.
    """
    parser = argparse.ArgumentParser(prog=name, description=what)
    parser.add_argument("--lab", metavar="DIR", help="work on a lab instead of this Qubes system")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    lab: str | None = parser.parse_args(argv).lab

    def open_backend() -> Backend:
        return locate.open_backend(lab, os.environ)

    try:
        open_backend()
        begin = _imported(module)
        sys.setswitchinterval(_SWITCH_S)
        garbage.begin()
    except ForwardError as error:
        sys.stderr.write(f"{name}: {error}\n")
        if shows_errors and not sys.stderr.isatty():
            _show(name, str(error))
        return 1
    return begin(Start(open_backend, lab or os.environ.get(locate.LAB_VARIABLE) or None))


def _imported(module: str) -> Callable[[Start], int]:
    """Raises `ForwardError` where there is no GTK, or nothing to show it on, which would end the process."""
    _gtk()
    begin: Callable[[Start], int] = import_module(f".{module}", __package__).begin
    return begin


def _gtk() -> Any:
    try:
        gtk = import_module(".gtk", __package__)
    except (ImportError, ValueError) as error:
        raise ForwardError(f"{_NO_GTK} ({error})") from error
    if not gtk.Gtk.init_check()[0]:
        raise ForwardError("there is no display; start it in a graphical session")
    return gtk.Gtk


def _show(name: str, text: str) -> None:
    """Show an error until it is closed, where anything can be shown."""
    with suppress(ForwardError):
        gtk = _gtk()
        dialog = gtk.MessageDialog(
            message_type=gtk.MessageType.ERROR,
            buttons=gtk.ButtonsType.CLOSE,
            title=name,
            text=name,
            secondary_text=text,
        )
        dialog.run()
        dialog.destroy()
