# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads and works programs as assistive technology does, by AT-SPI: by the role and the name of each control.

Every wait ends with what it is for, is woken by what programs say of themselves, and has a bound.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import pytest
import screen  # noqa: F401  # it skips where GTK is missing
from desktop import Desktop
from helpers import BOUND_S

import gi  # isort: skip

try:
    gi.require_version("Atspi", "2.0")
    from gi.repository import Atspi, GLib
except (ImportError, ValueError):
    pytest.skip("nothing to read a screen with (Debian: gir1.2-atspi-2.0)", allow_module_level=True)

T = TypeVar("T")
_EVENTS = (
    "object:children-changed",
    "object:property-change",
    "object:state-changed",
    "object:text-changed",
    "object:selection-changed",
    "object:row-inserted",
    "object:row-deleted",
    "object:model-changed",
    "object:visible-data-changed",
    "window",
)
_TABS_MAX = 60
_QUIET_MS = 500
# Not all that changes is told, above all while a program and the bus begin to know each other.
_LOOK_MS = 1000
# What has a text beside its name. Asking everything whether it has one takes most of the time.
_WITH_TEXT = frozenset({"entry", "password text", "spin button", "text"})
BUTTONS = frozenset({"push button", "toggle button"})
CONTROLS = _WITH_TEXT | BUTTONS
CONTROLS |= {
    "check box",
    "combo box",
    "link",
    "list box",
    "menu item",
    "radio button",
    "switch",
    "tree table",
}
"""What a person works with, so that each needs a name."""


class Seen(NamedTuple):
    """One thing that is seen, with AT-SPI's own words for its role and its states. ``at`` are the things that
    it is in, from the window inwards, as role and name.
    """

    role: str
    name: str
    text: str
    states: frozenset[str]
    at: tuple[tuple[str, str], ...]
    itself: Any

    @property
    def is_usable(self) -> bool:
        return "sensitive" in self.states

    @property
    def window(self) -> str:
        """The title of its window."""
        return (*self.at, (self.role, self.name))[0][1]

    def __str__(self) -> str:
        words = ", ".join(sorted(self.states & {"checked", "focused", "selected", "expanded", "modal"}))
        off = "" if self.is_usable else " (not usable)"
        return f"{self.role} {self.name!r} {self.text!r} {words}{off}"


