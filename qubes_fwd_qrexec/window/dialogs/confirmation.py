# SPDX-License-Identifier: GPL-2.0-or-later
"""The question before a rule is confirmed: what was, and what will be.

What is shown follows the system.
"""

from functools import partial

from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.seen import Seen
from qubes_fwd_qrexec.admin.states import Key
from qubes_fwd_qrexec.window import widgets
from qubes_fwd_qrexec.window.gtk import Gtk
from qubes_fwd_qrexec.window.kept import LINE_MAX, Text
from qubes_fwd_qrexec.window.model import actions
from qubes_fwd_qrexec.window.model.actions import Done, error_lines
from qubes_fwd_qrexec.window.model.agreement import Agreement, Turn, agreement
from qubes_fwd_qrexec.window.model.board import Board, Later
from qubes_fwd_qrexec.window.model.words import _
from qubes_fwd_qrexec.window.widgets import GAP

from .question import Question, Tell


class Confirmation:
    """``widget`` is the dialog."""

    def __init__(self, board: Board, tell: Tell, *, later: Later = widgets.later) -> None:
        self._board = board
        self._key: Key | None = None
        self._shown: Agreement | None = None
        self._question = Question(board, tell, _("Confirm a forward"), _("C_onfirm"), "note", later=later)
        self.widget = self._question.widget
        self._head, self._opens, self._notes, self._problem = (
            Text(style="title"),
            Text(),
            Text(),
            Text(style="bad"),
        )
        self._turns = Gtk.Grid(row_spacing=GAP, column_spacing=2 * GAP)
        for each in (
            self._head.widget,
            self._turns,
            self._opens.widget,
            self._notes.widget,
            self._problem.widget,
        ):
            self._question.body.pack_start(each, False, False, 0)
        self._question.follow(self._follow)

    def open(self, parent: Gtk.Window | None, key: Key) -> None:
        """Ask about a rule."""
        self._key = key
        self._head.show(" ".join(key))
        self._question.withdraw()
        self._question.open(parent)
        self._follow()

    def _follow(self) -> None:
        look, key, now = self._board.look, self._key, self._board.now
        if look is not None and key is not None:
            show = partial(self._show, key)
            self._board.compute(lambda: agreement(look, key, now), show, self._failed, kind="agreement")

    def _show(self, key: Key, found: Agreement | None) -> None:
        if self._question.is_closed or found == self._shown:
            return
        if found is None:  # somebody has removed it
            self._question.close()
            return
        self._shown = found
        self._show_turns(found.turns)
        self._opens.show(_("After that: {state}").format(state=found.opens) if found.opens else "")
        self._notes.show("\n".join(_("Note: {note}").format(note=note) for note in found.notes))
        self._problem.show(found.problem or "")
        if found.is_to_anybody:
            self._question.rename(_("_Open to anybody"), "anybody")
        else:
            self._question.rename(_("C_onfirm"), "note")
        self._question.fit()
        if found.problem is None:
            self._question.ask(found, partial(self._confirm, key, found.seen))
        else:
            self._question.withdraw()

    def _confirm(self, key: Key, seen: Seen, backend: Backend) -> Done:
        return actions.confirm(backend, self._board.now, key, seen)

    def _failed(self, error: Exception) -> None:
        if not self._question.is_closed:
            self._shown = None
            self._question.withdraw()
            self._problem.show("\n".join(error_lines(error)))

    def _show_turns(self, turns: tuple[Turn, ...]) -> None:
        for child in self._turns.get_children():
            child.destroy()
        # Translators: titles of two columns: what was agreed to, and what will be
        rows = [(("", ""), (_("was"), "faint"), (_("will be"), "faint"))]
        for turn in turns:
            # An arrow, as no colour alone says that something changes.
            # Translators: in the column of what will be: it stays as it was
            will_be = (_("the same"), "faint") if turn.is_same else (f"→ {turn.will_be}", "note")
            rows.append(((turn.what, "faint"), (turn.was, ""), will_be))
        cells = [(at, row, *cell) for row, some in enumerate(rows) for at, cell in enumerate(some)]
        # The last that comes into a grid is the first that a screen reader finds there.
        for at, row, words, style in reversed(cells):
            self._turns.attach(_cell(words, style), at, row, 1, 1)
        self._turns.show_all()


def _cell(words: str, style: str) -> Gtk.Label:
    cell = Text(style=style, longest=LINE_MAX)
    cell.show(words)
    cell.widget.set_yalign(0)
    cell.widget.set_hexpand(True)
    return cell.widget
