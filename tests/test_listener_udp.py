# SPDX-License-Identifier: GPL-2.0-or-later
"""The listener with forwards of UDP: real sockets of clients, and a stand-in for qrexec-client-vm.

Behind that is a target which says back what it hears; `test_udp_end_to_end` has the real service.
"""

import os
import signal
import socket
import time
from pathlib import Path

import pytest
import trio
from helpers import (
    BOUND_S,
    NEVER_AGAIN,
    FakeClient,
    children,
    no_fds_left,
    running_listener,
    until,
    write_config,
)
from udp_clients import UdpClient, free_udp_port
from udp_forwards import KEY, forward_of, is_bound, write_udp_config

from qubes_fwd_qrexec.common.report import Answer, Way
from qubes_fwd_qrexec.common.values import Proto
from qubes_fwd_qrexec.exposed import flowpool, flowwaiting
from qubes_fwd_qrexec.listener import Listener
from qubes_fwd_qrexec.system.configsource import FileSource

pytestmark = pytest.mark.usefixtures("no_hurry")

# Carrying


async def test_a_datagram_goes_there_and_its_answer_comes_back(tmp_path: Path) -> None:
    port, client = free_udp_port(), FakeClient(tmp_path, "flows")
    write_udp_config(tmp_path / "config", port)
    async with running_listener(tmp_path / "config", client.command) as listener:
        with UdpClient(port) as near:
            assert await near.ask(b"who?") == b"who?"
            assert await near.ask(b"") == b""
            assert await near.ask(bytes(65507)) == bytes(65507)
        await until(lambda: listener.report().forwards[0].datagrams_received == 3)
        (report,) = listener.report().forwards
        assert (report.proto, report.way, report.mux_calls) == (Proto.UDP, Way.OPEN, 1)
        assert (report.connections, report.total, report.is_listening) == (1, 1, True)
        assert (report.datagrams_sent, report.datagrams_received) == (3, 3)
        assert (report.sent, report.received) == (65511, 65511)
        assert report.dropped == {}
    assert client.calls == ["work qubes.ForwardUDP+53+mux"]


async def test_many_clients_are_one_call(tmp_path: Path) -> None:
    port, client = free_udp_port(), FakeClient(tmp_path, "flows")
    write_udp_config(tmp_path / "config", port)
    async with running_listener(tmp_path / "config", client.command) as listener:
        clients = [UdpClient(port) for _ in range(50)]
        for number, near in enumerate(clients):
            near.send(b"%d" % number)
        for number, near in enumerate(clients):
            assert await near.hear() == b"%d" % number
            near.sock.close()
        assert forward_of(listener).connections == 50
    assert len(client.calls) == 1


async def test_tcp_and_udp_of_one_rule_are_two_forwards(tmp_path: Path) -> None:
    port, client = free_udp_port(), FakeClient(tmp_path, "flows")
    write_udp_config(tmp_path / "config", port)
    write_config(tmp_path / "config", port, 53, key="fwd.work.dns", transport="mux")
    async with running_listener(tmp_path / "config", client.command) as listener:
        reports = listener.report().forwards
        assert [(report.name, report.proto) for report in reports] == [("dns", Proto.TCP), ("dns", Proto.UDP)]
        with UdpClient(port) as near:
            assert await near.ask(b"who?") == b"who?"
        (tmp_path / "config" / "fwd.work.dns").unlink()
        listener.reload()
        assert is_bound(port)
        (tmp_path / "config" / KEY).unlink()
        listener.reload()
        assert not is_bound(port)


async def test_a_full_call_is_joined_by_another(tmp_path: Path) -> None:
    port, client = free_udp_port(), FakeClient(tmp_path, "flows")
    write_udp_config(tmp_path / "config", port)
    async with running_listener(tmp_path / "config", client.command):
        clients = [UdpClient(port) for _ in range(130)]
        for near in clients:
            assert await near.ask(b"x") == b"x"
        for near in clients:
            near.sock.close()
    assert len(client.calls) == 2


# Without a call


async def test_what_comes_before_the_call_is_there_waits_for_it(tmp_path: Path) -> None:
    """Nothing is lost: each of several datagrams of several clients."""
    port, client = free_udp_port(), FakeClient(tmp_path, "flows")
    write_udp_config(tmp_path / "config", port)
    async with running_listener(tmp_path / "config", client.command):
        clients = [UdpClient(port) for _ in range(20)]
        for number in range(3):
            for near in clients:
                near.send(b"%d" % number)
        for near in clients:
            assert [await near.hear() for _ in range(3)] == [b"0", b"1", b"2"]
            near.sock.close()


async def test_it_waits_for_so_long_and_so_much_of_it_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flowpool, "WAIT_S", 0.2)
    monkeypatch.setattr(flowwaiting, "WAITING_MAX_BYTES", 10_000)
    monkeypatch.setattr(flowwaiting, "WAITING_OF_ONE_BYTES", 4_000)
    port, client = free_udp_port(), FakeClient(tmp_path, "hang")
    write_udp_config(tmp_path / "config", port)
    async with running_listener(tmp_path / "config", client.command) as listener:
        drops = forward_of(listener).table.counters.drops
        clients = [UdpClient(port) for _ in range(4)]
        for near in clients:
            for _ in range(5):
                near.send(bytes(1000))
        # Of each client three, and of all of them seven.
        await until(lambda: sum(drops.values()) == 20)
        assert drops == {"full": 13, "no-call": 7}
        assert listener.report().forwards[0].way is Way.OPENING
        assert forward_of(listener).connections == 4
        for near in clients:
            near.sock.close()
        await until(lambda: len(client.calls) == 1)


