# SPDX-License-Identifier: GPL-2.0-or-later
"""A qrexec call, seen from the qube that makes it: the one place that starts qrexec-client-vm.

qrexec-client-vm gets a socketpair for stdin and one for stdout, which works with every version of it (one
socket for both ways, --use-stdin-socket, needs 4.2.19, and would pass on the end of a failed call before its
exit status is known). It copies the target's stderr without limit, and blocks until that is read. So stderr
is discarded, or goes into one more socketpair, which is read once the output has ended. A target that fills
it before that stalls only its own call.
"""

import contextlib
import fcntl
import math
import os
import shlex
import signal
import socket
import struct
import subprocess
import termios
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import trio

from qubes_fwd_qrexec.common.errors import ConfigError

CLIENT = ("/usr/bin/qrexec-client-vm",)
# Each ring of the vchan of a call for one connection, so that it takes 17 of the caller's grant pages instead
# of 33. With 16 KiB (9 pages) one stream has half the rate, see docs/numbers.md.
SINGLE_BUFFER_BYTES = 32768
# Every qrexec-client-vm has it (qubes-core-qrexec agent/qrexec-client-vm.c, since its first commit in 2018).
_BUFFER_OPTION = "--buffer-size"
# What a stalled direction may hold in the kernel, for each socketpair: twice the 64 KiB of qrexec-client-vm.
# A mux of streams sets more for what it sends (`relay.backlog`).
_SOCKET_BUFFER_BYTES = 131072
# The same for stderr: a dozen lines and more.
STDERR_BUFFER_BYTES = 16384
_DROP_BYTES = 65536
# How often to look whether a call is through: soon for a target that runs, rarely for one that must start.
_LOOK_FIRST_S = 0.002
_LOOK_MAX_S = 0.25


def parse_client(text: str) -> tuple[str, ...]:
    """Split the command line of a qrexec-client-vm as a shell would. Raises `ConfigError`."""
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise ConfigError(f"--qrexec-client {text!a}: {error}") from None
    if not words:
        raise ConfigError(
            "--qrexec-client is empty; a program such as /usr/bin/qrexec-client-vm would be right"
        )
    return words


class CallInput:
    """The socketpair of a call's stdin: ``ours`` is this end, a non-blocking socket.

    We keep the other end open, too, until the call is through. So what no qrexec-client-vm has read by then
    is still there for the next one, and a call that found no room can be made again without losing a byte.
    It also shows when a call is through: only then does qrexec-client-vm make its stdin non-blocking
    (qubes-core-qrexec libqrexec/process_io.c), which everybody sees who has the same file open.
    """

    def __init__(self) -> None:
        self.ours, self._theirs = _pair()

    @property
    def theirs(self) -> socket.socket:
        """The end of qrexec-client-vm; only before the call is through."""
        return self._theirs

    @property
    def is_read(self) -> bool:
        """Whether qrexec-client-vm has begun to read it."""
        if self._theirs.fileno() < 0:
            return True
        if os.get_blocking(self._theirs.fileno()):
            return False
        self._theirs.close()  # from now on qrexec-client-vm alone decides when it ends
        return True

    def close(self) -> None:
        self.ours.close()
        self._theirs.close()


