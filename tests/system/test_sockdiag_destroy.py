# SPDX-License-Identifier: GPL-2.0-or-later
"""Connections that a qube's own kernel ends: exactly those, with a RST to the peer."""

import errno
import socket
import struct
import sys
from collections.abc import Container, Iterator
from contextlib import ExitStack
from ipaddress import ip_address

import pytest
from bounds import BOUND_S
from spaces import Spaces, needs_namespaces

from qubes_fwd_qrexec.common.values import IPAddress
from qubes_fwd_qrexec.system.sockdiag import SocketsError, destroy

pytestmark = needs_namespaces
CLIENTS = ("192.0.2.9", "192.0.2.10", "fd77::9")
SERVER = {4: "192.0.2.1", 6: "fd77::1"}
ALL = range(1, 65536)


class Net:
    """A server's qube and a client's, which has two addresses of IPv4."""

    def __init__(self, spaces: Spaces, opened: ExitStack) -> None:
        self.spaces = spaces
        self._opened = opened

    def serve(self, port: int, address: str = "::") -> socket.socket:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with self.spaces.within("server"):
            sock = socket.create_server((address, port), family=family, dualstack_ipv6=address == "::")
        sock.settimeout(BOUND_S)
        return self._opened.enter_context(sock)

    def connect(self, server: socket.socket, source: str = CLIENTS[0]) -> tuple[socket.socket, socket.socket]:
        """A client, and the server's end."""
        port = int(server.getsockname()[1])
        with self.spaces.within("client"):
            client = socket.create_connection(
                (SERVER[ip_address(source).version], port), BOUND_S, source_address=(source, 0)
            )
        far, _ = server.accept()
        for sock in (client, far):
            sock.settimeout(BOUND_S)
            self._opened.enter_context(sock)
        return client, far

    def destroy(self, *peers: str, ports: Container[int] = ALL) -> int:
        asked = {ip_address(peer) for peer in peers}

        def is_ended(peer: IPAddress, port: int) -> bool:
            return port in ports and (not asked or peer in asked)

        with self.spaces.within("server"):
            return destroy(is_ended)


@pytest.fixture
def net() -> Iterator[Net]:
    with Spaces("client", "server") as spaces, ExitStack() as opened:
        spaces.join(
            *("server", "client"),
            (f"{SERVER[4]}/24", f"{CLIENTS[0]}/24"),
            (f"{SERVER[4]}/32", f"{CLIENTS[1]}/24"),
            (f"{SERVER[6]}/64", f"{CLIENTS[2]}/64"),
        )
        yield Net(spaces, opened)


def is_alive(client: socket.socket, far: socket.socket) -> bool:
    client.sendall(b"x")
    return far.recv(9) == b"x"


def assert_ended(client: socket.socket, far: socket.socket) -> None:
    """The client gets a RST though nobody moves, and the server an error of its own."""
    with pytest.raises(ConnectionResetError):
        client.recv(9)
    with pytest.raises(OSError, match=r".") as caught:
        far.recv(9)
    assert caught.value.errno == errno.ECONNABORTED


@pytest.mark.parametrize("address", ["::", "192.0.2.1"])
def test_a_peer_that_is_named_gets_a_reset_and_the_others_go_on(net: Net, address: str) -> None:
    """Also with a server that takes IPv4 by its socket of IPv6."""
    server = net.serve(8080, address)
    ended, kept = net.connect(server), net.connect(server, CLIENTS[1])
    assert net.destroy(CLIENTS[0]) == 1
    assert_ended(*ended)
    assert is_alive(*kept)
    again = net.connect(server)  # nobody has closed the server's own socket
    assert is_alive(*again)


def test_a_connection_by_ipv6_ends_the_same(net: Net) -> None:
    ended = net.connect(net.serve(8080), CLIENTS[2])
    assert net.destroy(CLIENTS[2]) == 1
    assert_ended(*ended)


def test_only_the_named_ports_are_meant(net: Net) -> None:
    pairs = [net.connect(net.serve(port)) for port in (8079, 8080, 8081, 8082)]
    assert net.destroy(ports=(8080, 8081)) == 2
    assert [is_alive(*pairs[at]) for at in (0, 3)] == [True, True]
    for at in (1, 2):
        assert_ended(*pairs[at])


def test_what_the_qube_connects_to_itself_is_left_alone(net: Net) -> None:
    """By its loopback addresses and by its own."""
    server = net.serve(8080)
    pairs = []
    for address, source in (
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.0.1", "127.0.0.2"),
        ("::1", "::1"),
        (SERVER[4], SERVER[4]),
        (SERVER[6], SERVER[6]),
    ):
        with net.spaces.within("server"):
            client = socket.create_connection((address, 8080), BOUND_S, source_address=(source, 0))
        far, _ = server.accept()
        pairs.append((client, far))
    assert net.destroy() == 0
    for client, far in pairs:
        with client, far:
            assert is_alive(client, far)


def test_a_connection_that_nobody_has_accepted_yet_ends_as_well(net: Net) -> None:
    net.serve(8080)
    with net.spaces.within("client"):
        client = socket.create_connection((SERVER[4], 8080), BOUND_S)
    with client:
        client.settimeout(BOUND_S)
        assert net.destroy() == 1
        with pytest.raises(ConnectionResetError):
            client.recv(9)


def test_one_that_its_program_has_closed_already_is_no_failure(net: Net) -> None:
    """The kernel may have nothing of it that it could end."""
    client, far = net.connect(net.serve(8080))
    far.close()
    assert client.recv(9) == b""
    net.destroy()
    client.close()
    net.destroy()


def test_one_that_ends_by_itself_before_it_is_its_turn_is_no_failure(net: Net) -> None:
    client, far = net.connect(net.serve(8080))
    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def is_ended(_: IPAddress, port: int) -> bool:
        far.close()
        return port == 8080

    with net.spaces.within("server"):
        assert destroy(is_ended) == 0
    with pytest.raises(ConnectionResetError):
        client.recv(9)


def test_many_are_ended(net: Net) -> None:
    server = net.serve(8080)
    pairs = [net.connect(server) for _ in range(200)]
    assert net.destroy() == 200
    for pair in pairs:
        assert_ended(*pair)


def test_without_the_right_it_is_an_error(net: Net) -> None:
    """CAP_NET_ADMIN is all it needs."""
    pair = net.connect(net.serve(8080))
    code = (
        "import ctypes, struct\n"
        "from qubes_fwd_qrexec.system import sockdiag\n"
        "def keep(rights):\n"
        "    header = struct.pack('=Ii', 0x20080522, 0)\n"
        "    data = struct.pack('=6I', rights, rights, 0, 0, 0, 0)\n"
        "    assert ctypes.CDLL(None).capset(header, data) == 0\n"
        "def end():\n"
        "    try:\n"
        "        print(sockdiag.destroy(lambda *_: True))\n"
        "    except sockdiag.SocketsError as error:\n"
        "        print(error)\n"
        "{}\nend()\n"
    )
    said = net.spaces.run("server", sys.executable, "-c", code.format("keep(0)"))
    assert said == "the kernel does not end connections: Operation not permitted\n"
    assert is_alive(*pair)
    assert net.spaces.run("server", sys.executable, "-c", code.format("keep(1 << 12)")) == "1\n"
    assert_ended(*pair)


def test_a_kernel_that_does_not_answer_is_an_error(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    del net
    monkeypatch.setattr(socket, "AF_NETLINK", 99)
    with pytest.raises(SocketsError, match="the kernel does not end connections"):
        destroy(lambda *_: True)
