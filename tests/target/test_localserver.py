# SPDX-License-Identifier: GPL-2.0-or-later
import errno
import os
import select
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from helpers import BOUND_S, listening_socket, no_fds_left, port_of

from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.common.values import Proto, TargetPorts
from qubes_fwd_qrexec.relay.copy import close_cleanly, half_close
from qubes_fwd_qrexec.system.unixsockets import open_unix_listening
from qubes_fwd_qrexec.target import localserver
from qubes_fwd_qrexec.target.localserver import ServiceError, connect, parse_argument
from qubes_fwd_qrexec.target.servers import LOCALHOSTS, ServerAddress

BAD_ARGUMENTS = [
    "", "+8080", " 8080", "8080 ", "08080", "8_080", "8080\n", "65536", "99999", "100000", "0", "-1", "80-90",
    "\u0668\u0660", "\u00b2", "0x50", "8e3", "80.0", "localhost", "127.0.0.1:80", "80+", "80+call",
    "80+mux+", "+mux", "80-+mux", "90-80+mux", "080+mux", "80-65536+mux",
    "80/../81", "x" * 100_000, "\udcff",
]  # fmt: skip


@pytest.mark.parametrize(("text", "port"), [("1", 1), ("80", 80), ("8080", 8080), ("65535", 65535)])
def test_a_port_is_taken(text: str, port: int) -> None:
    assert parse_argument(text) == (TargetPorts(port, port), False)


@pytest.mark.parametrize(
    ("text", "first", "last"), [("80+mux", 80, 80), ("80-90+mux", 80, 90), ("1-65535+mux", 1, 65535)]
)
def test_a_mux_call_is_asked_for_by_port_or_range(text: str, first: int, last: int) -> None:
    assert parse_argument(text) == (TargetPorts(first, last), True)


def test_a_call_for_udp_is_a_mux_call() -> None:
    assert parse_argument("53-54+mux", Proto.UDP) == (TargetPorts(53, 54), True)
    with pytest.raises(ServiceError, match=r"is not PORT\+mux or PORT-PORT\+mux") as caught:
        parse_argument("53", Proto.UDP)
    assert caught.value.status == 2


@pytest.mark.parametrize("text", BAD_ARGUMENTS)
def test_whatever_is_no_port_is_refused_with_status_2(text: str) -> None:
    with pytest.raises(ServiceError) as caught:
        parse_argument(text)
    assert caught.value.status == 2


def test_ipv6_is_tried_when_ipv4_refuses() -> None:
    with listening_socket("::1") as server, connect(port_of(server)) as sock:
        assert sock.getpeername()[:2] == server.getsockname()[:2]
        assert not sock.getblocking()


def test_a_server_whose_queue_is_full_is_status_75_in_time() -> None:
    with socket.socket() as server, no_fds_left():
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        fillers = []
        for _ in range(3):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(server.getsockname())
            fillers.append(filler)
        with pytest.raises(ServiceError) as caught:
            connect(port_of(server), timeout_s=0.1)
        for filler in fillers:
            filler.close()
    assert caught.value.status is ExitStatus.SERVER_TIMEOUT


def test_a_port_that_nobody_listens_on_never_answers_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket that the kernel happened to bind to the very port it connects to meets itself."""
    with listening_socket() as sock:
        port = port_of(sock)

    class Unlucky(socket.socket):
        def connect(self, address: tuple[str, int]) -> None:  # type: ignore[override]
            if self.family == socket.AF_INET:
                self.bind(("127.0.0.1", port))
            super().connect(address)

    monkeypatch.setattr(localserver.socket, "socket", Unlucky)
    with no_fds_left(), pytest.raises(ServiceError) as caught:
        connect(port)
    assert caught.value.status is ExitStatus.SERVER_REFUSED


def test_a_shortage_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> socket.socket:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(localserver.socket, "socket", refuse)
    with pytest.raises(ServiceError, match="Too many open files"):
        connect(80)


@pytest.mark.parametrize(("family", "host"), LOCALHOSTS)
@pytest.mark.parametrize("is_over", [False, True])
def test_a_server_of_the_target_may_listen_on_a_port_that_a_connection_comes_from(
    family: socket.AddressFamily, host: str, *, is_over: bool
) -> None:
    """Also where that has ended and TCP holds the port for a while. Others have some ports, or had lately."""
    assert any(can_listen_where_it_comes_from(family, host, is_over=is_over) for _ in range(500))


def can_listen_where_it_comes_from(family: socket.AddressFamily, host: str, *, is_over: bool) -> bool:
    with ExitStack() as undo:
        server = undo.enter_context(socket.create_server((host, 0), family=family))
        near = undo.enter_context(
            localserver.connect_to(ServerAddress(family, host), port_of(server), BOUND_S)
        )
        far, _ = server.accept()
        undo.enter_context(far)
        port = near.getsockname()[1]
        if is_over:
            half_close(near)
            assert far.recv(1) == b""
            far.close()
            select.select([near], [], [], BOUND_S)
            close_cleanly(near)
        for address in (host, "::" if family == socket.AF_INET6 else "0.0.0.0"):
            with socket.socket(family) as other:
                other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    other.bind((address, port))
                    other.listen()
                except OSError:
                    return False
    return True


def test_a_server_that_has_only_its_own_address_is_reached_there(name_servers: Callable[[str], Path]) -> None:
    with listening_socket("127.0.0.2") as server:
        with pytest.raises(ServiceError, match="Connection refused"):
            connect(port_of(server))
        name_servers(f"tcp {port_of(server)} 127.0.0.2")
        with connect(port_of(server)) as sock:
            assert sock.getpeername() == server.getsockname()


def test_a_port_that_is_named_is_not_tried_at_localhost(
    server: socket.socket, name_servers: Callable[[str], Path]
) -> None:
    name_servers(f"tcp {port_of(server)} 127.0.0.2")
    with no_fds_left(), pytest.raises(ServiceError, match="Connection refused"):
        connect(port_of(server))


def test_a_port_whose_line_is_wrong_is_refused_and_the_place_is_named(
    server: socket.socket, name_servers: Callable[[str], Path]
) -> None:
    path = name_servers(f"tcp {port_of(server)} localhosts/8")
    with pytest.raises(ServiceError, match=f"port {port_of(server)}: {path}:1: ") as caught:
        connect(port_of(server))
    assert caught.value.status is ExitStatus.SERVER_REFUSED


@pytest.mark.parametrize("folder", ["", "f" * 120])
def test_a_server_on_a_unix_socket_is_reached_however_long_its_path(
    tmp_path: Path, name_servers: Callable[[str], Path], folder: str
) -> None:
    (place := tmp_path / folder).mkdir(exist_ok=True)
    name_servers(f"tcp 80 unix:{place}/web.sock")
    with no_fds_left():
        with pytest.raises(ServiceError, match="port 80: No such file or directory"):
            connect(80)
        with open_unix_listening(place / "web.sock", 0o600, 1) as server, connect(80) as sock:
            assert not sock.getblocking()
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 2 * 131_072
            sock.send(b"hello")
            far, _ = server.accept()
            with far:
                assert far.recv(5) == b"hello"


def test_a_unix_server_whose_queue_is_full_is_waited_for(
    unix_server: socket.socket, name_servers: Callable[[str], Path]
) -> None:
    name_servers(f"tcp 80 unix:{unix_server.getsockname()}")
    unix_server.listen(0)
    with connect(80), no_fds_left():
        with pytest.raises(ServiceError, match="no answer within") as caught:
            connect(80, timeout_s=0.05)
        assert caught.value.status is ExitStatus.SERVER_TIMEOUT
