# SPDX-License-Identifier: GPL-2.0-or-later
"""What dom0 is told of a server: whether it is where calls get to, and what it seems to expect."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from helpers import BOUND_S, free_port, listening_socket, no_fds_left, port_of
from udpservice_bench import udp_port, udp_server

from qubes_fwd_qrexec.common.report import Answer, Expects, Trial
from qubes_fwd_qrexec.common.values import Proto
from qubes_fwd_qrexec.target.servertrials import look_at, try_header, try_port

Write = Callable[[str], Path]
Serve = Callable[[bytes], tuple[bytes, bool]]
V2 = b"\r\n\r\n\0\r\nQUIT\n"
ENDS, STAYS = True, False


# Where it is


def test_a_server_that_is_where_its_owner_says_is_told_with_the_line(
    name_servers: Write, unix_server: socket.socket
) -> None:
    where = f"unix:{unix_server.getsockname()}"
    path = name_servers(f"# a comment\ntcp 80 {where}")
    text = f"a server accepts connections on port 80; calls get to {where}, as {path}:2 says"
    assert try_port(80) == Trial(Answer.THROUGH, "elsewhere", text)


def test_a_server_that_is_not_where_its_owner_says_is_told_with_the_line(
    server: socket.socket, name_servers: Write
) -> None:
    port = port_of(server)
    path = name_servers(f"tcp {port} 127.0.0.2")
    refused = f"port {port}: Connection refused; calls get to 127.0.0.2, as {path}:1 says"
    assert try_port(port) == Trial(Answer.REFUSED, "elsewhere", refused)
    name_servers(f"tcp {port} nosuch0")
    wrong = f"port {port}: {path}:1: this qube has no such interface, or that has no address"
    assert try_port(port) == Trial(Answer.REFUSED, "elsewhere", wrong)


def test_a_server_that_listens_elsewhere_though_nobody_says_so_is_told_with_its_address() -> None:
    with listening_socket("127.0.0.2") as server:
        port = port_of(server)
        assert try_port(port) == Trial(
            Answer.REFUSED,
            "not-at-loopback",
            f"port {port}: Connection refused; a server listens at 127.0.0.2",
        )


def test_of_udp_a_server_counts_where_its_owner_says(name_servers: Write) -> None:
    with udp_server("127.0.0.53") as server:
        port = udp_port(server)
        what = f"udp port {port}: a server listens at 127.0.0.53"
        assert look_at(Proto.UDP, port) == Trial(Answer.REFUSED, "not-at-loopback", what)
        path = name_servers(f"udp {port} 127.0.0.53")
        said = f"{what}; calls get to 127.0.0.53, as {path}:1 says"
        assert look_at(Proto.UDP, port) == Trial(Answer.REFUSED, "loopback", said)
        name_servers(f"udp {port} 127.0.0.2")
        said = f"{what}; calls get to 127.0.0.2, as {path}:1 says"
        assert look_at(Proto.UDP, port) == Trial(Answer.REFUSED, "elsewhere", said)
        name_servers(f"udp {port} nosuch0")
        assert look_at(Proto.UDP, port).reason == "elsewhere"


def test_a_line_that_is_wrong_does_not_keep_packets_of_others_from_a_server(name_servers: Write) -> None:
    with udp_server("0.0.0.0") as server:
        name_servers(f"udp {udp_port(server)} nosuch0")
        trial = look_at(Proto.UDP, udp_port(server))
        assert (trial.answer, trial.reason) == (Answer.THROUGH, "elsewhere")


def test_no_packet_gets_to_a_server_on_a_unix_socket(name_servers: Write) -> None:
    """So dom0 chooses calls for it."""
    name_servers("tcp 80 unix:/run/web.sock")
    trial = look_at(Proto.TCP, 80)
    assert (trial.answer, trial.reason) == (Answer.REFUSED, "loopback")


# What it expects


@contextmanager
def serving(serve: Serve) -> Iterator[int]:
    """The port of a server that takes one connection after the other. ``serve`` says to the first bytes of
    each what it answers, and whether it ends.
    """
    with ExitStack() as kept, listening_socket() as server:
        server.setblocking(True)

        def run() -> None:
            while True:
                try:
                    sock = kept.enter_context(server.accept()[0])
                except OSError:
                    return
                answer, ends = serve(sock.recv(100))
                sock.sendall(answer)
                if ends:
                    sock.close()

        thread = threading.Thread(target=run)
        thread.start()
        yield port_of(server)
        server.shutdown(socket.SHUT_RDWR)
        thread.join(BOUND_S)


def nginx_that_expects(data: bytes) -> tuple[bytes, bool]:
    return b"", not data.startswith((V2 + b"\x20", b"PROXY "))


def postfix_that_expects(data: bytes) -> tuple[bytes, bool]:
    return (b"220 mail\r\n", STAYS) if data.startswith(V2 + b"\x20") else (b"", ENDS)


def only_version_1(data: bytes) -> tuple[bytes, bool]:
    return b"", not data.startswith(b"PROXY ")


def web_server(_: bytes) -> tuple[bytes, bool]:
    return b"HTTP/1.1 400 Bad Request\r\n\r\n", ENDS


def database(_: bytes) -> tuple[bytes, bool]:
    return b"", ENDS


def sshd(_: bytes) -> tuple[bytes, bool]:
    return b"SSH-2.0-server\r\n", STAYS


def python_web_server(data: bytes) -> tuple[bytes, bool]:
    return (b"", ENDS) if data.startswith(b"\r\n") else web_server(data)


def one_that_waits(_: bytes) -> tuple[bytes, bool]:
    return b"", STAYS


@pytest.mark.parametrize(
    ("serve", "expected"),
    [
        (nginx_that_expects, Expects.V2),
        (postfix_that_expects, Expects.V2),
        (only_version_1, Expects.V1),
        (web_server, Expects.NONE),
        (database, Expects.NONE),
        (sshd, Expects.NONE),
        (python_web_server, Expects.NONE),
    ],
)
def test_what_a_server_seems_to_expect(serve: Serve, expected: Expects) -> None:
    with no_fds_left(), serving(serve) as port:
        trial = try_header(port, BOUND_S, 0.1)
        assert (trial.answer, trial.reason) == (Answer.THROUGH, expected)


def test_a_server_that_waits_for_more_does_not_show_what_it_expects() -> None:
    with serving(one_that_waits) as port:
        trial = try_header(port, 0.05)
        assert (trial.answer, trial.reason) == (Answer.SILENT, "")


def test_where_nobody_listens_nothing_is_found_out() -> None:
    trial = try_header(free_port())
    assert (trial.answer, trial.reason) == (Answer.FAILED, "")
    assert "Connection refused" in trial.text
