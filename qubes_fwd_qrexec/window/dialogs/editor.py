# SPDX-License-Identifier: GPL-2.0-or-later
"""The dialog that adds a forward or changes one. It says below the fields, at each change of them, what would
become of that; only what has been seen so can be stored.

It stays open until the change is made or the user takes it away. It has no default button: Enter opens
nothing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.seen import NotAsSeenError, Seen
from qubes_fwd_qrexec.admin.states import Key
from qubes_fwd_qrexec.common.errors import RuleError, UsageError
from qubes_fwd_qrexec.common.options import Option
from qubes_fwd_qrexec.common.rules import ForwardRule, NamedRule
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.window.gtk import Gdk, Gtk
from qubes_fwd_qrexec.window.model import actions
from qubes_fwd_qrexec.window.model.actions import Done, error_lines
from qubes_fwd_qrexec.window.model.board import Board, Later
from qubes_fwd_qrexec.window.model.draft import QUBE, Draft, Ends
from qubes_fwd_qrexec.window.model.judgement import NOTHING, Judgement, field_of, judge
from qubes_fwd_qrexec.window.model.judgement import button as words_of_button
from qubes_fwd_qrexec.window.model.look import Look
from qubes_fwd_qrexec.window.model.mends import Mend
from qubes_fwd_qrexec.window.model.words import _
from qubes_fwd_qrexec.window.portions import Portions
from qubes_fwd_qrexec.window.widgets import GAP, later, named, scrolled

from .form import Form
from .verdict import Verdict

Tell = Callable[[Done], None]
# In pixels. Where the screen is lower, such as 800x600, the fields scroll; what is said below always does.
_WIDTH, _HEIGHT, _FRAME_HEIGHT = 740, 740, 60
_VERDICT_HEIGHT = 150
# How long a button waits that has come to mean something else by no doing of the user.
_CHANGED_S = 1.0


class Editor:
    """Opens the dialog; ``tell`` hears what came of the change. ``widget`` is the dialog opened last."""

    def __init__(self, board: Board, tell: Tell, later: Later = later) -> None:
        self._board = board
        self._tell = tell
        self._later = later
        self._portions = Portions()
        self.widget: Gtk.Dialog | None = None

    def add(self, parent: Gtk.Window | None, target: QubeName | None = None) -> None:
        """Make a new forward, of this qube if one is given."""
        self._portions.run(self._opening(parent, _("Add a forward"), Draft(target=target or "")))

    def edit(self, parent: Gtk.Window | None, key: Key, options: Sequence[Option] = ()) -> None:
        """Change a rule that the last look has and that can be read; ``options`` are filled in already."""
        look = self._board.look
        stored = None if look is None else look.snapshot.stored.get(key)
        if isinstance(stored, NamedRule):
            title = _("Edit {rule}").format(rule=stored)
            self._portions.run(self._opening(parent, title, Draft.of(stored).with_options(options)))

    def close(self) -> None:
        """Show no dialog any more that is not shown yet; its parent is about to go."""
        self._portions.stop()

    def _opening(self, parent: Gtk.Window | None, title: str, draft: Draft) -> Iterator[None]:
        dialog = _Dialog(self._board, self._tell, self._later)
        yield from dialog.form.making()
        yield from dialog.opening(parent, title, draft)
        self.widget = dialog.widget


class _Dialog:
    """One opening. What has begun is done, and told, even if the dialog is closed meanwhile."""

    def __init__(self, board: Board, tell: Tell, later: Later) -> None:
        self._board = board
        self._tell = tell
        self._later = later
        self._look: Look | None = None
        self._judgement: Judgement | None = None
        self._faults: Mapping[str, str] = NOTHING
        self._is_busy = self._is_closed = False
        self._had_focus: Gtk.Widget | None = None
        self._cancel_wait: Callable[[], None] | None = None
        self._unsubscribe: Callable[[], None] = lambda: None
        self.widget: Gtk.Dialog | None = None
        self.form = Form(self._changed)
        self._verdict = Verdict(self._mend)
        self._save = Gtk.Button.new_with_mnemonic(words_of_button(Draft()))
        self._cancel = Gtk.Button.new_with_mnemonic(_("_Cancel"))

    def opening(self, parent: Gtk.Window | None, title: str, draft: Draft) -> Iterator[None]:
        """Show it, with its form made, in steps that take some milliseconds each."""
        self.widget = dialog = named(
            Gtk.Dialog(title=title, transient_for=parent, modal=True, use_header_bar=0), title
        )
        dialog.connect("response", self._answered)
        dialog.connect("delete-event", lambda *_: self._is_busy)
        dialog.connect("destroy", self._closed)
        try:
            self._fill(dialog)
            yield
            self._unsubscribe = self._board.subscribe(self._looked)
            self.form.show(draft)
            self._looked()
            yield
        except GeneratorExit:
            dialog.destroy()
            raise
        dialog.show_all()
        self.form.focus("dstports" if draft.target else QUBE)

    def _fill(self, dialog: Gtk.Dialog) -> None:
        fields, verdict = scrolled(self.form.widget), scrolled(self._verdict.widget)
        verdict.set_min_content_height(_VERDICT_HEIGHT)
        content = dialog.get_content_area()
        content.pack_start(fields, True, True, 0)
        content.pack_start(Gtk.Separator(), False, False, 0)
        content.pack_start(verdict, False, False, 0)
        dialog.add_action_widget(self._cancel, Gtk.ResponseType.CANCEL)
        dialog.add_action_widget(self._save, Gtk.ResponseType.APPLY)
        dialog.set_destroy_with_parent(True)
        dialog.set_border_width(GAP)
        dialog.set_default_size(_WIDTH, min(_HEIGHT, _room(dialog) - _FRAME_HEIGHT))

    def _answered(self, _dialog: Gtk.Dialog, answer: int) -> None:
        if answer == Gtk.ResponseType.APPLY:
            self._begin()
        else:
            self._close()

    def _close(self) -> None:
        """Take it away, unless a change is under way: what comes of that is to be seen."""
        if not self._is_busy and self.widget is not None:
            self.widget.destroy()

    def _closed(self, _dialog: Gtk.Dialog) -> None:
        self._is_closed = True
        self._stop_waiting()
        self._unsubscribe()

    def _changed(self) -> None:
        """The user has changed a field."""
        self._faults = NOTHING
        self._verdict.fail(())
        self._judgement = None
        self._stop_waiting()
        self._judge()

    def _looked(self) -> None:
        """There is a new look, or the time has come to tell times anew."""
        look = self._board.look
        if look is None:
            self._verdict.say(self._board.trouble or _("The qubes have not been read yet."))
        elif look is not self._look:
            self._look = look
            self.form.fit(look.snapshot.inventory, self._board.now)
            self._judge()
        self._update()

    def _judge(self) -> None:
        look, draft, now = self._look, self.form.draft, self._board.now
        if look is not None:
            self._board.compute(
                partial(judge, draft, look.snapshot, now, look.plan),
                partial(self._judged, look),
                self._not_judged,
                kind="preview",
            )
        self._update()

    def _judged(self, look: Look, judgement: Judgement) -> None:
        if self._is_closed or look is not self._look or judgement.draft != self.form.draft:
            return
        was, self._judgement = self._judgement, judgement
        self.form.mark(judgement, self._faults)
        self._verdict.show(judgement, self._lines(judgement))
        if was is not None and _meaning(was) != _meaning(judgement):
            self._wait()
        self._update()

    def _not_judged(self, error: Exception) -> None:
        if not self._is_closed:
            self._verdict.say(str(error))

    def _lines(self, judgement: Judgement) -> Sequence[str]:
        """Which fields are wrong or empty, by their names."""
        found = {}
        if judgement.missing:
            found[_("Still to be filled in: {fields}.")] = judgement.missing
        if judgement.faults and judgement.forward is None:
            found[_("To be corrected: {fields}.")] = tuple(judgement.faults)
        lines = [words.format(fields=", ".join(self.form.titles(fields))) for words, fields in found.items()]
        if self._look is not None and self._look.read_only is not None:
            lines.append(self._look.read_only)
        return lines

    def _mend(self, mend: Mend) -> None:
        if mend.command:
            Gtk.Clipboard.get(Gdk.SELECTION_CLIPBOARD).set_text(mend.command, -1)
        if mend.draft is not None:
            self.form.show(mend.draft)
        if mend.options:
            self.form.show(self.form.draft.with_options(mend.options))
        if mend.field:
            self.form.focus(mend.field)

    def _update(self) -> None:
        """Fit the buttons to what is known."""
        found, is_ready = self._judgement, self._ready() is not None
        self._save.set_label(words_of_button(self.form.draft) if found is None else found.button)
        self._save.set_sensitive(is_ready)
        context = self._save.get_style_context()
        (context.add_class if is_ready and self.form.draft.is_anybody else context.remove_class)("anybody")
        self._cancel.set_sensitive(not self._is_busy)
        self.form.widget.set_sensitive(not self._is_busy)
        self._verdict.widget.set_sensitive(not self._is_busy)

    def _ready(self) -> Judgement | None:
        """What may be stored now."""
        can_save = self._look is not None and self._look.read_only is None
        if self._is_busy or self._cancel_wait is not None or not can_save:
            return None
        return self._judgement if self._judgement is not None and self._judgement.is_fine else None

    def _wait(self) -> None:
        self._stop_waiting()
        self._cancel_wait = self._later(_CHANGED_S, self._waited)

    def _waited(self) -> None:
        self._cancel_wait = None
        self._update()

    def _stop_waiting(self) -> None:
        if self._cancel_wait is not None:
            self._cancel_wait()
            self._cancel_wait = None

    def _begin(self) -> None:
        found = self._ready()
        if found is None or found.named is None or found.seen is None:
            return
        self._is_busy = True
        self._had_focus = None if self.widget is None else self.widget.get_focus()
        self._verdict.fail(())
        self._update()
        now = self._board.now
        # "18:00" is that of the day for which it was shown; a span of time begins now.
        options = found.draft.options(found.now if found.draft.ends is Ends.UNTIL else now)
        change = partial(_change, found.draft.base is None, found.named, found.seen, options, now)
        self._board.change(change, self._done, self._failed)

    def _done(self, done: Done) -> None:
        self._is_busy, self._had_focus = False, None
        self._close()
        self._tell(done)

    def _failed(self, error: Exception) -> None:
        self._is_busy = False
        if self._is_closed:
            self._tell(Done((), error_lines(error), is_well=False))
            return
        found = self._judgement
        if isinstance(error, NotAsSeenError) and found is not None:
            self._judgement = found._replace(is_fine=False)  # the next look shows what there is
        if isinstance(error, (RuleError, UsageError)) and found is not None:
            self._faults = {field_of(found.draft, name): str(error) for name in error.options}
            self.form.mark(found, self._faults)
        self._verdict.fail(error_lines(error))
        self._update()
        self._lead_back()

    def _lead_back(self) -> None:
        """Give the focus, which nothing had meanwhile, to the field that is wrong, or back where it was."""
        had_focus, self._had_focus = self._had_focus, None
        if self._faults:
            self.form.focus(next(iter(self._faults)))
        elif had_focus is not None and had_focus.is_sensitive():
            had_focus.grab_focus()
        else:
            self._cancel.grab_focus()


def _room(window: Gtk.Window) -> int:
    """How high the lowest of the screens is, without panels, in pixels."""
    display = window.get_display()
    monitors = filter(None, map(display.get_monitor, range(display.get_n_monitors())))
    return min((monitor.get_workarea().height for monitor in monitors), default=_HEIGHT)


def _meaning(judgement: Judgement) -> tuple[object, ...]:
    """What a user must have seen before he presses the button; how far off its end is changes by itself."""
    return judgement.is_fine, judgement.button, judgement.headline, judgement.lines[:1], judgement.seen


def _change(
    is_new: bool, named: NamedRule, seen: Seen, options: Sequence[Option], now: float, backend: Backend
) -> Done:
    """Make the change that was shown, and no other."""
    if not is_new:
        return actions.edit(backend, now, named.key, options, seen)
    return actions.add(backend, now, named.target, ForwardRule.from_options(options), named.name, seen)
