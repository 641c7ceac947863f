# SPDX-License-Identifier: GPL-2.0-or-later
"""One call's two ends joined, with the endings that qrexec gives them.

Facts: qubes-core-qrexec libqrexec/process_io.c and remote.c, both sides of which are played here.
The directions end independently; a reset becomes an end of file; what is sent to a side that takes no
more is read and dropped; the exit status comes last, and after it nothing is read any more.
"""

import os
import socket
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress

import trio

from qubes_fwd_qrexec.relay.copy import Copy, CopyEnd
from qubes_fwd_qrexec.relay.thread import RelayThread

from . import wire
from .started import ConnectedSocket, Started, StartedProcess

_DRAIN_BYTES = 65536

SendStderr = Callable[[bytes], Awaitable[None]]


class CallerEnds:
    """The caller's descriptors, handed over: one socket both ways, or a source and a sink."""

    def __init__(self, sockets: list[socket.socket]) -> None:
        self.source = sockets[0]
        self.sink = sockets[-1]
        self._is_single = len(sockets) == 1

    def begin(self) -> None:
        """The call is connected: process_io.c makes the descriptors non-blocking now, which the caller can
        see.
        """
        for sock in (self.source, self.sink):
            sock.setblocking(False)

    def end_source(self) -> None:
        """No more is read from the caller."""
        self._end(self.source, socket.SHUT_RD)

    def end_sink(self) -> None:
        """The caller sees the end of the service's output."""
        self._end(self.sink, socket.SHUT_WR)

    def close(self) -> None:
        for sock in (self.source, self.sink):
            _close_as_found(sock)

    def _end(self, sock: socket.socket, direction: int) -> None:
        # process_io.c, close_stdio(): an inherited descriptor of one direction is closed, not shut down, so
        # that another holder of it is left alone.
        if self._is_single:
            shut_down(sock, direction)
        else:
            _close_as_found(sock)


