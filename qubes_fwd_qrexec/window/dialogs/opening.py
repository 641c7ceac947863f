# SPDX-License-Identifier: GPL-2.0-or-later
"""The question before a rule is opened to anybody."""

from collections.abc import Callable

from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.seen import Seen
from qubes_fwd_qrexec.admin.states import Key
from qubes_fwd_qrexec.admin.views.render import exposed_at
from qubes_fwd_qrexec.window.gtk import Gtk
from qubes_fwd_qrexec.window.kept import Text
from qubes_fwd_qrexec.window.model.actions import Done
from qubes_fwd_qrexec.window.model.board import Board, Later
from qubes_fwd_qrexec.window.model.look import Look
from qubes_fwd_qrexec.window.model.words import _
from qubes_fwd_qrexec.window.widgets import later

from .question import Question, Tell

Change = Callable[[Backend, float, Key, Seen], Done]
"""Changes a rule, such as `actions.enable`."""


def opens_to_anybody(look: Look, key: Key) -> bool:
    """Whether a rule is closed that would let in anybody."""
    forward = look.plan.find(*key)
    return forward is not None and forward.named.rule.sources.anyone and not forward.is_live


class Opening:
    """``widget`` is the dialog. What is shown follows the system, and nothing else is opened."""

    def __init__(self, board: Board, tell: Tell, *, later: Later = later) -> None:
        self._board = board
        self._key: Key | None = None
        self._change: Change | None = None
        self._question = Question(
            board, tell, _("Open to anybody"), _("_Open to anybody"), "anybody", later=later
        )
        self.widget = self._question.widget
        self._text = Text()
        self._question.body.pack_start(self._text.widget, False, False, 0)
        self._question.follow(self._follow)

    def open(self, parent: Gtk.Window | None, key: Key, change: Change) -> None:
        """Ask whether a rule is to be changed so that it opens."""
        self._key, self._change = key, change
        self._question.open(parent)
        self._follow()

    def _follow(self) -> None:
        look, key, change = self._board.look, self._key, self._change
        if look is None or key is None or change is None:
            return
        forward = look.plan.find(*key)
        if forward is None or not opens_to_anybody(look, key):
            self._question.close()
            return
        text = _("Anybody who can reach {at} may connect to {name}.")
        text = text.format(at=exposed_at(forward), name=forward.named)
        self._text.show(text)
        self._question.fit()
        seen = Seen.of(look.snapshot, key)
        self._question.ask((text, seen), lambda backend: change(backend, self._board.now, key, seen))
