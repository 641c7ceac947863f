# SPDX-License-Identifier: GPL-2.0-or-later
"""What a call meets before it is joined: policy, knobs, slots, services; and how it ends."""

import array
import os
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio
from helpers import until

from qubes_fwd_qrexec.admin import policy
from qubes_fwd_qrexec.admin.states import Plan
from qubes_fwd_qrexec.common.services import REVOKE_SERVICE
from qubes_fwd_qrexec.lab import wire
from qubes_fwd_qrexec.lab.qube import QubeState
from qubes_fwd_qrexec.lab.running import RunningLab
from qubes_fwd_qrexec.target.callnotes import DIRECTORY_VARIABLE

from .lab_calls import ALLOW_TEST, Gate, bounded_lab, calling, give_config, give_service, read_exactly


async def test_policy_refusal_ends_with_126_and_says_so(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path, policy="") as lab, calling(lab) as call:
        assert await call.read_stderr() == b"Request refused\n"
        assert await call.status() == 126
        assert await call.read_all() == b""


async def test_policy_change_holds_from_the_next_call_on(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path, policy="") as lab:
        give_service(lab, "exit 3")
        for text, status in (("", 126), (ALLOW_TEST, 3), (f"{ALLOW_TEST}junk\n", 126)):
            lab.write_policy(text)
            async with calling(lab) as call:
                assert await call.status() == status


