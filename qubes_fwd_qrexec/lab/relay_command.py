# SPDX-License-Identifier: GPL-2.0-or-later
"""``qvm-forward-lab relay``: one forward on loopback, for any test tool of TCP or UDP to be pointed at.

Broker, rule, policy, listener and service are the real ones; only the qubes are not.
"""

import argparse
import re
import subprocess

from qubes_fwd_qrexec.common.errors import TextError
from qubes_fwd_qrexec.common.rules import Transport
from qubes_fwd_qrexec.common.values import IPAddress, address_text, parse_address, parse_port

from .daemon import Network
from .session import LabSession, SessionError, open_session

_TARGET = "work"
_EXPOSED = "sys-net"
_SHAPE = re.compile(r"(?:\[(?P<ipv6>[^]]*)\]|(?P<ipv4>[^:]*)):(?P<port>[^=]*)=(?P<target>.*)\Z", re.DOTALL)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Bring up a lab with one forward on loopback, print 'ready ADDR:PORT' once connections or datagrams "
        "are taken, and run until SIGINT or SIGTERM. The server at TARGET_PORT is yours to start."
    )
    parser.add_argument("forward", metavar="LISTEN_ADDR:PORT=TARGET_PORT")
    kind = parser.add_mutually_exclusive_group()
    transports = [str(transport) for transport in Transport]
    kind.add_argument("--transport", choices=transports, default=str(Transport.AUTO))
    kind.add_argument("--udp", action="store_true", help="forward UDP instead of TCP")
    parser.add_argument("--calls", metavar="N", help="calls at once (default: the listener's own)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="OPTION=VALUE",
        help="another option of the rule, such as proxy=v2",
    )


def parse_forward(text: str) -> tuple[IPAddress, int, int]:
    """Address, port and target port of ``LISTEN_ADDR:PORT=TARGET_PORT``. Raises `TextError`."""
    parts = _SHAPE.match(text)
    if parts is None:
        raise TextError(text, "LISTEN_ADDR:PORT=TARGET_PORT, such as 127.0.0.1:8000=8080 or [::1]:8000=8080")
    address = parse_address(parts["ipv6"] if parts["ipv4"] is None else parts["ipv4"])
    return address, parse_port(parts["port"]), parse_port(parts["target"])


def run(arguments: argparse.Namespace) -> int:
    """Raises `TextError` for a bad argument, `SessionError` where something ends that should not."""
    address, port, target_port = parse_forward(arguments.forward)
    try:
        with open_session(Network.LOOPBACK) as session:
            listener = _expose(session, address, port, target_port, arguments)
            print(f"ready {address_text(address, port)}", flush=True)
            status = listener.wait()
            raise SessionError(f"the listener ended with exit status {status}")
    except KeyboardInterrupt:
        return 0


def _expose(
    session: LabSession, address: IPAddress, port: int, target_port: int, arguments: argparse.Namespace
) -> subprocess.Popen[bytes]:
    session.forward(
        *("add", _TARGET, f"{port}:{target_port}", "--name", "relay", "--from", "any", "--via", _EXPOSED),
        *("--listen", str(address), "--mode", "qrexec"),
        *(("--proto", "udp") if arguments.udp else ("--transport", arguments.transport)),
    )
    if arguments.set:
        session.forward("set", _TARGET, "relay", *arguments.set)
    return session.start_listener(
        _EXPOSED, *(() if arguments.calls is None else ("--calls", arguments.calls))
    )
