# SPDX-License-Identifier: GPL-2.0-or-later
"""The indicator as a program: it tells the desktop, has one place in the session, and ends without a word."""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from desktop import Desktop
from helpers import BOUND_S
from stories import TITLE, Machine, Show
from worlds import ADD, NOW, Command

from qubes_fwd_qrexec.lab.directory import LabDirectory

if TYPE_CHECKING:
    from reader import Reader

SERVER = Path(__file__).parent / "notifyserver.py"
INDICATOR = "import sys; from qubes_fwd_qrexec.window import program; sys.exit(program.indicator())"
PROGRAM = ["-P", "-c", INDICATOR]
NAME = "qubes-forward-indicator"
APP_ID = "org.qubesos.forwardindicator"
Started = Callable[..., subprocess.Popen[bytes]]
WindowOpens = Callable[[subprocess.Popen[bytes]], None]


class Notices:
    """A server of notifications, and what it was told."""

    def __init__(self, environ: dict[str, str]) -> None:
        words = [sys.executable, "-P", str(SERVER)]
        environ = environ | {"PYTHONPATH": str(SERVER.parent)}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(words, env=environ, stdin=pipe, stdout=pipe, bufsize=0)
        assert self.next() == {}  # it is there

    def next(self) -> dict[str, Any]:
        """The next one, when it has come."""
        assert self.process.stdout is not None
        line = b""
        while not line.endswith(b"\n"):
            assert select.select([self.process.stdout], [], [], BOUND_S)[0], "there is no notice"
            data = self.process.stdout.read(1)
            assert data, "the server has ended"
            line += data
        found: dict[str, Any] = json.loads(line)
        return found

    def take(self, number: int, action: str) -> None:
        """Do what one of them offers."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{number} {action}\n".encode())

    def close(self) -> None:
        self.process.communicate(timeout=BOUND_S)


@pytest.fixture
def serve(desktop: Desktop) -> Iterator[Callable[[], Notices]]:
    """Starts a server of notifications."""
    servers: list[Notices] = []

    def start() -> Notices:
        servers.append(Notices(dict(desktop.environ)))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def panel(desktop: Desktop) -> Iterator[None]:
    """A panel with a tray."""
    if shutil.which("trayer") is None:
        pytest.skip("there is no tray (Debian: trayer)")
    with subprocess.Popen(
        ["trayer", "--monitor", "0"], env=dict(desktop.environ), stderr=subprocess.DEVNULL
    ) as trayer:
        yield
        trayer.terminate()


def xdotool(desktop: Desktop, *words: str) -> str:
    """What it prints. It fails where a window goes while it looks, and is asked again then."""
    end = time.monotonic() + BOUND_S
    while True:
        done = subprocess.run(
            ["xdotool", *words],
            env=dict(desktop.environ),
            capture_output=True,
            timeout=BOUND_S,
            text=True,
        )
        if done.returncode == 0:
            return done.stdout
        assert time.monotonic() < end, done.stderr


@pytest.fixture
def start(desktop: Desktop, panel: None, show: Show, machine: Machine, forward: Command) -> Started:
    """Starts the indicator, where something is open; returns when its icon is in the panel."""

    def start(**environ: str) -> subprocess.Popen[bytes]:
        assert forward(*ADD).status == 0
        # GDK finds fault with every icon in a tray, which the program leaves out of what it says.
        process = show(PROGRAM, machine.environ | {"G_DEBUG": ""} | environ).process
        xdotool(desktop, "search", "--sync", "--onlyvisible", "--name", f"^{NAME}$")
        return process

    return start


def ended(process: subprocess.Popen[bytes], number: int = signal.SIGTERM) -> int:
    process.send_signal(number)
    return process.wait(BOUND_S)


def test_what_opens_and_closes_is_told(
    start: Started,
    serve: Callable[[], Notices],
    forward: Command,
    lab: LabDirectory,
    machine: Machine,
) -> None:
    notices = serve()
    start()
    forward("add", "personal", "81", "--from", "any", "--expire", "1h", "--comment", "<b>&")
    found = notices.next()
    assert (found["app"], found["title"]) == ("Qubes Port Forwards", "personal tcp-81 is open to anybody")
    assert "reach port 81 of personal. It ends at 2027-01-15 " in found["body"]
    lab.set_feature("work", "forward.web", "<i>&amp;")
    forward("apply")
    found = notices.next()
    assert found["title"] == "work web is closed"
    assert found["body"].startswith("Its rule cannot be read: ")
    assert r"\x3ci\x3e\x26amp;" in found["body"]
    forward("panic")
    assert notices.next()["title"] == "Everything is held"


def test_a_later_notice_of_a_rule_takes_the_place_of_the_earlier(
    start: Started, serve: Callable[[], Notices], forward: Command, lab: LabDirectory
) -> None:
    notices = serve()
    start()
    forward("set", "work", "web", "srchosts=any")
    first = notices.next()
    line = lab.features("work")["forward.web"]
    lab.set_feature("work", "forward.web", f"{line} expire={NOW - 1}")
    forward("apply")
    second = notices.next()
    assert (second["title"], second["replaces"]) == ("work web has ended", first["id"])


def test_what_is_still_open_is_told_until_it_is_closed(
    start: Started, serve: Callable[[], Notices], forward: Command, lab: LabDirectory
) -> None:
    notices = serve()
    start()
    lab.set_feature("work", "forward.web", f"{lab.features('work')['forward.web']} enabled=no")
    found = notices.next()
    assert (found["title"], found["urgency"]) == ("work web is still open", 2)
    forward("apply")
    assert notices.next() == {"closed": found["id"]}


def test_without_anybody_to_tell_it_goes_on(
    start: Started, serve: Callable[[], Notices], forward: Command, desktop: Desktop
) -> None:
    process = start()
    match = "interface=org.freedesktop.Notifications"
    words = ["dbus-monitor", "--session", match]
    with subprocess.Popen(words, env=dict(desktop.environ), stdout=subprocess.PIPE, text=True) as monitor:
        assert monitor.stdout is not None
        forward("add", "personal", "81", "--from", "any")
        assert any("member=GetServerInformation" in line for line in monitor.stdout)
        monitor.terminate()
    notices = serve()
    forward("add", "personal", "82", "--from", "any")
    while "tcp-82" not in notices.next()["title"]:
        pass
    assert ended(process) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_end_it_does_without_a_word(start: Started, number: int) -> None:
    assert ended(start(), number) == 0


def test_a_second_start_changes_nothing(
    start: Started, show: Show, machine: Machine, desktop: Desktop
) -> None:
    first = start()
    assert show(PROGRAM, machine.environ).process.wait(BOUND_S) == 0
    assert len(xdotool(desktop, "search", "--onlyvisible", "--name", f"^{NAME}$").split()) == 1
    assert ended(first) == 0


def windows(desktop: Desktop) -> set[int]:
    """The processes of the windows that are there."""
    search = ["xdotool", "search", "--onlyvisible", "--name", f"^{TITLE}$", "getwindowpid", "%@"]
    found = subprocess.run(search, env=dict(desktop.environ), capture_output=True, timeout=BOUND_S)
    return set(map(int, found.stdout.split()))


@pytest.fixture
def window_opens(desktop: Desktop) -> Iterator[WindowOpens]:
    """Waits for a window of another program than the indicator, whose tooltip is one too; ends it at last."""
    before, found = windows(desktop), set[int]()

    def wait(indicator: subprocess.Popen[bytes]) -> None:
        end = time.monotonic() + BOUND_S
        while not found:
            assert time.monotonic() < end, "there is no window"
            xdotool(desktop, "search", "--sync", "--onlyvisible", "--name", f"^{TITLE}$")
            found.update(windows(desktop) - before - {indicator.pid})

    yield wait
    for pid in found:
        process = os.pidfd_open(pid)
        os.kill(pid, signal.SIGTERM)
        assert select.select([process], [], [], BOUND_S)[0], "the window does not end"
        os.close(process)


@pytest.mark.parametrize("text", ["", "Open the window"])
def test_a_click_on_a_notice_or_its_button_opens_the_window(
    text: str,
    start: Started,
    serve: Callable[[], Notices],
    forward: Command,
    window_opens: WindowOpens,
) -> None:
    notices = serve()
    process = start()
    forward("add", "personal", "81", "--from", "any")
    found = notices.next()
    names, texts = found["actions"][::2], found["actions"][1::2]
    assert names[0] == "default"
    notices.take(found["id"], names[texts.index(text)])
    window_opens(process)


def click(desktop: Desktop) -> None:
    """Click the icon; again, if it was elsewhere or another one afterwards."""
    search = ["search", "--onlyvisible", "--name", f"^{NAME}$"]
    place = ""
    while place != (place := xdotool(desktop, *search, "getwindowgeometry", "--shell", "%1")):
        xdotool(desktop, *search, "mousemove", "--window", "%1", "8", "8", "click", "1")


def test_a_click_on_the_icon_opens_the_window(
    start: Started, desktop: Desktop, window_opens: WindowOpens
) -> None:
    process = start()
    click(desktop)
    window_opens(process)


def test_the_menu_asks_before_it_closes_everything(
    start: Started, desktop: Desktop, reader: "Reader"
) -> None:
    start()
    search = ["search", "--onlyvisible", "--name", f"^{NAME}$"]
    xdotool(desktop, *search, "mousemove", "--window", "%1", "8", "8", "click", "3")
    reader.find("Close everything…", "menu item")
    desktop.key("Down", "Down", "Return")
    number = desktop.number("Close everything")
    assert number in xdotool(desktop, "search", "--onlyvisible", "--class", f"^{APP_ID}$").split()


def test_it_works_without_a_bus(
    start: Started, forward: Command, desktop: Desktop, window_opens: WindowOpens
) -> None:
    process = start(DBUS_SESSION_BUS_ADDRESS="unix:path=/nowhere")
    forward("add", "personal", "81", "--from", "any")
    # It takes longer than what has to be told is gathered.
    click(desktop)
    window_opens(process)
    assert ended(process) == 0