@pytest.mark.parametrize(
    ("mode", "kind", "words"),
    [
        ("exit126", "policy", "policy refuses the call"),
        ("exit127", "no-service", "does not have the service"),
        ("die", "no-call", "unknown frame type"),
    ],
)
async def test_a_call_that_fails_is_a_reason_of_its_own_and_dom0_is_left_alone(
    tmp_path: Path, mode: str, kind: str, words: str
) -> None:
    port, client = free_udp_port(), FakeClient(tmp_path, mode)
    write_udp_config(tmp_path / "config", port)
    async with running_listener(tmp_path / "config", client.command, waits=NEVER_AGAIN) as listener:
        counters = forward_of(listener).table.counters
        with UdpClient(port) as near:
            for number in range(5):
                near.send(b"x")
                await until(lambda: counters.refusals.get(kind) == number + 1)  # noqa: B023
            with pytest.raises(BlockingIOError):
                near.sock.recv(10)
        (report,) = listener.report().forwards
        assert (report.connections, report.total) == (0, 5)
        assert report.dropped == {"no-call": 5}
        assert words in str(report.last_error)
    assert len(client.calls) == 1


async def test_a_flow_whose_call_is_lost_keeps_its_place_and_has_a_new_one(tmp_path: Path) -> None:
    port, client = free_udp_port(), FakeClient(tmp_path, "flows")
    write_udp_config(tmp_path / "config", port)
    async with running_listener(tmp_path / "config", client.command) as listener:
        with UdpClient(port) as near:
            assert await near.ask(b"one") == b"one"
            (pid,) = children()
            os.kill(pid, signal.SIGKILL)
            await until(lambda: not listener.report().forwards[0].mux_calls)
            assert forward_of(listener).connections == 1
            listener.transports.calls.forget_refusals()
            assert await near.ask(b"two") == b"two"
        assert forward_of(listener).table.counters.total == 1
    assert len(client.calls) == 2


@pytest.mark.parametrize("code", ["REFUSED", "UNREACHABLE", "OVER_LIMIT"])
async def test_a_flow_that_the_target_refuses_ends_and_is_counted(tmp_path: Path, code: str) -> None:
    port, client = free_udp_port(), FakeClient(tmp_path, f"flows {code}")
    write_udp_config(tmp_path / "config", port)
    async with running_listener(tmp_path / "config", client.command) as listener:
        with UdpClient(port) as near:
            near.send(b"x")
            await until(lambda: forward_of(listener).table.counters.refusals == {"server": 1})
            await until(lambda: not forward_of(listener).connections)
            near.send(b"x")
            await until(lambda: forward_of(listener).table.counters.total == 2)
            with pytest.raises(BlockingIOError):
                near.sock.recv(10)
    assert len(client.calls) == 1


@pytest.mark.parametrize("code", ["LEASE_OVER", "SHUTDOWN", "die"])
async def test_a_target_that_gives_its_calls_up_is_no_flood_of_calls(tmp_path: Path, code: str) -> None:
    port, client = free_udp_port(), FakeClient(tmp_path, f"flows {code}")
    write_udp_config(tmp_path / "config", port)
    async with running_listener(tmp_path / "config", client.command, waits=NEVER_AGAIN) as listener:
        with UdpClient(port) as near:
            refusals = forward_of(listener).table.counters.refusals

            def again() -> bool:
                near.send(b"x")
                return refusals.get("no-call", 0) >= 5

            await until(again)
    assert len(client.calls) <= 3


@pytest.mark.parametrize("code", ["LEASE_OVER", "SHUTDOWN"])
async def test_a_call_that_refuses_flows_as_if_it_drained_ends_with_the_last(
    tmp_path: Path, code: str
) -> None:
    """The target never says that it drains."""
    port, client = free_udp_port(), FakeClient(tmp_path, f"flows {code}")
    write_udp_config(tmp_path / "config", port)
    async with running_listener(tmp_path / "config", client.command, waits=NEVER_AGAIN) as listener:
        with UdpClient(port) as near:
            near.send(b"x")
            await until(lambda: client.calls)
            await until(lambda: not listener.transports.calls.calls)


async def test_what_waited_for_a_call_when_its_flow_ended_is_counted(tmp_path: Path) -> None:
    port, client = free_udp_port(), FakeClient(tmp_path, "hang")
    write_udp_config(tmp_path / "config", port)
    async with running_listener(tmp_path / "config", client.command) as listener:
        with UdpClient(port) as near:
            near.send(b"x")
            await until(lambda: forward_of(listener).connections == 1)
            forward_of(listener).cut()
            await until(lambda: listener.report().forwards[0].dropped == {"no-call": 1})


# What ends it


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


# Trials


@pytest.mark.usefixtures("long_trial")
async def test_a_trial_asks_for_a_call_and_sends_nothing(tmp_path: Path) -> None:
    port, client = free_udp_port(), FakeClient(tmp_path, "flows")
    write_udp_config(tmp_path / "config", port)
    async with running_listener(tmp_path / "config", client.command) as listener:
        assert (await listener.try_out(KEY)).answer is Answer.THROUGH
        assert (await listener.try_out(KEY)).answer is Answer.THROUGH
        assert forward_of(listener).table.counters.total == 0
        assert (await listener.try_out("fwd.work.dns")).answer is Answer.FAILED
    assert len(client.calls) == 1


@pytest.mark.usefixtures("long_trial")
async def test_a_trial_that_is_refused_says_why(tmp_path: Path) -> None:
    port, client = free_udp_port(), FakeClient(tmp_path, "exit126")
    write_udp_config(tmp_path / "config", port)
    async with running_listener(tmp_path / "config", client.command, waits=NEVER_AGAIN) as listener:
        trial = await listener.try_out(KEY)
        assert (trial.answer, trial.reason) == (Answer.REFUSED, "policy")
