# SPDX-License-Identifier: GPL-2.0-or-later
"""A trial connection all the way through a forward, without any data, to see whether the way is open.

It takes the way of a client's connection: over the same mux call or a call of its own, within the same
bounds, to the server in the target, which sees somebody connect and send FIN at once.
"""

import socket
from ipaddress import IPv4Address

import trio

from qubes_fwd_qrexec.common.config import ListenerConfig
from qubes_fwd_qrexec.common.refusals import Refusal
from qubes_fwd_qrexec.common.report import Answer, Trial
from qubes_fwd_qrexec.common.values import Proto
from qubes_fwd_qrexec.mux import Origin
from qubes_fwd_qrexec.system.logs import one_line

from .call import Ending
from .connectionlog import How
from .counters import Carried
from .flowpool import FlowPool
from .guest import Guest
from .transports import Transports

# Less than dom0 waits for the whole answer (5 s).
TRIAL_S = 3.0
_LOOK_S = 0.02
_LOCALHOST = IPv4Address("127.0.0.1")


async def try_out(config: ListenerConfig, transports: Transports, timeout_s: float = TRIAL_S) -> Trial:
    """Try the first port of a forward for up to ``timeout_s`` seconds. The counters do not count it.

    For UDP it is only tried whether there is a call: nothing but a client's datagram is sent to a server.
    """
    if config.proto is Proto.UDP:
        return await _try_call(transports.flow_pool(config), timeout_s)
    found: Ending | None = None
    ours, theirs = socket.socketpair()
    port = config.listen_ports.first
    guest = Guest(config, theirs, Origin(_LOCALHOST, port, _LOCALHOST, port))
    try:
        theirs.setblocking(False)
        ours.shutdown(socket.SHUT_WR)
        with trio.move_on_after(timeout_s):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_leave_when_joined, guest, nursery.cancel_scope)
                found = await _carry(guest, transports)
                nursery.cancel_scope.cancel()
    finally:
        ours.close()
        theirs.close()
    if found is not None and found.refusal is not None:
        return Trial(Answer.REFUSED, found.refusal, one_line(found.error or "refused"))
    if guest.is_joined or (found is not None and found.error is None and found.how is How.CLOSED):
        return Trial(Answer.THROUGH, "", "the server in the target took a connection")
    if found is None:
        return Trial(Answer.SILENT, "", f"no answer within {timeout_s:g} s")
    return Trial(Answer.FAILED, "", one_line(found.error or f"the connection ended: {found.how}"))


async def _try_call(pool: FlowPool, timeout_s: float) -> Trial:
    with trio.move_on_after(timeout_s):
        call = await pool.opened()
        if call.problem is None:
            return Trial(Answer.THROUGH, "", "the target takes datagrams; only a client can ask its server")
        return Trial(Answer.REFUSED, call.refusal or Refusal.NO_CALL, one_line(call.problem))
    return Trial(Answer.SILENT, "", f"no answer within {timeout_s:g} s")


async def _carry(guest: Guest, transports: Transports) -> Ending:
    try:
        return await transports.carry(guest)
    except OSError as error:
        return Ending(str(error), 0, 0, how=How.ABORTED)


async def _leave_when_joined(carried: Carried, scope: trio.CancelScope) -> None:
    """Stop once the server has taken the connection. It polls, as the relay thread does not report it."""
    while not carried.is_joined:  # noqa: ASYNC110
        await trio.sleep(_LOOK_S)
    scope.cancel()
