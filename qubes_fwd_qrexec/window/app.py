# SPDX-License-Identifier: GPL-2.0-or-later
"""The program qubes-forward-manager: one window for each system, and the dialogs that it opens."""

import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType

from qubes_fwd_qrexec.admin.seen import Seen
from qubes_fwd_qrexec.admin.states import Key, State
from qubes_fwd_qrexec.admin.views.connected import Client
from qubes_fwd_qrexec.common.options import Option
from qubes_fwd_qrexec.common.values import QubeName

from .dialogs.closing import Closing
from .dialogs.confirmation import Confirmation
from .dialogs.cutting import Cutting
from .dialogs.diagnosis import Diagnosis
from .dialogs.editor import Editor
from .dialogs.opening import Opening, opens_to_anybody
from .dialogs.removal import Removal
from .dialogs.resuming import Resuming
from .gtk import Gdk, GLib, Gtk
from .mainwindow import MainWindow
from .model import actions
from .model.actions import Done
from .model.board import Board
from .model.remedies import Act, Remedy
from .model.worker import fault
from .program import Start
from .visibility import Visibility
from .widgets import deliver, introduce, later

APP_ID = "org.qubesos.forwardmanager"


class Manager:
    """All of the program but its place in the session. It is what `Commands` asks for.

    It ``is_closed`` when its window is gone; ``ended`` is called once a change that had begun is done, too.
    """

    def __init__(self, start: Start, ended: Callable[[], None]) -> None:
        self._ended = ended
        self.is_closed = False
        self._asked: list[tuple[object, dict[str, object]]] = []
        self.board = Board(start.open_backend, deliver, later)
        self.window = MainWindow(self.board, self, self.close)
        self.widget = self.window.widget
        self._editor = Editor(self.board, self.tell)
        self._diagnoses: dict[Key, Diagnosis] = {}
        self._closing = Closing(start.lab, resume=self.resume)
        self._forget = self.board.subscribe(self.window.show)
        self._visibility = Visibility(self.widget, self.board.be_seen)
        self.widget.connect("delete-event", self._asked_to_close)

    def start(self) -> None:
        """Look at the system, follow it, and show the window."""
        self.board.start()
        self.widget.present()

    def close(self) -> None:
        """Take the window away, and end after a change that has begun. The main loop goes on meanwhile."""
        if not self.is_closed:
            self.is_closed = True
            self._forget()
            self._editor.close()
            self.widget.destroy()
            self.board.close(waits=False, ended=self._ended)

    def _asked_to_close(self, *_event: object) -> bool:
        self.close()
        return True

    def tell(self, outcome: Done | Exception) -> None:
        if isinstance(outcome, Exception):
            self.window.outcome.show_error(outcome)
        else:
            self.window.outcome.show(outcome)

    def add(self, target: QubeName | None = None) -> None:
        self._editor.add(self.widget, target)

    def edit(self, key: Key, options: Sequence[Option] = ()) -> None:
        self._editor.edit(self.widget, key, options)

    def extend(self, key: Key, seconds: int = 3600) -> None:
        self._open(key, partial(actions.extend, seconds=seconds), State.EXPIRED)

    def enable(self, key: Key) -> None:
        self._open(key, actions.enable, State.DISABLED)

    def disable(self, key: Key) -> None:
        self._change(key, actions.disable)

    def confirm(self, key: Key) -> None:
        Confirmation(self.board, self.tell).open(self.widget, key)

    def remove(self, keys: Sequence[Key]) -> None:
        Removal(self.board, self.tell).open(self.widget, keys)

    def cut(self, key: Key, client: Client | None) -> None:
        Cutting(self.board, self.tell).open(self.widget, key, client)

    def diagnose(self, key: Key) -> None:
        """There is one diagnosis of a rule at a time, and no second click begins another."""
        if (found := self._diagnoses.get(key)) is not None:
            found.widget.present()
            return
        self._diagnoses[key] = diagnosis = Diagnosis(self.board, self)
        diagnosis.widget.connect("destroy", lambda _: self._diagnoses.pop(key))
        diagnosis.open(self.widget, key)

    def close_everything(self) -> None:
        self._closing.open(self.widget)

    def resume(self) -> None:
        Resuming(self.board, self.tell).open(self.widget)

    def apply(self) -> None:
        self._do(actions.apply)

    def mark(self, qube: str) -> None:
        self._do(partial(actions.mark, qube=qube))

    def show(self, key: Key) -> None:
        self.window.choose(key)

    def remedy(self, remedy: Remedy) -> None:
        key = remedy.key
        if remedy.act is Act.APPLY:
            self.apply()
        elif remedy.act is Act.RESUME:
            self.resume()
        elif remedy.act is Act.MARK:
            self.mark(remedy.qube)
        elif key is None or remedy.act is Act.COPY:
            Gtk.Clipboard.get(Gdk.SELECTION_CLIPBOARD).set_text(remedy.command, -1)
        elif remedy.act is Act.CONFIRM:
            self.confirm(key)
        elif remedy.act is Act.ENABLE:
            self.enable(key)
        elif remedy.act is Act.DISABLE:
            self.disable(key)
        elif remedy.act is Act.REMOVE:
            self.remove([key])
        else:
            self.edit(key, remedy.options)

    def _open(self, key: Key, change: Callable[..., Done], closed: State) -> None:
        """Change a rule, after a question where that opens it to anybody: where nothing but ``closed``, which
        the change ends, keeps it from them.
        """
        look = self.board.look
        forward = None if look is None else look.plan.find(*key)
        is_opened = forward is not None and forward.state is closed
        if look is not None and is_opened and opens_to_anybody(look, key):
            Opening(self.board, self.tell).open(self.widget, key, change)
        else:
            self._change(key, change)

    def _change(self, key: Key, change: Callable[..., Done]) -> None:
        """Change a rule if it is still what the user saw: what its pane shows may be older than the look."""
        look = self.board.look
        if look is not None:
            seen = self.window.seen(key) or Seen.of(look.snapshot, key)
            self._do(partial(change, key=key, seen=seen))

    def _do(self, change: Callable[..., Done]) -> None:
        """Change something, after all that was asked for before; the same again at once asks for nothing."""
        what = _told_apart(change)
        if self._asked[-1:] == [what]:
            return
        self._asked.append(what)
        self.window.be_busy(is_busy=True)

        def ended(outcome: Done | Exception) -> None:
            self._asked.remove(what)
            self.window.be_busy(is_busy=bool(self._asked))
            self.tell(outcome)

        self.board.change(lambda backend: change(backend, self.board.now), ended, ended)


