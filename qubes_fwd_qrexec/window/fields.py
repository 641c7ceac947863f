# SPDX-License-Identifier: GPL-2.0-or-later
"""The kinds of fields that a form is made of. Each has a name that is read out, and says itself what is wrong
with it: by a text below, by a border, and to assistive technology.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar, cast

from qubes_fwd_qrexec.admin.inventory import Inventory

from .draft import Draft
from .gtk import Gtk, Pango
from .widgets import GAP, column, label, named, row

Changed = Callable[[], object]
W = TypeVar("W", bound=Gtk.Widget)


def hidden(widget: W) -> W:
    """A widget that is there only when it is made visible, whatever it stands in."""
    widget.show_all()
    widget.hide()
    widget.set_no_show_all(True)
    return widget


class Field:
    """A control, with its ``label`` before it and what is wrong with it below. ``focused`` are what has the
    focus in it, the first one first; they have a border in that case if it ``is_bordered``.
    """

    is_bordered = True

    def __init__(self, name: str, mnemonic: str, control: Gtk.Widget, *focused: Gtk.Widget) -> None:
        self.name = name
        self._focused = focused
        self._fault = hidden(label(wraps=True, style="bad"))
        self.widget = named(column(control, self._fault, gap=0), name)
        self.label = label(mnemonic)
        self.label.set_ellipsize(Pango.EllipsizeMode.NONE)
        self.label.set_use_underline(True)
        self.label.set_valign(Gtk.Align.START)
        self.label.set_margin_top(GAP)
        self.label.set_mnemonic_widget(focused[0])

    @property
    def fault(self) -> str:
        """What is shown to be wrong."""
        return self._fault.get_text()

    def mark(self, fault: str) -> None:
        """Show what is wrong, or with an empty text that nothing is."""
        if fault == self.fault:
            return
        self._fault.set_text(fault)
        self._fault.set_visible(bool(fault))
        for widget in self._focused:
            widget.get_accessible().set_description(fault)
            context = widget.get_style_context()
            (context.add_class if fault and self.is_bordered else context.remove_class)("invalid_entry")

    def focus(self) -> None:
        self._focused[0].grab_focus()


class Entry(Field):
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

    @property
    def text(self) -> str:
        return self._entry.get_text()

    @text.setter
    def text(self, text: str) -> None:
        if text != self._entry.get_text():
            self._entry.set_text(text)

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

    def __init__(
        self,
        name: str,
        mnemonic: str,
        changed: Changed,
        words: Mapping[str, str],
        place: Callable[[Mapping[str, Gtk.RadioButton]], Gtk.Widget],
    ) -> None:
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
        if self._buttons[value].get_label() != words:
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


class NameEntry(Field):
    """A name that can be typed, completed or chosen from many, such as that of a qube."""

    def __init__(
        self, name: str, mnemonic: str, changed: Changed, *, beside: Iterable[Gtk.Widget] = ()
    ) -> None:
        self._names = Gtk.ListStore(str)
        self._offered: tuple[str, ...] = ()
        box = Gtk.ComboBox.new_with_model_and_entry(self._names)
        box.set_entry_text_column(0)
        completion = Gtk.EntryCompletion(model=self._names, text_column=0, inline_completion=False)
        self._entry = entry = cast(Gtk.Entry, box.get_child())
        entry.set_completion(completion)
        entry.connect("changed", lambda _: changed())
        self._box = named(box, name)
        super().__init__(name, mnemonic, row(box, *beside), named(entry, name))

    @property
    def text(self) -> str:
        return self._entry.get_text()

    @text.setter
    def text(self, text: str) -> None:
        if text != self._entry.get_text():
            self._entry.set_text(text)

    def show_control(self, is_shown: bool) -> None:
        """Show it, or only what stands beside it."""
        self._box.set_no_show_all(not is_shown)
        self._box.set_visible(is_shown)

    @property
    def offered(self) -> tuple[str, ...]:
        """The names that can be chosen."""
        return self._offered

    def offer(self, names: Iterable[str]) -> None:
        """Let these be chosen, in their order."""
        offered = tuple(names)
        if offered == self._offered:
            return
        self._offered = offered
        self._names.clear()
        for name in offered:
            self._names.append([name])


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
