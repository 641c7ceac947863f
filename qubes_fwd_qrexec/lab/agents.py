# SPDX-License-Identifier: GPL-2.0-or-later
"""The agents' processes, as the broker sees them: forked when dom0 says yes, told what to do, waited for.

`agentprocess` is the program on the other side. Nothing here decides what a call may do.
"""

import array
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import trio

PROGRAM = Path(__file__).with_name("agentprocess.py")
_PACKET_MAX = 4096
_NO_STATUS = -1
_ANCILLARY_BYTES = socket.CMSG_SPACE(4)


class AgentProcess:
    """One call's process in the target; `Agents.fork` makes it, and `run` must run as long as it lives.

    One that was lost never answers: ``is_lost`` tells, once it is ``gone``.
    """

    def __init__(self, pid: int, sock: trio.socket.SocketType) -> None:
        self.pid = pid
        self.gone = trio.Event()
        self.is_lost = False
        self._exited = trio.Event()
        self._status: int = _NO_STATUS
        self._is_let_go = False
        self._sock = sock
        self._answers, self._answered = trio.open_memory_channel[tuple[dict[str, Any], list[int]]](2)

    async def run(self) -> None:
        """Read what the process reports until it has ended. Do not cancel this; `kill` ends it."""
        with trio.CancelScope(shield=True), self._sock:
            with suppress(OSError):
                while True:
                    packet, fds = await _receive(self._sock)
                    if not packet:
                        break
                    answer = json.loads(packet)
                    if "status" in answer:
                        self._status = answer["status"]
                        self._exited.set()
                    else:
                        self._answers.send_nowait((answer, fds))
            self.is_lost = self._status == _NO_STATUS and not self._is_let_go
            self._exited.set()
            self.gone.set()
            self._answers.close()
            with suppress(trio.EndOfChannel):
                while True:
                    # Nobody waited for it any more.
                    for fd in self._answered.receive_nowait()[1]:
                        os.close(fd)

    async def order(
        self, what: Mapping[str, object], fds: Sequence[int], namespace_fd: int | None
    ) -> list[int]:
        """Order it to start or connect, and return the descriptors that it hands over. Raises the process's
        OSError.
        """
        all_fds = array.array("i", [*fds, *([] if namespace_fd is None else [namespace_fd])])
        packet = json.dumps({**what, "in_namespace": namespace_fd is not None}).encode()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, all_fds)] if all_fds else []
        try:
            await self._sock.sendmsg([packet], rights)
        except OSError:
            await trio.sleep_forever()
        try:
            answer, handed = await self._answered.receive()
        except trio.EndOfChannel:
            await trio.sleep_forever()
        if "errno" in answer:
            raise OSError(answer["errno"], os.strerror(answer["errno"]))
        return handed

    async def wait_for_exit(self) -> int:
        """The service's exit status, as qrexec reports it."""
        await self._exited.wait()
        if self._status == _NO_STATUS:
            await trio.sleep_forever()
        return self._status

    def let_go(self) -> None:
        """Give no more orders: it ends, or goes on waiting for its service."""
        self._is_let_go = True
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def kill(self) -> None:
        """End it, and its service with it."""
        if not self.gone.is_set():
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)


class Agents:
    """Made by `open_agents`."""

    def __init__(self, fork_socket: trio.socket.SocketType, nursery: trio.Nursery) -> None:
        self._fork_socket = fork_socket
        self._nursery = nursery

    async def fork(self) -> AgentProcess:
        """Fork a process, as an agent does once dom0 has allowed a call. Raises OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock = trio.socket.from_stdlib_socket(ours)
        with theirs:
            rights = array.array("i", [theirs.fileno()])
            try:
                # Shielded: once forked, the process has to be known, or nobody would wait for it.
                with trio.CancelScope(shield=True):
                    await self._fork_socket.sendmsg([b"f"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
                    theirs.close()
                    packet, _ = await _receive(sock)
                    agent = AgentProcess(json.loads(packet)["pid"], sock)
            except (OSError, ValueError) as error:
                sock.close()
                raise OSError("the agent's process cannot be forked") from error
        self._nursery.start_soon(agent.run)
        return agent


@asynccontextmanager
async def open_agents(environment: Mapping[str, str]) -> AsyncIterator[Agents]:
    """Agents whose services get ``environment``. All of their processes are gone when the block ends."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = await trio.lowlevel.open_process(
            [sys.executable, "-I", "-S", str(PROGRAM)],
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            env=dict(environment),
            cwd="/",
            start_new_session=True,
        )
    try:
        async with trio.open_nursery() as nursery:
            with trio.socket.from_stdlib_socket(ours) as fork_socket:
                yield Agents(fork_socket, nursery)
            # The end of its stdin ends the program, and that ends the processes that it forked; the nursery
            # waits for them.
    finally:
        with trio.CancelScope(shield=True):
            await process.wait()


async def _receive(sock: trio.socket.SocketType) -> tuple[bytes, list[int]]:
    packet, ancillary, _, _ = await sock.recvmsg(_PACKET_MAX, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return packet, list(fds)
