# SPDX-License-Identifier: GPL-2.0-or-later
"""The buttons for one rule. Each keeps its place, so no click hits another button than the user saw."""

from collections.abc import Callable
from functools import partial

from qubes_fwd_qrexec.admin.states import State

from .gtk import Gtk
from .model.about import About
from .model.commands import Commands
from .model.words import _
from .widgets import GAP, button, named

HOUR_S = 3600
COLUMNS, COLUMNS_BELOW = 3, 4
"""Where the pane stands beside the list, and below it in a window that is less high."""


class Buttons:
    """``widget`` holds them. What cannot be done now cannot be pressed."""

    def __init__(self, commands: Commands) -> None:
        self._commands = commands
        self._about: About | None = None
        self._is_to_anybody = False
        self._can: dict[Gtk.Widget, bool] = {}
        self._edit = button(_("_Edit…"), self._does(lambda about: commands.edit(about.key)))
        self._enable = button(_("Ena_ble"), self._does(lambda about: commands.enable(about.key)))
        self._disable = button(_("_Disable"), self._does(lambda about: commands.disable(about.key)))
        self._confirm = button(_("Con_firm…"), self._does(lambda about: commands.confirm(about.key)))
        self._diagnose = button(_("Dia_gnose…"), self._does(lambda about: commands.diagnose(about.key)))
        self._remove = button(_("Re_move…"), self._does(lambda about: commands.remove([about.key])))
        # Translators: one hour more until the forward ends
        self._hour = button(_("+_1 h"), partial(self._extend, HOUR_S))
        self._spans = Gtk.MenuButton(popup=self._menu())
        named(self._spans, _("Extend it by…"))
        self._later = Gtk.Box()
        self._later.get_style_context().add_class(Gtk.STYLE_CLASS_LINKED)
        self._later.pack_start(self._hour, True, True, 0)
        self._later.pack_start(self._spans, False, False, 0)
        self.widget = Gtk.Grid(
            row_spacing=GAP, column_spacing=GAP, column_homogeneous=True, halign=Gtk.Align.START
        )
        self._cells = (
            self._edit,
            self._enable,
            self._disable,
            self._later,
            self._confirm,
            self._diagnose,
            self._remove,
        )
        # The last that comes into a grid is the first that a screen reader finds there.
        for cell in reversed(self._cells):
            self.widget.add(cell)
        self.stand_in(COLUMNS)

    def stand_in(self, columns: int) -> None:
        """Place them in so many columns."""
        for number, cell in enumerate(self._cells):
            self.widget.child_set_property(cell, "left-attach", number % columns)
            self.widget.child_set_property(cell, "top-attach", number // columns)

    def show(self, about: About, *, read_only: str | None) -> None:
        """Let be pressed what can be done with a rule; ``read_only`` says why nothing can be changed."""
        self._about = about
        rule = None if about.forward is None else about.forward.named.rule
        can_change = read_only is None
        is_suspended = about.forward is not None and about.forward.state is State.SUSPENDED
        can_extend = can_change and rule is not None and rule.expire is not None
        self._ask_about_anybody(rule is not None and rule.sources.anyone)
        had_focus = self.widget.get_focus_child()
        for each, can in {
            self._edit: can_change and rule is not None,
            self._enable: can_change and rule is not None and not rule.enabled,
            self._disable: can_change and rule is not None and rule.enabled,
            self._hour: can_extend,
            self._spans: can_extend,
            self._confirm: can_change and is_suspended,
            self._diagnose: True,
            self._remove: can_change,
        }.items():
            if self._can.get(each) is not can:
                self._can[each] = can
                each.set_sensitive(can)
                each.set_tooltip_text(None if can else read_only or "")
        if had_focus is not None and not had_focus.is_sensitive():
            self._diagnose.grab_focus()

    def _ask_about_anybody(self, is_to_anybody: bool) -> None:
        """Say by text and colour that enabling asks first, as it opens to anybody."""
        if is_to_anybody is not self._is_to_anybody:
            self._is_to_anybody = is_to_anybody
            self._enable.set_label(_("Ena_ble…") if is_to_anybody else _("Ena_ble"))
            context = self._enable.get_style_context()
            (context.add_class if is_to_anybody else context.remove_class)("anybody")

    def focus(self) -> None:
        """Give the first of them the focus that can be pressed."""
        (self._edit if self._can.get(self._edit) else self._diagnose).grab_focus()

    def _does(self, act: Callable[[About], None]) -> Callable[[], None]:
        def clicked() -> None:
            if self._about is not None:
                act(self._about)

        return clicked

    def _extend(self, seconds: int) -> None:
        if self._about is not None:
            self._commands.extend(self._about.key, seconds)

    def _menu(self) -> Gtk.Menu:
        menu = Gtk.Menu()
        # Translators: how much later a forward is to end
        for text, seconds in ((_("5 min"), 300), (_("1 h"), HOUR_S), (_("8 h"), 8 * HOUR_S)):
            item = Gtk.MenuItem.new_with_label(text)
            item.connect("activate", lambda _, seconds=seconds: self._extend(seconds))
            menu.append(item)
        menu.show_all()
        return menu
