# SPDX-License-Identifier: GPL-2.0-or-later
"""The second half of the demo, where each qube has a firewall: forwards by nft, of TCP and of UDP."""

import sys

from . import netns
from .demo_stage import no_answer, retried
from .narration import Narrator, check
from .session import LabSession, output_of

_TARGET = "work"
_PATH = (_TARGET, "sys-firewall", netns.EDGE)
_TCP_PORT, _UDP_PORT = "8081", "5000"
_ANSWER_TIMEOUT_S = 60.0
# How long one waits who is not to get an answer.
_REFUSAL_TIMEOUT_S = 0.5
# Greets by TCP, and by UDP gives back what it gets, on all addresses.
_SERVER = """\
import selectors, socket, sys
tcp = socket.create_server(("", int(sys.argv[1])))
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(("", int(sys.argv[2])))
ready = selectors.DefaultSelector()
for sock in (tcp, udp):
    ready.register(sock, selectors.EVENT_READ)
while True:
    for key, _ in ready.select():
        if key.fileobj is udp:
            data, peer = udp.recvfrom(2048)
            udp.sendto(b"echo of " + data, peer)
        else:
            connection, peer = tcp.accept()
            with connection:
                connection.sendall(f"Hello from the qube 'work' to {peer[0]}.\\n".encode())
"""
# Asks until it is answered, as a busy machine's qubes may not all be open yet, and says what came back or why
# nothing did.
_CLIENT = """\
import socket, sys, time
kind, host, port, source, timeout = sys.argv[1:]
until = time.monotonic() + float(timeout)
type = socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM
while True:
    try:
        with socket.socket(socket.AF_INET, type) as sock:
            sock.settimeout(min(2.0, float(timeout)))
            sock.bind((source, 0))
            sock.connect((host, int(port)))
            if kind == "udp":
                sock.send(b"a datagram")
            print(sock.recv(2048).decode().strip())
        break
    except OSError as error:
        if time.monotonic() > until:
            sys.exit(f"no answer: {error.strerror or error}")
        time.sleep(0.1)
"""


def run_nft_demo(session: LabSession, narrator: Narrator) -> None:
    """All steps, in their order. Raises `SessionError` at the first that fails."""
    say = narrator.say
    say(
        "There is another way, mode nft: the qubes on the path forward packets, at full speed, and UDP too. "
        "The service qubes-forward-nft is switched on in each of them, and each keeps its own firewall:"
    )
    for qube in _PATH:
        narrator.lab("service", qube, "qubes-forward-nft", "on")
    narrator.lab("listen", *_PATH)

    say(f"In 'work', a server listens on TCP port {_TCP_PORT}, and an echo server on UDP port {_UDP_PORT}.")
    session.start(session.in_qube(_TARGET, sys.executable, "-I", "-c", _SERVER, _TCP_PORT, _UDP_PORT))
    greeted = _client("tcp", "127.0.0.1", _TCP_PORT, "127.0.0.1", _ANSWER_TIMEOUT_S)
    retried(lambda: output_of(session.in_qube(_TARGET, *greeted)))

    say("In dom0, one command for each; what each qube has to do follows from the rule:")
    source = ("--from", "192.168.77.0/24")
    narrator.forward("add", _TARGET, f"81:{_TCP_PORT}", "--name", "greeting", *source, "--mode", "nft")
    narrator.forward("add", _TARGET, _UDP_PORT, "--name", "echo", "--proto", "udp", *source, "--mode", "nft")
    narrator.forward("show", _TARGET, "greeting")

    say(f"The allowed client at {netns.LAN_HOST} is greeted by its own address, and its datagram comes back:")
    greeting, echo = (
        output_of(_from_lan(session, kind, port, netns.LAN_HOST, _ANSWER_TIMEOUT_S)).strip()
        for kind, port in (("tcp", "81"), ("udp", _UDP_PORT))
    )
    narrator.show(f"{greeting}\n{echo}")
    check(greeting == f"Hello from the qube 'work' to {netns.LAN_HOST}.", "this is not the greeting")
    check(echo == "echo of a datagram", "this is not the echo")

    say(f"The client at {netns.LAN_HOST_REFUSED} gets nothing:")
    narrator.show(no_answer(_from_lan(session, "tcp", "81", netns.LAN_HOST_REFUSED, _REFUSAL_TIMEOUT_S)))

    say("In dom0, both are removed, and every qube on the path says that it has closed:")
    narrator.forward("remove", _TARGET, "greeting")
    narrator.forward("remove", _TARGET, "echo")
    narrator.show(no_answer(_from_lan(session, "tcp", "81", netns.LAN_HOST, _REFUSAL_TIMEOUT_S)))
    narrator.show(no_answer(_from_lan(session, "udp", _UDP_PORT, netns.LAN_HOST, _REFUSAL_TIMEOUT_S)))


def _client(kind: str, host: str, port: str, source: str, timeout_s: float) -> list[str]:
    return [sys.executable, "-I", "-c", _CLIENT, kind, host, port, source, str(timeout_s)]


def _from_lan(session: LabSession, kind: str, port: str, source: str, timeout_s: float) -> list[str]:
    """A client on the LAN, which asks sys-net."""
    return session.in_qube(netns.LAN, *_client(kind, netns.EDGE_ADDRESS, port, source, timeout_s))
