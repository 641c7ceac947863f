# SPDX-License-Identifier: GPL-2.0-or-later
"""The program qubes-forward-indicator: an icon in the panel, and notices of what opens and closes.

It follows the system by events, and asks no qube anything.
"""

import shlex
import signal
import sys
from contextlib import suppress
from types import TracebackType

from . import style
from .dialogs.closing import Closing
from .gtk import Gdk, Gio, GLib, Gtk
from .indicator import NAME, Indicator
from .model.board import Board
from .model.notices import Notice, Notifier
from .model.words import _
from .model.worker import fault
from .program import Start
from .widgets import ICON, deliver, introduce, later

APP_ID = "org.qubesos.forwardindicator"
_SERVER, _SERVER_PATH = "org.freedesktop.Notifications", "/org/freedesktop/Notifications"
_WINDOW = "import sys; from qubes_fwd_qrexec.window.program import manager; sys.exit(manager())"


class Tray(Gtk.Application):
    """The place in the session, of which there is one for each system."""

    def __init__(self, start: Start) -> None:
        super().__init__(application_id=start.application_id(APP_ID))
        self._lab = start.lab
        self._open_backend = start.open_backend
        self.board: Board | None = None

    def do_startup(self) -> None:
        Gtk.Application.do_startup(self)
        action = Gio.SimpleAction(name="show")
        action.connect("activate", lambda *_: self.open_window())
        self.add_action(action)
        # A dialog wants a window to belong to, shown or not.
        self._place = Gtk.Window()
        self._closing = Closing(self._lab)
        style.apply(self._closing.widget)
        self.board = Board(self._open_backend, deliver, later)
        self.indicator = Indicator(
            self.board,
            open_window=self.open_window,
            close_everything=lambda: self._closing.open(self._place),
            leave=self.leave,
        )
        self._notifier = Notifier(self._send, self.withdraw_notification, later)
        self.board.subscribe(self._looked)
        self.board.start()
        self.hold()

    def do_activate(self) -> None:
        """A second start changes nothing."""

    def open_window(self) -> None:
        """Start the program qubes-forward-manager, which shows the window that it has already."""
        words = [sys.executable, "-P", "-c", _WINDOW, *(["--lab", self._lab] if self._lab else [])]
        line = shlex.join(words).replace("%", "%%")
        flags = Gio.AppInfoCreateFlags.SUPPORTS_STARTUP_NOTIFICATION
        try:
            program = Gio.AppInfo.create_from_commandline(line, "qubes-forward-manager", flags)
            # By it the window manager knows that the user has asked for the window.
            display = Gdk.Display.get_default()
            program.launch([], display.get_app_launch_context() if display else None)
        except GLib.Error as error:
            sys.stderr.write(f"{NAME}: {error.message}\n")

    def leave(self) -> None:
        """End; what closes everything goes on."""
        if self.board is not None:
            self.board.close()
        self.quit()

    def _looked(self) -> None:
        if self.board is not None and self.board.look is not None:
            self._notifier.looked(self.board.look)

    def _send(self, notice: Notice) -> None:
        """Tell the desktop, where anything shows notices: where nothing does, Gio would warn on stderr."""
        bus = self.get_dbus_connection()
        if bus is None:
            return

        def answered(_bus: Gio.DBusConnection, result: Gio.AsyncResult) -> None:
            with suppress(GLib.Error):
                bus.call_finish(result)
                self.send_notification(notice.id, _notification(notice))

        flags = Gio.DBusCallFlags.NONE
        bus.call(
            _SERVER, _SERVER_PATH, _SERVER, "GetServerInformation", None, None, flags, -1, None, answered
        )


def _notification(notice: Notice) -> Gio.Notification:
    made = Gio.Notification.new(notice.title)
    made.set_body(notice.body)
    made.set_icon(Gio.ThemedIcon.new(ICON))
    priority = Gio.NotificationPriority
    # Of these two alone servers of freedesktop.org hear a difference: what is urgent stays.
    made.set_priority(priority.URGENT if notice.is_alarming else priority.NORMAL)
    made.set_default_action("app.show")
    # xfce4-notifyd, dom0's, closes a notification that is clicked, and shows no action without a text.
    made.add_button(_("Open the window"), "app.show")
    return made


def begin(start: Start) -> int:
    """Run the program until it is left or SIGTERM comes; returns the exit status."""
    introduce(APP_ID)
    GLib.set_application_name(_("Qubes Port Forwards"))
    tray = Tray(start)

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """A bug in what GTK calls ends nothing."""
        if isinstance(error, Exception):
            sys.stderr.write(f"{NAME}: {fault(error)}\n")
        else:
            sys.__excepthook__(kind, error, trace)

    def end() -> bool:
        tray.leave()
        return True

    sys.excepthook = hook
    GLib.log_set_handler("Gdk", GLib.LogLevelFlags.LEVEL_CRITICAL, _log)
    for number in (signal.SIGTERM, signal.SIGINT):
        GLib.unix_signal_add(GLib.PRIORITY_HIGH, number, end)
    return tray.run([])


def _log(domain: str | None, level: GLib.LogLevelFlags, message: str, *_data: object) -> None:
    """Log what GDK says, but what it says of every icon that a tray takes in, and means nothing."""
    if "gdk_window_thaw_toplevel_updates" not in message:
        GLib.log_default_handler(domain, level, message, None)