class Reader:
    """A reader of all that is on a desktop. A process can have one, as libatspi has one bus."""

    def __init__(self, desktop: Desktop) -> None:
        # libatspi asks the environment for its bus, once.
        os.environ["DBUS_SESSION_BUS_ADDRESS"] = desktop.environ["DBUS_SESSION_BUS_ADDRESS"]
        Atspi.init()
        self._root = Atspi.get_desktop(0)
        del os.environ["DBUS_SESSION_BUS_ADDRESS"]
        self._desktop = desktop
        self._heard = False
        self.focus: tuple[str, str] | None = None
        """Where the keyboard goes, as far as was heard: a name, and that of what it is a part of."""
        self.why_in_vain: Callable[[], str] = str
        """Why nothing more will come of a wait; empty if that is not known."""
        self._listener = Atspi.EventListener.new(self._hear)
        for event in _EVENTS:
            self._listener.register(event)

    def until(self, wanted: Callable[[], T], what: str) -> T:
        """What ``wanted`` returns, once that is true of something."""
        context = GLib.MainContext.default()
        over: list[bool] = []
        source = GLib.timeout_add(int(BOUND_S * 1000), lambda: over.append(True) or True)
        looks = GLib.timeout_add(_LOOK_MS, lambda: True)
        try:
            while not (found := wanted()):
                assert not (why := self.why_in_vain()), f"not so: {what}; {why}"
                assert not over, f"not so within {BOUND_S:g} s: {what}. There is\n{self.told()}"
                context.iteration(True)
                while context.pending():
                    context.iteration(False)
            return found
        finally:
            GLib.source_remove(source)
            GLib.source_remove(looks)

    def seen(self, window: str | None = None) -> list[Seen]:
        """All that is to be seen in all windows, or in those with this title."""
        return [
            seen
            for program in _children(self._root)
            for itself in _children(program)
            if window is None or _name(itself) == window
            for seen in _walk(itself, ())
        ]

    def told(self) -> str:
        """All that is to be seen, as text."""
        return "\n".join(f"{'  ' * len(seen.at)}{seen}" for seen in self.seen())

    def find(self, name: str, *roles: str, window: str | None = None) -> Seen:
        """What has that name and, if some are given, one of the roles; waits until it is there and usable."""

        def found() -> Seen | None:
            return next(
                (seen for seen in self.seen(window) if _fits(seen, name, roles) and seen.is_usable), None
            )

        return self.until(found, f"there is {name!r} {roles} to use")  # type: ignore[return-value]

    def reads(self, text: str, window: str | None = None) -> Seen:
        """What has this text in its name or its text; waits until it is there."""

        def found() -> Seen | None:
            return next((seen for seen in self.seen(window) if text in seen.name or text in seen.text), None)

        return self.until(found, f"it says {text!r}")  # type: ignore[return-value]

    def is_usable(self, name: str, window: str | None = None) -> bool:
        """Whether something of that name can be used now."""
        return any(seen.name == name and seen.is_usable for seen in self.seen(window))

    def until_gone(self, window: str) -> None:
        """Wait until no window has this title."""
        self.until(lambda: not self.seen(window), f"there is no {window!r} any more")

    def press(self, name: str, window: str | None = None) -> None:
        """Press a button."""
        Atspi.Action.do_action(self.find(name, *BUTTONS, window=window).itself, 0)

    def choose(self, name: str, window: str | None = None) -> None:
        """Turn on what can be chosen: a radio button or a check box."""
        found = self.find(name, "radio button", "check box", "toggle button", window=window)
        if "checked" not in found.states:
            Atspi.Action.do_action(found.itself, 0)

    def write(self, name: str, text: str, window: str | None = None) -> None:
        """Write into a field, in place of what is in it."""
        assert Atspi.EditableText.set_text_contents(self.find(name, *_WITH_TEXT, window=window).itself, text)

    def pick(self, name: str, item: str, window: str | None = None) -> None:
        """Take an item of a list that opens at a button."""
        box = self.find(name, "combo box", window=window).itself
        items = [each.get_name() for menu in _children(box) for each in _children(menu)]
        assert Atspi.Selection.select_child(box, items.index(item))

    def select(self, text: str, window: str | None = None) -> None:
        """Go to the row of a table that has this text."""

        def found() -> Seen | None:
            return next(
                (seen for seen in self.seen(window) if seen.role == "table cell" and text in seen.name), None
            )

        row = self.until(found, f"there is a row with {text!r}")
        assert Atspi.Component.grab_focus(row.itself)  # type: ignore[union-attr]

    def settle(self) -> None:
        """Wait until programs have said nothing for a while, so that what they show is drawn."""
        context = GLib.MainContext.default()
        is_quiet: list[bool] = []
        while not is_quiet:
            source = GLib.timeout_add(_QUIET_MS, lambda: is_quiet.append(True))
            self._heard = False
            while not (is_quiet or self._heard):
                context.iteration(True)
            if not is_quiet:
                GLib.source_remove(source)

    def nameless(self) -> list[Seen]:
        """The controls of which nobody who does not see them knows what they are for."""
        return [seen for seen in self.seen() if seen.role in CONTROLS and not seen.name.strip()]

    def enter(self, window: str) -> None:
        """Give a window the keyboard."""
        self.focus = None
        self._desktop.focus(window)
        self.until(lambda: self.focus, f"something in {window!r} has the focus")

    def tab_to(self, name: str, key: str = "Tab") -> None:
        """Press Tab, or another key, until the keyboard goes to what has this name."""
        for _ in range(_TABS_MAX):
            if self.focus is not None and name in self.focus:
                return
            self.focus = None
            self._desktop.key(key)
            self.until(lambda: self.focus, f"{key} moves the focus")
        raise AssertionError(f"{key} does not lead to {name!r}. There is\n{self.told()}")

    def _hear(self, event: Any) -> None:
        self._heard = True
        if event.type == "object:state-changed:focused" and event.detail1:
            with suppress(GLib.Error):
                # A button that opens a list is itself a part of a control that has a name.
                parent = event.source.get_parent()
                self.focus = (event.source.get_name(), "" if parent is None else parent.get_name())


def _fits(seen: Seen, name: str, roles: tuple[str, ...]) -> bool:
    return seen.name == name and (not roles or seen.role in roles)


def _name(itself: Any) -> str:
    with suppress(GLib.Error):
        return itself.get_name() or ""
    return ""


def _children(parent: Any) -> Iterator[Any]:
    """What has gone meanwhile is not among them."""
    with suppress(GLib.Error):
        for number in range(parent.get_child_count()):
            child = parent.get_child_at_index(number)
            if child is not None:
                yield child


def _label(itself: Any) -> str:
    """The text that stands beside a control as its name; empty if there is none."""
    for relation in itself.get_relation_set():
        if relation.get_relation_type() == Atspi.RelationType.LABELLED_BY:
            return relation.get_target(0).get_name() or ""
    return ""


def _chosen(box: Any) -> str:
    chosen = Atspi.Selection.get_selected_child(box, 0)
    return "" if chosen is None else chosen.get_name()


def _is_scrolled_away(itself: Any, at: tuple[tuple[str, str], ...]) -> bool:
    """Whether something that does not show has a place all the same, where one can scroll to."""
    is_scrolled = any(role == "viewport" for role, _ in at)
    return is_scrolled and Atspi.Component.get_extents(itself, Atspi.CoordType.SCREEN).width > 1


def _walk(itself: Any, at: tuple[tuple[str, str], ...]) -> Iterator[Seen]:
    try:
        states = frozenset(state.value_nick for state in itself.get_state_set().get_states())
        if "showing" not in states and not ("visible" in states and _is_scrolled_away(itself, at)):
            return
        role, name = itself.get_role_name(), itself.get_name() or ""
        text = Atspi.Text.get_text(itself, 0, -1) if role in _WITH_TEXT else ""
        if role == "combo box":
            # What is chosen is its name as long as it has none.
            text = _chosen(itself)
            name = "" if name == text else name
        if role in CONTROLS:
            name = name or _label(itself)
        yield Seen(role, name, text, states, at, itself)
        for child in _children(itself):
            yield from _walk(child, (*at, (role, name)))
    except GLib.Error:
        return  # it has gone meanwhile
