# SPDX-License-Identifier: GPL-2.0-or-later
"""The question before rules are removed: which, and what that closes."""

from collections.abc import Mapping, Sequence
from functools import partial

from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.seen import Seen
from qubes_fwd_qrexec.admin.states import Forward, Key
from qubes_fwd_qrexec.admin.views import reasons
from qubes_fwd_qrexec.admin.views.tables import escaped, shortened
from qubes_fwd_qrexec.common.rules import OnExpire
from qubes_fwd_qrexec.window.gtk import Gtk
from qubes_fwd_qrexec.window.kept import TEXT_MAX, Lines, Text
from qubes_fwd_qrexec.window.model import actions
from qubes_fwd_qrexec.window.model.actions import Done
from qubes_fwd_qrexec.window.model.board import Board
from qubes_fwd_qrexec.window.model.entries import Entry
from qubes_fwd_qrexec.window.model.look import Look
from qubes_fwd_qrexec.window.model.words import _, ngettext
from qubes_fwd_qrexec.window.widgets import named

from .question import Question, Tell

SHOWN_MAX = 20
"""Of hundreds whose time is over; the others are counted."""


class Removal:
    """``widget`` is the dialog. What is shown follows the system, and nothing else is removed."""

    def __init__(self, board: Board, tell: Tell) -> None:
        self._board = board
        self._keys: Sequence[Key] = ()
        self._question = Question(board, tell, _("Remove forwards"), _("_Remove"), "bad")
        self.widget = self._question.widget
        self._head, self._lines = Text(style="title"), Lines()
        named(self._lines.widget, _("What is removed"))
        for each in (self._head, self._lines):
            self._question.body.pack_start(each.widget, False, False, 0)
        self._question.follow(self._follow)

    def open(self, parent: Gtk.Window | None, keys: Sequence[Key]) -> None:
        """Ask about these rules."""
        self._keys = tuple(keys)
        self._follow()
        if self._keys:
            self._question.open(parent)

    def _follow(self) -> None:
        look = self._board.look
        if look is None or not self._keys:
            return
        keys = [key for key in self._keys if key in look.snapshot.stored]
        if not keys:
            self._question.close()
            return
        head = ngettext("Remove this forward?", "Remove these {count} forwards?", len(keys))
        self._head.show(head.format(count=len(keys)))
        text = "\n\n".join(what_closes(look, keys))
        self._lines.show(text)
        self._question.fit(text)
        seen = {key: Seen.of(look.snapshot, key) for key in keys}
        self._question.offer(partial(_removed, self._board, seen))


def _removed(board: Board, seen: Mapping[Key, Seen], backend: Backend) -> Done:
    return actions.remove(backend, board.now, seen)


def what_closes(look: Look, keys: Sequence[Key]) -> list[str]:
    """A sentence for each rule, and one for those that are too many."""
    forwards: dict[Key, Forward] = {forward.named.key: forward for forward in look.plan}
    entries = {entry.key: entry for entry in look.entries.rules}
    texts = [_closes(entries[key], forwards.get(key)) for key in keys[:SHOWN_MAX]]
    if (more := len(keys) - SHOWN_MAX) > 0:
        texts.append(ngettext("and {count} more", "and {count} more", more).format(count=more))
    return texts


def _closes(entry: Entry, forward: Forward | None) -> str:
    parts = [f"{escaped(' '.join(entry.key))}: {entry.mark}.", entry.note]
    if forward is not None and forward.is_live:
        parts.append(reasons.sentence(forward))
        is_cut = forward.named.rule.on_expire is not OnExpire.DRAIN
        drains = _("Its connections may go on for up to an hour.")
        parts.append(_("Its connections are cut.") if is_cut else drains)
    elif not entry.is_live:
        parts.append(_("It is not open."))
    return shortened(" ".join(filter(None, parts)), TEXT_MAX)
