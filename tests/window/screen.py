# SPDX-License-Identifier: GPL-2.0-or-later
"""A screen for tests that show something: import this module first of all that imports GTK."""

import atexit
import os
import subprocess
from collections.abc import Callable

import debiangi
import pytest
from helpers import BOUND_S, STANDING


def _import_gtk() -> str | None:
    """Why there is no GTK; None if there is."""
    missing = debiangi.offer()
    if missing is None:
        try:
            import qubes_fwd_qrexec.window.gtk  # noqa: F401
        except (ImportError, ValueError) as error:
            return f"no GTK 3 for Python: {error}"
    return missing


def _start_server() -> str | None:
    """Start an X server of our own, with a display that nobody else has; why there is none."""
    ours, its = os.pipe()
    try:
        server = subprocess.Popen(
            ["Xvfb", "-displayfd", str(its), "-screen", "0", "1280x800x24", "-nolisten", "tcp"],
            pass_fds=(its,),
            stderr=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        os.close(its)
        os.close(ours)
        return "there is no Xvfb to show a window on (Debian: xvfb)"
    os.close(its)
    STANDING.add(server.pid)
    atexit.register(server.wait)
    atexit.register(server.terminate)
    with os.fdopen(ours) as answer:
        display = answer.readline().strip()
    if not display:
        return "Xvfb did not start"
    os.environ["DISPLAY"] = f":{display}"
    # No service of a session is asked, nor started, and no theme but GTK's own is there.
    os.environ |= {
        "NO_AT_BRIDGE": "1",
        "GDK_BACKEND": "x11",
        "GTK_THEME": "Adwaita",
        "GSETTINGS_BACKEND": "memory",
    }
    os.environ.pop("DBUS_SESSION_BUS_ADDRESS", None)
    return None


missing = _start_server() or _import_gtk()
if missing is not None:
    pytest.skip(missing, allow_module_level=True)

from qubes_fwd_qrexec.window.gtk import GLib, Gtk  # noqa: E402

assert Gtk.init_check()[0]


def until(condition: Callable[[], object], bound_s: float = BOUND_S) -> None:
    """Run the main loop until the condition holds."""
    over: list[bool] = []
    source = GLib.timeout_add(int(bound_s * 1000), lambda: over.append(True) or True)
    context = GLib.MainContext.default()
    try:
        while not condition():
            assert not over, f"not so within {bound_s} s: {condition}"
            context.iteration(True)
    finally:
        GLib.source_remove(source)


def end_grabs() -> None:
    """Let events through to all windows again, whatever dialog is still there."""
    while (widget := Gtk.grab_get_current()) is not None:
        widget.grab_remove()


def settle() -> None:
    """Run what the main loop has to do by now, such as drawing."""
    context = GLib.MainContext.default()
    while context.pending():
        context.iteration(False)
