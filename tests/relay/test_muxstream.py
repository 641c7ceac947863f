# SPDX-License-Identifier: GPL-2.0-or-later
"""A mux call's stream keeps trio's contract for streams, and reports an abort as trio's streams do."""

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import IPv4Address

import pytest
import trio
import trio.testing
from helpers import BOUND_S, nobody, unix_pair, until
from muxstream import MuxStream

from qubes_fwd_qrexec.mux import Connection, GoawayCode, Hello, OpenReceived, Origin, ResetCode
from qubes_fwd_qrexec.relay.budget import WINDOW_MAX_BYTES, Budget
from qubes_fwd_qrexec.relay.leg import Leg
from qubes_fwd_qrexec.relay.mux import Mux
from qubes_fwd_qrexec.relay.thread import RelayThread, open_relay_thread

_PORT = 8080
_ORIGIN = Origin(IPv4Address("192.0.2.1"), 40000, IPv4Address("192.0.2.2"), 80)


class _Owner:
    """Either end of a mux call; streams that are asked for are joined with a socketpair's end."""

    def __init__(self, relays: RelayThread) -> None:
        self.relays = relays
        self.mux: Mux | None = None
        self.is_ready = trio.Event()
        self.asked: list[MuxStream] = []
        self.came = trio.Event()

    def ready(self) -> None:
        self.relays.tell(self.is_ready.set)

    def open_requested(self, event: OpenReceived) -> None:
        ours, legs = unix_pair()
        assert self.mux is not None
        leg = self.mux.accept(event.stream_id, legs)
        assert leg is not None
        asked = MuxStream(ours, leg, self.relays)

        def tell() -> None:
            self.asked.append(asked)
            self.came.set()

        self.relays.tell(tell)

    def open_abandoned(self, stream_id: int) -> None:
        raise AssertionError("every stream is answered at once")

    def refused(self, leg: Leg, code: ResetCode) -> None:
        raise AssertionError(code)

    def draining(self, code: GoawayCode) -> None:
        pass

    def over(self, problem: str | None) -> None:
        pass


class MuxCall:
    """Two ends in one thread; `streams` makes a stream and gives both of its ends."""

    def __init__(self, relays: RelayThread) -> None:
        self.relays = relays
        self.near, self.far = _Owner(relays), _Owner(relays)
        self._muxes: list[Mux] = []

    def begin(self) -> None:
        (near_in, far_out), (far_in, near_out) = unix_pair(), unix_pair()
        self.sockets = (near_in, far_out, far_in, near_out)
        listener = Hello(WINDOW_MAX_BYTES, secrets.token_bytes(16))
        target = Hello(WINDOW_MAX_BYTES, secrets.token_bytes(16), max_streams=100, lease_s=300)
        for hello, source, sink, owner in (
            (listener, near_in, near_out, self.near),
            (target, far_in, far_out, self.far),
        ):
            connection = Connection(hello, range(_PORT, _PORT + 1))
            owner.mux = Mux(self.relays.loop, connection, source, sink, Budget(), owner)
            self._muxes.append(owner.mux)

    def end(self) -> None:
        for mux in self._muxes:
            mux.abandon()
        for sock in self.sockets:
            sock.close()

    async def streams(self) -> tuple[MuxStream, MuxStream]:
        """Both ends of one that is open at both: until then, a socketpair's close is nothing but an abort."""
        ours, legs = unix_pair()
        self.far.came = trio.Event()
        opened: list[Leg] = []

        def open_it() -> None:
            leg = self._muxes[0].open(_PORT, _ORIGIN, legs)
            assert leg is not None
            opened.append(leg)

        self.relays.order(open_it, nobody)
        await self.far.came.wait()
        await until(lambda: opened[0].is_joined)
        return MuxStream(ours, opened[0], self.relays), self.far.asked.pop()


@asynccontextmanager
async def mux_call() -> AsyncIterator[MuxCall]:
    with trio.fail_after(BOUND_S):
        async with open_relay_thread() as relays:
            made = MuxCall(relays)
            relays.order(made.begin, nobody)
            await made.near.is_ready.wait()
            try:
                yield made
            finally:
                ended = trio.Event()

                def end() -> None:
                    made.end()
                    relays.tell(ended.set)

                relays.order(end, nobody)
                with trio.CancelScope(shield=True):
                    await ended.wait()


async def test_it_is_a_half_closeable_stream_as_trio_has_them() -> None:
    async with mux_call() as made:
        await trio.testing.check_half_closeable_stream(made.streams, None)


async def test_an_abort_is_a_broken_resource_and_no_end() -> None:
    async with mux_call() as made:
        near, far = await made.streams()
        async with near, far:
            await near.send_all(b"half of it")
            assert await far.receive_some() == b"half of it"
            near.abort()
            with pytest.raises(trio.BrokenResourceError):
                await far.receive_some()
