# SPDX-License-Identifier: GPL-2.0-or-later
"""A question before something is changed: what will be done, a button that does it, and one that does not.

No button is the default, so Enter alone changes nothing. An error keeps the question open. What has just been
shown, or changed, nobody can agree to for a second: the click or key may have been meant for something else.
"""

from collections.abc import Callable

from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.window.gtk import Atk, Gtk
from qubes_fwd_qrexec.window.kept import Text
from qubes_fwd_qrexec.window.model.actions import Done, error_lines
from qubes_fwd_qrexec.window.model.board import Board, Later
from qubes_fwd_qrexec.window.model.words import _
from qubes_fwd_qrexec.window.widgets import GAP, button, column, later, named, row, scrolled

Job = Callable[[Backend], Done]
Tell = Callable[[Done | Exception], None]
WAIT_S = 1.0
"""How long nobody can agree to what has just come or changed."""
_WIDTH, _HEIGHT_MAX = 560, 420
# What a line of `Lines` takes, about, in this width.
_LINE_CHARS, _LINE_HEIGHT = 70, 20


class Question:
    """``body`` is what is asked, and ``widget`` the dialog. ``tell`` hears what came of the change, also if
    the dialog was closed meanwhile. If it ``stays``, what is not well is shown here and can be tried again.
    """

    def __init__(
        self,
        board: Board,
        tell: Tell,
        title: str,
        yes: str,
        style: str = "",
        *,
        stays: bool = False,
        later: Later = later,
    ) -> None:
        self._stays = stays
        self._board = board
        self._tell = tell
        self._later = later
        self._asked: object = None
        self._job: Job | None = None
        self._next_job: Job | None = None
        self._cancel_wait: Callable[[], None] = lambda: None
        self._unsubscribe: Callable[[], None] = lambda: None
        self._is_busy = False
        self.is_closed = False
        self.body = column(gap=2 * GAP)
        self._error = Text(style="bad")
        self._error.widget.get_accessible().set_role(Atk.Role.ALERT)
        self._yes, self._style = button(yes, self._agree, style=style), style
        self._no = button(_("_Cancel"), self.close)
        self._place = scrolled(self.body)
        self.widget = Gtk.Dialog(title=title, modal=True, destroy_with_parent=True)
        self.widget.set_default_size(_WIDTH, -1)
        self.widget.set_border_width(GAP)
        self.widget.connect("destroy", self._closed)
        self.widget.connect("response", lambda *_: self.close())
        content = self.widget.get_content_area()
        content.set_spacing(2 * GAP)
        content.pack_start(self._place, True, True, 0)
        content.pack_start(self._error.widget, False, False, 0)
        # The dialog's own place for buttons is deprecated, or has each of them end the dialog.
        buttons = row(self._no, self._yes)
        buttons.set_halign(Gtk.Align.END)
        content.pack_end(buttons, False, False, 0)
        named(self.widget, title)

    def open(self, parent: Gtk.Window | None) -> None:
        """Ask."""
        self.widget.set_transient_for(parent)
        self.widget.show_all()
        self.fit()
        self._no.grab_focus()

    def fit(self, text: str = "") -> None:
        """Make the dialog as high as what it asks, up to a bound; ``text`` is what `Lines` show in it, whose
        height GTK finds only bit by bit.
        """
        lines = sum(1 + len(line) // _LINE_CHARS for line in text.split("\n")) if text else 0
        height = self.body.get_preferred_height_for_width(_WIDTH)[1] + lines * _LINE_HEIGHT
        self._place.set_min_content_height(min(height, _HEIGHT_MAX))

    def follow(self, changed: Callable[[], None]) -> None:
        """Have this called when there is something new on the board, until the dialog is closed."""
        self._unsubscribe = self._board.subscribe(changed)

    def offer(self, job: Job | None) -> None:
        """Let the user agree to this now; to nothing if it is None."""
        self._job = job
        self._yes.set_sensitive(job is not None and not self._is_busy)

    def ask(self, what: object, job: Job) -> None:
        """Let the user agree to ``what`` is shown, a second after it was shown first; ``job`` does that."""
        self._next_job = job
        if what != self._asked:
            self.withdraw()
            self._asked = what
            self._cancel_wait = self._later(WAIT_S, lambda: self.offer(self._next_job))
        elif self._job is not None:
            self.offer(job)

    def withdraw(self) -> None:
        """Let the user agree to nothing."""
        self._cancel_wait()
        self._asked = None
        self.offer(None)

    def rename(self, yes: str, style: str) -> None:
        """Give the button that agrees another text and style."""
        context = self._yes.get_style_context()
        context.remove_class(self._style)
        context.add_class(style)
        self._style = style
        self._yes.set_label(yes)

    def close(self) -> None:
        """Take it away; what has begun is done all the same."""
        self.widget.destroy()

    def _agree(self) -> None:
        if self._job is not None and not self._is_busy:
            self._is_busy = True
            self._yes.set_sensitive(False)
            self._error.show("")
            self._board.change(self._job, self._done, self._failed)

    def _done(self, done: Done) -> None:
        if self._stays and not done.is_well:
            self._show(done, (*done.lines, *done.warnings))
        else:
            self._tell(done)
            if not self.is_closed:
                self.close()

    def _failed(self, error: Exception) -> None:
        self._show(error, error_lines(error))

    def _show(self, outcome: Done | Exception, lines: tuple[str, ...]) -> None:
        """Show why it was not done, here if the dialog is still open."""
        self._is_busy = False
        if self.is_closed:
            self._tell(outcome)
        else:
            self._error.show("\n".join(lines))
            self.offer(self._job)
            if self.widget.get_focus() is None:  # it was at the button, which could not be pressed meanwhile
                (self._yes if self._yes.is_sensitive() else self._no).grab_focus()

    def _closed(self, _dialog: Gtk.Dialog) -> None:
        self.is_closed = True
        self._cancel_wait()
        self._unsubscribe()
