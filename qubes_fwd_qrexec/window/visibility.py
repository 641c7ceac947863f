# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether a window is seen: not minimized, on another workspace, or behind others as far as X tells that."""

from collections.abc import Callable

from .gtk import Gdk, Gtk


class Visibility:
    """``told`` is called when it changes."""

    def __init__(self, window: Gtk.Window, told: Callable[[bool], object]) -> None:
        self._told = told
        self._is_mapped = window.get_mapped()
        self._is_iconified = self._is_obscured = self._was_seen = False
        window.add_events(Gdk.EventMask.VISIBILITY_NOTIFY_MASK)
        # The X server's own word: on another workspace, or rolled up, xfwm4 takes away what GTK has shown.
        window.connect("map-event", lambda *_: self._map(is_mapped=True))
        window.connect("unmap-event", lambda *_: self._map(is_mapped=False))
        window.connect("window-state-event", lambda _, event: self._state(event.new_window_state))
        window.connect("visibility-notify-event", lambda _, event: self._obscure(event.state))

    def _map(self, *, is_mapped: bool) -> bool:
        self._is_mapped = is_mapped
        self._tell()
        return False

    def _state(self, state: Gdk.WindowState) -> bool:
        self._is_iconified = bool(state & (Gdk.WindowState.ICONIFIED | Gdk.WindowState.WITHDRAWN))
        self._tell()
        return False

    def _obscure(self, state: Gdk.VisibilityState) -> bool:
        self._is_obscured = state is Gdk.VisibilityState.FULLY_OBSCURED
        self._tell()
        return False

    def _tell(self) -> None:
        is_seen = self._is_mapped and not (self._is_iconified or self._is_obscured)
        if is_seen is not self._was_seen:
            self._was_seen = is_seen
            self._told(is_seen)
