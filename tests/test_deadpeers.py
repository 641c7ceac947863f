# SPDX-License-Identifier: GPL-2.0-or-later
import socket
import subprocess
import sys
from ipaddress import ip_address

import pytest
from helpers import port_of

from qubes_fwd_qrexec import deadpeers, localserver
from qubes_fwd_qrexec.accepting import open_listening
from qubes_fwd_qrexec.lab import netns


def asks(sock: socket.socket) -> bool:
    """Whether a dead peer of it is noticed, in the time that is said."""
    tcp = socket.IPPROTO_TCP
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)) and (
        sock.getsockopt(tcp, socket.TCP_KEEPIDLE),
        sock.getsockopt(tcp, socket.TCP_KEEPINTVL),
        sock.getsockopt(tcp, socket.TCP_KEEPCNT),
        sock.getsockopt(tcp, socket.TCP_USER_TIMEOUT),
    ) == (300, 60, 10, 900_000)


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


def test_the_questions_end_when_the_user_timeout_does() -> None:
    asked_s = deadpeers.IDLE_S + deadpeers.COUNT * deadpeers.INTERVAL_S
    assert asked_s * 1000 == deadpeers.USER_TIMEOUT_MS


_CODE = """
import ctypes, os, select, socket, subprocess, sys, time
from ipaddress import ip_address
from qubes_fwd_qrexec import deadpeers
from qubes_fwd_qrexec.accepting import open_listening
if ctypes.CDLL(None, use_errno=True).unshare(0x40000000):  # CLONE_NEWNET
    sys.exit(os.strerror(ctypes.get_errno()))
def loopback(state):
    subprocess.run(["ip", "link", "set", "lo", state], check=True)
deadpeers.IDLE_S = deadpeers.INTERVAL_S = deadpeers.COUNT = 1
deadpeers.USER_TIMEOUT_MS = 2000
loopback("up")
with open_listening(ip_address("127.0.0.1"), 0) as listening:
    listening.setblocking(True)
    client = socket.create_connection(listening.getsockname())
    accepted, _ = listening.accept()
if sys.argv[1] == "sending":
    accepted.send(b"x")
    client.recv(1)
loopback("down")
if sys.argv[1] == "sending":
    accepted.send(b"x")
select.select([accepted], [], [], 20)
try:
    accepted.setblocking(False)
    accepted.recv(1)
except OSError as error:
    print("gone" if not isinstance(error, BlockingIOError) else "never noticed")
"""


@pytest.mark.skipif(
    netns.why_unavailable() is not None, reason=f"no namespaces here: {netns.why_unavailable()}"
)
@pytest.mark.parametrize("what", ["idle", "sending"])
def test_a_peer_behind_a_network_that_is_gone_is_noticed(what: str) -> None:
    """relay-behaviours 38, in a namespace of its own, with seconds in the place of minutes."""
    found = subprocess.run(
        [sys.executable, "-c", _CODE, what], capture_output=True, text=True, timeout=60, check=False
    )
    assert (found.stdout, found.stderr) == ("gone\n", "")
