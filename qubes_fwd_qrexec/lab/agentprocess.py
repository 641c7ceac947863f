# SPDX-License-Identifier: GPL-2.0-or-later
"""The agent's process that serves one call, and the small, single-threaded program that forks it.

The program forks one process for each connection that it gets over stdin, so that the broker, which has
threads, never forks. A process begins when dom0 has allowed its call; the service finds its pid in
QREXEC_AGENT_PID. It waits for the broker's order, starts the service or connects to it, and stays until the
service has ended. If the broker goes away, the processes kill their services and end.

Facts: qubes-core-qrexec agent/qrexec-agent-data.c. It imports nothing of this package, so that the program
needs no search path.
"""

import _socket
import ctypes
import errno
import gc
import json
import posix
import signal
import sys
from typing import Any

# include/uapi/linux/prctl.h and sched.h.
_PR_SET_PDEATHSIG = 1
_CLONE_NEWNET = 0x40000000
_ORDER_MAX = 262144
_FDS_MAX = 5
_FD_BYTES = 4
_LIBC = ctypes.CDLL(None, use_errno=True)
# Looked up once, and not by each process.
_prctl, _setns = _LIBC.prctl, _LIBC.setns


def main() -> None:
    """Fork one process for each descriptor received; returns when the broker is gone."""
    broker = _socket.socket(-1, -1, -1, posix.dup(0))
    # The broker sees their sockets close. Waited for, their processor time counts as that of our children.
    signal.signal(signal.SIGCHLD, lambda *_: _reap())
    own_pid = posix.getpid()
    # A process shares its memory with this one as long as neither looks for garbage in it.
    gc.disable()
    gc.freeze()
    while True:
        packet, fds = _receive(broker)
        if not packet:
            return
        for fd in fds:
            try:
                pid = posix.fork()
            except OSError:
                pid = -1  # the broker sees that no process answers
            if pid == 0:
                broker.close()
                try:
                    _serve(_socket.socket(-1, -1, -1, fd), own_pid)
                except OSError:
                    pass  # the broker is gone, or has let go of this call
                finally:
                    posix._exit(0)
            posix.close(fd)


def _reap() -> None:
    """Wait for the processes that have ended."""
    try:
        while posix.waitpid(-1, posix.WNOHANG) != (0, 0):
            pass
    except ChildProcessError:
        pass  # none is left


def _serve(broker: _socket.socket, parent_pid: int) -> None:
    """One call, from its beginning to its service's end."""
    services: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: _end_with(services))
    # A service may ask for a single socket this way. The lab does not offer that, and must not die of it.
    signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if posix.getppid() != parent_pid:
        return
    broker.send(json.dumps({"pid": posix.getpid()}).encode())
    packet, fds = _receive(broker)
    if not packet:
        return
    order = json.loads(packet)
    try:
        if order["in_namespace"]:
            _enter(fds.pop())
        if "argv" in order:
            _start(order, fds, services)
        else:
            _connect(broker, order)
    except OSError as error:
        broker.send(json.dumps({"errno": error.errno or errno.EIO}).encode())
        return
    if not services:
        broker.recv(1)  # until the broker lets go
        return
    for fd in fds:
        posix.close(fd)
    broker.send(b'{"started": true}')
    _, status = posix.waitpid(services[0], 0)
    broker.send(json.dumps({"status": _exit_status(status)}).encode())


def _start(order: dict[str, Any], fds: list[int], services: list[int]) -> None:
    """Start the service with three descriptors, and note its pid; raises OSError if it cannot be executed."""
    environment = posix.environ | {
        key.encode("utf-8", "surrogateescape"): value.encode("utf-8", "surrogateescape")
        for key, value in order["environment"].items()
    }
    environment[b"QREXEC_AGENT_PID"] = b"%d" % posix.getpid()
    posix.chdir(order["directory"])
    services.append(
        posix.posix_spawn(
            order["argv"][0],
            order["argv"],
            environment,
            file_actions=[(posix.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(fds)],
            setsid=True,
            setsigdef=(signal.SIGPIPE, signal.SIGXFSZ),
        )
    )


def _connect(broker: _socket.socket, order: dict[str, Any]) -> None:
    """Connect to a socket service and hand the connection over; raises OSError."""
    sock = _socket.socket(order["family"], _socket.SOCK_STREAM)
    if order["family"] == _socket.AF_UNIX:
        directory, _, name = order["address"].rpartition("/")
        posix.chdir(directory)  # from there every path is short enough
        sock.connect(name)
    else:
        sock.connect(tuple(order["address"]))
    handed = sock.fileno().to_bytes(_FD_BYTES, sys.byteorder)
    broker.sendmsg([b'{"started": true}'], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, handed)])
    sock.close()


def _enter(namespace_fd: int) -> None:
    if _setns(namespace_fd, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")
    posix.close(namespace_fd)


def _end_with(services: list[int]) -> None:
    """The qube is gone, and with it whatever the service has started in its group."""
    try:
        for pid in services:
            posix.killpg(pid, signal.SIGKILL)
    finally:
        posix._exit(0)


def _exit_status(wait_status: int) -> int:
    """As qrexec reports it: 128 + N for signal N."""
    if posix.WIFSIGNALED(wait_status):
        return 128 + posix.WTERMSIG(wait_status)
    return posix.WEXITSTATUS(wait_status)


def _receive(sock: _socket.socket) -> tuple[bytes, list[int]]:
    packet, ancillary, _, _ = sock.recvmsg(
        _ORDER_MAX, _socket.CMSG_SPACE(_FDS_MAX * _FD_BYTES), _socket.MSG_CMSG_CLOEXEC
    )
    fds = []
    for level, kind, data in ancillary:
        if (level, kind) == (_socket.SOL_SOCKET, _socket.SCM_RIGHTS):
            count = len(data) // _FD_BYTES
            fds += [
                int.from_bytes(data[i * _FD_BYTES : (i + 1) * _FD_BYTES], sys.byteorder) for i in range(count)
            ]
    return packet, fds


if __name__ == "__main__":
    main()
