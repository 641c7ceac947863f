# SPDX-License-Identifier: GPL-2.0-or-later
"""The dialog *Close everything*: one question, then the output of the process that does it, as it comes."""

import os
import subprocess
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from qubes_fwd_qrexec.window import style
from qubes_fwd_qrexec.window.gtk import GLib, Gtk, Pango
from qubes_fwd_qrexec.window.model import panic
from qubes_fwd_qrexec.window.model.panic import Line, Reading, Report
from qubes_fwd_qrexec.window.model.words import _
from qubes_fwd_qrexec.window.widgets import GAP, button, label, named

_READ_BYTES = 1 << 16
LINES_MAX = 5000
"""Of a process that says more, the last ones are shown."""
_WIDTH, _HEIGHT = 620, 360


class Process:
    """The process that closes everything, which goes on whatever becomes of this program.

    It is started with these words. In the main loop ``said`` is called with lines of its, and ``ended`` once.
    Raises OSError if it cannot be started.
    """

    def __init__(
        self,
        words: Sequence[str],
        reading: Reading,
        said: Callable[[list[str]], None],
        ended: Callable[[Report], None],
    ) -> None:
        self._reading = reading
        self._said = said
        self._ended = ended
        self._process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        out, err = self._process.stdout, self._process.stderr
        if out is None or err is None:
            raise OSError("subprocess made no pipes")
        self._takes = {out.fileno(): self._reading.reported, err.fileno(): self._take_lines}
        self._files = (out, err)
        for fd in self._takes:
            os.set_blocking(fd, False)
        self._sources = {fd: _watch(fd, partial(self._read, fd)) for fd in self._takes}
        # That it has ended is no end of its output, which a process that it has started may hold.
        GLib.child_watch_add(GLib.PRIORITY_DEFAULT, self._process.pid, self._end)

    def _read(self, fd: int) -> bool:
        """Take what there is now; whether there will be more."""
        try:
            data = os.read(fd, _READ_BYTES)
        except BlockingIOError:
            return True
        self._takes[fd](data)
        if not data:
            del self._sources[fd]
        return bool(data)

    def _take_lines(self, data: bytes) -> None:
        if lines := self._reading.said(data):
            self._said(lines)

    def _end(self, _pid: int, status: int) -> None:
        """GLib has waited for it, with that status as of `os.wait`."""
        for fd, source in tuple(self._sources.items()):
            GLib.source_remove(source)
            # A pipe holds no more than is read at once.
            if self._read(fd):
                self._takes[fd](b"")
        for file in self._files:
            file.close()
        self._process.returncode = os.waitstatus_to_exitcode(status)
        self._ended(self._reading.ended(self._process.returncode))


def _watch(fd: int, ready: Callable[[], bool]) -> int:
    conditions = GLib.IOCondition.IN | GLib.IOCondition.HUP
    return GLib.io_add_watch(
        GLib.IOChannel.unix_new(fd), GLib.PRIORITY_DEFAULT, conditions, lambda *_: ready()
    )


