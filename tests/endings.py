# SPDX-License-Identifier: GPL-2.0-or-later
"""How TCP connections go and end: scripts that are played straight against a server, and through a relay.

Each script is ``async (client, server)``. It knows nothing of what is between the two, and reports what
each side saw with `End.saw`. `play` runs one over any way from an address to a listening socket.
"""

import fcntl
import hashlib
import socket
import struct
import termios
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio
from bounds import BOUND_S
from helpers import until

MIB = 1 << 20


@dataclass(frozen=True)
class Saw:
    """What one side saw, in its order: sizes and hashes of data, then ``EOF`` or ``RST``."""

    client: tuple[str, ...]
    server: tuple[str, ...]


@dataclass
class End:
    """One end of a connection, in the hands of a script."""

    sock: trio.socket.SocketType
    saw: list[str] = field(default_factory=list)

    async def send(self, data: bytes) -> None:
        await trio.SocketStream(self.sock).send_all(data)

    async def delivered(self) -> None:
        """Wait until the peer's kernel has all that was sent: a later abort must not take it back."""

        def unacknowledged_bytes() -> int:
            return int(struct.unpack("i", fcntl.ioctl(self.sock.fileno(), termios.TIOCOUTQ, bytes(4)))[0])

        await until(lambda: unacknowledged_bytes() == 0)

    def fin(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    def rst(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    async def read(self, size: int) -> None:
        """Read exactly so much."""
        data = bytearray()
        while len(data) < size:
            chunk = await self.sock.recv(size - len(data))
            assert chunk, f"an end of file after {len(data)} of {size} bytes"
            data += chunk
        self._saw_data(bytes(data))

    async def read_to_end(self) -> None:
        """Read all there is, and how it ends."""
        data = bytearray()
        try:
            while chunk := await self.sock.recv(65536):
                data += chunk
        except ConnectionResetError:
            how = "RST"
        else:
            how = "EOF"
        self._saw_data(bytes(data))
        self.saw.append(how)

    def _saw_data(self, data: bytes) -> None:
        if data:
            self.saw.append(f"{len(data)} bytes {hashlib.sha256(data).hexdigest()[:16]}")


Script = Callable[[End, End], Awaitable[None]]


def pattern(size: int, seed: int = 1) -> bytes:
    return hashlib.shake_128(str(seed).encode()).digest(size)


async def server_speaks_first(client: End, server: End) -> None:
    await server.send(b"220 hello\r\n")
    await client.read(11)
    await client.send(b"QUIT\r\n")
    await server.read(6)
    server.fin()
    await client.read_to_end()
    client.fin()
    await server.read_to_end()


async def client_ends_first_and_gets_all(client: End, server: End) -> None:
    await client.send(b"request")
    client.fin()
    await server.read_to_end()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.read_to_end)
        await server.send(pattern(4 * MIB))
        server.fin()


async def server_ends_first_and_gets_all(client: End, server: End) -> None:
    await client.send(b"a")  # so that the server's end is not its connection's first news
    await server.read(1)
    server.fin()
    await client.read_to_end()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.read_to_end)
        await client.send(pattern(4 * MIB))
        client.fin()


async def client_ends_without_a_byte(client: End, server: End) -> None:
    client.fin()
    await server.read_to_end()
    await server.send(b"still here")
    server.fin()
    await client.read_to_end()


async def server_ends_without_a_byte(client: End, server: End) -> None:
    server.fin()
    await client.read_to_end()
    await client.send(b"still here")
    client.fin()
    await server.read_to_end()


async def both_ways_at_once(client: End, server: End) -> None:
    async def send(end: End, seed: int) -> None:
        await end.send(pattern(8 * MIB, seed))
        end.fin()

    async with trio.open_nursery() as nursery:
        for end, seed in ((client, 1), (server, 2)):
            nursery.start_soon(send, end, seed)
            nursery.start_soon(end.read_to_end)


