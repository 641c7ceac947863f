# SPDX-License-Identifier: GPL-2.0-or-later
"""A forward by nft along a path of qubes: its end by time, in each kernel."""

import time
from contextlib import suppress

import pytest
from test_path import EXPOSED, INTERNAL, KINDS, each, path, put, serve
from wired import FAMILIES, FIREWALL, LAN, NET, PROBLEM, WORK, Wired

pytestmark = pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))


@pytest.mark.parametrize("over", [NET, FIREWALL, WORK])
def test_what_is_over_is_closed_by_the_kernel_of_each_qube_alone(wired: Wired, over: str) -> None:
    """No program of ours runs here: there are only the rules."""
    serve(wired)
    put(wired, each() | {over: each(expire=1)[over]})
    for proto, at in KINDS:
        assert wired.send(proto, LAN, at.net, EXPOSED, at.lan) == f"dropped in {over}"


@pytest.mark.parametrize("over", [NET, FIREWALL, WORK])
def test_when_the_end_comes_the_kernel_stops_live_connections_too(wired: Wired, over: str) -> None:
    server = wired.serve("tcp", WORK, INTERNAL)
    put(wired, path())
    clients = [wired.connect(LAN, at.net, EXPOSED, at.lan) for at in FAMILIES]
    taken = [server.accept()[0] for _ in clients]
    end = int(time.time()) + 2
    put(wired, {over: path(expire=end)[over]})
    for sock in taken:
        sock.setblocking(False)
    while time.time() <= end:
        for client, sock in zip(clients, taken, strict=True):
            client.sendall(b".")
            with suppress(BlockingIOError):
                sock.recv(1 << 16)
    wired.pass_through()
    for client, sock, at in zip(clients, taken, FAMILIES, strict=True):
        with suppress(BlockingIOError):
            while sock.recv(1 << 16):
                pass
        client.sendall(b"late")
        wired.pass_through()
        assert wired.send("tcp", LAN, at.net, EXPOSED, at.lan) == f"dropped in {over}"
        with pytest.raises(BlockingIOError):
            sock.recv(1 << 16)
