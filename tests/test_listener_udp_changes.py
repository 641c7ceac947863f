# SPDX-License-Identifier: GPL-2.0-or-later
"""The listener with forwards of UDP when its configuration changes, or it ends: which flows go on, and where.

Behind the stand-in for qrexec-client-vm is a target which says back what it hears.
"""

import os
import signal
import socket
import time
from pathlib import Path

import pytest
import trio
from fakeclient import FakeClient
from helpers import BOUND_S, children, no_fds_left, running_listener, until
from udp_clients import UdpClient, free_udp_port
from udp_forwards import KEY, forward_of, is_bound, write_udp_config

from qubes_fwd_qrexec.common.values import Proto
from qubes_fwd_qrexec.exposed.listener import Listener
from qubes_fwd_qrexec.system.configsource import FileSource

pytestmark = pytest.mark.usefixtures("no_hurry")


@pytest.mark.parametrize("how", ["cut", "drain"])
async def test_a_removed_forward_cuts_or_drains_as_it_says(tmp_path: Path, how: str) -> None:
    port, client = free_udp_port(), FakeClient(tmp_path, "flows")
    file = write_udp_config(tmp_path / "config", port, on_expire=how)
    async with running_listener(tmp_path / "config", client.command) as listener:
        with UdpClient(port) as near, UdpClient(port) as new:
            assert await near.ask(b"x") == b"x"
            file.unlink()
            listener.reload()
            assert is_bound(port) == (how == "drain")
            if how == "cut":
                with pytest.raises(ConnectionRefusedError):
                    await near.ask(b"late")
                return
            assert await near.ask(b"still") == b"still"
            new.send(b"x")
            (draining,) = listener.report().draining
            assert (draining.proto, draining.connections) == (Proto.UDP, 1)
            # Another forward needs the port.
            write_udp_config(tmp_path / "config", port, key="udp.work.other", listen="0.0.0.0")
            listener.reload()
            assert listener.report().problems == ()
            assert listener.report().draining == ()
            assert await near.ask(b"new") == b"new"
            assert forward_of(listener, "udp.work.other").table.counters.total == 1


async def test_what_is_narrowed_passes_no_more_datagram_in_either_direction(tmp_path: Path) -> None:
    port, client = free_udp_port(), FakeClient(tmp_path, "flows")
    write_udp_config(tmp_path / "config", port)
    async with running_listener(tmp_path / "config", client.command) as listener:
        with UdpClient(port) as near, UdpClient(port, own="127.0.0.2") as friend:
            assert await near.ask(b"x") == b"x"
            assert await friend.ask(b"x") == b"x"
            write_udp_config(tmp_path / "config", port, srchosts="127.0.0.2/32")
            listener.reload()
            counters = forward_of(listener).table.counters
            assert await friend.ask(b"y") == b"y"
            near.send(b"again")
            await until(lambda: counters.refusals.get("srchosts"))
            with pytest.raises(BlockingIOError):
                near.sock.recv(10)


async def test_an_expired_forward_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port, client = free_udp_port(), FakeClient(tmp_path, "flows")
    real, offset = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + offset[0])
    write_udp_config(tmp_path / "config", port, expire=str(int(real()) + 1000))
    async with running_listener(tmp_path / "config", client.command) as listener:
        with UdpClient(port) as near:
            assert await near.ask(b"x") == b"x"
            offset[0] = 1001
            await until(lambda: not is_bound(port))
            assert [problem.key for problem in listener.report().problems] == [KEY]
            with pytest.raises(ConnectionRefusedError):
                await near.ask(b"late")


