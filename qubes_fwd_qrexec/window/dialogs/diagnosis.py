# SPDX-License-Identifier: GPL-2.0-or-later
"""A forward tried from end to end: each step is shown as it comes, up to the first fault.

A step asks qubes and may take seconds. Each is asked for when the one before it is shown, so that closing the
window leaves one question behind at most.
"""

from collections.abc import Iterator
from typing import NamedTuple

from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.snapshot import look
from qubes_fwd_qrexec.admin.states import Forward, Key
from qubes_fwd_qrexec.admin.views.diagnose import conclusion, walk
from qubes_fwd_qrexec.admin.views.tables import Check, Style, checks, escaped
from qubes_fwd_qrexec.window.checklist import CheckList
from qubes_fwd_qrexec.window.gtk import Atk, Gdk, Gtk
from qubes_fwd_qrexec.window.kept import Text
from qubes_fwd_qrexec.window.model.actions import error_lines
from qubes_fwd_qrexec.window.model.board import Board
from qubes_fwd_qrexec.window.model.commands import Commands
from qubes_fwd_qrexec.window.model.words import _
from qubes_fwd_qrexec.window.portions import Portions
from qubes_fwd_qrexec.window.widgets import GAP, button, column, named, row, scrolled

_WIDTH, _HEIGHT = 640, 420


class _Walk(NamedTuple):
    """A walk that has begun; taking a step blocks."""

    steps: Iterator[Check]
    forward: Forward | None


class Diagnosis:
    """``widget`` is the window, which can be closed at any time."""

    def __init__(self, board: Board, commands: Commands) -> None:
        self._board = board
        self._key: Key | None = None
        self._number = 0
        self._found: list[Check] = []
        self._conclusion = ""
        self._portions = Portions()
        self._checks = CheckList(commands)
        self._state, self._last = Text(style="faint"), Text()
        self._last.widget.get_accessible().set_role(Atk.Role.ALERT)
        self._spinner = Gtk.Spinner()
        self._copy = button(_("C_opy as text"), self._copied)
        self._again = button(_("_Try again"), self._begin)
        self._close = button(_("_Close"), self.close)
        self.widget = Gtk.Dialog(destroy_with_parent=True)
        self.widget.set_default_size(_WIDTH, _HEIGHT)
        self.widget.set_border_width(GAP)
        self.widget.connect("destroy", self._ended)
        self.widget.connect("response", lambda *_: self.close())
        state = row(self._spinner, self._state.widget)
        body = column(self._checks.widget, state, self._last.widget, gap=2 * GAP)
        self.widget.get_content_area().pack_start(scrolled(body), True, True, 0)
        buttons = row()
        for each in (self._copy, self._again, self._close):
            buttons.pack_start(each, True, True, 0)
        buttons.set_homogeneous(True)
        buttons.set_halign(Gtk.Align.END)
        self.widget.get_content_area().pack_end(buttons, False, False, 0)

    def open(self, parent: Gtk.Window | None, key: Key) -> None:
        """Diagnose a rule."""
        self._key = key
        title = _("Diagnosis of {name}").format(name=escaped(" ".join(key)))
        self.widget.set_title(title)
        named(self.widget, title)
        self.widget.set_transient_for(parent)
        self.widget.show_all()
        self._close.grab_focus()
        self._begin()

    def close(self) -> None:
        """Take it away, and ask nothing more."""
        self.widget.destroy()

    @property
    def text(self) -> str:
        """All that is shown, as `qvm-forward diagnose` prints it."""
        return f"{checks(self._found, Style()) if self._found else ''}{self._conclusion}\n"

    def _ended(self, _dialog: Gtk.Dialog) -> None:
        self._key = None
        self._number += 1
        self._portions.stop()

    def _begin(self) -> None:
        """Begin anew; what an earlier walk still finds is not shown."""
        key = self._key
        if key is None:
            return
        self._number += 1
        self._found.clear()
        self._conclude("")
        self._show()
        self._be_busy(True)
        number, now = self._number, self._board.now

        def begin(backend: Backend) -> _Walk:
            seen = look(backend, with_config=True)
            steps = walk(seen, seen.find(*key), now, backend)
            return _Walk(steps, seen.plan(now).find(*key))

        self._board.ask(begin, lambda begun: self._step(number, begun), lambda e: self._failed(number, e))

    def _step(self, number: int, begun: _Walk) -> None:
        if number == self._number:
            self._board.ask(
                lambda _backend: next(begun.steps, None),
                lambda check: self._stepped(number, begun, check),
                lambda error: self._failed(number, error),
            )

    def _stepped(self, number: int, begun: _Walk, check: Check | None) -> None:
        if number != self._number:
            return
        if check is not None:
            self._found.append(check)
            self._show()
            self._step(number, begun)
        else:
            self._be_busy(False)
            self._conclude(conclusion(self._found[-1], begun.forward))

    def _failed(self, number: int, error: Exception) -> None:
        if number == self._number:
            self._be_busy(False)
            self._conclude("\n".join(error_lines(error)))

    def _show(self) -> None:
        self._portions.run(self._checks.show(self._found))

    def _conclude(self, text: str) -> None:
        self._conclusion = text
        self._last.show(text)

    def _be_busy(self, is_busy: bool) -> None:
        self._state.show(_("Asking…") if is_busy else "")
        self._spinner.set_visible(is_busy)
        (self._spinner.start if is_busy else self._spinner.stop)()
        self._again.set_sensitive(not is_busy)

    def _copied(self) -> None:
        Gtk.Clipboard.get(Gdk.SELECTION_CLIPBOARD).set_text(self.text, -1)
