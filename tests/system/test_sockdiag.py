# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a user's programs listen: the kernel is asked, and where it is not, a kernel that is written down."""

import os
import socket
import struct
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Self

import pytest
from helpers import port_of

from qubes_fwd_qrexec.common.values import Binding
from qubes_fwd_qrexec.system import sockdiag as module
from qubes_fwd_qrexec.system.netlink import READ_MAX
from qubes_fwd_qrexec.system.sockdiag import DIRECTORY, SocketsError, listening, owner
from qubes_fwd_qrexec.target import listenersockets

LOOPBACK, LOOPBACK_IPV6 = ip_address("127.0.0.1"), ip_address("::1")
UID = os.getuid()
UNIT = Path(__file__).parents[2] / "systemd" / "qubes-forward-listener.service"


def server(host: str = "127.0.0.1") -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, 0), family=family)


def test_what_listens_is_told_by_address_and_port() -> None:
    with server() as one, server("::1") as other:
        wanted = {(LOOPBACK, port_of(one)), (LOOPBACK_IPV6, port_of(other))}
        assert wanted <= listening(UID)
    assert not wanted & listening(UID)


def test_what_listens_everywhere_is_told_as_that() -> None:
    with server("0.0.0.0") as one, server("::") as other:
        port, port_ipv6 = port_of(one), port_of(other)
        found = listening(UID)
    assert {(ip_address("0.0.0.0"), port), (ip_address("::"), port_ipv6)} <= found
    # Nothing else is made of it: neither one address, nor the other family.
    assert [address for address, at in found if at == port] == [ip_address("0.0.0.0")]
    assert [address for address, at in found if at == port_ipv6] == [ip_address("::")]


def test_sockets_of_another_user_are_not_listed() -> None:
    with server() as sock:
        assert (LOOPBACK, port_of(sock)) not in listening(UID + 1)
        if UID == 0:
            uid = 1_000_000 + os.getpid()  # of nobody else, also where these tests run twice at once
            os.fchown(sock.fileno(), uid, -1)  # as if that user had made it
            assert listening(uid) == {(LOOPBACK, port_of(sock))}
            assert (LOOPBACK, port_of(sock)) not in listening(UID)


def test_what_does_not_listen_is_not_even_asked_for() -> None:
    with socket.socket() as bound, server() as sock, socket.create_connection(sock.getsockname()) as far:
        bound.bind(("127.0.0.1", 0))
        accepted, _ = sock.accept()
        with accepted:
            assert not {(LOOPBACK, port_of(bound)), (LOOPBACK, port_of(far))} & listening(UID)