async def test_ports_that_two_forwards_exchange_are_theirs_at_once(tmp_path: Path) -> None:
    one, two, config = free_udp_port(), free_udp_port(), tmp_path / "config"
    client = FakeClient(tmp_path, "flows")
    write_udp_config(config, one, 1, key="udp.a.x", on_expire="drain")
    write_udp_config(config, two, 2, key="udp.b.x", on_expire="drain")
    async with running_listener(config, client.command) as listener:
        with UdpClient(one) as near, UdpClient(two) as other:
            assert await near.ask(b"x") == b"x"
            write_udp_config(config, two, 1, key="udp.a.x", on_expire="drain")
            write_udp_config(config, one, 2, key="udp.b.x", on_expire="drain")
            listener.reload()
            assert listener.report().problems == ()
            assert await near.ask(b"x") == b"x"
            assert await other.ask(b"x") == b"x"
    assert client.calls == ["a qubes.ForwardUDP+1+mux", "b qubes.ForwardUDP+2+mux"]


async def test_a_port_in_use_is_named_and_tried_again(tmp_path: Path) -> None:
    port, client = free_udp_port(), FakeClient(tmp_path, "flows")
    (tmp_path / "config").mkdir()
    async with running_listener(tmp_path / "config", client.command) as listener:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as holder:
            holder.bind(("127.0.0.1", port))
            write_udp_config(tmp_path / "config", port)
            listener.reload()
            (problem,) = listener.report().problems
            assert problem.key == KEY
            assert "in use by this program itself" in problem.text
        with trio.fail_after(BOUND_S):
            await until(lambda: is_bound(port) and not listener.report().problems)


async def test_stopping_closes_the_ports_and_leaves_nothing(tmp_path: Path) -> None:
    port, client = free_udp_port(), FakeClient(tmp_path, "flows")
    write_udp_config(tmp_path / "config", port, on_expire="drain")
    with no_fds_left():
        listener = Listener(FileSource(tmp_path / "config"), client.command)
        async with trio.open_nursery() as nursery:
            await nursery.start(listener.run)
            with UdpClient(port) as near:
                assert await near.ask(b"x") == b"x"
                listener.stop()
                await until(lambda: not is_bound(port))
                await until(lambda: not nursery.child_tasks)


async def test_a_cancelled_listener_leaves_no_descriptor(tmp_path: Path) -> None:
    port, client = free_udp_port(), FakeClient(tmp_path, "flows")
    write_udp_config(tmp_path / "config", port)
    with no_fds_left():
        async with trio.open_nursery() as nursery:
            listener = Listener(FileSource(tmp_path / "config"), client.command)
            await nursery.start(listener.run)
            with UdpClient(port) as near:
                assert await near.ask(b"x") == b"x"
                nursery.cancel_scope.cancel()


async def test_a_reload_touches_no_flow(tmp_path: Path) -> None:
    port, other, client = free_udp_port(), free_udp_port(), FakeClient(tmp_path, "flows")
    config = tmp_path / "config"
    write_udp_config(config, port)
    async with running_listener(config, client.command) as listener:
        with UdpClient(port) as near:
            assert await near.ask(b"x") == b"x"
            for turn in range(20):
                write_udp_config(config, port, srchosts=f"127.0.0.0/{8 + turn % 2}")
                if turn % 2:
                    write_udp_config(config, other, key="udp.work.other")
                else:
                    (config / "udp.work.other").unlink(missing_ok=True)
                listener.reload()
                assert is_bound(other) is bool(turn % 2)
                assert await near.ask(b"x") == b"x"
        assert forward_of(listener).table.counters.total == 1
    assert len(client.calls) == 1


async def test_a_flow_that_goes_on_has_its_next_call_from_the_forward_as_it_is_now(tmp_path: Path) -> None:
    port, client = free_udp_port(), FakeClient(tmp_path, "flows")
    config = tmp_path / "config"
    write_udp_config(config, port)
    async with running_listener(config, client.command) as listener:
        with UdpClient(port) as near:
            assert await near.ask(b"x") == b"x"
            (pid,) = children()
            write_udp_config(config, port, srcports=f"{port}-{port + 1}", dstports="53-54")
            listener.reload()
            assert await near.ask(b"y") == b"y"
            os.kill(pid, signal.SIGKILL)
            await until(lambda: not children())
            assert await near.ask(b"z") == b"z"
        counters = forward_of(listener).table.counters
        assert (counters.total, counters.refusals) == (1, {})
    assert [call.partition("+")[2] for call in client.calls] == ["53+mux", "53-54+mux"]
