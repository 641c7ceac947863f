# SPDX-License-Identifier: GPL-2.0-or-later
"""The listener with forwards of UDP: real sockets of clients, and a stand-in for qrexec-client-vm.

Behind that is a target which says back what it hears; `test_udp_end_to_end` has the real service.
"""

import os
import signal
from pathlib import Path

import pytest
from fakeclient import FakeClient
from helpers import NEVER_AGAIN, children, running_listener, until, write_config
from udp_clients import UdpClient, free_udp_port
from udp_forwards import KEY, forward_of, is_bound, write_udp_config

from qubes_fwd_qrexec.common.report import Answer, Way
from qubes_fwd_qrexec.common.values import Proto
from qubes_fwd_qrexec.exposed import flowpool, flowwaiting, udpport

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
        for number in range(5):
            with UdpClient(port) as near:
                near.send(b"x")
                await until(lambda: counters.refusals.get(kind) == number + 1)  # noqa: B023
                with pytest.raises(BlockingIOError):
                    near.sock.recv(10)
        (report,) = listener.report().forwards
        assert (report.connections, report.total) == (0, 5)
        assert report.dropped == {"no-call": 5}
        assert words in str(report.last_error)
    assert len(client.calls) == 1


@pytest.mark.usefixtures("no_hurry")
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
            await until(lambda: not listener.transports.calls.calls)  # its loss has been noted
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
            await until(lambda: listener.report().forwards[0].dropped == {"refused": 1})
            assert forward_of(listener).table.counters.total == 1
            with pytest.raises(BlockingIOError):
                near.sock.recv(10)
    assert len(client.calls) == 1


@pytest.mark.parametrize("code", ["LEASE_OVER", "SHUTDOWN", "die"])
async def test_a_target_that_gives_its_calls_up_is_no_flood_of_calls(
    tmp_path: Path, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(udpport, "REFUSED_S", 0.0)
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