def test_a_socket_bound_to_an_interface_is_not_listed() -> None:
    """Another program may listen on the same port for the other interfaces."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0")
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        assert (LOOPBACK, port_of(sock)) not in listening(UID)


def receiver(host: str = "127.0.0.1", port: int = 0, *, is_shared: bool = False) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, is_shared)
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    sock.bind((host, port))
    return sock


def test_what_takes_datagrams_of_anybody_listens_for_udp() -> None:
    with receiver() as one, receiver("::1") as other, receiver() as joined:
        joined.connect(one.getsockname())
        wanted = {(LOOPBACK, port_of(one)), (LOOPBACK_IPV6, port_of(other))}
        found = listening(UID, socket.IPPROTO_UDP)
        assert wanted <= found
        assert (LOOPBACK, port_of(joined)) not in found
        assert not wanted & listening(UID)
        assert not wanted & listening(UID + 1, socket.IPPROTO_UDP)
    assert not wanted & listening(UID, socket.IPPROTO_UDP)


@pytest.mark.skipif(UID != 0, reason="only root can make a socket another user's")
@pytest.mark.parametrize(
    ("ours", "theirs", "is_listed"),
    [
        ("127.0.0.1", "127.0.0.1", False),
        ("0.0.0.0", "0.0.0.0", False),
        ("0.0.0.0", "127.0.0.1", False),  # what is sent to that address is the other's
        ("127.0.0.1", "0.0.0.0", True),
        ("127.0.0.1", "127.0.0.2", True),
        ("0.0.0.0", "::", True),
    ],
)
def test_a_port_of_udp_that_another_users_program_shares_is_not_listed(
    ours: str, theirs: str, is_listed: bool
) -> None:
    with (
        receiver(ours, is_shared=True) as sock,
        receiver(theirs, port_of(sock), is_shared=True) as other,
    ):
        uid = 1_000_000 + os.getpid()
        os.fchown(sock.fileno(), uid, -1)
        assert bool(listening(uid, socket.IPPROTO_UDP)) == is_listed
        os.fchown(other.fileno(), uid, -1)
        assert listening(uid, socket.IPPROTO_UDP)


def test_many_are_listed_in_several_parts_and_none_is_lost() -> None:
    count = 2 * READ_MAX // len(entry(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.socket, "socket", FakeKernel.of(*parts(range(1, count + 1)), done()))
        assert len(listening(7)) == count
    many = [server() for _ in range(400)]  # 50 KiB of messages, and the kernel sends at most 32 in a part
    try:
        assert {(LOOPBACK, port_of(sock)) for sock in many} <= listening(UID)
    finally:
        for sock in many:
            sock.close()


def test_a_kernel_that_refuses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    # linux/sock_diag.h has no request of this number; then one for a protocol that has no list.
    monkeypatch.setattr(module, "_SOCK_DIAG_BY_FAMILY", 99)
    with pytest.raises(SocketsError, match="the kernel does not list its sockets: Invalid argument"):
        listening(UID)
    monkeypatch.undo()
    with pytest.raises(SocketsError, match="the kernel does not list its sockets: No such file"):
        listening(UID, socket.IPPROTO_ICMP)


def test_where_there_is_no_netlink_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_NETLINK_SOCK_DIAG", 31)  # linux/netlink.h: one less than MAX_LINKS, unused
    with pytest.raises(SocketsError, match="the kernel does not list its sockets"):
        listening(UID)


def message(kind: int, payload: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(payload), kind, 0, 1, 0) + payload


def entry(port: int, *, uid: int = 7, family: int = socket.AF_INET, state: int = 10) -> bytes:
    """An inet_diag_msg of linux/inet_diag.h, with an attribute behind it."""
    address = socket.inet_pton(family, "192.0.2.1" if family == socket.AF_INET else "2001:db8::1")
    sockid = struct.pack("!HH16s16sI8x", port, 0, address, b"", 0)
    rest = struct.pack("=IIIII", 0, 0, 128, uid, 99)
    return message(20, struct.pack("=BBBB", family, state, 0, 0) + sockid + rest + b"\5\0\x08\0\0\0\0\0")


def parts(ports: "range") -> list[bytes]:
    return [b"".join(map(entry, ports[at : at + 100])) for at in range(0, len(ports), 100)]


def done(status: int = 0) -> bytes:
    return message(3, struct.pack("=i", status))


class FakeKernel:
    """A netlink socket that answers a dump of IPv4 by these parts, and one of IPv6 by nothing."""

    def __init__(self, answers: tuple[tuple[bytes, int], ...], *given: int) -> None:
        assert given == (socket.AF_NETLINK, socket.SOCK_RAW, 4)
        self._answers = list(answers)

    @classmethod
    def of(cls, *answers: bytes | tuple[bytes, int]) -> Callable[..., Self]:
        """Each from the kernel, or with the port of who sends it."""
        sent = tuple(one if isinstance(one, tuple) else (one, 0) for one in answers)
        return lambda *given: cls(sent, *given)

    def close(self) -> None:
        pass

    def settimeout(self, timeout_s: float) -> None:
        assert 0 < timeout_s < 60

    def sendto(self, request: bytes, address: tuple[int, int]) -> None:
        assert address == (0, 0)
        # A dump of what listens for TCP: linux/netlink.h, linux/sock_diag.h and linux/inet_diag.h.
        assert struct.unpack_from("=IHHII", request) == (72, 20, 0x301, 1, 0)
        assert struct.unpack_from("=BBBBI", request, 16)[1:] == (6, 0, 0, 1 << 10)
        if request[16] == socket.AF_INET6:
            self._answers = [(done(), 0)]

    def recvfrom(self, _: int) -> tuple[bytes, tuple[int, int]]:
        if not self._answers:
            raise TimeoutError("timed out")
        said, sender = self._answers.pop(0)
        return said, (sender, 0)


V4: Callable[[int], Binding] = lambda port: (ip_address("192.0.2.1"), port)  # noqa: E731


@pytest.mark.parametrize(
    ("answers", "found"),
    [
        ((done(),), set()),
        ((entry(80) + entry(81), done()), {V4(80), V4(81)}),
        ((entry(80) + done() + entry(81),), {V4(80)}),
        ((entry(80, uid=8), done()), set()),
        ((entry(80, state=1), done()), set()),
        ((entry(80, family=socket.AF_INET6), done()), set()),
        (((entry(80), 4711), done()), set()),  # another program says so, and not the kernel
        (((done(), 4711), entry(80), done()), {V4(80)}),
    ],
)
def test_only_what_the_kernel_says_of_this_user_counts(
    monkeypatch: pytest.MonkeyPatch, answers: tuple[Any, ...], found: set[Binding]
) -> None:
    monkeypatch.setattr(module.socket, "socket", FakeKernel.of(*answers))
    assert listening(7) == found


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ((), "the kernel does not list its sockets: timed out"),
        ((entry(80),), "the kernel does not list its sockets: timed out"),
        ((entry(80) + done(-12),), "the kernel does not list its sockets: Cannot allocate memory"),
        (
            (message(2, struct.pack("=i", -1)),),
            "the kernel does not list its sockets: Operation not permitted",
        ),
        ((entry(80)[:-1],), "cut short"),
        ((b"\0" * 16,), "cut short"),
        ((b"x",), "cut short"),
        ((message(20, b"x" * 71),), "not what it should be"),
    ],
)
def test_half_a_list_is_none(monkeypatch: pytest.MonkeyPatch, answers: tuple[Any, ...], words: str) -> None:
    monkeypatch.setattr(module.socket, "socket", FakeKernel.of(*answers))
    with pytest.raises(SocketsError, match=words):
        listening(7)


def test_the_listener_is_known_by_its_directory_and_root_is_never_taken_for_it(tmp_path: Path) -> None:
    directory = tmp_path / "listener"
    with pytest.raises(SocketsError, match=r"no listener is running: .*: No such file"):
        owner(directory)
    directory.mkdir()
    if UID == 0:
        with pytest.raises(SocketsError, match="owned by a user other than root"):
            owner(directory)
        os.chown(directory, 54321, 54321)
    assert owner(directory) == (54321 if UID == 0 else UID)
    link = tmp_path / "link"  # as systemd makes one of a directory that outlives its unit
    link.symlink_to(directory)
    if UID == 0:
        os.chown(link, 54321, 54321, follow_symlinks=False)
    with pytest.raises(SocketsError, match="is not a directory"):
        owner(link)


def test_the_directory_is_that_of_the_unit_and_its_owner_the_units_user() -> None:
    lines = UNIT.read_text().splitlines()
    assert str(DIRECTORY) == listenersockets.LISTENER_DIRECTORY
    assert f"RuntimeDirectory={DIRECTORY.name}" in lines
    assert DIRECTORY.parent == Path("/run")
    # systemd.exec(5): one that outlives its unit is in /run/private, and here there is a link of root's.
    assert "DynamicUser=yes" in lines
    assert not [line for line in lines if line.startswith("RuntimeDirectoryPreserve=")]