async def test_live_call_outlives_a_policy_change(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab:
        give_service(lab, "cat")
        async with calling(lab) as call:
            await call.stdin.send_all(b"one")
            assert await read_exactly(call.stdout, 3) == b"one"
            lab.write_policy("")
            await call.stdin.send_all(b"two")
            assert await read_exactly(call.stdout, 3) == b"two"


async def test_executable_gets_the_arguments_and_environment_of_the_agent(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab:
        give_service(lab, 'echo "$# $1 $PPID"; env | grep ^QREXEC_ | sort')
        async with calling(lab, "work", "test.Service+8080") as call:
            first, *lines = (await call.read_all()).decode().splitlines()
    *arguments, parent = first.split()
    assert arguments == ["1", "8080"]
    assert lines == [
        f"QREXEC_AGENT_PID={parent}",
        "QREXEC_REMOTE_DOMAIN=sys-net",
        "QREXEC_REQUESTED_TARGET_TYPE=",
        "QREXEC_SERVICE_ARGUMENT=8080",
        "QREXEC_SERVICE_FULL_NAME=test.Service+8080",
    ]


async def test_service_without_argument_has_a_plus_in_its_full_name_and_no_argv(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab:
        give_service(lab, 'echo "$# $QREXEC_SERVICE_FULL_NAME"')
        async with calling(lab) as call:
            assert await call.read_all() == b"0 test.Service+\n"


async def test_stdin_and_stdout_of_an_executable_are_two_sockets(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab:
        give_service(lab, "readlink /proc/$$/fd/0 /proc/$$/fd/1")
        async with calling(lab) as call:
            names = (await call.read_all()).split()
    assert len(set(names)) == 2
    assert all(name.startswith(b"socket:") for name in names)


async def test_callers_name_and_target_are_sanitized_before_the_policy_sees_them(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path, policy="test.Service * @anyvm work allow\n") as lab:
        give_service(lab, "echo $QREXEC_SERVICE_FULL_NAME")
        async with calling(lab, "work", "test.Service+a b/c") as call:
            assert await call.read_all() == b"test.Service+a_b_c\n"


@pytest.mark.parametrize(
    ("script", "status"), [("exit 0", 0), ("exit 77", 77), ("exit 126", 126), ("kill -9 $$", 137)]
)
async def test_exit_status_of_the_service_is_the_clients(tmp_path: Path, script: str, status: int) -> None:
    async with bounded_lab(tmp_path) as lab:
        give_service(lab, script)
        async with calling(lab) as call:
            assert await call.status() == status


async def test_missing_service_is_127_after_the_end_of_output(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab, calling(lab) as call:
        assert await call.read_all() == b""
        assert await call.status() == 127


@pytest.mark.parametrize(("script", "status"), [(None, 127), ("exit 3", 3)])
async def test_end_of_output_comes_before_the_status(tmp_path: Path, script: str | None, status: int) -> None:
    async with bounded_lab(tmp_path) as lab:
        if script is not None:
            give_service(lab, script)
        stdin, its_stdin = socket.socketpair()
        stdout, its_stdout = socket.socketpair()
        agent = trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with stdin, stdout, agent:
            await agent.connect(str(lab.directory.qube_dir("sys-net").agent_socket))
            fds = array.array("i", [its_stdin.fileno(), its_stdout.fileno()])
            packet = wire.Call("work", "test.Service", "", b"").encode()
            await agent.sendmsg([packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
            its_stdin.close()
            its_stdout.close()
            assert await agent.recv(100) == wire.CONNECTED
            assert await agent.recv(100) == wire.encode_exit(status)
            stdout.setblocking(False)
            assert stdout.recv(1) == b""


async def test_unusable_configuration_is_125(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab:
        give_service(lab, "exit 0")
        give_config(lab, "exit-on-client-eof=yes\n")
        async with calling(lab) as call:
            assert await call.status() == 125


async def test_script_without_its_interpreter_is_127(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab:
        give_service(lab, "").write_text("#!/nonexistent\n", encoding="utf-8")
        async with calling(lab) as call:
            assert await call.status() == 127


async def test_refused_tcp_connect_is_125(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab:
        place = lab.directory.qube_dir("work").service_dirs[0]
        (place / "test.Service").symlink_to("/dev/tcp/127.0.0.1/1")
        async with calling(lab) as call:
            assert await call.read_all() == b""
            assert await call.status() == 125


async def test_halted_target_is_started_and_gets_its_vm_config(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab:
        give_service(lab, "exit 5")
        lab.directory.set_state("work", QubeState.HALTED)
        lab.directory.set_feature("work", "vm-config.fwd.x", "y")
        assert lab.directory.vm_config("work") == {}
        async with calling(lab) as call:
            assert await call.status() == 5
        assert lab.directory.qube("work").is_running
        assert lab.directory.vm_config("work") == {"fwd.x": "y"}


async def test_halted_target_stays_halted_where_autostart_is_denied(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path, policy="test.Service * sys-net work allow autostart=no\n") as lab:
        lab.directory.set_state("work", QubeState.HALTED)
        async with calling(lab) as call:
            assert await call.status() == 126
        assert not lab.directory.qube("work").is_running


async def test_halted_caller_is_refused(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab:
        lab.directory.set_state("sys-net", QubeState.HALTED)
        async with calling(lab) as call:
            assert await call.status() == 126


async def test_call_beyond_the_cap_is_refused_and_a_freed_slot_is_used(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab:
        give_service(lab, "echo up; cat")
        give_service(lab, "echo up; cat", qube="vault")
        lab.turn(calls_per_target=2)
        async with calling(lab) as first, calling(lab) as second:
            for call in (first, second):
                assert await read_exactly(call.stdout, 3) == b"up\n"
            async with calling(lab) as third:
                assert await third.read_stderr() == b"Request refused\n"
                assert await third.status() == 126
            async with calling(lab, "vault") as other_target:
                assert await read_exactly(other_target.stdout, 3) == b"up\n"
            await first.stdin.send_eof()
            assert await first.status() == 0
            # The caller hears of the end a moment before the slot is free.
            await until(lambda: lab.broker.used_slots() == {"work": 1})
            async with calling(lab) as fourth:
                assert await read_exactly(fourth.stdout, 3) == b"up\n"
            await second.stdin.send_eof()
            assert await second.status() == 0


async def test_latency_delays_the_answer(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab:
        give_service(lab, "exit 0")
        lab.turn(latency_ms=200)
        started = trio.current_time()
        async with calling(lab) as call:
            assert await call.status() == 0
        assert trio.current_time() - started >= 0.2


async def test_refusal_knob_refuses_its_target_alone(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab:
        give_service(lab, "exit 0")
        give_service(lab, "exit 0", qube="vault")
        lab.turn(refuse=("work/test.Service",))
        for target, status in (("work", 126), ("vault", 0)):
            async with calling(lab, target) as call:
                assert await call.status() == status


async def test_hanging_call_is_never_answered_and_ends_with_its_client(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab:
        give_service(lab, "echo never")
        lab.turn(hang=("work",))
        async with calling(lab) as call:
            with trio.move_on_after(0.3):
                await call.status()
            assert call.process.returncode is None
            call.process.kill()
            assert await call.read_all() == b""


async def test_dropped_calls_lose_their_vchan_on_both_sides(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab:
        mark = tmp_path / "service-saw-eof"
        give_service(lab, f"echo up; cat >/dev/null; echo eof >{mark}")
        os.mkfifo(mark)
        async with calling(lab) as first:
            assert await read_exactly(first.stdout, 3) == b"up\n"
            async with calling(lab) as second:
                assert await read_exactly(second.stdout, 3) == b"up\n"
                assert lab.drop_calls(0.5) == 1
                assert await first.read_all() == b""
                assert await first.read_stderr() == b"vchan connection closed early\n"
                assert await first.status() == 255
                assert await trio.to_thread.run_sync(mark.read_text) == "eof\n"
                assert second.process.poll() is None
                assert lab.drop_calls() == 1
                assert await second.status() == 255
                assert await trio.to_thread.run_sync(mark.read_text) == "eof\n"


async def test_killed_client_is_a_lost_vchan_and_its_slot_waits_for_the_service(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab:
        gate = Gate(tmp_path)
        give_service(lab, f"echo up; cat >/dev/null; read _ <{gate}")
        lab.turn(calls_per_target=1)
        async with calling(lab) as call:
            assert await read_exactly(call.stdout, 3) == b"up\n"
            call.process.kill()
            assert await call.read_all() == b""
            await until(lambda: not lab.broker.joined)
            assert lab.broker.used_slots() == {"work": 1}
            await gate.open()
            await until(lambda: not lab.broker.used_slots())


async def test_new_qube_is_taken_up_and_a_gone_one_given_up(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab:
        work = lab.directory.qube_dir("work")
        (tmp_path / "lab" / "qubes" / "work").rename(tmp_path / "lab" / "qubes" / "office")
        await lab.broker.reload()
        assert lab.directory.qube_dir("office").agent_socket.exists()
        assert not work.agent_socket.exists()


async def test_socket_path_beyond_108_bytes_works(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path / ("x" * 100)) as lab:
        give_service(lab, "exit 4")
        async with calling(lab) as call:
            assert await call.status() == 4


WELL_FORMED = wire.Call("work", "test.Service", "", b"").encode()


@pytest.mark.parametrize(
    "packet",
    [
        b"x",
        b"\0" * 3,
        b"work\0test.Service\0\0 65536",
        b"work\0test.Service\0\0\0",
        b"work\0test.Service\0\0-1\0",
        b"work\0test.Service\0\0" + b"9" * 11 + b"\0",
        "work\0test.Service\0\0\N{ARABIC-INDIC DIGIT ONE}\0".encode(),
    ],
)
async def test_garbled_request_with_sockets_ends_that_connection_alone(
    tmp_path: Path, packet: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "qubes_fwd_qrexec.lab")
    async with bounded_lab(tmp_path) as lab:
        give_service(lab, "exit 4")
        ours, theirs = socket.socketpair()
        with ours, theirs:
            assert await answer_to(lab, packet, [theirs.fileno()]) == b""
            theirs.close()
            assert ours.recv(1) == b""
        assert "sys-net: refused: the client's request is garbled" in caplog.messages
        async with calling(lab) as call:
            assert await call.status() == 4


@pytest.mark.parametrize("kind", ["none", "three", "datagrams", "a file"])
async def test_request_without_streams_ends_that_connection_alone(tmp_path: Path, kind: str) -> None:
    async with bounded_lab(tmp_path) as lab:
        give_service(lab, "exit 4")
        with ExitStack() as ends:
            how = socket.SOCK_DGRAM if kind == "datagrams" else socket.SOCK_STREAM
            pairs = [socket.socketpair(socket.AF_UNIX, how) for _ in range(2)]
            fds = [ends.enter_context(sock).fileno() for pair in pairs for sock in pair]
            file_fd = os.open(os.devnull, os.O_RDONLY)
            ends.callback(os.close, file_fd)
            chosen = {"none": [], "three": fds[:3], "datagrams": fds[:2], "a file": [fds[0], file_fd]}
            assert await answer_to(lab, WELL_FORMED, chosen[kind]) == b""
        async with calling(lab) as call:
            assert await call.status() == 4


async def answer_to(lab: RunningLab, packet: bytes, fds: list[int]) -> bytes:
    """What the broker says to a client that writes this itself."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    with trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_SEQPACKET) as agent:
        await agent.connect(str(lab.directory.qube_dir("sys-net").agent_socket))
        await agent.sendmsg([packet], rights)
        return await agent.recv(100)


@pytest.mark.parametrize("text", ["", "test.Service * @anyvm @anyvm deny\n", "junk\n"])
async def test_dom0s_own_calls_are_not_judged_by_policy(tmp_path: Path, text: str) -> None:
    async with bounded_lab(tmp_path, policy=text) as lab:
        give_service(lab, "echo $QREXEC_REMOTE_DOMAIN")
        async with calling(lab, qube="dom0") as call:
            assert await call.read_all() == b"dom0\n"
            assert await call.status() == 0
        for qube in ("sys-net", "work", "fedora-42"):
            async with calling(lab, "vault", qube=qube) as call:
                assert await call.status() == 126


async def test_no_qube_passes_for_dom0(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path, policy="") as lab:
        give_service(lab, "exit 0")
        async with calling(lab, "work", "test.Service", "--source-qube=dom0") as call:
            assert await call.status() == 126


async def test_dom0s_own_calls_start_no_qube(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab:
        give_service(lab, "exit 0")
        lab.directory.set_state("work", QubeState.HALTED)
        async with calling(lab, qube="dom0") as call:
            assert await call.status() == 126
        assert not lab.directory.qube("work").is_running


@pytest.mark.parametrize("target", ["nobody", "@default", "@anyvm", "@dispvm"])
async def test_dom0s_own_calls_to_what_is_no_qube_are_refused(tmp_path: Path, target: str) -> None:
    async with bounded_lab(tmp_path) as lab, calling(lab, target, qube="dom0") as call:
        assert await call.status() == 126


@pytest.mark.parametrize("qube", ["sys-net", "work", "vault"])
async def test_only_dom0_may_end_mux_calls(tmp_path: Path, qube: str) -> None:
    """The policy that qvm-forward writes says so, even if another file allows it further down."""
    service = REVOKE_SERVICE
    async with bounded_lab(tmp_path, policy=policy.text(Plan(()))) as lab:
        lab.write_policy(f"{REVOKE_SERVICE} * @anyvm @anyvm allow\n", "90-other.policy")
        async with calling(lab, "work" if qube != "work" else "vault", service, qube=qube) as call:
            assert await call.read_stderr() == b"Request refused\n"
            assert await call.status() == 126
        async with calling(lab, "work", service, qube="dom0") as call:
            await call.stdin.send_all(b"version=1 drains=keep\n")
            await call.stdin.send_eof()
            assert await call.read_all() == b"version=1 ended=0 draining=0\n"
            assert await call.status() == 0


async def test_each_qube_has_notes_of_its_own(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab:
        for qube in ("work", "vault"):
            give_service(lab, f"echo ${DIRECTORY_VARIABLE}", qube=qube)
            async with calling(lab, qube) as call:
                place = Path((await call.read_all()).decode().rstrip("\n"))
            assert place == lab.directory.qube_dir(qube).root / "run" / "forward"
