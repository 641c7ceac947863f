# SPDX-License-Identifier: GPL-2.0-or-later
"""The question before the hold is lifted: what opens again. Nothing else is opened than what is shown.

What is shown follows the system. For a second after it has changed nobody can agree to it, so that no click
or key that was meant for something else does.
"""

from collections.abc import Callable
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

WAIT_S = 1.0


class Resuming:
    """``widget`` is the dialog."""

    def __init__(self, board: Board, tell: Tell, *, later: Later = widgets.later) -> None:
        self._board = board
        self._later = later
        self._shown: Reopening | None = None
        self._is_open = self._is_offered = False
        self._seen: Look | None = None
        self._looks = 0
        self._cancel: Callable[[], None] = lambda: None
        self._question = Question(board, tell, _("Resume"), _("_Resume"), "note")
        self._question.at_end(self._ended)
        self.widget = self._question.widget
        self._head, self._lines, self._problem = Text(style="title"), Lines(), Text(style="bad")
        named(self._lines.widget, _("What opens again"))
        for each in (self._head, self._lines, self._problem):
            self._question.body.pack_start(each.widget, False, False, 0)
        self._end = board.subscribe(self._follow)

    def open(self, parent: Gtk.Window | None) -> None:
        """Ask."""
        self._is_open = True
        self._seen = self._board.look
        self._question.offer(None)
        self._head.show(_("Looking at the system…"))
        self._question.open(parent)
        self._board.refresh()
        self._follow()

    def _ended(self) -> None:
        self._is_open = False
        self._end()
        self._cancel()

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
        if not self._is_open:
            return
        if found is None:
            if looks > 1:
                self._question.close()
            return
        was, self._shown = self._shown, found
        self._problem.show("")
        if was is not None and (was.head, was.lines) == (found.head, found.lines):
            if self._is_offered:
                self._offer()
            return
        self._head.show(found.head, "anybody" if found.is_anybody else "title")
        if found.is_anybody:
            self._question.rename(_("_Resume: open to anybody"), "anybody")
        else:
            self._question.rename(_("_Resume"), "note")
        text = "\n\n".join(found.lines)
        self._lines.show(text)
        self._question.fit(text)
        self._withdraw()
        self._cancel = self._later(WAIT_S, self._offer)

    def _withdraw(self) -> None:
        self._cancel()
        self._is_offered = False
        self._question.offer(None)

    def _offer(self) -> None:
        if self._shown is not None:
            self._is_offered = True
            self._question.offer(partial(_resumed, self._board, self._shown.plan))

    def _failed(self, error: Exception) -> None:
        if self._is_open:
            self._shown = None
            self._withdraw()
            self._problem.show("\n".join(error_lines(error)))


def _resumed(board: Board, shown: Plan, backend: Backend) -> Done:
    return actions.resume(backend, board.now, shown)
