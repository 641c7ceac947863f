# SPDX-License-Identifier: GPL-2.0-or-later
"""What carries connections and flows to their targets, over the transport that their forward uses.

`Transports` has what forwards share: the budget of calls, and the mux calls to each target.
"""

from typing import Any

import trio

from qubes_fwd_qrexec.common.config import ListenerConfig
from qubes_fwd_qrexec.common.errors import RefusedError
from qubes_fwd_qrexec.common.rules import Transport
from qubes_fwd_qrexec.common.values import TargetPorts
from qubes_fwd_qrexec.relay.thread import RelayThread
from qubes_fwd_qrexec.system.memory import memory_bytes

from .call import CallTimeouts, Ending
from .callbudget import CallBudget
from .callwaits import CallWaits
from .connection import Carrier
from .connectionlog import How
from .flowpool import FlowPool
from .guest import Guest
from .limits import budget
from .muxpool import LINGER_S, MuxPool
from .singlecalls import SingleCalls
from .streampool import StreamPool

_PoolKey = tuple[str, str, TargetPorts]
_Shared = tuple[tuple[str, ...], CallBudget, str, str, TargetPorts, RelayThread, trio.Nursery]


class Transports:
    """One for each listener; it carries the connections of all forwards."""

    def __init__(
        self,
        qrexec_client: tuple[str, ...],
        relays: RelayThread,
        tasks: trio.Nursery,
        calls_max: int,
        timeouts: CallTimeouts,
        linger_s: float = LINGER_S,
        waits: CallWaits | None = None,
    ) -> None:
        self.relays = relays
        self._qrexec_client = qrexec_client
        self._tasks = tasks
        self.calls = CallBudget(tasks, calls_max, bugs=relays.loop.bugs, waits=waits)
        self._timeouts = timeouts
        self._linger_s = linger_s
        self._budget = budget(memory_bytes())
        self._singles = SingleCalls(qrexec_client, self.calls, relays, tasks, timeouts)
        self.pools: dict[_PoolKey, StreamPool] = {}
        self.flow_pools: dict[_PoolKey, FlowPool] = {}
        self._is_draining = False

    def carrier(self, config: ListenerConfig) -> Carrier:
        """What carries the connections of a forward."""
        return self.pool(config) or self._singles

    async def carry(self, guest: Guest) -> Ending:
        """Carry a connection of no forward. Raises `BugError` after a bug, and OSError if it is gone."""
        pool = self.pool(guest.config)
        if pool is not None:
            return await guest.relay(pool, self.relays)
        try:
            return await self._singles.relay(guest)
        except RefusedError as error:
            return Ending(str(error), 0, 0, error.kind, How.REFUSED)

    def pool(self, config: ListenerConfig) -> StreamPool | None:
        """The pool of mux calls that a forward uses; None if it has none."""
        if config.transport is Transport.CALL:
            return None
        key = _pool_key(config)
        if key not in self.pools:
            times = self._timeouts.half_close_s, self._linger_s, self._timeouts.idle_s
            self.pools[key] = StreamPool(*self._shared(config), self._budget, *times)
            if self._is_draining:
                self.pools[key].retire()
        return self.pools[key]

    def flow_pool(self, config: ListenerConfig) -> FlowPool:
        """The pool of mux calls that a forward of UDP uses."""
        key = _pool_key(config)
        if key not in self.flow_pools:
            self.flow_pools[key] = FlowPool(*self._shared(config), self._linger_s)
            if self._is_draining:
                self.flow_pools[key].retire()
        return self.flow_pools[key]

    def reconfigured(self, configs: list[ListenerConfig]) -> None:
        """The configuration has changed, and perhaps the policy: forget refusals, and pools without use."""
        needed = {_pool_key(config) for config in configs if config.transport is Transport.MUX}
        for key in self.pools.keys() - needed:
            self.pools.pop(key).retire()
        for key in self.flow_pools.keys() - needed:
            self.flow_pools.pop(key).retire()
        self.calls.expect(len(needed), {config.target for config in configs})
        self.calls.forget_refusals()

    def drain(self) -> None:
        """The listener stops: open no more mux calls, and let each end with the last that it carries."""
        self._is_draining = True
        self._singles.begin()
        pools: list[MuxPool[Any]] = [*self.pools.values(), *self.flow_pools.values()]
        for pool in pools:
            pool.retire()

    def _shared(self, config: ListenerConfig) -> _Shared:
        """What a pool of either kind needs first."""
        ports = config.target_ports
        service = f"{config.service}+{ports.brief()}+mux"
        return self._qrexec_client, self.calls, config.target, service, ports, self.relays, self._tasks


def _pool_key(config: ListenerConfig) -> _PoolKey:
    """Target, service and ports, by which dom0 judges a mux call."""
    return config.target, config.service, config.target_ports