async def server_closes_after_its_answer(client: End, server: End) -> None:
    await client.send(b"GET / HTTP/1.0\r\n\r\n")
    await server.read(18)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.read_to_end)
        await server.send(pattern(MIB))
        server.sock.close()
    client.fin()


async def server_aborts_without_a_byte(client: End, server: End) -> None:
    await client.send(b"a")
    await server.read(1)
    server.rst()
    await client.read_to_end()


async def server_aborts_after_data(client: End, server: End) -> None:
    await client.send(b"a")
    await server.read(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.read_to_end)
        await server.send(pattern(MIB))
        await server.delivered()
        server.rst()


async def server_aborts_with_the_upload_unread(client: End, server: End) -> None:
    await client.send(pattern(100_000))
    await server.read(10)
    server.sock.close()  # with bytes unread: the kernel sends RST
    await client.read_to_end()


async def server_aborts_after_the_clients_end(client: End, server: End) -> None:
    await client.send(b"a")
    client.fin()
    await server.read_to_end()
    server.rst()
    await client.read_to_end()


async def byte_by_byte(client: End, server: End) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.read, 500)
        for byte in pattern(500):
            await client.send(bytes([byte]))
    server.fin()
    await client.read_to_end()
    client.fin()
    await server.read_to_end()


async def urgent_bytes(client: End, server: End) -> None:
    """Each stays in its place for a server that has them in line, as telnet's and ftp's have."""
    for end, other in ((client, server), (server, client)):
        other.sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        await end.send(b"ab")
        await end.sock.send(b"!", socket.MSG_OOB)
        await end.send(b"cd")
        end.fin()
    await server.read_to_end()
    await client.read_to_end()


def echo_of(size: int) -> Script:
    async def script(client: End, server: End) -> None:
        async def upload() -> None:
            await client.send(pattern(size))
            client.fin()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(upload)
            nursery.start_soon(server.read_to_end)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.read_to_end)
            await server.send(pattern(size, 2))
            server.fin()

    script.__name__ = f"echo_of_{size}"
    return script


SIZES = (0, 1, 32767, 32768, 32769, 65535, 65536, 65537, MIB - 1, MIB, MIB + 1)

# What every relay must get exactly as the direct connection has it.
SCRIPTS: tuple[Script, ...] = (
    server_speaks_first,
    client_ends_first_and_gets_all,
    server_ends_first_and_gets_all,
    client_ends_without_a_byte,
    server_ends_without_a_byte,
    both_ways_at_once,
    server_closes_after_its_answer,
    server_aborts_without_a_byte,
    server_aborts_after_data,
    server_aborts_with_the_upload_unread,
    server_aborts_after_the_clients_end,
    byte_by_byte,
    urgent_bytes,
    *map(echo_of, SIZES),
)


async def client_aborts(client: End, server: End) -> None:
    await client.send(b"a")
    await server.read(1)
    client.rst()
    await server.read_to_end()


async def client_aborts_while_the_server_sends(client: End, server: End) -> None:
    await server.send(b"a")
    await client.read(1)
    client.rst()
    await server.read_to_end()


# Those need a mux call: raw qrexec turns a client's abort into an end of file.
CLIENT_ABORTS: tuple[Script, ...] = (client_aborts, client_aborts_while_the_server_sends)


async def play(script: Script, address: tuple[str, int], listening: socket.socket) -> Saw:
    """Play a script between a client that connects to ``address`` and what ``listening`` accepts then."""
    with trio.fail_after(BOUND_S), trio.socket.socket() as client:
        await client.connect(address)
        await trio.lowlevel.wait_readable(listening)
        accepted, _ = listening.accept()
        accepted.setblocking(False)
        with trio.socket.from_stdlib_socket(accepted) as server:
            ends = End(client), End(server)
            await script(*ends)
            return Saw(tuple(ends[0].saw), tuple(ends[1].saw))


async def play_directly(script: Script, listening: socket.socket) -> Saw:
    """The judge of every relay."""
    return await play(script, listening.getsockname()[:2], listening)
