# SPDX-License-Identifier: GPL-2.0-or-later
"""The question before the hold is lifted: what opens again. Nothing else is opened than what is shown.

What is shown follows the system.
"""

from functools import partial

from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.states import Plan
from qubes_fwd_qrexec.window import widgets
from qubes_fwd_qrexec.window.gtk import Gtk
from qubes_fwd_qrexec.window.kept import Lines, Text
from qubes_fwd_qrexec.window.model import actions
from qubes_fwd_qrexec.window.model.actions import Done, error_lines
from qubes_fwd_qrexec.window.model.board import Board, Later
from qubes_fwd_qrexec.window.model.look import Look
from qubes_fwd_qrexec.window.model.reopening import Reopening, reopening
from qubes_fwd_qrexec.window.model.words import _
from qubes_fwd_qrexec.window.widgets import named

from .question import Question, Tell


class Resuming:
    """``widget`` is the dialog."""

    def __init__(self, board: Board, tell: Tell, *, later: Later = widgets.later) -> None:
        self._board = board
        self._is_open = False
        self._seen: Look | None = None
        self._looks = 0
        self._question = Question(board, tell, _("Resume"), _("_Resume"), "note", later=later)
        self.widget = self._question.widget
        self._head, self._lines, self._problem = Text(style="title"), Lines(), Text(style="bad")
        named(self._lines.widget, _("What opens again"))
        for each in (self._head, self._lines, self._problem):
            self._question.body.pack_start(each.widget, False, False, 0)
        self._question.follow(self._follow)

    def open(self, parent: Gtk.Window | None) -> None:
        """Ask."""
        self._is_open = True
        self._seen = self._board.look
        self._question.withdraw()
        self._head.show(_("Reading the system…"))
        self._question.open(parent)
        self._board.refresh()
        self._follow()

    def _follow(self) -> None:
        look, now = self._board.look, self._board.now
        if look is None or not self._is_open:
            return
        if look is not self._seen:
            self._seen = look
            self._looks += 1
            # The first may have begun before the hold that this is about, and the one after it has not.
            if self._looks == 1:
                self._board.refresh()
        show = partial(self._show, self._looks)
        self._board.compute(lambda: reopening(look, now), show, self._failed, kind="reopening")

    def _show(self, looks: int, found: Reopening | None) -> None:
        if self._question.is_closed:
            return
        if found is None:
            if looks > 1:
                self._question.close()
            return
        self._problem.show("")
        self._head.show(found.head, "anybody" if found.is_anybody else "title")
        if found.is_anybody:
            self._question.rename(_("_Resume: open to anybody"), "anybody")
        else:
            self._question.rename(_("_Resume"), "note")
        text = "\n\n".join(found.lines)
        self._lines.show(text)
        self._question.fit(text)
        self._question.ask((found.head, found.lines), partial(self._resume, found.plan))

    def _resume(self, shown: Plan, backend: Backend) -> Done:
        return actions.resume(backend, self._board.now, shown)

    def _failed(self, error: Exception) -> None:
        if not self._question.is_closed:
            self._question.withdraw()
            self._problem.show("\n".join(error_lines(error)))
