# SPDX-License-Identifier: GPL-2.0-or-later
"""``demo`` and ``relay`` as a user runs them: what they say, how they end, and what they leave behind."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from bounds import BOUND_S

from qubes_fwd_qrexec.common.errors import TextError
from qubes_fwd_qrexec.lab import cli, demo, netns
from qubes_fwd_qrexec.lab.relay_command import parse_forward

_LAB = (sys.executable, "-m", "qubes_fwd_qrexec.lab.cli")
_NEEDS_NAMESPACES = pytest.mark.skipif(
    netns.why_unavailable() is not None, reason=f"no namespaces here: {netns.why_unavailable()}"
)


@pytest.mark.parametrize("network", [pytest.param("namespaces", marks=_NEEDS_NAMESPACES), "loopback"])
def test_demo_shows_the_page_and_both_refusals_whatever_lies_where_it_runs(
    network: str, tmp_path: Path
) -> None:
    """Modules of the working directory are not taken for Python's, by any program of the lab."""
    options = [] if network == "namespaces" else ["--no-netns"]
    place, temporary = tmp_path / "here", tmp_path / "tmp"
    for directory in (place, temporary):
        directory.mkdir()
    for name in ("socket", "json", "http", "trio", "signal", "select", "qubesdb"):
        (place / f"{name}.py").write_text("raise SystemExit('the wrong module')\n", encoding="ascii")
    done = subprocess.run(
        [sys.executable, "-P", *_LAB[1:], "demo", *options],
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=False,
        cwd=place,
        env=os.environ | {"TMPDIR": str(temporary)},
    )
    assert done.returncode == 0, done.stderr
    assert "wrong module" not in done.stdout + done.stderr
    refusals = ["gets nowhere", "port is closed"]
    if network == "loopback":
        refusals = ["Connection reset by peer", "Connection refused"]
    page, stranger, closed = (done.stdout.index(text) for text in ("Hello from the qube", *refusals))
    answer = done.stdout.index("the vault has heard: Where is the key?")
    assert page < stranger < closed < answer
    has_nft = network == "namespaces" and netns.why_no_firewall() is None
    for said in (f"Hello from the qube 'work' to {netns.LAN_HOST}.", "echo of a datagram"):
        assert (said in done.stdout) is has_nft
    assert list(temporary.iterdir()) == []


def test_place_whose_path_is_too_long_for_sockets_is_named(tmp_path: Path) -> None:
    place = tmp_path / ("x" * 100)
    place.mkdir()
    done = subprocess.run(
        [*_LAB, "demo", "--no-netns"],
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=False,
        env=os.environ | {"TMPDIR": str(place)},
    )
    assert done.returncode == 1
    assert f"no lab in {place}: its sockets would have paths of" in done.stderr
    assert "set TMPDIR to another directory" in done.stderr
    assert list(place.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("words", ["demo --no-netns", "init {}/lab"])
def test_place_without_programs_is_named(tmp_path: Path, words: str) -> None:
    command = shlex.join([*_LAB, *words.format(tmp_path).split()])
    script = f"mount -t tmpfs -o noexec none {tmp_path} && exec {command}"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script],
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=False,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 1
    assert "no program can be run from there, as on a file system mounted noexec" in done.stderr
    assert ("set TMPDIR" in done.stderr) == words.startswith("demo")


def test_demo_whose_client_gets_no_page_fails_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(demo, "_CLIENT", "raise SystemExit('no answer: the client is broken')")
    assert cli.main(["demo", "--no-netns"]) == 1
    assert "the client is broken" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_relay_that_cannot_listen_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [*_LAB, "relay", f"127.0.0.1:{port}=8080"],
            capture_output=True,
            text=True,
            timeout=BOUND_S,
            check=False,
            env=os.environ | {"TMPDIR": str(tmp_path)},
        )
    assert done.returncode == 1
    assert f"127.0.0.1:{port}: the port is in use" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_relay_carries_datagrams(tmp_path: Path) -> None:
    kind = (socket.AF_INET, socket.SOCK_DGRAM)
    with socket.socket(*kind) as server, socket.socket(*kind) as client:
        for sock in (server, client):
            sock.bind(("127.0.0.1", 0))
            sock.settimeout(1.0)
        place = ("127.0.0.2", client.getsockname()[1])  # its port at another address: nobody else takes that
        command = [*_LAB, "relay", "--udp", f"{place[0]}:{place[1]}={server.getsockname()[1]}"]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": str(tmp_path)}
        ) as relay:
            assert relay.stdout is not None
            with bounded(relay):
                assert relay.stdout.readline() == f"ready {place[0]}:{place[1]}\n"
                data = b""
                while not data and relay.poll() is None:  # the first may be too old when the call is through
                    client.sendto(b"ping", place)
                    with suppress(TimeoutError):
                        asked, peer = server.recvfrom(64)
                        server.sendto(asked + b"pong", peer)
                        data = client.recv(64)
                assert data == b"pingpong"
                relay.send_signal(signal.SIGTERM)
                assert relay.wait(BOUND_S) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "address", "port", "target"),
    [
        ("127.0.0.1:8000=8080", "127.0.0.1", 8000, 8080),
        ("[::1]:1=65535", "::1", 1, 65535),
    ],
)
def test_relay_reads_its_forward(text: str, address: str, port: int, target: int) -> None:
    found = parse_forward(text)
    assert (str(found[0]), *found[1:]) == (address, port, target)


@pytest.mark.parametrize(
    "text", ["", "8000=8080", "127.0.0.1:8000", "localhost:1=2", "127.0.0.1:0=1", "::1:1=2"]
)
def test_relay_refuses_what_is_no_forward(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TextError):
        parse_forward(text)
    assert cli.main(["relay", text]) == 2
    assert "is not" in capsys.readouterr().err


@contextmanager
def bounded(process: "subprocess.Popen[str]") -> Iterator[None]:
    """Kill a process that reads and waits would otherwise wait for without end."""
    timer = threading.Timer(BOUND_S, process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        process.kill()


def processes_that_name(path: Path) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            words = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
            if bytes(path) in words:
                found.append(words.decode(errors="replace"))
    return found
