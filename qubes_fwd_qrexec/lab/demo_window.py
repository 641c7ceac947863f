# SPDX-License-Identifier: GPL-2.0-or-later
"""``qvm-forward-lab window``: the window over a lab of its own, with forwards in several states and traffic.

All is the real thing: `watch` in dom0, the listener in sys-net, a server in a qube, clients that come and go.
The qubes share this machine's loopback interface. When the window is closed, everything ends.
"""

import argparse
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from . import units
from .daemon import Network
from .demo_stage import retried
from .session import LabSession, SessionError, open_session
from .store import LabStore

# PyGObject is the distribution's, and so fits the distribution's Python.
_PYTHONS = (sys.executable, "/usr/bin/python3")
_PROBE = """\
import sys
if sys.version_info < (3, 11):
    sys.exit(3)
try:
    import gi
    gi.require_version("Gtk", "3.0")
    from gi.repository import Gtk
except (ImportError, ValueError):
    sys.exit(3)
sys.exit(0 if Gtk.init_check()[0] else 4)
"""
_NO_DISPLAY = 4
_PROBE_TIMEOUT_S = 30.0
_WINDOW = "qubes_fwd_qrexec.window"
_START = f"import sys; from {_WINDOW} import program; sys.exit(program.{{}}())"
# Some connections stay for a while, others only fetch the page; each client has an address of its own.
_CLIENTS = """\
import http.client, socket, sys, time
port, *sources = sys.argv[1:]
held = {}
number = 0
while True:
    source = sources[number % len(sources)]
    number += 1
    try:
        if source in held:
            held.pop(source).close()
        else:
            held[source] = socket.create_connection(("127.0.0.1", int(port)), 5, (source, 0))
        page = http.client.HTTPConnection("127.0.0.1", int(port), 5, source_address=(source, 0))
        page.request("GET", "/")
        page.getresponse().read()
        page.close()
    except OSError:
        pass
    time.sleep(2)
"""
# Refused, as it would go round the VPN that the qube is behind; and what is no rule.
_REFUSED = (
    "action=forward srcports=9000 srchosts=any mode=qrexec via=sys-net owner=untrusted "
    "path=sys-vpn,sys-firewall,sys-net"
)
_BROKEN = "action=forward srcport=9001 srchosts=any"
_PAGE = "Hello from the qube 'work'.\n"
_WIKI_PORT, _WEB_PORT, _PHOTOS_PORT, _SSH_PORT, _TEST_PORT = 3000, 8080, 8443, 2222, 5000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Show the window over a lab of its own, with forwards and traffic, until it is closed."
    )


def run(arguments: argparse.Namespace) -> int:
    if find_spec(_WINDOW) is None:
        raise SessionError("there is no window to show; install the package qubes-fwd-qrexec-manager")
    python = find_gtk(_PYTHONS)
    try:
        with open_session(Network.LOOPBACK) as session:
            _begin(session)
            environ = os.environ | {
                "QVM_FORWARD_LAB": str(session.lab.root),
                "PYTHONPATH": units.search_path(),
            }
            session.start([python, "-P", "-c", _START.format("indicator")], env=environ)
            window = session.start([python, "-P", "-c", _START.format("manager")], env=environ)
            print(
                "The window is over a lab, which is gone when it is closed. In another terminal, this has\n"
                f"qvm-forward work on it too:\n    export QVM_FORWARD_LAB={session.lab.root}",
                flush=True,
            )
            return window.wait()
    except KeyboardInterrupt:
        return 0


def find_gtk(pythons: Sequence[str]) -> str:
    """The first Python that has GTK 3 and a display. Raises `SessionError`, which says what is missing."""
    for python in pythons:
        try:
            probe = subprocess.run(
                [python, "-c", _PROBE],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_PROBE_TIMEOUT_S,
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        if probe.returncode == 0:
            return python
        if probe.returncode == _NO_DISPLAY:
            raise SessionError("there is no display; start it in a graphical session, or with xvfb-run")
    raise SessionError(
        "no Python of this machine has GTK 3; install python3-gi and gir1.2-gtk-3.0 on Debian, "
        "python3-gobject and gtk3 on Fedora"
    )


def _begin(session: LabSession) -> None:
    """Forwards in several states, and what belongs to them."""
    place = session.lab.run_dir / "www"
    place.mkdir()
    (place / "index.html").write_text(_PAGE, encoding="utf-8")
    web, wiki, photos, ssh, test = map(
        _free_port, (_WEB_PORT, _WIKI_PORT, _PHOTOS_PORT, _SSH_PORT, _TEST_PORT)
    )
    served = _free_port(0)
    server = ("-m", "http.server", str(served), "--bind", "127.0.0.1", "--directory", str(place))
    _start_quietly(session, session.in_qube("work", sys.executable, "-I", *server), "www.log")
    session.lab_command("listen", "sys-net")
    words = session.command("admin.views.cli", "--lab", str(session.lab.root), "watch")
    _start_quietly(session, words, "watch.log")
    retried(lambda: _check_watched(session))
    for qube, port, name, *options in (
        ("work", f"{web}:{served}", "web", "--from=127.0.0.0/8", "--expire=+8h", "--comment=the team's page"),
        ("work", f"{photos}:{served}", "photos", "--from=any", "--expire=+5m"),
        ("work", f"{ssh}:22", "ssh", "--from=192.168.0.0/16", "--disabled"),
        ("vault", str(test), "test", "--from=10.0.0.0/8", "--via=sys-net", "--expire=+1h"),
        ("personal", str(wiki), "wiki", "--from=10.0.0.0/8", "--comment=the netvm changed since"),
    ):
        session.forward("add", qube, port, "--mode=qrexec", "--name", name, "--listen=127.0.0.1", *options)
    session.lab_command("shutdown", "vault")
    session.lab_command("prefs", "personal", "netvm", "sys-net")
    session.lab_command("features", "untrusted", "forward.old", _REFUSED)
    session.lab_command("features", "untrusted", "forward.typo", _BROKEN)
    clients = ("-I", "-c", _CLIENTS, str(web), "127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.5")
    _start_quietly(session, [sys.executable, *clients], "clients.log")


def _free_port(wanted: int) -> int:
    """The port that is wanted, or another one where that is taken."""
    for port in (wanted, 0):
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(sock.getsockname()[1])
    raise SessionError("no port of 127.0.0.1 is free")


def _start_quietly(session: LabSession, words: Sequence[str], log_file: str) -> None:
    with open(Path(session.lab.run_dir, log_file), "wb") as log:
        session.start(words, stdout=log, stderr=log)


def _check_watched(session: LabSession) -> str:
    if LabStore(session.lab).unwatched() is not None:
        raise SessionError("qvm-forward watch does not start")
    return ""