class Call:
    """A call under way. ``stdin`` and ``stdout`` are our non-blocking sockets for those of the target, and
    ``stderr`` is the third one, if the call was opened with it.
    """

    def __init__(
        self, process: trio.Process, given: CallInput, stdout: socket.socket, stderr: socket.socket | None
    ) -> None:
        self._process = process
        self._input = given
        self.stdin = given.ours
        self.stdout = stdout
        self.stderr = stderr

    @property
    def is_through(self) -> bool:
        """Whether dom0 has allowed the call and the target has taken it."""
        return self._input.is_read

    async def wait_through(self, has_sign: Callable[[], bool] | None = None) -> None:
        """Return once it is through, or ``has_sign()``. It polls, as no event says so."""
        pause_s = _LOOK_FIRST_S
        while not (self.is_through or (has_sign is not None and has_sign())):
            await trio.sleep(pause_s)
            pause_s = min(pause_s * 2, _LOOK_MAX_S)

    async def status(self, timeout_s: float = math.inf) -> int | None:
        """Wait up to ``timeout_s`` seconds for the exit status; None if there is none."""
        with trio.move_on_after(timeout_s):
            await self._process.wait()
        return self._process.poll()

    async def over(self, timeout_s: float) -> None:
        """Wait up to ``timeout_s`` seconds for the end of the target's output, which shows that it has all of
        its input. What still comes is dropped."""
        with trio.move_on_after(timeout_s), contextlib.suppress(OSError):
            while True:
                await trio.lowlevel.wait_readable(self.stdout)
                with contextlib.suppress(BlockingIOError):
                    if not self.stdout.recv(_DROP_BYTES):
                        return

    async def said(self, max_bytes: int) -> bytes:
        """Wait for more on ``stderr``; empty at its end, or without a ``stderr``."""
        while self.stderr is not None:
            await trio.lowlevel.wait_readable(self.stderr)
            with contextlib.suppress(BlockingIOError):
                return self.stderr.recv(max_bytes)
        return b""

    def has_taken(self, written_bytes: int) -> bool:
        """Whether qrexec-client-vm has read any of the ``written_bytes`` that were sent to its stdin.

        It reads nothing before the call is through to the target. The kernel counts what is unread including
        its own overhead, so a number below ``written_bytes`` means that some of it was read.
        """
        unread_bytes = struct.unpack("i", fcntl.ioctl(self.stdin, termios.TIOCOUTQ, bytes(4)))[0]
        return bool(written_bytes > unread_bytes)


@asynccontextmanager
async def open_call(
    qrexec_client: Sequence[str],
    target: str,
    service: str,
    given: CallInput | None = None,
    buffer_bytes: int | None = None,
    *,
    has_stderr: bool = False,
) -> AsyncIterator[Call]:
    """Call ``service`` (``NAME+ARGUMENT``) in ``target``; leaving the block ends the call.

    ``given`` is the input, which stays open afterwards; without it the call has an input of its own.
    ``buffer_bytes`` is the size of the vchan's buffer each way, unless ``qrexec_client`` sets one. With
    ``has_stderr`` the caller must read what the target writes to stderr, or the call stalls.

    Raises OSError when qrexec-client-vm cannot be started. Whether dom0 allows the call and the target
    answers shows only later, in the exit status, or never.
    """
    options = []
    if buffer_bytes is not None and not any(word.startswith(_BUFFER_OPTION) for word in qrexec_client):
        options.append(f"{_BUFFER_OPTION}={buffer_bytes}")
    with contextlib.ExitStack() as ours:
        if given is None:
            given = CallInput()
            ours.callback(given.close)
        with contextlib.ExitStack() as theirs:
            stdout, client_stdout = _pair()
            ours.callback(stdout.close)
            theirs.callback(client_stdout.close)
            stderr = client_stderr = None
            if has_stderr:
                stderr, client_stderr = _pair(STDERR_BUFFER_BYTES)
                ours.callback(stderr.close)
                theirs.callback(client_stderr.close)
            process = await trio.lowlevel.open_process(
                [*qrexec_client, *options, "--", target, service],
                stdin=given.theirs,
                stdout=client_stdout,
                stderr=client_stderr or subprocess.DEVNULL,
                start_new_session=True,
            )
        try:
            yield Call(process, given, stdout, stderr)
        finally:
            if process.returncode is None:
                # It may be a script around the real one; it leads a process group of its own.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            with trio.CancelScope(shield=True):
                await process.wait()


def _pair(buffer_bytes: int = _SOCKET_BUFFER_BYTES) -> tuple[socket.socket, socket.socket]:
    """Our end, which is non-blocking, and the end of qrexec-client-vm."""
    mine, other = socket.socketpair()
    mine.setblocking(False)
    for end in (mine, other):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
    return mine, other
