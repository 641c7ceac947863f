# SPDX-License-Identifier: GPL-2.0-or-later
"""GTK 3 by PyGObject: the one place that imports it, so that nothing else loads another version.

PyGObject 3.42 and GTK 3.24 are enough (Debian 12).
"""

import gi

gi.require_version("Atk", "1.0")
gi.require_version("Gdk", "3.0")
gi.require_version("Gtk", "3.0")
from gi.repository import Atk, Gdk, GdkPixbuf, Gio, GLib, GObject, Gtk, Pango  # noqa: E402

__all__ = ["Atk", "GLib", "GObject", "Gdk", "GdkPixbuf", "Gio", "Gtk", "Pango"]
