# SPDX-License-Identifier: GPL-2.0-or-later
"""UDP over qrexec in a lab with networks: to a target behind a VPN, and to one that a qube asks by name."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

from qubes_fwd_qrexec.lab import daemon, netns
from qubes_fwd_qrexec.lab.session import LabSession, SessionError, open_session

PROBLEM = netns.why_unavailable() or netns.why_no_firewall()
pytestmark = pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))

SERVER_PORT = 5353
SERVER = f"""
import socket
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind(("127.0.0.1", {SERVER_PORT}))
print("up", flush=True)
while True:
    question, client = sock.recvfrom(100)
    sock.sendto(b"answer to " + question, client)
"""
# Hears nobody but whom it asks, and asks again each second, as a datagram may be lost.
CLIENT = """
import socket, sys
host, port = sys.argv[1], int(sys.argv[2])
sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
sock.settimeout(1)
try:
    sock.connect((host, port))
    for _ in range(60):
        sock.send(b"question")
        try:
            print(sock.recv(100).decode())
            break
        except TimeoutError:
            pass
except OSError as error:
    print(type(error).__name__)
"""


@pytest.fixture(scope="module")
def session() -> Iterator[LabSession]:
    with open_session(daemon.Network.NAMESPACES) as opened:
        opened.lab_command("listen", "sys-net", "sys-vpn", "sys-firewall")
        for target in ("untrusted", "vault"):
            words = opened.in_qube(target, sys.executable, "-c", SERVER)
            server = opened.start(words, stdout=subprocess.PIPE)
            assert server.stdout is not None
            with server.stdout:
                assert server.stdout.readline() == b"up\n"
        yield opened


def ask(session: LabSession, qube: str, address: str, port: int) -> str:
    """What a client in the qube gets to hear, or the kind of its error, or nothing."""
    words = session.in_qube(qube, sys.executable, "-c", CLIENT, address, str(port))
    return subprocess.run(words, stdout=subprocess.PIPE, timeout=100, check=True).stdout.decode().strip()


@pytest.mark.parametrize(("proto", "port"), [("udp", 5000), ("both", 5001)])
def test_udp_to_a_target_behind_a_vpn_comes_by_the_tunnel_and_not_from_the_lan(
    session: LabSession, proto: str, port: int
) -> None:
    add = ("add", "untrusted", f"{port}:{SERVER_PORT}", "--proto", proto, "--name", proto)
    with pytest.raises(SessionError, match="listening at sys-net would bypass it"):
        session.forward(*add, "--from", "192.168.0.0/16", "--mode", "qrexec")
    # Nothing of it was stored: the name and the port are free.
    session.forward(*add, "--from", "any", "--via", "sys-vpn")
    for address in ("10.8.0.2", "fd08::2"):
        assert ask(session, netns.PROVIDER, address, port) == "answer to question"


def test_a_qube_that_is_named_asks_a_qube_without_network_and_its_neighbour_does_not(
    session: LabSession,
) -> None:
    words = ("add", "vault", f"53:{SERVER_PORT}", "--proto", "udp", "--via", "sys-firewall")
    session.forward(*words, "--internal", "--from", "personal")
    netvm = session.lab.qube("sys-firewall")
    for address in (netvm.ip, netvm.ip6):
        assert ask(session, "personal", str(address), 53) == "answer to question"
    # The stock rules reject what comes from a qube by IPv4.
    assert ask(session, "work", str(netvm.ip), 53) == "OSError"
