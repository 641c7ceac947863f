# SPDX-License-Identifier: GPL-2.0-or-later
"""The target's end of a mux call that carries UDP: a socket for each flow, connected to the user's server.

The call's argument fixes the ports, and the protocol refuses any other; where the servers are,
`servers` says. Lease, revocation and signals are `callservice`'s.
"""

import errno
import secrets
import socket
import time

from qubes_fwd_qrexec.common.allowance import Calls
from qubes_fwd_qrexec.common.values import Proto, TargetPorts
from qubes_fwd_qrexec.mux import FlowCode, FlowConnection, FlowRequested, Hello
from qubes_fwd_qrexec.relay.budget import STREAMS_MAX
from qubes_fwd_qrexec.relay.flowmux import FlowMux
from qubes_fwd_qrexec.relay.loop import Loop
from qubes_fwd_qrexec.system.bugs import Bugs
from qubes_fwd_qrexec.system.descriptors import raise_descriptor_limit
from qubes_fwd_qrexec.system.outlet import Outlet

from .callnotes import Kind
from .callservice import CallService, Lease, serve_call
from .callstart import CallStart
from .permissionwatch import PermissionLike
from .servers import Servers, ServersError
from .udpflow import NewSocket, UdpFlow, new_socket

# The descriptors of a process that are no sockets of flows: the call's, the loop's, the note's and some more.
_OTHER_DESCRIPTORS = 32
_LOOK_S = 1.0
_REFUSALS = {
    errno.ECONNREFUSED: FlowCode.REFUSED,
    errno.EMFILE: FlowCode.OVER_LIMIT,
    errno.ENFILE: FlowCode.OVER_LIMIT,
    errno.ENOSPC: FlowCode.OVER_LIMIT,  # the kernel watches no more
    errno.EAGAIN: FlowCode.OVER_LIMIT,  # no port is free
    errno.ENOBUFS: FlowCode.OVER_LIMIT,
    errno.ENOMEM: FlowCode.OVER_LIMIT,
}


def serve(calls: Calls, start: CallStart, stdin: socket.socket, stdout: socket.socket) -> int:
    """Serve a mux call that carries UDP over its two sockets until it is over. Returns the exit status.

    Raises `ServiceError`, and `RevocationError` if dom0 no longer allows the call or could not end it.
    """
    flows_max = STREAMS_MAX

    def make(lease: Lease, permission: PermissionLike, bugs: Bugs) -> UdpService:
        descriptors = raise_descriptor_limit()
        most = flows_max if descriptors < 0 else max(1, min(flows_max, descriptors - _OTHER_DESCRIPTORS))
        return UdpService(calls.ports, stdin, stdout, lease, permission, bugs, most)

    return serve_call(Kind.UDP, calls, start, make)


class UdpService(CallService):
    """One mux call that carries UDP; see `CallService`. It takes ``flows_max`` flows at once."""

    def __init__(
        self,
        ports: TargetPorts,
        stdin: socket.socket,
        stdout: socket.socket,
        lease: Lease,
        permission: PermissionLike,
        bugs: Bugs | None = None,
        flows_max: int = 1000,
        new: NewSocket = new_socket,
    ) -> None:
        self.lost_to_server = self.lost_by_kernel = self.kept_bytes = self.bursts = 0
        self._flows: dict[int, UdpFlow] = {}
        self._new = new
        self._servers = Servers(Outlet().say)
        hello = Hello(0, secrets.token_bytes(16), max_streams=flows_max, lease_s=lease.length_s)
        connection = FlowConnection(hello, range(ports.first, ports.last + 1))
        loop = Loop(bugs)
        self.mux = FlowMux(loop, connection, stdin, stdout, self)
        super().__init__(lease, permission, loop, self.mux)
        loop.after(_LOOK_S, self._look, self.mux.fail)

    @property
    def carries_any(self) -> bool:
        return bool(self._flows)

    def _look(self) -> None:
        """A second has passed: end what is idle, and tell what was dropped."""
        if self.is_over:
            return
        now = time.monotonic()
        for flow_id, flow in list(self._flows.items()):
            if flow.look(now):
                flow.close()
                self.end(flow_id, FlowCode.DONE)
        mux = self.mux
        to_listener = mux.dropped_full + mux.dropped_old + self.lost_by_kernel
        mux.report_lost(self.lost_to_server + mux.dropped_late, to_listener)
        self.loop.after(_LOOK_S, self._look, mux.fail)

    def _let_go(self) -> None:
        for flow in list(self._flows.values()):
            flow.close()
        self._flows.clear()

    # As the owner of the mux

    def flow_requested(self, event: FlowRequested) -> None:
        try:
            addresses = self._servers.addresses(Proto.UDP, event.port)
            flow = UdpFlow(self, event, self._new, addresses)
        except ServersError:
            self.mux.end(event.flow_id, FlowCode.REFUSED)
        except OSError as error:
            code = FlowCode.UNREACHABLE if error.errno is None else _REFUSALS.get(error.errno)
            self.mux.end(event.flow_id, code or FlowCode.UNREACHABLE)
        else:
            self._flows[event.flow_id] = flow
            self.mux.join(event.flow_id, flow)

    def dropped(self, flow_id: int, datagrams: int, *, is_old: bool) -> None:
        """Once a second the other end is told how many these are in all (`_look`)."""

    def lost(self, late: int, there: int) -> None:
        """The same."""

    # As the owner of the flows

    def answer(self, flow_id: int, data: bytes, segment: int) -> None:
        self.mux.send(flow_id, data, segment)

    def end(self, flow_id: int, code: FlowCode) -> None:
        self.left(flow_id)
        self.mux.finish(flow_id, code)

    def left(self, flow_id: int) -> None:
        self._flows.pop(flow_id, None)
