# SPDX-License-Identifier: GPL-2.0-or-later
"""How the two ends of a call are joined: each ending of qrexec's, seen from outside."""

import hashlib
import random
import socket
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from qubes_fwd_qrexec.relay.copy import Copy, Relay

from .lab_calls import (
    Gate,
    bounded_lab,
    calling,
    give_config,
    give_service,
    read_all,
    read_exactly,
    tcp_server,
    unix_server,
)

SINGLE = pytest.mark.parametrize("single", [False, True], ids=["two-sockets", "stdin-socket"])


@SINGLE
async def test_bytes_arrive_whole_both_ways(tmp_path: Path, single: bool) -> None:
    data = random.Random(1).randbytes(3_000_001)
    async with bounded_lab(tmp_path) as lab:
        give_service(lab, "cat")
        async with calling(lab, single=single) as call, trio.open_nursery() as nursery:

            async def send() -> None:
                await call.stdin.send_all(data)
                await call.stdin.send_eof()

            nursery.start_soon(send)
            received = await call.read_all()
            assert hashlib.sha256(received).digest() == hashlib.sha256(data).digest()
            assert await call.status() == 0


@SINGLE
async def test_callers_eof_leaves_the_other_direction_open(tmp_path: Path, single: bool) -> None:
    async with bounded_lab(tmp_path) as lab:
        give_service(lab, "cat >/dev/null; echo late")
        async with calling(lab, single=single) as call:
            await call.stdin.send_eof()
            assert await call.read_all() == b"late\n"
            assert await call.status() == 0


@SINGLE
async def test_services_eof_leaves_the_other_direction_open(tmp_path: Path, single: bool) -> None:
    async with bounded_lab(tmp_path) as lab:
        copy = tmp_path / "copy"
        give_service(lab, f"echo early; exec >&-; exec cat >{copy}")
        async with calling(lab, single=single) as call:
            assert await call.read_all() == b"early\n"
            await call.stdin.send_all(b"upload" * 1000)
            await call.stdin.send_eof()
            assert await call.status() == 0
        assert copy.read_bytes() == b"upload" * 1000


