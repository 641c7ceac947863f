# SPDX-License-Identifier: GPL-2.0-or-later
"""A server of desktop notifications, which shows none: each is a line of JSON on stdout, and a line on stdin
with its number and the name of an action takes that. One that is withdrawn is a line, too.
"""

import json
import sys

import debiangi

_XML = """
<node><interface name="org.freedesktop.Notifications">
  <method name="Notify">
    <arg type="s" direction="in"/><arg type="u" direction="in"/><arg type="s" direction="in"/>
    <arg type="s" direction="in"/><arg type="s" direction="in"/><arg type="as" direction="in"/>
    <arg type="a{sv}" direction="in"/><arg type="i" direction="in"/><arg type="u" direction="out"/>
  </method>
  <method name="CloseNotification"><arg type="u" direction="in"/></method>
  <method name="GetCapabilities"><arg type="as" direction="out"/></method>
  <method name="GetServerInformation">
    <arg type="s" direction="out"/><arg type="s" direction="out"/>
    <arg type="s" direction="out"/><arg type="s" direction="out"/>
  </method>
  <signal name="ActionInvoked"><arg type="u"/><arg type="s"/></signal>
</interface></node>
"""


def main() -> None:
    if why := debiangi.offer():
        sys.exit(why)
    from gi.repository import Gio, GLib

    loop, shown = GLib.MainLoop(), [0]

    def called(_bus, _sender, _path, _interface, method, values, invocation):  # type: ignore[no-untyped-def]
        if method == "Notify":
            name, replaces, icon, title, body, actions, hints, _timeout = values.unpack()
            shown[0] += not replaces
            found = replaces or shown[0]
            said = {
                "id": found,
                "replaces": replaces,
                "app": name,
                "icon": icon,
                "title": title,
                "body": body,
            }
            print(json.dumps(said | {"actions": actions, "urgency": hints.get("urgency")}), flush=True)
            invocation.return_value(GLib.Variant("(u)", (found,)))
        elif method == "GetCapabilities":
            invocation.return_value(GLib.Variant("(as)", (["body", "body-markup", "actions"],)))
        elif method == "GetServerInformation":
            invocation.return_value(GLib.Variant("(ssss)", ("test", "none", "1", "1.2")))
        else:
            print(json.dumps({"closed": values.unpack()[0]}), flush=True)
            invocation.return_value(None)

    def got(bus, _name):  # type: ignore[no-untyped-def]
        interface = Gio.DBusNodeInfo.new_for_xml(_XML).interfaces[0]
        bus.register_object("/org/freedesktop/Notifications", interface, called)

        def clicked(channel, _condition):  # type: ignore[no-untyped-def]
            line = sys.stdin.readline()
            if not line:
                loop.quit()
                return False
            number, action = line.split()
            values = GLib.Variant("(us)", (int(number), action))
            place = "/org/freedesktop/Notifications", "org.freedesktop.Notifications"
            bus.emit_signal(None, *place, "ActionInvoked", values)
            return True

        GLib.io_add_watch(
            GLib.IOChannel.unix_new(0),
            GLib.PRIORITY_DEFAULT,
            GLib.IOCondition.IN | GLib.IOCondition.HUP,
            clicked,
        )

    def own(_bus, _name):  # type: ignore[no-untyped-def]
        print("{}", flush=True)

    Gio.bus_own_name(
        Gio.BusType.SESSION, "org.freedesktop.Notifications", Gio.BusNameOwnerFlags.NONE, got, own, None
    )
    loop.run()


if __name__ == "__main__":
    main()
