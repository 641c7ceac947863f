# SPDX-License-Identifier: GPL-2.0-or-later
"""The kinds of fields that a form is made of. Each has a name for screen readers, and shows what is wrong
with it: by a text below, by a border, and to assistive technology.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from qubes_fwd_qrexec.admin.inventory import Inventory
from qubes_fwd_qrexec.admin.views.tables import shortened
from qubes_fwd_qrexec.window.gtk import Gtk, Pango
from qubes_fwd_qrexec.window.kept import TEXT_MAX, Text
from qubes_fwd_qrexec.window.model.draft import Draft
from qubes_fwd_qrexec.window.model.judgement import Judgement
from qubes_fwd_qrexec.window.model.words import _
from qubes_fwd_qrexec.window.portions import Portions
from qubes_fwd_qrexec.window.widgets import GAP, column, label, named, row, scrolled

Changed = Callable[[], object]
W = TypeVar("W", bound=Gtk.Widget)
# About ten names of 31 characters, in pixels.
_LIST_WIDTH, _LIST_HEIGHT = 250, 240


def hidden(widget: W) -> W:
    """A widget that is there only when it is made visible, whatever it stands in."""
    widget.show_all()
    widget.hide()
    widget.set_no_show_all(True)
    return widget


class Field:
    """A control, with its ``label`` before it and below it the ``fault``, what is shown to be wrong with it.
    ``focused`` are what has the focus in it, the first one first. They have a border then if it
    ``is_bordered``, and if it ``is_labelled`` the label leads there.
    """

    is_bordered = True
    is_labelled = True

    def __init__(self, name: str, mnemonic: str, control: Gtk.Widget, *focused: Gtk.Widget) -> None:
        self.name = name
        self.fault = ""
        self._focused = focused
        self._words = Text(style="bad", is_selectable=False)
        self.widget = named(column(control, self._words.widget, gap=0), name)
        self.label = label(mnemonic)
        self.label.set_ellipsize(Pango.EllipsizeMode.NONE)
        self.label.set_use_underline(True)
        self.label.set_valign(Gtk.Align.START)
        self.label.set_margin_top(GAP)
        if mnemonic and self.is_labelled:
            self.label.set_mnemonic_widget(focused[0])

    def mark(self, fault: str) -> None:
        """Show what is wrong, which may quote all that was pasted there; nothing if the text is empty."""
        fault = shortened(fault, TEXT_MAX)
        if fault == self.fault:
            return
        self.fault = fault
        self._words.show(fault)
        for widget in self._focused:
            widget.get_accessible().set_description(fault)
            context = widget.get_style_context()
            (context.add_class if fault and self.is_bordered else context.remove_class)("invalid_entry")

    def focus(self) -> None:
        self._focused[0].grab_focus()


class _TypedField(Field):
    """A field with an entry to type in."""

    _entry: Gtk.Entry

    @property
    def text(self) -> str:
        return self._entry.get_text()

    @text.setter
    def text(self, text: str) -> None:
        if text != self._entry.get_text():
            self._entry.set_text(text)


class TextField(_TypedField):
    """A line of text. ``beside`` stands at its right."""

    def __init__(
        self,
        name: str,
        mnemonic: str,
        changed: Changed,
        *,
        hint: str = "",
        width: int = -1,
        beside: Iterable[Gtk.Widget] = (),
    ) -> None:
        self._entry = Gtk.Entry(width_chars=width, placeholder_text=hint)
        self._entry.connect("changed", lambda _: changed())
        box = row(*beside)
        box.pack_start(self._entry, width < 0, width < 0, 0)
        box.reorder_child(self._entry, 0)
        super().__init__(name, mnemonic, box, named(self._entry, name))

    def hint(self, text: str) -> None:
        """Say in the empty field what it stands for."""
        self._entry.set_placeholder_text(text)


class Choice(Field):
    """One of a few values, each with its words."""

    def __init__(self, name: str, mnemonic: str, changed: Changed, words: Mapping[str, str]) -> None:
        self._box = Gtk.ComboBoxText(halign=Gtk.Align.START)
        for value, text in words.items():
            self._box.append(value, text)
        self._box.connect("changed", lambda _: changed())
        super().__init__(name, mnemonic, self._box, named(self._box, name))

    @property
    def text(self) -> str:
        return self._box.get_active_id() or ""

    @text.setter
    def text(self, value: str) -> None:
        self._box.set_active_id(value)


class Radios(Field):
    """One of a few values, which are all shown, each with its words and what stands beside it or below."""

    is_bordered = False
    # A label of a radio button takes its name, and GTK's relations of the two break a rule of Atk's.
    is_labelled = False

    def __init__(
        self,
        name: str,
        mnemonic: str,
        changed: Changed,
        words: Mapping[str, str],
        place: Callable[[Mapping[str, Gtk.RadioButton]], Gtk.Widget],
    ) -> None:
        self._said = dict(words)
        self._buttons: dict[str, Gtk.RadioButton] = {}
        first: Gtk.RadioButton | None = None
        for value, text in words.items():
            button = Gtk.RadioButton.new_with_mnemonic_from_widget(first, text)
            button.connect("toggled", lambda button: changed() if button.get_active() else None)
            self._buttons[value] = button
            first = first or button
        super().__init__(name, mnemonic, place(self._buttons), *self._buttons.values())

    @property
    def text(self) -> str:
        return next(value for value, button in self._buttons.items() if button.get_active())

    @text.setter
    def text(self, value: str) -> None:
        self._buttons[value].set_active(True)

    def say(self, value: str, words: str) -> None:
        """Give one of the values other words."""
        if words != self._said[value]:
            self._said[value] = words
            self._buttons[value].set_label(words)

    def focus(self) -> None:
        self._buttons[self.text].grab_focus()


class Switch(Field):
    """Yes or no."""

    is_bordered = False

    def __init__(self, name: str, mnemonic: str, changed: Changed) -> None:
        self._box = Gtk.CheckButton.new_with_mnemonic(mnemonic)
        self._box.connect("toggled", lambda _: changed())
        super().__init__(name, "", self._box, named(self._box, name))

    @property
    def is_on(self) -> bool:
        return self._box.get_active()

    @is_on.setter
    def is_on(self, is_on: bool) -> None:
        self._box.set_active(is_on)


class NameField(_TypedField):
    """A name that can be typed, completed or chosen from many, such as that of a qube.

    A combo box would take a tenth of a second to open its menu of 200 names.
    """

    def __init__(
        self, name: str, mnemonic: str, changed: Changed, *, beside: Iterable[Gtk.Widget] = ()
    ) -> None:
        self._names = Gtk.ListStore(str)
        self._offered: tuple[str, ...] = ()
        self._portions = Portions()
        self._entry = Gtk.Entry(completion=Gtk.EntryCompletion(model=self._names, text_column=0))
        self._entry.connect("changed", lambda _: changed())
        self._popover = Gtk.Popover()
        self._popover.connect("show", self._open_list)
        self._list = named(Gtk.MenuButton(popover=self._popover), _("Choose: {field}").format(field=name))
        self._list.connect("destroy", self._closed)
        self._control = row(named(self._entry, name), self._list, gap=0)
        self._control.get_style_context().add_class("linked")
        super().__init__(name, mnemonic, row(self._control, *beside), self._entry)

    def show_control(self, is_shown: bool) -> None:
        """Show it, or only what stands beside it."""
        self._control.set_no_show_all(not is_shown)
        self._control.set_visible(is_shown)

    def offer(self, names: Iterable[str]) -> None:
        """Let these be chosen, in their order; many are there only after a while."""
        offered = tuple(names)
        if offered != self._offered:
            self._offered = offered
            self._portions.run(self._filling(offered))

    def _filling(self, names: Iterable[str]) -> Iterator[None]:
        self._names.clear()
        for name in names:
            self._names.append([name])
            yield

    def _closed(self, _button: Gtk.MenuButton) -> None:
        """A popover outlives what it belongs to, and keeps all that it calls."""
        self._portions.stop()
        self._popover.destroy()

    def _open_list(self, _popover: Gtk.Popover) -> None:
        """Make the list when it is opened first."""
        if self._popover.get_child() is None:
            view = Gtk.TreeView(model=self._names, headers_visible=False, activate_on_single_click=True)
            cell, column = Gtk.CellRendererText(), Gtk.TreeViewColumn()
            column.pack_start(cell, True)
            column.add_attribute(cell, "text", 0)
            view.append_column(column)
            view.connect("row-activated", self._chosen)
            place = scrolled(named(view, self.name))
            place.set_min_content_height(_LIST_HEIGHT)
            place.set_min_content_width(_LIST_WIDTH)
            place.show_all()
            self._popover.add(place)

    def _chosen(self, _view: Gtk.TreeView, path: Gtk.TreePath, _column: Gtk.TreeViewColumn) -> None:
        self.text = self._names[path][0]
        self._list.set_active(False)
        self._entry.grab_focus()


class Section:
    """Part of a form: ``rows`` are its fields as they stand below each other, ``fields`` all of them by their
    names. It shows some of a draft's texts, and reads them back.
    """

    rows: Sequence[Field]
    fields: Mapping[str, Field]

    def show(self, draft: Draft) -> None:
        """Show what the draft has."""
        raise NotImplementedError

    def read(self, draft: Draft) -> Draft:
        """The draft with what the fields hold."""
        raise NotImplementedError

    def follow(self, draft: Draft, inventory: Inventory | None, now: float) -> None:
        """Fit what is offered, and said about it, to what all fields hold and to the qubes that there are."""

    def learn(self, judgement: Judgement) -> None:
        """Fit it to what becomes of the draft."""
