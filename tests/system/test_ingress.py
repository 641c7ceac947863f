# SPDX-License-Identifier: GPL-2.0-or-later
"""By which interface connections come: packets in the namespaces of a lab, and the kernel's word on them."""

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from bounds import BOUND_S
from fakeclient import FakeClient
from helpers import free_port, running_listener, until, write_config

from qubes_fwd_qrexec.common.config import Side
from qubes_fwd_qrexec.lab import netns
from qubes_fwd_qrexec.lab.blueprint import create_lab
from qubes_fwd_qrexec.system.ingress import Sides, ingress, interface_group, note_ingress

PROBLEM = netns.why_unavailable()
needs_namespaces = pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))
LOOPBACK = ["127.0.0.1", "::1"]


@contextmanager
def accepted(
    address: str, places: netns.Namespaces | None = None, *, is_noted: bool = True
) -> Iterator[socket.socket]:
    """A connection to this address, from the LAN into sys-net or else within this machine."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) if places is None else in_place(places, netns.EDGE, family) as listening:
        if is_noted:
            note_ingress(listening)
        listening.bind((address, 0))
        listening.listen()
        with socket.socket(family) if places is None else in_place(places, netns.LAN, family) as client:
            client.settimeout(BOUND_S)
            client.connect(listening.getsockname()[:2])
            connection, _ = listening.accept()
            with connection:
                yield connection


def in_place(places: netns.Namespaces, qube: str, family: int) -> socket.socket:
    with places.entering(qube)():
        return socket.socket(family)


@pytest.mark.parametrize("address", LOOPBACK)
@pytest.mark.parametrize("side", Side)
def test_what_comes_from_the_qube_itself_is_admitted_at_any_side(address: str, side: Side) -> None:
    with accepted(address) as connection:
        assert Sides().came_by(connection, side.group)


@pytest.mark.parametrize("address", LOOPBACK)
@pytest.mark.parametrize("side", Side)
def test_where_the_kernel_does_not_tell_nobody_came_by_any_side(address: str, side: Side) -> None:
    with accepted(address, is_noted=False) as connection:
        assert ingress(connection) is None
        assert not Sides().came_by(connection, side.group)


def test_what_is_no_interface_has_no_group() -> None:
    assert interface_group(2**31 - 1) is None
    assert interface_group(1) == 0


@needs_namespaces
@pytest.mark.parametrize("address", [netns.EDGE_ADDRESS, netns.EDGE_ADDRESS_IPV6])
@pytest.mark.parametrize("group", [0, 1, 2, 77])
def test_a_connection_belongs_only_to_the_side_of_its_interface(
    tmp_path: Path, address: str, group: int
) -> None:
    places = netns.Namespaces(create_lab(tmp_path / "lab"))
    places.create()
    try:
        with places.entering(netns.EDGE)():
            index = socket.if_nametoindex("eth0")
            subprocess.run(["ip", "link", "set", "eth0", "group", str(group)], check=True, timeout=BOUND_S)
        with accepted(address, places) as connection:
            assert ingress(connection) == index
            with places.entering(netns.EDGE)():
                by = [side for side in Side if Sides().came_by(connection, side.group)]
            assert by == [side for side in Side if side.group == group]
    finally:
        places.destroy()


@needs_namespaces
@pytest.mark.parametrize("address", [netns.EDGE_ADDRESS, netns.EDGE_ADDRESS_IPV6])
async def test_a_client_from_another_side_is_refused_and_counted(tmp_path: Path, address: str) -> None:
    """By the listener alone: there is no firewall here."""
    places = netns.Namespaces(create_lab(tmp_path / "lab"))
    places.create()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    wanted = {"listen": "0.0.0.0,::", "srchosts": "any"}
    try:
        port, config = free_port(), tmp_path / "config"
        write_config(config, port, 80, side="vifs", **wanted)
        with (
            in_place(places, netns.LAN, family) as stranger,
            in_place(places, netns.LAN, family) as client,
            places.entering(netns.EDGE)(),
        ):
            async with running_listener(config, FakeClient(tmp_path, "hang").command) as listener:
                stranger.settimeout(BOUND_S)
                with suppress(ConnectionResetError):  # so soon that connect() has not returned yet
                    stranger.connect((address, port))
                await until(lambda: listener.report().forwards[0].refused == {"side": 1})
                assert listener.report().forwards[0].connections == 0
                with pytest.raises((BrokenPipeError, ConnectionResetError)):
                    stranger.send(b"x")
                write_config(config, port, 80, side="outer", **wanted)
                listener.reload()
                client.settimeout(BOUND_S)
                client.connect((address, port))
                await until(lambda: listener.report().forwards[0].connections == 1)
    finally:
        places.destroy()