class Join:
    """Carries one call until the service has ended; `run` answers with the exit status."""

    def __init__(self, relays: RelayThread, caller: CallerEnds, started: Started, prefix: bytes) -> None:
        self._relays = relays
        self._caller = caller
        self._started = started
        self._prefix = prefix
        self._input_over = trio.Event()
        self._output_over = trio.Event()
        self._carrying_input = trio.CancelScope()
        self._input: Copy | None = None

    @property
    def taken(self) -> tuple[int, int]:
        """Bytes from the caller that the service's input has taken, and those that wait for it."""
        return (0, 0) if self._input is None else (self._input.moved, len(self._input.pending))

    async def run(self, send_stderr: SendStderr) -> int:
        """Carry the call and return the status that the caller gets; its output has ended by then.

        If this is cancelled, the call is lost: the caller's end is closed, and `let_go` has to end the
        service's.
        """
        try:
            async with trio.open_nursery() as nursery:
                if isinstance(self._started, StartedProcess):
                    status = await self._run_process(nursery, self._started, send_stderr)
                else:
                    status = await self._run_socket(nursery, self._started)
                # After the exit status no more is read from the caller.
                nursery.cancel_scope.cancel()
            return status
        finally:
            self._caller.close()

    async def _run_process(self, nursery: trio.Nursery, started: StartedProcess, send: SendStderr) -> int:
        nursery.start_soon(self._carry_input, started.stdin)
        nursery.start_soon(self._carry_output, started.stdout)
        stderr_over = trio.Event()
        nursery.start_soon(self._carry_stderr, started.stderr_fd, send, stderr_over)
        status = await started.agent.wait_for_exit()
        # From SIGCHLD on the agent drops what the caller sends, even if the service left its stdin to others.
        self._carrying_input.cancel()
        await self._output_over.wait()
        await stderr_over.wait()
        return status

    async def _run_socket(self, nursery: trio.Nursery, started: ConnectedSocket) -> int:
        config = started.config
        self._prefix = started.descriptor + self._prefix
        carrying_output = trio.CancelScope()
        has_let_go = trio.Event()
        copy = Copy(started.stream, self._caller.sink)

        async def carry_output() -> None:
            with carrying_output:
                await self._carry_output(started.stream, copy)
            has_let_go.set()

        nursery.start_soon(self._carry_input, started.stream)
        nursery.start_soon(carry_output)
        if config.exit_on_service_eof or config.exit_on_client_eof:
            first = trio.Event()

            async def tell(over: trio.Event) -> None:
                await over.wait()
                first.set()

            if config.exit_on_service_eof:
                nursery.start_soon(tell, self._output_over)
            if config.exit_on_client_eof:
                nursery.start_soon(tell, self._input_over)
            nursery.start_soon(_tell_when_both, self._input_over, self._output_over, first)
            await first.wait()
            if not self._output_over.is_set():
                carrying_output.cancel()
                # Before, the relay's thread may still use the socket that is closed now, or only begin to.
                await has_let_go.wait()
                await self._flush(copy)
        else:
            await self._input_over.wait()
            await self._output_over.wait()
        return 0

    async def _carry_input(self, sink: socket.socket) -> None:
        """Caller to service. The caller does not notice that a service takes no more."""
        end = None
        with self._carrying_input:
            if await send_all(sink, self._prefix):
                self._input = Copy(self._caller.source, sink)
                end = await self._relays.run(self._input)
            else:
                end = CopyEnd.SINK_BROKEN
        shut_down(sink, socket.SHUT_WR)
        self._input_over.set()
        if end in (None, CopyEnd.SINK_BROKEN):
            await drain(self._caller.source)
        self._caller.end_source()

    async def _carry_output(self, source: socket.socket, copy: Copy | None = None) -> None:
        """Service to caller; the service is not told that the caller takes no more."""
        end = await self._relays.run(copy or Copy(source, self._caller.sink))
        self._caller.end_sink()
        if end is CopyEnd.SINK_BROKEN:
            await drain(source)
        self._output_over.set()

    async def _flush(self, copy: Copy) -> None:
        """What was read from the service before exit-on-client-eof ended it still reaches the caller."""
        await send_all(self._caller.sink, copy.pending)
        self._caller.end_sink()

    async def _carry_stderr(self, fd: int, send: SendStderr, over: trio.Event) -> None:
        async with trio.lowlevel.FdStream(os.dup(fd)) as stream:
            while data := await stream.receive_some(wire.STDERR_MAX):
                await send(data)
        over.set()

    async def let_go(self) -> None:
        """End the service's side: shut it down, but do not close it before the service has ended by itself.

        What was taken from the caller is passed on first, for as long as the service needs.
        """
        started = self._started
        if isinstance(started, ConnectedSocket):
            started.stream.close()
            return
        with started.stdin, started.stdout, ExitStack() as stderr:
            stderr.callback(os.close, started.stderr_fd)
            async with trio.open_nursery() as nursery:

                async def finish_input() -> None:
                    if self._input is not None and not self._input_over.is_set():
                        await send_all(started.stdin, self._input.pending)
                    shut_down(started.stdin, socket.SHUT_WR)
                    shut_down(started.stdout, socket.SHUT_RD)
                    stderr.close()

                nursery.start_soon(finish_input)
                await started.agent.gone.wait()
                nursery.cancel_scope.cancel()


async def _tell_when_both(one: trio.Event, other: trio.Event, told: trio.Event) -> None:
    await one.wait()
    await other.wait()
    told.set()


async def send_all(sink: socket.socket, data: bytes) -> bool:
    """False if the sink takes no more."""
    view = memoryview(data)
    while view:
        try:
            view = view[sink.send(view) :]
        except BlockingIOError:
            await trio.lowlevel.wait_writable(sink)
        except OSError:
            return False
    return True


async def drain(source: socket.socket) -> None:
    """Read and drop until the end, whatever it is."""
    buffer = bytearray(_DRAIN_BYTES)
    while True:
        await trio.lowlevel.wait_readable(source)
        try:
            if source.recv_into(buffer) == 0:
                return
        except BlockingIOError:
            continue
        except OSError:
            return


def shut_down(sock: socket.socket, direction: int) -> None:
    """`shutdown`, also where the peer is gone already."""
    with suppress(OSError):
        sock.shutdown(direction)


def _close_as_found(sock: socket.socket) -> None:
    """Close in blocking mode, as the real client does: others may hold the same open file."""
    if sock.fileno() >= 0:
        sock.setblocking(True)
        sock.close()
