# SPDX-License-Identifier: GPL-2.0-or-later
"""The window in a process of its own, worked from within by a script that measures the turns of its loop.

A timer of the highest priority is due every 2 ms; how late it comes is how long the main loop was held up: by
our code, by GTK, by drawing, or by a thread that has Python's lock. `window` starts this with a display.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

BEAT_MS = 2
SLOW_S = 0.05
START = "start, until the window is drawn"
"""The phase before there is a main loop that anybody could wait for."""
_BOUND_S = 60.0
_LETTER_S = 0.08
_LOOK_EVERY_MS = 20
_SETTLED_S = 1.0
_DRAWN_S = 0.1
Step = Callable[[], object] | float
"""What is waited for: a condition, or some seconds of a user who does nothing."""


class Meter:
    """How long the main loop was held up, phase by phase, in seconds; and with ``finds``, by what.

    Of the longest turn ``own_s`` is the main thread's time on a processor, and ``queued_s`` how long it
    waited for one. For the rest it waited for Python's lock or the X server.
    """

    def __init__(self, glib: Any, *, finds: bool) -> None:
        self.phases: dict[str, dict[str, Any]] = {}
        self.title = ""
        self._phase: dict[str, Any] | None = None
        self._last = time.perf_counter()
        self._queue = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
        self._spent = self._spending()
        self._main = threading.get_ident()
        self._where: Counter[str] = Counter()
        glib.timeout_add(BEAT_MS, self._beat, priority=glib.PRIORITY_HIGH)
        if finds:
            threading.Thread(target=self._find, daemon=True).start()

    def begin(self, title: str) -> None:
        """What comes from now on belongs to that phase."""
        self.title = title
        figures = {"longest_s": 0.0, "own_s": 0.0, "queued_s": 0.0, "slow": 0, "s": 0.0, "where": {}}
        self._phase = self.phases.setdefault(title, figures)
        self._where.clear()
        self._begun = time.perf_counter()

    def end(self) -> None:
        assert self._phase is not None
        self._phase["s"] = time.perf_counter() - self._begun
        self._phase["where"] = dict(self._where.most_common(6))
        self._phase = None

    def _beat(self) -> bool:
        now, spent, before = time.perf_counter(), self._spending(), self._spent
        late_s, self._last, self._spent = now - self._last - BEAT_MS / 1000, now, spent
        if self._phase is not None:
            self._phase["slow"] += late_s > SLOW_S
            if late_s > self._phase["longest_s"]:
                self._phase["longest_s"] = late_s
                self._phase["own_s"], self._phase["queued_s"] = spent[0] - before[0], spent[1] - before[1]
        return True

    def _spending(self) -> tuple[float, float]:
        """The main thread's seconds on a processor so far, and those for which it waited for one."""
        return time.thread_time(), int(os.pread(self._queue, 100, 0).split()[1]) / 1e9

    def _find(self) -> None:
        """Where the main thread is while it is late."""
        while True:
            time.sleep(0.005)
            if time.perf_counter() - self._last > SLOW_S / 2:
                self._where[_place(sys._current_frames()[self._main])] += 1


def _place(frame: FrameType) -> str:
    """The innermost lines of ours that run, from the outermost."""
    ours = [
        f"{Path(each.filename).stem}:{each.lineno} {each.name}"
        for each in traceback.extract_stack(frame)
        if "/qubes_fwd_qrexec/" in each.filename and "program" not in each.filename
    ]
    return " > ".join(ours[-4:]) or "GTK"


