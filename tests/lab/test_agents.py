# SPDX-License-Identifier: GPL-2.0-or-later
"""The agents' processes: when they begin, what they outlive, and what ends them."""

import os
import signal
import socket
import struct
from pathlib import Path

import pytest
import trio
from helpers import until

from .lab_calls import Gate, bounded_lab, calling, give_service, read_exactly, tcp_server, unix_server

CHUNK = b"x" * 65536


def start_time(pid: int) -> int:
    """Clock ticks since boot, from proc(5)."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def is_alive(pid: int) -> bool:
    """Whether it runs: what has ended may wait for a parent that is in no hurry."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def test_agents_process_of_a_parked_call_began_when_dom0_said_yes(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab:
        give_service(lab, "echo $QREXEC_AGENT_PID; cat")
        lab.turn(park=("work/test.Service",))
        async with calling(lab) as call:
            await until(lambda: len(lab.broker.joined) == 1)
            agent = lab.broker.joined[0].agent.pid
            assert is_alive(agent)
            assert lab.broker.used_slots() == {"work": 1}
            # What dom0 says now comes too late for this call.
            lab.write_policy("")
            lab.turn(park=())
            assert await read_exactly(call.stdout, len(f"{agent}\n")) == f"{agent}\n".encode()
            await call.stdin.send_eof()
            assert await call.status() == 0
        await until(lambda: not is_alive(agent))