class Closing:
    """``widget`` is the dialog, which hides when it is closed. While the process runs it comes again at its
    end, whatever the user did with it. ``resume`` begins to open again, and ``words`` start another process.
    """

    def __init__(
        self,
        lab: str | None,
        *,
        resume: Callable[[], None] | None = None,
        words: Sequence[str] | None = None,
    ) -> None:
        self._lab = lab
        self._words = words or panic.command(lab)
        self._is_running = self._is_gone = False
        self._head = label(wraps=True, style="title")
        self._bar = Gtk.InfoBar()
        self._bar.get_content_area().pack_start(self._head, True, True, 0)
        self._text = label(wraps=True, is_selectable=True)
        self._report = _ReportView()
        self._resume = button(_("_Resume…"), partial(self._leave_to, resume)) if resume else None
        self._no = button(_("_Cancel"), self._dismiss)
        self._yes = button(_("Close _everything"), self._run)
        self.widget = Gtk.Dialog(title=_("Close everything"), modal=True, destroy_with_parent=True)
        self.widget.set_default_size(_WIDTH, _HEIGHT)
        self.widget.connect("delete-event", self._deleted)
        self.widget.connect("destroy", self._destroyed)
        content = self.widget.get_content_area()
        content.set_spacing(GAP)
        content.pack_start(self._bar, False, False, 0)
        content.pack_start(self._text, False, False, GAP)
        content.pack_start(self._report.widget, True, True, 0)
        for each in (self._resume, self._no, self._yes):
            if each is not None:
                self.widget.add_action_widget(each, Gtk.ResponseType.NONE)
        content.show_all()

    def open(self, parent: Gtk.Window | None) -> None:
        """Ask; while it runs show how far it is."""
        self.widget.set_transient_for(parent)
        if not self._is_running and not self.widget.get_visible():
            self._ask()
        self.widget.present()

    def _ask(self) -> None:
        self._show(
            Gtk.MessageType.QUESTION,
            _("Close everything?"),
            _(
                "All forwards of this machine are closed at once, and their connections end. The rules are "
                "kept as they are: Resume reopens what they ask for."
            ),
        )
        self._report.widget.hide()
        self._offer(_("Close _everything"), _("_Cancel"))
        self._yes.grab_focus()

    def _run(self) -> None:
        self._show(
            Gtk.MessageType.INFO,
            _("Closing everything…"),
            _("This continues even if you close this window."),
        )
        self._report.clear()
        self._report.widget.show()
        self._offer(None, _("_Hide"))
        self._is_running = True
        try:
            Process(self._words, Reading(self._lab), self._said, self._ended)
        except OSError as error:
            self._ended(panic.not_started(error, self._lab))

    def _said(self, lines: list[str]) -> None:
        if not self._is_gone:
            self._report.add(lines)

    def _ended(self, report: Report) -> None:
        self._is_running = False
        if self._is_gone:
            return
        self._report.put_first(report.lines)
        if report.is_closed:
            self._show(Gtk.MessageType.INFO, f"✓ {report.title}", "")
            self._offer(None, _("_Close"), may_resume=True)
            self._no.grab_focus()
        else:
            text = _("Something may still be reachable. Correct what is reported below and try again.")
            self._show(Gtk.MessageType.ERROR, f"✖ {report.title}", text)
            self._offer(_("_Try again"), _("_Close"))
            self._yes.grab_focus()
        self.widget.present()

    def _show(self, kind: Gtk.MessageType, head: str, text: str) -> None:
        self._bar.set_message_type(kind)
        self._head.set_text(head)
        named(self._bar, head, text)
        self._text.set_text(text)
        self._text.set_visible(bool(text))

    def _offer(self, yes: str | None, no: str, *, may_resume: bool = False) -> None:
        self._no.set_label(no)
        self._yes.set_label(yes or "")
        self._yes.set_visible(yes is not None)
        self._no.show()
        if self._resume is not None:
            self._resume.set_visible(may_resume)

    def _dismiss(self) -> None:
        self.widget.hide()

    def _deleted(self, *_event: object) -> bool:
        self._dismiss()
        return True

    def _destroyed(self, _dialog: Gtk.Dialog) -> None:
        self._is_gone = True

    def _leave_to(self, resume: Callable[[], None]) -> None:
        self._dismiss()
        resume()


class _ReportView:
    """Lines below each other, what is bad in bold and with a sign."""

    def __init__(self) -> None:
        self._view = Gtk.TextView(
            editable=False, cursor_visible=False, wrap_mode=Gtk.WrapMode.WORD_CHAR, left_margin=GAP
        )
        named(self._view, _("Report"))
        self._buffer = self._view.get_buffer()
        self._bad = self._buffer.create_tag("bad", weight=Pango.Weight.BOLD)
        self.widget = Gtk.ScrolledWindow(shadow_type=Gtk.ShadowType.IN)
        self.widget.add(self._view)

    def clear(self) -> None:
        self._buffer.set_text("")

    def add(self, lines: list[str]) -> None:
        """Further lines at the end, which is shown."""
        self._insert(self._buffer.get_end_iter(), lines)
        over = self._buffer.get_line_count() - 1 - LINES_MAX
        if over > 0:
            self._buffer.delete(self._buffer.get_start_iter(), self._buffer.get_iter_at_line(over))
        self._view.scroll_to_iter(self._buffer.get_end_iter(), 0.0, False, 0.0, 0.0)

    def put_first(self, lines: tuple[Line, ...]) -> None:
        """Lines above those that are there, which are what was said meanwhile; the first is shown."""
        self._bad.set_property("foreground", style.colours(self._view)["bad"])
        good = [line.text for line in lines if not line.is_bad]
        bad = [f"✖ {line.text}" for line in lines if line.is_bad]
        if self._buffer.get_char_count():
            good += ["", _("What was done, in order:")]
        self._insert(self._buffer.get_start_iter(), good)
        self._insert(self._buffer.get_start_iter(), bad, "bad")
        self._buffer.place_cursor(self._buffer.get_start_iter())
        self._view.scroll_to_iter(self._buffer.get_start_iter(), 0.0, False, 0.0, 0.0)

    def _insert(self, at: Gtk.TextIter, lines: Iterable[str], *tags: str) -> None:
        self._buffer.insert_with_tags_by_name(at, "".join(f"{line}\n" for line in lines), *tags)
