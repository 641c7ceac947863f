# SPDX-License-Identifier: GPL-2.0-or-later
"""A forward by nft along a path of qubes: its end by time, in each kernel."""

import time
from contextlib import suppress

import pytest
from test_path import EXPOSED, INTERNAL, families, path, protos, put, serve
from wired import FIREWALL, LAN, NET, PROBLEM, WORK, Addresses, Wired

pytestmark = pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))


@protos
@families
@pytest.mark.parametrize("over", [NET, FIREWALL, WORK])
def test_what_is_over_is_closed_by_the_kernel_of_each_qube_alone(
    wired: Wired, proto: str, at: Addresses, over: str
) -> None:
    """No program of ours runs here: there are only the rules."""
    serve(wired)
    put(wired, path(proto))
    put(wired, {over: path(proto, expire=1)[over]})
    assert wired.send(proto, LAN, at.net, EXPOSED, at.lan) == f"dropped in {over}"


@families
@pytest.mark.parametrize("over", [NET, FIREWALL, WORK])
def test_when_the_end_comes_the_kernel_stops_live_connections_too(
    wired: Wired, at: Addresses, over: str
) -> None:
    server = wired.serve("tcp", WORK, INTERNAL)
    put(wired, path())
    client = wired.connect(LAN, at.net, EXPOSED, at.lan)
    taken, _ = server.accept()
    end = int(time.time()) + 2
    put(wired, {over: path(expire=end)[over]})
    taken.setblocking(False)
    while time.time() <= end:
        client.sendall(b".")
        with suppress(BlockingIOError):
            taken.recv(1 << 16)
    with suppress(BlockingIOError):
        while taken.recv(1 << 16):
            pass
    client.sendall(b"late")
    assert wired.send("tcp", LAN, at.net, EXPOSED, at.lan) == f"dropped in {over}"
    with pytest.raises(BlockingIOError):
        taken.recv(1 << 16)
