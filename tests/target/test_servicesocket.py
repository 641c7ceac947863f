# SPDX-License-Identifier: GPL-2.0-or-later
"""What the agent says first on a socket service's socket, and which socket that may be."""

import os
from pathlib import Path

import pytest
import trio
import trio.testing
from helpers import BOUND_S, listening_socket, no_fds_left, unix_pair

from qubes_fwd_qrexec.common.errors import ForwardError
from qubes_fwd_qrexec.common.values import TargetPorts
from qubes_fwd_qrexec.relay.copy import half_close
from qubes_fwd_qrexec.target.localserver import Request
from qubes_fwd_qrexec.target.servicesocket import (
    DESCRIPTOR_MAX,
    DescriptorError,
    SocketError,
    adopt,
    listen_on,
    parse_descriptor,
    read_descriptor,
)


def test_a_descriptor_says_port_and_caller() -> None:
    one = Request(TargetPorts(8080, 8080), is_mux=False)
    assert parse_descriptor(b"qubes.ForwardTCP+8080 sys-net") == ("8080", one, "sys-net")
    assert parse_descriptor(b"qubes.ForwardTCP+8080 dom0 name work") == ("8080", one, "dom0")
    mux_call = Request(TargetPorts(80, 90), is_mux=True)
    assert parse_descriptor(b"qubes.ForwardTCP+80-90+mux w") == ("80-90+mux", mux_call, "w")


@pytest.mark.parametrize(
    "untrusted",
    [
        b"", b" ", b"qubes.ForwardTCP sys-net", b"qubes.ForwardTCP+80", b"qubes.ForwardTCP+80 ",
        b"qubes.ConnectTCP+80 sys-net", b"qubes.ForwardTCP+ sys-net", b"qubes.ForwardTCP+080 sys-net",
        b"qubes.ForwardTCP+80-90 sys-net", b"qubes.ForwardTCP+80\n sys-net", b"\xd9\xa8 sys-net",
        b"qubes.ForwardTCP++80 sys-net", b"qubes.ForwardTCP+65536 sys-net",
    ],
)  # fmt: skip
def test_any_other_descriptor_is_refused(untrusted: bytes) -> None:
    with pytest.raises(ForwardError):
        parse_descriptor(untrusted)


@pytest.mark.parametrize("chunks", [[b"abc\0rest"], [b"a", b"bc", b"\0", b"rest"], [b"abc", b"\0re", b"st"]])
async def test_a_descriptor_is_read_up_to_its_nul_and_no_further(chunks: list[bytes]) -> None:
    near, far = unix_pair()
    with near, far, trio.fail_after(BOUND_S):
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def send() -> None:
                for chunk in chunks:
                    far.send(chunk)
                    await trio.testing.wait_all_tasks_blocked()

            assert await read_descriptor(near) == b"abc"
        assert near.recv(100) == b"rest"


@pytest.mark.parametrize("sent", [b"", b"no end", b"x" * DESCRIPTOR_MAX, b"x" * 5000])
async def test_a_descriptor_without_end_is_refused(sent: bytes) -> None:
    near, far = unix_pair()
    with near, far, trio.fail_after(BOUND_S):
        far.send(sent)
        half_close(far)
        with pytest.raises(DescriptorError, match=f"first {min(len(sent), DESCRIPTOR_MAX)} bytes"):
            await read_descriptor(near)


async def test_the_longest_descriptor_is_read() -> None:
    near, far = unix_pair()
    with near, far, trio.fail_after(BOUND_S):
        far.send(b"x" * (DESCRIPTOR_MAX - 1) + b"\0stream")
        assert await read_descriptor(near) == b"x" * (DESCRIPTOR_MAX - 1)
        assert near.recv(100) == b"stream"


def test_a_socket_left_over_is_replaced_and_anything_else_stays(tmp_path: Path) -> None:
    path = tmp_path / "service"
    listen_on(path).close()
    with listen_on(path), pytest.raises(SocketError, match="in use"):
        listen_on(path)
    path.unlink()
    path.write_text("a file")
    with no_fds_left(), pytest.raises(SocketError):
        listen_on(path)
    assert path.read_text() == "a file"


def test_only_a_listening_unix_stream_socket_is_adopted(tmp_path: Path) -> None:
    path = tmp_path / "service"
    with listen_on(path) as right:
        fd = os.dup(right.fileno())
        os.set_inheritable(fd, True)  # as systemd passes it
        with adopt(fd) as adopted:
            assert not adopted.get_inheritable()
            assert not adopted.getblocking()
    one, other = unix_pair()
    with one, other, pytest.raises(SocketError, match="not a listening"):
        adopt(os.dup(one.fileno()))
    with listening_socket() as tcp, pytest.raises(SocketError, match="not a listening"):
        adopt(os.dup(tcp.fileno()))


# As systemd does it: the descriptor at 3, the environment, and then the program under the same pid.