class Script:
    """A user who looks, filters, chooses, adds; ``change`` is a program that changes rules meanwhile."""

    def __init__(self, meter: Meter, gdk: Any, gtk: Any, rules: int, change: list[str]) -> None:
        self._meter = meter
        self._gdk, self._gtk = gdk, gtk
        self._rules = rules
        self._change = change

    def run(self) -> Iterator[Step]:
        meter = self._meter
        meter.begin(START)
        yield lambda: any(window.get_mapped() for window in self._gtk.Window.list_toplevels())
        yield _DRAWN_S
        meter.end()

        meter.begin("first look")
        yield self._is_filled
        yield _SETTLED_S
        meter.end()
        view = self._only(self._gtk.TreeView)
        tree = view.get_model()
        search = self._only(self._gtk.SearchEntry)

        meter.begin("new looks by events")
        with subprocess.Popen(self._change) as process:
            yield lambda: process.poll() is not None
        yield _SETTLED_S
        meter.end()

        meter.begin("filtering by text")
        yield from self._type(search, "app-17")
        yield _SETTLED_S
        search.set_text("")
        yield self._is_filled
        yield _SETTLED_S
        meter.end()

        meter.begin("filtering by qube")
        for combo in self._all(self._gtk.ComboBoxText):
            for number in (1, 2, 0):
                combo.set_active(number)
                yield _SETTLED_S / 2
        yield self._is_filled
        yield _SETTLED_S
        meter.end()

        meter.begin("opening the list of qubes")
        combo = max(self._all(self._gtk.ComboBoxText), key=lambda each: len(each.get_model()))
        self._press_alt_down(combo)
        yield lambda: combo.props.popup_shown
        yield _SETTLED_S
        combo.popdown()
        yield _SETTLED_S
        meter.end()

        meter.begin("choosing rules")
        for number in range(20):
            view.set_cursor(self._gtk.TreePath.new_from_indices([number, 0]))
            yield _LETTER_S
        yield _SETTLED_S
        meter.end()

        yield from self._edit("opening Add", "typing in Add", "_Add…", "Add…")
        view.set_cursor(self._gtk.TreePath.new_from_indices([3, 0]))
        yield _SETTLED_S
        yield from self._edit("opening Edit", "typing in Edit", "_Edit…", "Edit…")

        meter.begin("figures, twice, beside a user who does nothing")
        yield 12.0
        meter.end()
        del tree

    def _edit(self, opening: str, typing: str, *labels: str) -> Iterator[Step]:
        before = set(self._dialogs())
        self._meter.begin(opening)
        self._button(*labels).clicked()
        yield lambda: set(self._dialogs()) - before
        yield _SETTLED_S
        self._meter.end()
        (dialog,) = set(self._dialogs()) - before
        self._meter.begin(typing)
        for entry in _inside(dialog, self._gtk.Entry):
            if entry.get_mapped() and entry.get_editable() and entry.is_sensitive():
                text = entry.get_text()
                yield from self._type(entry, f"{text}1")
                entry.set_text(text)
                yield _LETTER_S
        yield _SETTLED_S
        self._meter.end()
        dialog.close()
        yield _SETTLED_S

    def _dialogs(self) -> list[Any]:
        return [each for each in self._gtk.Window.list_toplevels() if isinstance(each, self._gtk.Dialog)]

    def _press_alt_down(self, widget: Any) -> None:
        """As GTK takes a key: without an event it would warn of a menu that opens."""
        widget.grab_focus()
        event, display = self._gdk.Event.new(self._gdk.EventType.KEY_PRESS), self._gdk.Display.get_default()
        event.window, event.send_event = widget.get_toplevel().get_window(), True
        event.keyval, event.state = self._gdk.KEY_Down, self._gdk.ModifierType.MOD1_MASK
        _, (key, *_) = self._gdk.Keymap.get_for_display(display).get_entries_for_keyval(event.keyval)
        event.hardware_keycode = key.keycode
        event.set_device(display.get_default_seat().get_keyboard())
        self._gtk.main_do_event(event)

    def _type(self, entry: Any, text: str) -> Iterator[Step]:
        for end in range(1, len(text) + 1):
            entry.set_text(text[:end])
            entry.set_position(-1)
            yield _LETTER_S

    def _is_filled(self) -> bool:
        """Whether the list has all rules; a look at few rows, as each takes its time."""
        for view in self._all(self._gtk.TreeView):
            tree = view.get_model()
            groups = tree.iter_n_children(None)
            if groups and not hasattr(self, "_groups"):
                count = sum(tree.iter_n_children(tree.iter_nth_child(None, n)) for n in range(groups))
                if count >= self._rules:
                    self._groups = groups
                    return True
                return False
            if groups:
                return bool(groups == self._groups)
        return False

    def _button(self, *labels: str) -> Any:
        return next(
            button
            for button in self._all(self._gtk.Button)
            if button.get_label() in labels and button.get_mapped()
        )

    def _only(self, kind: Any) -> Any:
        return next(widget for widget in self._all(kind) if widget.get_mapped())

    def _all(self, kind: Any) -> Iterator[Any]:
        for window in self._gtk.Window.list_toplevels():
            yield from _inside(window, kind)


def _inside(widget: Any, kind: Any) -> Iterator[Any]:
    if isinstance(widget, kind):
        yield widget
    if hasattr(widget, "get_children"):
        for child in widget.get_children():
            yield from _inside(child, kind)


def main() -> None:
    out, rules, finds, *change = sys.argv[1:]
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "window"))
    import debiangi

    if why := debiangi.offer():
        sys.exit(why)
    from qubes_fwd_qrexec.window import program
    from qubes_fwd_qrexec.window.gtk import Gdk, GLib, Gtk

    meter = Meter(GLib, finds=finds == "finds")
    steps = Script(meter, Gdk, Gtk, int(rules), change).run()
    waiting: list[Any] = [next(steps), time.monotonic()]

    def turn() -> bool:
        """An error would only be shown by the window."""
        try:
            return go_on()
        except Exception:  # noqa: BLE001
            traceback.print_exc()
            os._exit(1)

    def go_on() -> bool:
        step, since = waiting
        waited_s = time.monotonic() - since
        if waited_s > _BOUND_S:
            raise TimeoutError(f"not so within {_BOUND_S:g} s: {meter.title}")
        if waited_s < step if isinstance(step, float) else not step():
            return True
        try:
            waiting[:] = next(steps), time.monotonic()
        except StopIteration:
            Path(out).write_text(json.dumps(meter.phases))
            os.kill(os.getpid(), signal.SIGTERM)
            return False
        return True

    GLib.timeout_add(_LOOK_EVERY_MS, turn)
    sys.argv[1:] = []
    sys.exit(program.manager())


if __name__ == "__main__":
    main()