def _told_apart(change: Callable[..., Done]) -> tuple[object, dict[str, object]]:
    """What a change does to which rule, whatever the user saw of it."""
    if not isinstance(change, partial):
        return change, {}
    return change.func, {name: value for name, value in change.keywords.items() if name != "seen"}


class Program(Gtk.Application):
    """The place in the session: a second start of the program shows the window of the first, or another one
    where that is closed and a change that it had begun is not done yet.
    """

    def __init__(self, start: Start) -> None:
        super().__init__(application_id=start.application_id(APP_ID))
        self._start = start
        self.manager: Manager | None = None

    def perform_setup(self) -> Manager:
        """Make the window. Nothing is shown, and the system not looked at, before its `start`."""
        # It is no window that keeps the program running, as a change may take longer.
        self.hold()
        self.manager = Manager(self._start, self.release)
        self.add_window(self.manager.widget)
        return self.manager

    def do_activate(self) -> None:
        if self.manager is None or self.manager.is_closed:
            self.perform_setup().start()
        else:
            self.manager.widget.present()

    def end(self) -> None:
        """Close the window, and end once all that was begun is done."""
        if self.manager is None:
            self.quit()
        else:
            self.manager.close()


def begin(start: Start) -> int:
    """Run the program until its window is closed or SIGTERM comes; returns the exit status."""
    introduce(APP_ID)
    program = Program(start)

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """A bug in what GTK calls ends nothing, and is shown."""
        manager = program.manager
        if manager is None or manager.is_closed or not isinstance(error, Exception):
            sys.__excepthook__(kind, error, trace)
        else:
            manager.tell(fault(error))

    def end() -> bool:
        program.end()
        return True

    sys.excepthook = hook
    signals = (signal.SIGTERM, signal.SIGINT)
    sources = [GLib.unix_signal_add(GLib.PRIORITY_HIGH, number, end) for number in signals]
    try:
        return program.run([])
    finally:
        sys.excepthook = sys.__excepthook__
        for source in sources:
            GLib.source_remove(source)
