# SPDX-License-Identifier: GPL-2.0-or-later
"""What the tests of the programs in the qubes share: sockets and bounds."""

import os
import select
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Container, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import trio
from bounds import BOUND_S

from qubes_fwd_qrexec.exposed.call import CallTimeouts
from qubes_fwd_qrexec.exposed.callwaits import CallWaits
from qubes_fwd_qrexec.exposed.listener import Listener
from qubes_fwd_qrexec.relay.loop import Loop
from qubes_fwd_qrexec.system.configsource import FileSource

# However long a test takes, dom0 is not asked again for what it refused; whoever waits gives up soon.
NEVER_AGAIN = CallWaits(wait_s=0.05, again_s=1e6)
# What `revoke` waits for a process that does not obey, and again for one that it has killed.
KILLED_S = 3.0
# At descriptors that are left: they take less than the timers that could end those instead, of 10 s and more.
# It is no time that is bounded, as a machine may stand still between two.
_LOOKS = 1000
_NOBODY = 65534


class Everywhere(Container[object]):
    """Wherever one asks, somebody listens."""

    def __contains__(self, _: object) -> bool:
        return True


def listening_socket(host: str = "127.0.0.1", port: int = 0) -> socket.socket:
    """A non-blocking server socket, on a free port unless one is given."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.bind((host, port))
    sock.listen(128)
    sock.setblocking(False)
    return sock


_reserved: list[socket.socket] = []


def free_port(host: str = "127.0.0.1") -> int:
    """A port on which nobody listens, and which the kernel gives to nobody else before the test is over.

    It is bound, but not listened on: whoever has SO_REUSEADDR, as servers have, may have it all the same. Who
    listens at all addresses says so, as another test may have the same port at another one.
    """
    sock = socket.socket()
    _reserved.append(sock)
    sock.bind((host, 0))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return port_of(sock)


@contextmanager
def reserved_ports() -> Iterator[None]:
    """All ports that `free_port` has reserved are anybody's again after the block."""
    try:
        yield
    finally:
        while _reserved:
            _reserved.pop().close()


def port_of(sock: socket.socket) -> int:
    return int(sock.getsockname()[1])


STANDING: set[int] = set()
"""Processes of the whole run, such as an X server, which are no test's own."""


