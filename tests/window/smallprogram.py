# SPDX-License-Identifier: GPL-2.0-or-later
"""A program with a window, for the tests of what reads and works windows."""

from qubes_fwd_qrexec.window.gtk import Gtk
from qubes_fwd_qrexec.window.widgets import button, column, label, named


def main() -> None:
    said, field, nameless = label("nothing yet"), named(Gtk.Entry(), "Your name"), Gtk.Entry()
    agrees = Gtk.CheckButton(label="I agree")
    greeting, other = Gtk.ComboBoxText(), Gtk.ComboBoxText()
    for word in ("Hello", "Good day"):
        greeting.append_text(word)
        other.append_text(word)
    greeting.set_active(0)
    other.set_active(1)
    beside = Gtk.Label.new_with_mnemonic("Gr_eeting")
    beside.set_mnemonic_widget(greeting)
    store = Gtk.ListStore(str)
    for word in ("first", "second"):
        store.append([word])
    table = named(Gtk.TreeView(model=store), "Words")
    table.append_column(Gtk.TreeViewColumn("Word", Gtk.CellRendererText(), text=0))

    def greet() -> None:
        model, row = table.get_selection().get_selected()
        chosen = "none" if row is None else model[row][0]
        said.set_text(
            f"{greeting.get_active_text()} <b>{field.get_text()}</b>, {agrees.get_active()}, {chosen}"
        )

    window = Gtk.Window(title="Small")
    window.add(column(said, field, nameless, agrees, beside, greeting, other, table, button("_Greet", greet)))
    window.connect("destroy", lambda _: Gtk.main_quit())
    window.show_all()
    Gtk.main()


if __name__ == "__main__":
    main()
