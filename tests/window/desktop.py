# SPDX-License-Identifier: GPL-2.0-or-later
"""A desktop of its own for programs with windows: an X server, and the buses by which assistive technology
hears of them. `reader` is what reads them.
"""

import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from helpers import BOUND_S

_BUS_LAUNCHER = Path("/usr/libexec/at-spi-bus-launcher")
_END_TIMEOUT_S = 10.0
# Debian's package of each program that is needed beside GTK.
_NEEDED = {
    "Xvfb": "xvfb",
    "dbus-daemon": "dbus",
    str(_BUS_LAUNCHER): "at-spi2-core",
    "xdotool": "xdotool",
}
# Its bus starts nothing for whoever asks but the bus of assistive technology: not this machine's server of
# notifications, nor another program that happens to be installed.
_BUS = """\
<busconfig>
  <type>session</type>
  <listen>unix:dir={home}</listen>
  <servicedir>{home}/services</servicedir>
  <policy context="default">
    <allow send_destination="*" eavesdrop="true"/>
    <allow eavesdrop="true"/>
    <allow own="*"/>
  </policy>
</busconfig>
"""
_SERVICE = f"[D-BUS Service]\nName=org.a11y.Bus\nExec={_BUS_LAUNCHER}\n"
# Nothing moves by itself.
_SETTINGS = """\
[Settings]
gtk-cursor-blink = false
gtk-enable-animations = false
gtk-error-bell = false
"""


def missing() -> str | None:
    """Why there can be no desktop; None if there can."""
    packages = [package for program, package in _NEEDED.items() if shutil.which(program) is None]
    return f"a desktop needs Debian's packages {', '.join(packages)}" if packages else None


class Desktop:
    """Made by `open_desktop`. Its programs are started with `environ`."""

    def __init__(self, environ: Mapping[str, str], started: ExitStack) -> None:
        self.environ = environ
        self._started = started

    def start(
        self, words: Sequence[str], environ: Mapping[str, str], stderr: Path
    ) -> "subprocess.Popen[bytes]":
        """Start a program that is ended with the desktop, if it has not ended by then."""
        with open(stderr, "wb") as log:
            process = subprocess.Popen(
                words,
                env={**self.environ, **environ},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )
        self._started.callback(end, process)
        return process

    def number(self, title: str) -> str:
        """The X server's own number of the window with that title; waits until it is there."""
        search = ("search", "--sync", "--onlyvisible", "--limit", "1", "--name", f"^{re.escape(title)}$")
        return self._xdotool(*search).strip()

    def focus(self, title: str) -> None:
        """Give the window with that title the keyboard, as a window manager would."""
        self._xdotool("windowfocus", "--sync", self.number(title))

    def size(self, title: str, width: int, height: int) -> None:
        """Make the window with that title so wide and high, as a window manager would."""
        self._xdotool("windowsize", self.number(title), str(width), str(height))

    def clear_pointer(self) -> None:
        """Put the pointer where it points at nothing."""
        self._xdotool("mousemove", "9999", "9999")

    def key(self, *keys: str) -> None:
        """Press keys one after another, such as ``Tab`` and ``alt+a``."""
        self._xdotool("key", *keys)

    def type(self, text: str) -> None:
        """Type a text."""
        self._xdotool("type", "--delay", "1", text)

    def _xdotool(self, *words: str) -> str:
        done = subprocess.run(
            ["xdotool", *words],
            env=dict(self.environ),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=BOUND_S,
        )
        return done.stdout


@contextmanager
def open_desktop(width: int = 1280, height: int = 900, **settings: str) -> Iterator[Desktop]:
    """A screen with nothing on it, and no window manager. ``settings`` are added to the environment."""
    with tempfile.TemporaryDirectory(prefix="desktop-") as home, ExitStack() as started:
        settings_file = Path(home, "gtk-3.0", "settings.ini")
        settings_file.parent.mkdir()
        settings_file.write_text(_SETTINGS)
        environ = _environment(Path(home)) | settings
        environ["DISPLAY"] = f":{_display(started, width, height)}"
        environ["DBUS_SESSION_BUS_ADDRESS"] = _bus(started, Path(home), environ)
        yield Desktop(environ, started)


def _environment(home: Path) -> dict[str, str]:
    """Nothing of whoever runs this: not their settings, their theme, their language, nor their services."""
    kept = {
        name: os.environ[name] for name in ("PATH", "TMPDIR", "COVERAGE_PROCESS_START") if name in os.environ
    }
    return kept | {
        "HOME": str(home),
        "XDG_RUNTIME_DIR": str(home),
        "XDG_CONFIG_HOME": str(home),
        "XDG_CACHE_HOME": str(home),
        "GSETTINGS_BACKEND": "memory",
        "GIO_USE_VFS": "local",
        "GTK_USE_PORTAL": "0",
        "GDK_BACKEND": "x11",
        "GTK_THEME": "Adwaita",
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
        # A warning of GTK's is a fault of the program: it ends there.
        "G_DEBUG": "fatal-warnings",
        "G_ENABLE_DIAGNOSTIC": "1",
    }


def _display(started: ExitStack, width: int, height: int) -> str:
    ours, its = os.pipe()
    screen = ["-screen", "0", f"{width}x{height}x24", "-nolisten", "tcp", "-noreset"]
    try:
        _spawn(started, ["Xvfb", "-displayfd", str(its), *screen], os.environ, keep=(its,))
    finally:
        os.close(its)
    with os.fdopen(ours) as answer:
        return answer.readline().strip()


def _bus(started: ExitStack, home: Path, environ: Mapping[str, str]) -> str:
    """The address of its session bus."""
    services, config = home / "services", home / "bus.conf"
    services.mkdir()
    (services / "org.a11y.Bus.service").write_text(_SERVICE)
    config.write_text(_BUS.format(home=home))
    words = ["dbus-daemon", f"--config-file={config}", "--nofork", "--nopidfile", "--print-address=1"]
    bus = _spawn(started, words, environ)
    assert bus.stdout is not None
    return bus.stdout.readline().decode().strip()


def _spawn(
    started: ExitStack, words: Sequence[str], environ: Mapping[str, str], keep: Sequence[int] = ()
) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen(
        words,
        env=dict(environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        pass_fds=keep,
    )
    started.callback(end, process)
    return process


def end(process: "subprocess.Popen[bytes]") -> None:
    """Ask a program to end, and kill it if it does not."""
    if process.stdout is not None:
        process.stdout.close()
    for number in (signal.SIGTERM, signal.SIGKILL):
        process.send_signal(number)
        try:
            process.wait(_END_TIMEOUT_S)
            return
        except subprocess.TimeoutExpired:
            continue
