# SPDX-License-Identifier: GPL-2.0-or-later
"""Calls into a lab from tests: a bounded lab, services from a few words, and both ends of a call at hand."""

import os
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio
from bounds import BOUND_S

from qubes_fwd_qrexec.lab.running import RunningLab, open_lab

ALLOW_TEST = "test.Service * @anyvm @anyvm allow\n"


@asynccontextmanager
async def bounded_lab(path: Path, policy: str = ALLOW_TEST) -> AsyncIterator[RunningLab]:
    with trio.fail_after(BOUND_S):
        async with open_lab(path / "lab", policy=policy) as lab:
            yield lab


def give_service(lab: RunningLab, script: str, *, name: str = "test.Service", qube: str = "work") -> Path:
    """An executable service of a qube: a shell script."""
    path = lab.directory.qube_dir(qube).service_dirs[0] / name
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def give_config(lab: RunningLab, text: str, *, name: str = "test.Service", qube: str = "work") -> None:
    path = lab.directory.qube_dir(qube).rpc_config_dirs[0] / name
    path.write_text(text, encoding="utf-8")


class Gate:
    """What a service waits at until the test opens it: ``read _ <{gate}``."""

    def __init__(self, directory: Path) -> None:
        self._fifo = directory / "gate"
        os.mkfifo(self._fifo)

    def __str__(self) -> str:
        return str(self._fifo)

    async def open(self) -> None:
        await trio.to_thread.run_sync(self._fifo.write_text, "go\n")


class Call:
    """A running client stand-in; ``stdin`` and ``stdout`` are the test's ends, one stream if single."""

    def __init__(
        self, process: trio.Process, stdin: trio.SocketStream, stdout: trio.SocketStream, stderr: int
    ) -> None:
        self.process = process
        self.stdin = stdin
        self.stdout = stdout
        self._stderr = trio.lowlevel.FdStream(stderr)

    async def read_all(self) -> bytes:
        return await read_all(self.stdout)

    async def read_stderr(self) -> bytes:
        return await read_all(self._stderr)

    async def status(self) -> int:
        return await self.process.wait()

    async def close(self) -> None:
        self.process.kill()
        await self.process.wait()
        for stream in (self.stdin, self.stdout, self._stderr):
            await trio.aclose_forcefully(stream)


async def read_all(stream: trio.abc.ReceiveStream) -> bytes:
    received = bytearray()
    try:
        while data := await stream.receive_some():
            received += data
    except trio.BrokenResourceError:
        received += b"<RESET>"
    return bytes(received)


async def read_exactly(stream: trio.abc.ReceiveStream, count: int) -> bytes:
    received = b""
    while len(received) < count:
        data = await stream.receive_some(count - len(received))
        if not data:
            return received
        received += data
    return received


@asynccontextmanager
async def calling(
    lab: RunningLab,
    target: str = "work",
    service: str = "test.Service",
    *options: str,
    qube: str = "sys-net",
    single: bool = False,
) -> AsyncIterator[Call]:
    """Start the client stand-in as a listener would: on sockets."""
    ours, theirs = socket.socketpair()
    our_output, their_output = (ours, theirs) if single else socket.socketpair()
    stderr_read, stderr_write = os.pipe()
    command = [*lab.client_command(qube), *options, "--", target, service]
    if single:
        command.insert(2, "--use-stdin-socket")
    process = await trio.lowlevel.open_process(
        command,
        stdin=theirs.fileno(),
        stdout=subprocess.DEVNULL if single else their_output.fileno(),
        stderr=stderr_write,
    )
    theirs.close()
    their_output.close()
    os.close(stderr_write)
    stdin = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
    stdout = stdin if single else trio.SocketStream(trio.socket.from_stdlib_socket(our_output))
    call = Call(process, stdin, stdout, stderr_read)
    try:
        yield call
    finally:
        with trio.CancelScope(shield=True):
            await call.close()


async def unix_server(
    lab: RunningLab, *, name: str = "test.Service", qube: str = "work"
) -> trio.SocketListener:
    """A socket service of a qube; the caller accepts and closes."""
    path = lab.directory.qube_dir(qube).service_dirs[0] / name
    sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    await sock.bind(str(path))
    sock.listen(16)
    return trio.SocketListener(sock)


async def tcp_server(
    lab: RunningLab, *, name: str = "test.Service", qube: str = "work"
) -> trio.SocketListener:
    """A /dev/tcp service of a qube that leads to the listener returned."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    (lab.directory.qube_dir(qube).service_dirs[0] / name).symlink_to(f"/dev/tcp/127.0.0.1/{port}")
    return listener
