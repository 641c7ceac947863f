# SPDX-License-Identifier: GPL-2.0-or-later
"""The peers: ways for a client's TCP connection to reach the server, each measured in the same rows.

To add one, subclass `Peer` (or `ListenerPeer`, for another transport of ours) and name it in `PEERS`.
"""

import shlex
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import ClassVar

from qubes_fwd_qrexec.common.config import ListenerConfig, Service, Side
from qubes_fwd_qrexec.common.rules import Limits, Transport
from qubes_fwd_qrexec.common.values import ListenPorts, QubeName, RuleName, Sources, TargetPorts
from qubes_fwd_qrexec.lab.knobs import CALLS_PER_TARGET

from . import load
from .labprocess import TARGET
from .processes import BenchError, Child

_HOST = "127.0.0.1"
# All load comes from one client, which by default may have fewer connections than are held.
_LIMITS = Limits(connections=12_000, per_source=12_000, rate=100_000)
_READY_S = 60.0
_RETRY_S = 0.02


@dataclass(frozen=True, slots=True)
class Setting:
    """What every peer is given: the server, the qrexec client's command and a directory for its files.

    Our listener listens at ``listen``, for ``sources``.
    """

    server_port: int
    client: Sequence[str]
    directory: Path
    listen: str = _HOST
    sources: str = f"{_HOST}/32"


class Peer:
    """One way to the server. ``address`` is where clients connect, once `start` has returned."""

    name: ClassVar[str]
    title: ClassVar[str]
    # Whether each connection is a call, of which a qube has room for 30.
    is_call_each: ClassVar[bool] = False

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.address = (_HOST, setting.server_port)
        self._child: Child | None = None

    @classmethod
    def missing(cls) -> str | None:
        """What must be installed before this peer can be measured; None if nothing."""
        return None

    def command(self, port: int) -> list[str] | None:
        """The program that listens on ``port`` of 127.0.0.1 for clients; None if there is none."""
        return None

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes that were started; what they start in turn is found as their descendants."""
        return () if self._child is None else (self._child.pid,)

    def start(self) -> None:
        """Start, and wait until a byte is echoed. Raises `BenchError`."""
        port = free_port()
        command = self.command(port)
        if command is not None:
            self.address = (_HOST, port)
            self._child = Child(self.name, command, self.setting.directory / f"{self.name}.log")
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Until a byte is echoed: at start, and where a refused call has made a peer wait."""
        deadline = time.monotonic() + _READY_S
        while True:
            try:
                with load.connect(self.address) as sock:
                    load.echo(sock)
                return
            except (OSError, load.LoadError) as error:
                if self._child is None or self._child.has_ended(_RETRY_S) or time.monotonic() > deadline:
                    raise self.failure(f"not ready: {error}") from error

    def failure(self, what: str) -> BenchError:
        return self._child.failure(what) if self._child else BenchError(f"{self.name}: {what}")

    def stop(self) -> None:
        if self._child is not None:
            self._child.end()


class Direct(Peer):
    """Nothing in between: what machine, kernel and bench can do."""

    name = "direct"
    title = "direct TCP"


class Socat(Peer):
    """The loop of qvm-connect-tcp (qubes-core-agent-linux network/qvm-connect-tcp), bound to loopback."""

    is_call_each = True
    name = "socat"
    title = "socat"

    @classmethod
    def missing(cls) -> str | None:
        if shutil.which("socat") is None:
            return "socat is missing: Debian package socat (apt-get install socat)"
        return None

    def command(self, port: int) -> list[str]:
        client = " ".join(self.setting.client)
        return [
            "socat",
            f"TCP-LISTEN:{port},bind={_HOST},reuseaddr,fork",
            f"EXEC:{client} \\'{TARGET}\\' qubes.ConnectTCP+{self.setting.server_port}",
        ]


class ListenerPeer(Peer):
    """Our listener, with a cap on calls above qrexec's, so that its own cap does not show."""

    service: ClassVar[Service]
    transport: ClassVar[Transport]

    def command(self, port: int) -> list[str]:
        config = ListenerConfig(
            target=QubeName(TARGET),
            name=RuleName("bench"),
            side=Side.OUTER,
            listen=(ip_address(self.setting.listen),),
            listen_ports=ListenPorts(port, port),
            target_ports=TargetPorts(self.setting.server_port, self.setting.server_port),
            sources=Sources.parse(self.setting.sources),
            service=self.service,
            transport=self.transport,
            limits=_LIMITS,
        )
        directory = self.setting.directory / f"{self.name}.d"
        directory.mkdir()
        (directory / config.key).write_text(f"{config}\n", encoding="ascii")
        program = [sys.executable, "-m", "qubes_fwd_qrexec.listener", "--config", str(directory)]
        client = ["--qrexec-client", shlex.join(self.setting.client)]
        return [*program, *client, "--calls", str(CALLS_PER_TARGET + 1)]


class Call(ListenerPeer):
    """Transport `call` to the same stock service that socat calls."""

    is_call_each = True
    name = "call"
    title = "call"
    service = Service.CONNECT_TCP
    transport = Transport.CALL


class CallOurs(Call):
    """Transport `call` to our own service, which says how each connection ended."""

    name = "call-ours"
    title = "call, our service"
    service = Service.FORWARD_TCP


class MuxCall(ListenerPeer):
    """Transport `mux`: every connection a stream of one call to our own service."""

    name = "mux"
    title = "mux"
    service = Service.FORWARD_TCP
    transport = Transport.MUX


# The order of the table's columns.
PEERS: tuple[type[Peer], ...] = (Direct, Socat, Call, CallOurs, MuxCall)
# Those that are measured where each takes long.
USUAL: tuple[type[Peer], ...] = (Direct, Socat, Call, MuxCall)
BASE = Socat.name
# The columns of ratios: which peer, compared with which.
COMPARED = ((Call, Socat), (CallOurs, Call), (MuxCall, Socat), (MuxCall, Call))


def usable(names: Sequence[str]) -> list[type[Peer]]:
    """Those of the peers that can be measured here; what is missing for others is said on stderr."""
    found = []
    for peer in PEERS:
        if peer.name in names:
            if (missing := peer.missing()) is not None:
                print(f"{missing}; measured without it", file=sys.stderr)
            else:
                found.append(peer)
    return found


def free_port() -> int:
    """A port of 127.0.0.1 that nobody has just now."""
    with socket.create_server((_HOST, 0)) as sock:
        port: int = sock.getsockname()[1]
        return port