def children() -> list[int]:
    """The living processes that this one has started, but those of the whole run."""
    found = (path.read_text().split() for path in Path("/proc/self/task").glob("*/children"))
    pids = [int(pid) for some in found for pid in some]
    return [
        pid
        for pid in pids
        if pid not in STANDING
        and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    ]


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a TCP connection, non-blocking."""
    with listening_socket() as server:
        one = socket.create_connection(server.getsockname())
        server.setblocking(True)
        other, _ = server.accept()
    one.setblocking(False)
    other.setblocking(False)
    return one, other


def unix_pair() -> tuple[socket.socket, socket.socket]:
    one, other = socket.socketpair()
    one.setblocking(False)
    other.setblocking(False)
    return one, other


def open_fds() -> set[tuple[str, str]]:
    """Descriptors and what they are: a socket has a number that no other one gets."""
    found = set()
    for path in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the one by which this is read
            found.add((path.name, os.readlink(path)))
    return found


def nobody() -> None:
    """For what a loop calls in a test that has nothing which a bug would have to end."""


@contextmanager
def no_fds_left() -> Iterator[None]:
    """The block leaves no descriptor; one that another thread still has to close then is waited for."""
    before = open_fds()
    yield
    for look in range(_LOOKS + 1):
        if not (left := {found for found in open_fds() - before if int(found[0]) not in _held()}):
            break
        assert look < _LOOKS, left
        time.sleep(0.005)


def _held() -> set[int]:
    """Descriptors that `free_port` still needs."""
    return {sock.fileno() for sock in _reserved}


def is_ready(loop: Loop) -> bool:
    """Whether the kernel has news for it now."""
    return bool(select.select([loop], [], [], 0)[0])


async def until(condition: Callable[[], object]) -> None:
    """Wait, within the bound, for something without an event, by polling.

    That is what the kernel, another process or the relay's thread changes without a word to us, and what
    a program under test keeps to itself; it has no events for the sake of tests.
    """
    with trio.fail_after(BOUND_S):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.005)


def write_config(directory: Path, listen_port: int, target_port: int, **options: str) -> Path:
    """A configuration of one forward, replaced as a whole; ``key`` and any option may be said."""
    directory.mkdir(exist_ok=True)
    key = options.pop("key", "fwd.work.web")
    given = {
        "version": "1",
        "service": "qubes.ForwardTCP",
        "transport": "call",
        "side": "outer",
        "listen": "127.0.0.1",
        "srcports": f"{listen_port}-{listen_port}",
        "dstports": f"{target_port}-{target_port}",
        "srchosts": "127.0.0.0/8",
    } | {name.replace("_", "-"): value for name, value in options.items()}
    file = directory / key
    temporary = directory / ".new"
    temporary.write_text(" ".join(f"{name}={value}" for name, value in given.items()))
    return temporary.rename(file)


@asynccontextmanager
async def running_listener(
    directory: Path,
    client: tuple[str, ...],
    *,
    calls_max: int = 32,
    timeouts: CallTimeouts | None = None,
    drain_s: float = 5.0,
    linger_s: float = 60.0,
    status_dir: Path | None = None,
    waits: CallWaits | None = None,
) -> AsyncIterator[Listener]:
    """A listener that serves ``directory``; stopped, at once, with the block."""
    listener = Listener(
        FileSource(directory),
        client,
        calls_max=calls_max,
        timeouts=timeouts,
        drain_s=drain_s,
        linger_s=linger_s,
        status_dir=status_dir,
        waits=waits,
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(listener.run)
        yield listener
        listener.stop()
        listener.stop()


def calls_of(listener: Listener, target: str = "work") -> int:
    """Calls under way to a target, one for each connection that `call` carries."""
    return listener.transports.calls.calls_to(target)


def is_listening(port: int) -> bool:
    """Without a connection that the listener would have to carry."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(line[1].endswith(f":{port:04X}") and line[3] == "0A" for line in lines)


def can_connect(port: int, host: str = "127.0.0.1") -> bool:
    try:
        socket.create_connection((host, port), timeout=BOUND_S).close()
    except ConnectionRefusedError:
        return False
    return True


async def connect(port: int) -> trio.SocketStream:
    """Without a turn for the listener, whose reset would otherwise fail the connect itself at times."""
    sock = socket.create_connection(("127.0.0.1", port))
    sock.setblocking(False)
    return trio.SocketStream(trio.socket.from_stdlib_socket(sock))


async def accept_socket(server: socket.socket) -> socket.socket:
    with trio.fail_after(BOUND_S):
        await trio.lowlevel.wait_readable(server)
    sock, _ = server.accept()
    sock.setblocking(False)
    return sock


async def accept(server: socket.socket) -> trio.SocketStream:
    return trio.SocketStream(trio.socket.from_stdlib_socket(await accept_socket(server)))


def abort_stream(stream: trio.SocketStream) -> None:
    """Close it by an RST."""
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()


async def is_reset(stream: trio.SocketStream) -> bool:
    """Whether it ends by an abort, and not by an end of file; nothing else may come before that."""
    with trio.fail_after(BOUND_S):
        try:
            got = await stream.receive_some()
        except trio.BrokenResourceError as error:
            return isinstance(error.__cause__, ConnectionResetError)
    assert got == b""
    return False


async def echo_once(client: trio.SocketStream, far: trio.SocketStream) -> None:
    with trio.fail_after(BOUND_S):
        await client.send_all(b"x")
        assert await far.receive_some() == b"x"
        await far.send_all(b"y")
        assert await client.receive_some() == b"y"


@contextmanager
def without_rights(place: Path) -> Iterator[None]:
    """This user may not write there. To root, who may write anywhere, that happens as another user."""
    if os.geteuid() == 0:
        os.seteuid(_NOBODY)
        try:
            yield
        finally:
            os.seteuid(0)
        return
    mode = place.stat().st_mode
    place.chmod(0o500)
    try:
        yield
    finally:
        place.chmod(mode)