async def test_prefix_data_comes_before_stdin(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab:
        give_service(lab, "cat")
        async with calling(lab, "work", "test.Service", "--prefix-data=before ") as call:
            await call.stdin.send_all(b"after")
            await call.stdin.send_eof()
            assert await call.read_all() == b"before after"


async def test_services_stderr_is_the_clients(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab:
        give_service(lab, "echo trouble >&2")
        async with calling(lab) as call:
            assert await call.read_stderr() == b"trouble\n"


async def test_status_waits_for_stderr_and_output_of_the_services_children(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab:
        gate = Gate(tmp_path)
        give_service(lab, f"(read _ <{gate}; echo child) & exit 3")
        async with calling(lab) as call:
            await call.stdin.send_all(b"dropped")
            await gate.open()
            assert await call.read_all() == b"child\n"
            assert await call.status() == 3


async def test_stdin_ends_with_the_service_even_if_a_child_has_kept_it(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab:
        give_service(lab, "exec 3<&0; (cat <&3 >/dev/null; echo child saw eof) & exit 3")
        async with calling(lab) as call:
            assert await call.read_all() == b"child saw eof\n"
            assert await call.status() == 3


async def test_status_waits_for_stderr_alone(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab:
        gate = Gate(tmp_path)
        give_service(lab, f"(read _ <{gate}; echo late >&2) >&- & exit 3")
        async with calling(lab) as call:
            assert await call.read_all() == b""
            await gate.open()
            assert await call.read_stderr() == b"late\n"
            assert await call.status() == 3


async def test_service_that_takes_no_more_does_not_end_the_callers_writing(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab:
        gate = Gate(tmp_path)
        give_service(lab, f"exec <&-; read _ <{gate}; echo done")
        async with calling(lab) as call:
            await call.stdin.send_all(bytes(2_000_000))
            await gate.open()
            assert await call.read_all() == b"done\n"


async def test_service_is_not_told_that_the_caller_takes_no_more(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab:
        give_service(lab, "head -c 2000000 /dev/zero && exit 9")
        async with calling(lab) as call:
            await call.stdout.aclose()
            assert await call.status() == 9


async def test_nothing_is_read_after_the_exit_status(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab:
        give_service(lab, "exit 0")
        async with calling(lab) as call:
            assert await call.status() == 0
            with pytest.raises(trio.BrokenResourceError):
                await call.stdin.send_all(bytes(2_000_000))


async def test_buffer_between_the_ends_is_bounded(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab:
        gate = Gate(tmp_path)
        give_service(lab, f"read _ <{gate}; exec cat >/dev/null")
        async with calling(lab) as call:
            taken = 0
            is_taken = True
            while is_taken or taken <= 65536:  # `bounded_lab` bounds this
                is_taken = False
                with trio.move_on_after(0.5):
                    taken += await call.stdin.socket.send(bytes(65536))
                    is_taken = True
                # Two kernel socket buffers of about 208 KiB and the relay's 64 KiB.
                assert taken < 1_500_000
            await gate.open()
            await call.stdin.send_eof()
            assert await call.status() == 0


async def test_socket_service_gets_the_descriptor_and_then_the_prefix(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab, await unix_server(lab) as server:
        call_context = calling(lab, "work", "test.Service+1", "-pfix ")
        async with call_context as call, await server.accept() as service:
            await call.stdin.send_all(b"data")
            await call.stdin.send_eof()
            assert await read_all(service) == b"test.Service+1 sys-net\0fix data"
            await service.send_all(b"answer")
            await service.send_eof()
            assert await call.read_all() == b"answer"
            assert await call.status() == 0


async def test_descriptor_can_be_skipped(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab, await tcp_server(lab) as server:
        give_config(lab, "skip-service-descriptor=true\n")
        async with calling(lab) as call, await server.accept() as service:
            await call.stdin.send_all(b"data")
            assert await read_exactly(service, 4) == b"data"


async def test_unix_service_that_closes_ends_an_idle_call(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab, await unix_server(lab) as server, calling(lab) as call:
        service = await server.accept()
        await service.aclose()
        assert await call.status() == 0


async def test_reset_of_a_tcp_service_becomes_a_clean_end(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab, await tcp_server(lab) as server, calling(lab) as call:
        service = await server.accept()
        await read_exactly(service, len(b"test.Service+ sys-net\0"))
        await service.send_all(b"some")
        assert await read_exactly(call.stdout, 4) == b"some"
        _abort(service)
        assert await call.read_all() == b""
        assert await call.status() == 0


async def test_reset_by_a_tcp_caller_becomes_a_clean_end(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab:
        give_service(lab, "echo up; cat >/dev/null; exit 6")
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        async with listener:
            client = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
            accepted = await listener.accept()
            process = await trio.lowlevel.open_process(
                [*lab.client_command("sys-net"), "--use-stdin-socket", "work", "test.Service"],
                stdin=accepted.socket.fileno(),
            )
            await accepted.aclose()
            assert await read_exactly(client, 3) == b"up\n"
            _abort(client)
            assert await process.wait() == 6


async def test_exit_on_service_eof_loses_the_rest_of_the_upload(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab, await tcp_server(lab) as server:
        give_config(lab, "skip-service-descriptor=true\nexit-on-service-eof=true\n")
        async with calling(lab) as call, await server.accept() as service:
            await service.send_all(b"bye")
            await service.send_eof()
            assert await call.read_all() == b"bye"
            assert await call.status() == 0
            assert await read_all(service) == b""


async def send_for_ever(stream: trio.abc.SendStream, data: bytes) -> None:
    while True:
        await stream.send_all(data)


async def test_exit_on_client_eof_ends_the_call_at_once(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab, await unix_server(lab) as server:
        give_config(lab, "exit-on-client-eof=true\n")
        async with calling(lab) as call, await server.accept() as service:
            await call.stdin.send_eof()
            assert await call.read_all() == b""
            assert await call.status() == 0
            # The caller may know it a moment before the service does.
            with pytest.raises(trio.BrokenResourceError):
                await send_for_ever(service, b"too late")


async def test_no_socket_is_closed_before_the_copy_that_uses_it_has_let_go_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, stop = trio.lowlevel.current_trio_token(), Relay.stop
    were_open: list[bool] = []

    def stop_late(relay: Relay, copy: Copy) -> None:
        """Whoever closes the socket without waiting for this has done so by then."""
        trio.from_thread.run(wait_all_tasks_blocked, trio_token=token)
        were_open.append(copy.sink.fileno() >= 0)
        stop(relay, copy)

    monkeypatch.setattr(Relay, "stop", stop_late)
    async with bounded_lab(tmp_path) as lab, await unix_server(lab) as server:
        give_config(lab, "exit-on-client-eof=true\n")
        async with calling(lab) as call, await server.accept():
            await call.stdin.send_eof()
            assert await call.read_all() == b""
            assert await call.status() == 0
    assert set(were_open) == {True}


async def test_without_exit_keys_a_socket_service_ends_when_both_directions_have(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab, await tcp_server(lab) as server:
        give_config(lab, "skip-service-descriptor=true\n")
        async with calling(lab) as call, await server.accept() as service:
            await service.send_eof()
            assert await call.read_all() == b""
            assert call.process.poll() is None
            await call.stdin.send_all(b"still")
            await call.stdin.send_eof()
            assert await read_all(service) == b"still"
            assert await call.status() == 0


def _abort(stream: trio.SocketStream) -> None:
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    stream.socket.close()
