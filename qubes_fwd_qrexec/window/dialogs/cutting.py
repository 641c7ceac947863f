# SPDX-License-Identifier: GPL-2.0-or-later
"""The question before clients of a forward are cut."""

from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.states import Key
from qubes_fwd_qrexec.admin.views.connected import Client
from qubes_fwd_qrexec.window.clientlist import who
from qubes_fwd_qrexec.window.gtk import Gtk
from qubes_fwd_qrexec.window.kept import Text
from qubes_fwd_qrexec.window.model import actions
from qubes_fwd_qrexec.window.model.actions import Done
from qubes_fwd_qrexec.window.model.board import Board
from qubes_fwd_qrexec.window.model.words import _

from .question import Question, Tell


class Cutting:
    """``widget`` is the dialog."""

    def __init__(self, board: Board, tell: Tell) -> None:
        self._board = board
        self._question = Question(board, tell, _("Cut connections"), _("Cu_t"), "bad", stays=True)
        self.widget = self._question.widget
        self._text = Text()
        self._question.body.pack_start(self._text.widget, False, False, 0)

    def open(self, parent: Gtk.Window | None, key: Key, client: Client | None) -> None:
        """Ask about one client of a rule, or about all."""
        name = " ".join(key)
        if client is None:
            text = _("Cut all connections of {name}? Its rule stays as it is.").format(name=name)
        else:
            text = _("Cut the connection of {client} to {name}? Its rule stays as it is.")
            text = text.format(client=who(client), name=name)

        def cut(backend: Backend) -> Done:
            return actions.cut(backend, self._board.now, key, client)

        self._text.show(text)
        self._question.offer(cut)
        self._question.open(parent)
