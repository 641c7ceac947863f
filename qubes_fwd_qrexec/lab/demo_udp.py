# SPDX-License-Identifier: GPL-2.0-or-later
"""The part of the demo about UDP over qrexec: datagrams to a qube that has no network at all."""

import sys

from . import netns
from .demo_stage import Stage, no_answer, retried
from .narration import Narrator, check
from .session import LabSession, output_of

_TARGET = "vault"
_ANSWER_TIMEOUT_S = 60.0
# How long one waits who is not to get an answer.
_REFUSAL_TIMEOUT_S = 0.5
# Gives back what it gets, on the qube's own loopback.
_SERVER = """\
import socket, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind(("127.0.0.1", int(sys.argv[1])))
while True:
    data, peer = sock.recvfrom(2048)
    sock.sendto(b"the vault has heard: " + data, peer)
"""
# Asks until it is answered, as every client of UDP does, and says what came back or why nothing did.
_CLIENT = """\
import socket, sys, time
host, port, source, timeout = sys.argv[1:]
until = time.monotonic() + float(timeout)
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.settimeout(0.5)
sock.bind((source, 0))
sock.connect((host, int(port)))
while True:
    try:
        sock.send(b"Where is the key?")
        print(sock.recv(2048).decode())
        break
    except OSError as error:
        if time.monotonic() > until:
            sys.exit(f"no answer: {error.strerror or error}")
        time.sleep(0.1)
"""


def run_udp_demo(session: LabSession, narrator: Narrator, stage: Stage) -> None:
    """All steps, in their order. Raises `SessionError` at the first that fails."""
    say, forward = narrator.say, narrator.forward
    say(
        f"UDP works the same way. The qube '{_TARGET}' has no netvm, and a server there answers datagrams to "
        f"127.0.0.1:{stage.udp_target_port}. One command, and one policy line, which allows no TCP:"
    )
    words = (sys.executable, "-I", "-c", _SERVER, stage.udp_target_port)
    session.start(session.in_qube(_TARGET, *words))
    forward(
        *("add", _TARGET, f"{stage.udp_port}:{stage.udp_target_port}", "--name", "key", "--proto", "udp"),
        *("--mode", "qrexec", "--via", "sys-net", "--from", stage.network, *stage.listen),
    )
    policy = forward("policy")
    check(f"qubes.ForwardUDP  +{stage.udp_target_port}+mux" in policy, "the policy has no line for UDP")

    say(f"The client at {stage.allowed} asks, and is answered; the one at {stage.stranger} gets no answer:")
    answer = output_of(_client(session, stage, stage.allowed, _ANSWER_TIMEOUT_S))
    narrator.show(answer)
    check(answer == "the vault has heard: Where is the key?\n", "this is not what the server says")
    narrator.show(no_answer(_client(session, stage, stage.stranger, _REFUSAL_TIMEOUT_S)))

    say("In dom0, the rule is removed, and nobody gets an answer any more:")
    forward("remove", _TARGET, "key")
    unheard = _client(session, stage, stage.allowed, _REFUSAL_TIMEOUT_S)
    narrator.show(retried(lambda: no_answer(unheard)))


def _client(session: LabSession, stage: Stage, source: str, timeout_s: float) -> list[str]:
    words = (sys.executable, "-I", "-c", _CLIENT, stage.address, stage.udp_port, source, str(timeout_s))
    return session.in_qube(netns.LAN, *words) if session.has_namespaces else list(words)
