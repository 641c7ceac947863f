# SPDX-License-Identifier: GPL-2.0-or-later
"""``qvm-forward-lab demo``: a forward, from the command in dom0 to the page on the LAN, until it is closed.

Every step runs the real program and is checked; the first that fails ends the demo with exit status 1. Run
by root, the qubes are network namespaces, joined and guarded as on Qubes; otherwise they share this machine's
loopback.
"""

import argparse
import sys
import time
from pathlib import Path

from . import netns
from .daemon import Network
from .demo_nft import run_nft_demo
from .demo_stage import Stage, no_answer, retried
from .demo_udp import run_udp_demo
from .narration import Narrator, check
from .session import LabSession, SessionError, open_session, output_of
from .store import LabStore

_PAGE = "Hello from the qube 'work'. No IP packet can reach me.\n"
_POLL_S = 0.05
_PAGE_TIMEOUT_S = 60.0
# How long one waits who is not to get an answer.
_REFUSAL_TIMEOUT_S = 0.5
# A client that says where it connects from, and prints the page or why there is none.
_CLIENT = """\
import http.client, sys
host, port, source, timeout = sys.argv[1:]
try:
    connection = http.client.HTTPConnection(
        host, int(port), timeout=float(timeout), source_address=(source, 0)
    )
    connection.request("GET", "/")
    print(connection.getresponse().read().decode(), end="")
except OSError as error:
    sys.exit(f"no answer: {error.strerror or error}")
"""
# Succeeds once the server in the qube accepts, on the qube's own loopback.
_SERVER_CHECK = """\
import socket, sys
socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=1).close()
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Show a forward from end to end in a lab of its own; takes less than a minute."
    parser.add_argument("--no-netns", action="store_true", help="use the loopback even as root")


def run_demo(session: LabSession) -> None:
    """All steps, in their order. Raises `SessionError` at the first that fails."""
    stage = Stage.of(session)
    narrator = Narrator(session)
    say, forward = narrator.say, narrator.forward
    if session.has_ip:
        say(
            "Each qube of this lab is a network namespace, joined to its netvm as on Qubes. Firewalls let "
            "in nothing, so that no qube reaches another:"
        )
        narrator.show_in_qube("work", "ip", "-brief", "address")
    elif session.has_namespaces:
        say("Each qube of this lab is a network namespace. Without nftables, no IP path joins them:")
        narrator.show_in_qube("work", "ip", "-brief", "address")
    else:
        say(
            "This is the loopback form of the lab: its qubes share this machine's loopback interface, and "
            "clients are told apart by addresses such as 127.0.0.2. As root, with Debian's packages iproute2 "
            "and nftables, each qube has a network of its own, with a firewall."
        )

    say(f"In the qube 'work', a web server listens on 127.0.0.1:{stage.target_port}.")
    _start_server(session, stage)

    say("In sys-net, the units start what listens there, and the firewall helper where there is a firewall:")
    narrator.lab("listen", "sys-net")
    say("In dom0, this runs in the background, as a unit:")
    _start_watch(session, narrator)

    say("In dom0, one command makes it reachable, for eight hours and for one network:")
    forward(
        *("add", "work", f"{stage.port}:{stage.target_port}", "--name", "web", "--from", stage.network),
        *("--mode=qrexec", "--expire", "+8h", "--comment", "demo for the office", *stage.listen),
    )
    say("This is the rule, stored once at its target, and what was derived from it:")
    forward("show", "work", "web")
    say("dom0's policy allows exactly this forward, and nothing else:")
    policy = forward("policy")
    check(f"+{stage.target_port}" in policy and " work " in policy, "the policy has no line for the forward")

    say(f"A client at {stage.allowed}, which is allowed, fetches the page:")
    page = output_of(_client(session, stage, stage.allowed, _PAGE_TIMEOUT_S))
    narrator.show(page)
    check(page == _PAGE, "this is not the page that the server has")

    say(f"A client at {stage.stranger}, which is not allowed, gets nowhere, and dom0 is not even asked:")
    narrator.show(no_answer(_client(session, stage, stage.stranger, _REFUSAL_TIMEOUT_S)))

    say("In dom0, the rule is removed:")
    forward("remove", "work", "web")
    policy = forward("policy")
    check(f"+{stage.target_port}" not in policy, "the policy still has a line for the forward")
    say("The line is gone from the policy, and the port is closed:")
    narrator.show(retried(lambda: _closed(session, stage)))
    run_udp_demo(session, narrator, stage)
    if session.has_ip:
        run_nft_demo(session, narrator)
    say("That was all. The lab is taken down.")


def run(arguments: argparse.Namespace) -> int:
    network = Network.LOOPBACK if arguments.no_netns else Network.AUTO
    with open_session(network) as session:
        run_demo(session)
    return 0


def _start_server(session: LabSession, stage: Stage) -> None:
    place = Path(session.lab.run_dir) / "www"
    place.mkdir()
    (place / "index.html").write_text(_PAGE, encoding="utf-8")
    words = (
        sys.executable,
        "-I",
        "-m",
        "http.server",
        stage.target_port,
        "--bind",
        "127.0.0.1",
        "--directory",
        str(place),
    )
    with open(session.lab.run_dir / "www.log", "wb") as log:
        session.start(session.in_qube("work", *words), stdout=log, stderr=log)
    check = session.in_qube("work", sys.executable, "-I", "-c", _SERVER_CHECK, stage.target_port)
    try:
        retried(lambda: output_of(check))
    except SessionError:
        raise SessionError(f"the web server does not start; is port {stage.target_port} taken?") from None


def _start_watch(session: LabSession, narrator: Narrator) -> None:
    narrator.show("$ qvm-forward watch")
    words = session.command("admin.views.cli", "--lab", str(session.lab.root), "watch")
    with open(session.lab.run_dir / "watch.log", "wb") as log:
        watch = session.start(words, stdout=log, stderr=log)
    store = LabStore(session.lab)

    def is_running() -> str:
        if watch.poll() is None and store.unwatched() is None:
            return ""
        time.sleep(_POLL_S)
        raise SessionError("qvm-forward watch does not start")

    retried(is_running)


def _client(session: LabSession, stage: Stage, source: str, timeout_s: float) -> list[str]:
    client = (sys.executable, "-I", "-c", _CLIENT, stage.address, stage.port, source, str(timeout_s))
    return session.in_qube(netns.LAN, *client) if session.has_namespaces else list(client)


def _closed(session: LabSession, stage: Stage) -> str:
    """Raises `SessionError` while it is not."""
    refusal = no_answer(_client(session, stage, stage.allowed, _REFUSAL_TIMEOUT_S))
    if "refused" in refusal or (session.has_ip and "timed out" in refusal):
        return refusal
    raise SessionError(f"the port is not closed: {refusal}")
