# SPDX-License-Identifier: GPL-2.0-or-later
import socket
import subprocess
import sys
from ipaddress import ip_address

import pytest
from bounds import BOUND_S
from helpers import port_of

from qubes_fwd_qrexec.lab import netns
from qubes_fwd_qrexec.relay.acceptloop import open_listening
from qubes_fwd_qrexec.target import localserver


def asks(sock: socket.socket) -> bool:
    """Whether a dead peer of it is noticed, in the time that is said."""
    tcp = socket.IPPROTO_TCP
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)) and (
        sock.getsockopt(tcp, socket.TCP_KEEPIDLE),
        sock.getsockopt(tcp, socket.TCP_KEEPINTVL),
        sock.getsockopt(tcp, socket.TCP_KEEPCNT),
        sock.getsockopt(tcp, socket.TCP_USER_TIMEOUT),
    ) == (300, 60, 10, 0)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_what_is_accepted_notices_dead_peers(host: str) -> None:
    with open_listening(ip_address(host), 0) as listening:
        listening.setblocking(True)
        with socket.create_connection((host, port_of(listening))) as client:
            accepted, _ = listening.accept()
            with accepted:
                assert asks(accepted)
                assert not asks(client)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_the_connection_to_the_server_notices_dead_peers(family: int) -> None:
    with localserver.new_socket(family) as sock:
        assert asks(sock)


_CODE = """
import ctypes, os, select, socket, subprocess, sys, time
from ipaddress import ip_address
from pathlib import Path
from qubes_fwd_qrexec.system import deadpeers
from qubes_fwd_qrexec.relay.acceptloop import open_listening
if ctypes.CDLL(None, use_errno=True).unshare(0x40000000):  # CLONE_NEWNET
    sys.exit(os.strerror(ctypes.get_errno()))
def loopback(state):
    subprocess.run(["ip", "link", "set", "lo", state], check=True)
def probes():
    names, numbers = [
        line.split()
        for line in Path("/proc/net/netstat").read_text().splitlines()
        if line.startswith("TcpExt:")
    ]
    return int(dict(zip(names, numbers))["TCPWinProbe"])
def fill():
    sent = 0
    while select.select([], [accepted], [], 0.3)[1]:
        sent += accepted.send(bytes(65536))
    return sent
deadpeers.IDLE_S = deadpeers.INTERVAL_S = deadpeers.COUNT = 1
Path("/proc/sys/net/ipv4/tcp_retries2").write_text("3")  # of this namespace alone
loopback("up")
what = sys.argv[1]
with open_listening(ip_address("127.0.0.1"), 0) as listening:
    listening.setblocking(True)
    client = socket.create_connection(listening.getsockname())
    accepted, _ = listening.accept()
accepted.setblocking(False)
if what in ("stalled", "paused"):
    sent = fill()
if what == "paused":
    while probes() < 5:  # more of them than may stay unanswered
        time.sleep(0.01)
    got = 0
    while got < sent:
        got += len(client.recv(1 << 20))
    accepted.send(b"x")
    print("alive" if client.recv(1) == b"x" else "gone")
    sys.exit()
if what == "sending":
    accepted.send(b"x")
    client.recv(1)
loopback("down")
if what == "sending":
    accepted.send(b"x")
gone = select.poll()
gone.register(accepted, 0)
gone.poll(150_000)
try:
    accepted.recv(1)
except OSError as error:
    print("gone" if not isinstance(error, BlockingIOError) else "never noticed")
"""

in_a_namespace = pytest.mark.skipif(
    netns.why_unavailable() is not None, reason=f"no namespaces here: {netns.why_unavailable()}"
)


def found_in_a_namespace(what: str) -> str:
    """With seconds and a few retries instead of minutes."""
    found = subprocess.run(
        [sys.executable, "-c", _CODE, what], capture_output=True, text=True, timeout=BOUND_S, check=False
    )
    assert found.stderr == ""
    return found.stdout.strip()


@in_a_namespace
@pytest.mark.parametrize("what", ["idle", "sending", "stalled"])
def test_a_peer_behind_a_network_that_is_gone_is_noticed(what: str) -> None:
    """docs/behaviours.md, 38."""
    assert found_in_a_namespace(what) == "gone"


@in_a_namespace
def test_a_peer_that_takes_nothing_and_answers_is_not_gone() -> None:
    """It stays for longer than any that does not answer, and has all bytes then."""
    assert found_in_a_namespace("paused") == "alive"
