# SPDX-License-Identifier: GPL-2.0-or-later
import os
import subprocess
import sys
from pathlib import Path

import pytest
import trio
from fakeclient import FakeClient
from helpers import BOUND_S, no_fds_left

from qubes_fwd_qrexec.common.errors import ConfigError
from qubes_fwd_qrexec.exposed.qrexec import open_call, parse_client


def children() -> set[str]:
    me = str(os.getpid())
    return {p for p in os.listdir("/proc") if p.isdigit() and _parent(p) == me}


def _parent(pid: str) -> str | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
    except OSError:
        return None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("/usr/bin/qrexec-client-vm", ("/usr/bin/qrexec-client-vm",)),
        ("c --agent-socket='/a b/c' -p x", ("c", "--agent-socket=/a b/c", "-p", "x")),
    ],
)
def test_a_client_may_carry_options(text: str, words: tuple[str, ...]) -> None:
    assert parse_client(text) == words


@pytest.mark.parametrize("text", ["", "  ", "'unbalanced", "#\\"])
def test_an_invalid_qrexec_client_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--qrexec-client"):
        parse_client(text)


async def test_a_call_names_target_and_service_after_two_dashes(tmp_path: Path) -> None:
    client = FakeClient(tmp_path, "exit0")
    with trio.fail_after(BOUND_S):
        async with open_call(client.command, "work", "qubes.ForwardTCP+80") as call:
            assert await call.status() == 0
    assert client.calls == ["work qubes.ForwardTCP+80"]


@pytest.mark.parametrize(
    ("given", "options"), [((), "--buffer-size=32768"), (("--buffer-size=4096",), "--buffer-size=4096")]
)
async def test_a_call_has_the_buffer_it_is_given_unless_the_client_says_one(
    tmp_path: Path, given: tuple[str, ...], options: str
) -> None:
    client = FakeClient(tmp_path, "exit0")
    with trio.fail_after(BOUND_S):
        async with open_call((*client.command, *given), "work", "s+1", buffer_bytes=32768) as call:
            assert await call.status() == 0
    assert client.options == [options]


@pytest.mark.parametrize("status", [125, 126, 127])
async def test_the_exit_status_is_available(tmp_path: Path, status: int) -> None:
    with trio.fail_after(BOUND_S):
        async with open_call(FakeClient(tmp_path, f"exit{status}").command, "work", "s+1") as call:
            assert await call.status() == status


async def test_there_is_no_status_before_the_end(tmp_path: Path) -> None:
    with trio.fail_after(BOUND_S):
        async with open_call(FakeClient(tmp_path, "hang").command, "work", "s+1") as call:
            assert await call.status(0.01) is None


async def test_a_call_is_over_with_its_block_and_leaves_nothing(tmp_path: Path) -> None:
    client = FakeClient(tmp_path, "hang")
    before = children()
    with no_fds_left(), trio.fail_after(BOUND_S):
        for _ in range(3):
            async with open_call(client.command, "work", "s+1"):
                assert len(children() - before) == 1
        assert children() <= before


async def test_a_client_wrapped_in_a_script_dies_with_it() -> None:
    with trio.fail_after(BOUND_S):
        async with open_call(("/bin/sh", "-c", "sleep 1000 & echo $!; wait"), "work", "s+1") as call:
            await trio.lowlevel.wait_readable(call.stdout)
            sleeping = os.pidfd_open(int(call.stdout.recv(100)))
        await trio.lowlevel.wait_readable(sleeping)
    os.close(sleeping)


async def test_cancelled_at_every_point_a_call_leaves_nothing(tmp_path: Path) -> None:
    client = FakeClient(tmp_path, "hang")
    before = children()
    with no_fds_left():
        for steps in range(8):
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:

                    @nursery.start_soon
                    async def cancel(scope: trio.CancelScope = scope, steps: int = steps) -> None:
                        for _ in range(steps):
                            await trio.lowlevel.checkpoint()
                        scope.cancel()

                    async with open_call(client.command, "work", "s+1") as call:
                        await call.status()
        assert children() <= before


@pytest.mark.parametrize("kind", ["missing", "directory", "unexecutable"])
async def test_a_client_that_cannot_be_started_is_an_os_error_and_leaves_nothing(
    tmp_path: Path, kind: str
) -> None:
    program = tmp_path / kind
    if kind == "directory":
        program.mkdir()
    elif kind == "unexecutable":
        program.write_text("no program")
    with no_fds_left(), pytest.raises(OSError, match=r"Errno"):
        async with open_call((str(program),), "work", "s+1"):
            pytest.fail("it was started")


async def test_a_client_that_writes_stderr_without_end_stalls_nobody(tmp_path: Path) -> None:
    with trio.fail_after(BOUND_S):
        async with open_call(FakeClient(tmp_path, "chatty").command, "work", "s+1") as call:
            assert await call.status(0.05) is None


async def test_bytes_that_the_client_read_are_seen_as_taken() -> None:
    script = "import os, sys; os.read(0, 1); os.read(0, 65536); os.write(1, b'y'); os.read(0, 1)"
    with trio.fail_after(BOUND_S):
        async with open_call((sys.executable, "-c", script), "work", "s+1") as call:
            assert not call.has_taken(0)
            call.stdin.send(bytes(1000))
            await trio.lowlevel.wait_readable(call.stdout)
            assert call.has_taken(1000)


async def test_bytes_that_wait_for_the_client_are_not_taken(tmp_path: Path) -> None:
    async with open_call(FakeClient(tmp_path, "hang").command, "work", "s+1") as call:
        sent = 0
        try:
            while True:
                sent += call.stdin.send(bytes(1000))
        except BlockingIOError:
            pass
        assert not call.has_taken(sent)


def test_the_stand_in_refuses_what_the_real_client_would_not_get(tmp_path: Path) -> None:
    client = FakeClient(tmp_path, "exit0")
    assert subprocess.run([*client.command, "no", "work", "s"], stderr=subprocess.DEVNULL).returncode == 1