async def test_parked_call_ends_with_its_caller(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab:
        lab.turn(park=("work",))
        async with calling(lab) as call:
            await until(lambda: len(lab.broker.joined) == 1)
            agent = lab.broker.joined[0].agent.pid
            call.process.kill()
            await until(lambda: not is_alive(agent))
        await until(lambda: not lab.broker.used_slots())


@pytest.mark.parametrize("server_of", [unix_server, tcp_server])
async def test_socket_service_has_the_agents_process_as_its_peer(tmp_path: Path, server_of: object) -> None:
    async with bounded_lab(tmp_path) as lab, await server_of(lab) as listener, calling(lab):  # type: ignore[operator]
        async with await listener.accept() as stream:
            agent = lab.broker.joined[0].agent.pid
            assert is_alive(agent)
            if stream.socket.family == socket.AF_UNIX:
                peer = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
                assert struct.unpack("3i", peer)[0] == agent
        await until(lambda: not is_alive(agent) or not lab.broker.joined)


ENDED_BY_SHUTDOWN = """\
exec python3 -c '
import os, select
os.write(1, b"up")
os.read(0, 1)
poll = select.poll()
poll.register(1, 0)
seen = []
try:
    while True:
        seen = [events for _, events in poll.poll(0)]
        os.write(1, bytes(65536))
except BrokenPipeError:
    seen.append("EPIPE")
open("{told}", "w").write(repr(seen))
open("{gate}").read()
'
"""


async def test_lost_call_shuts_the_services_ends_down_and_closes_none(tmp_path: Path) -> None:
    """Its input ends and its output takes no more; that nobody is there any more (POLLHUP) is not told."""
    async with bounded_lab(tmp_path) as lab:
        gate = Gate(tmp_path)
        told = tmp_path / "told"
        os.mkfifo(told)
        give_service(lab, ENDED_BY_SHUTDOWN.format(told=told, gate=gate))
        async with calling(lab) as call:
            assert await read_exactly(call.stdout, 2) == b"up"
            agent = lab.broker.joined[0].agent.pid
            assert lab.drop_calls() == 1
            assert await trio.to_thread.run_sync(told.read_text) == "['EPIPE']"
            assert await call.status() == 255
            assert is_alive(agent)
            assert lab.broker.used_slots() == {"work": 1}
            await gate.open()
            await until(lambda: not lab.broker.used_slots())
            assert not is_alive(agent)


async def test_input_that_had_arrived_reaches_the_service_after_the_loss(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab:
        gate, counted = Gate(tmp_path), tmp_path / "counted"
        os.mkfifo(counted)
        give_service(lab, f"echo up; read _ <{gate}; wc -c >{counted}")
        async with calling(lab) as call:
            assert await read_exactly(call.stdout, 3) == b"up\n"
            (joined,) = lab.broker.joined
            with trio.CancelScope() as sending:

                async def until_agent_holds_some() -> None:
                    await until(lambda: joined.join is not None and joined.join.taken[1] > 0)
                    sending.cancel()

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(until_agent_holds_some)
                    while True:
                        await call.stdin.send_all(CHUNK)
            assert joined.join is not None
            expected = sum(joined.join.taken)
            lab.drop_calls()
            assert await call.status() == 255
            await gate.open()
            assert int(await trio.to_thread.run_sync(counted.read_text)) == expected


async def test_agent_that_is_killed_loses_its_call(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab:
        give_service(lab, "echo up; cat >/dev/null")
        async with calling(lab) as call:
            assert await read_exactly(call.stdout, 3) == b"up\n"
            os.kill(lab.broker.joined[0].agent.pid, signal.SIGKILL)
            assert await call.status() == 255


async def test_end_of_the_lab_ends_services_that_do_not_end_by_themselves(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab:
        give_service(lab, "trap '' TERM; echo $$; while :; do sleep 1000; done")
        async with calling(lab) as call:
            service = int(await read_exactly(call.stdout, 2) + (await call.stdout.receive_some()).rstrip())
            agent = lab.broker.joined[0].agent.pid
            assert start_time(agent) <= start_time(service)
            call.process.kill()
            await until(lambda: not lab.broker.joined)
    await until(lambda: not is_alive(service))
    assert not is_alive(agent)


async def test_thirty_vchans_fit_and_the_next_client_says_what_the_real_one_does(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab:
        for qube in ("work", "vault"):
            give_service(lab, "echo up; cat", qube=qube)
        lab.turn(vchans_per_caller=2)
        async with calling(lab) as first, calling(lab, "vault") as second:
            for call in (first, second):
                assert await read_exactly(call.stdout, 3) == b"up\n"
            async with calling(lab) as third:
                assert await third.read_stderr() == (
                    b"gntshr: error: ioctl failed: No space left on device\nData vchan connection failed\n"
                )
                assert await third.status() == 1
                assert await third.read_all() == b""
            # The target's agent waits for the vchan that never comes, and keeps its place.
            await until(lambda: lab.broker.used_slots() == {"work": 2, "vault": 1})
            async with calling(lab, qube="personal") as other_caller:
                assert await read_exactly(other_caller.stdout, 3) == b"up\n"
            await second.stdin.send_eof()
            assert await second.status() == 0
            async with calling(lab) as fourth:
                assert await read_exactly(fourth.stdout, 3) == b"up\n"


async def test_smaller_buffers_take_less_room(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab:
        give_service(lab, "echo up; cat")
        lab.turn(vchans_per_caller=1)  # 33 pages: three of 9, and not four
        small = "--buffer-size=16384"
        async with (
            calling(lab, "work", "test.Service", small) as first,
            calling(lab, "work", "test.Service", small) as second,
            calling(lab, "work", "test.Service", small) as third,
        ):
            for call in (first, second, third):
                assert await read_exactly(call.stdout, 3) == b"up\n"
            async with calling(lab, "work", "test.Service", small) as fourth:
                assert await fourth.status() == 1


async def test_of_calls_that_begin_together_only_so_many_get_through(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab:
        give_service(lab, "echo up; cat")
        lab.turn(begun_at_once=1, latency_ms=1000)
        async with calling(lab) as first, calling(lab) as second, calling(lab) as third:
            calls = (first, second, third)
            ups = [await read_exactly(call.stdout, 3) for call in calls]
            for call, up in zip(calls, ups, strict=True):
                if not up:
                    assert await call.read_stderr() == b"Data vchan connection failed\n"
                    assert await call.status() == 1
        assert b"up\n" in ups
