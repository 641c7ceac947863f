# SPDX-License-Identifier: GPL-2.0-or-later
"""The status of a running listener: its counters, and peers that must not stop it."""

import logging
import os
import resource
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import trio
import trio.lowlevel
from fakeclient import FakeClient
from helpers import (
    BOUND_S,
    NEVER_AGAIN,
    accept,
    connect,
    echo_once,
    free_port,
    is_reset,
    no_fds_left,
    port_of,
    running_listener,
    write_config,
)

from qubes_fwd_qrexec.common.report import Answer, ForwardReport, ListenerReport, Trial, Way
from qubes_fwd_qrexec.exposed import statussockets, trial
from qubes_fwd_qrexec.exposed.listener import Listener
from qubes_fwd_qrexec.exposed.statussockets import CLIENTS, CUT, METRICS, STATUS, TRY, runtime_directory
from qubes_fwd_qrexec.relay.acceptloop import SHORTAGE_PAUSE_S

pytestmark = pytest.mark.usefixtures("mux_call_home")


async def asked(path: Path, request: bytes = b"") -> bytes:
    """What is answered; nothing, if the connection is ended without a word."""
    received = b""
    with trio.fail_after(BOUND_S), suppress(trio.BrokenResourceError):
        async with await trio.open_unix_socket(str(path)) as stream:
            if request:
                await stream.send_all(request)
            async for chunk in stream:
                received += chunk
    return received


async def report_of(place: Path) -> ListenerReport:
    return ListenerReport.parse(await asked(place / STATUS))


async def only(place: Path) -> ForwardReport:
    (forward,) = (await report_of(place)).forwards
    return forward


async def tried(place: Path, key: str = "fwd.work.web") -> Trial:
    return Trial.parse(await asked(place / TRY, f"{key}\n".encode()))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "status"


@pytest.mark.parametrize("transport", ["call", "mux"])
async def test_a_connection_is_counted_while_it_lives_and_after(
    tmp_path: Path, place: Path, server: socket.socket, transport: str
) -> None:
    port, config = free_port(), tmp_path / "config"
    write_config(config, port, port_of(server), transport=transport)
    with no_fds_left():
        async with running_listener(config, FakeClient(tmp_path, "serve").command, status_dir=place):
            before = await only(place)
            assert (before.target, before.name, before.transport) == ("work", "web", transport)
            assert (before.connections, before.total, before.way) == (0, 0, Way.IDLE)
            assert before.is_listening
            async with await connect(port) as near, await accept(server) as far:
                await near.send_all(b"12345")
                assert await far.receive_some() == b"12345"
                await echo_once(near, far)
                with trio.fail_after(BOUND_S):
                    # Who has moved a byte counts it a moment later, in another thread.
                    while (during := await only(place)).received == 0:
                        pass
                assert (during.connections, during.total) == (1, 1)
                assert (during.sent, during.received) == (6, 1)
                assert during.mux_calls == (transport == "mux")
                if transport == "mux":
                    assert during.way is Way.OPEN
            with trio.fail_after(BOUND_S):
                while (after := await only(place)).connections:
                    pass
            assert (after.total, after.sent, after.received) == (1, 6, 1)
            assert after.refused == {}
        assert os.listdir(place) == []


@pytest.mark.parametrize("transport", ["call", "mux"])
@pytest.mark.parametrize(
    ("mode", "reason", "way"),
    [
        ("exit126", "policy", Way.REFUSED),
        ("exit127", "no-service", Way.NO_SERVICE),
        ("exit125", "no-call", Way.FAILED),
    ],
)
@pytest.mark.usefixtures("long_trial")
async def test_what_keeps_a_call_from_being_made_is_told_apart(
    tmp_path: Path, place: Path, mode: str, reason: str, way: Way, transport: str
) -> None:
    port, config = free_port(), tmp_path / "config"
    write_config(config, port, 1, transport=transport)
    client = FakeClient(tmp_path, mode)
    async with running_listener(config, client.command, status_dir=place, waits=NEVER_AGAIN):
        async with await connect(port) as near:
            await near.send_all(b"x")
            assert await is_reset(near)
        found = await only(place)
        assert (dict(found.refused), found.way) == ({reason: 1}, way)
        assert found.last_error is not None
        assert found.last_error_at is not None
        if mode == "exit126":  # the next one is refused here
            async with await connect(port) as near:
                assert await is_reset(near)
            assert dict((await only(place)).refused) == {reason: 2}
        assert (await tried(place)).answer is Answer.REFUSED


async def test_strangers_and_a_missing_server_have_reasons_of_their_own(tmp_path: Path, place: Path) -> None:
    port, config = free_port(), tmp_path / "config"
    write_config(config, port, free_port(), transport="mux", srchosts="127.0.0.1/32")
    client = FakeClient(tmp_path, "serve").command
    async with running_listener(config, client, status_dir=place) as listener:
        async with await connect(port) as near:
            assert await is_reset(near)
        write_config(config, port, free_port(), transport="mux", srchosts="192.0.2.0/24")
        listener.reload()
        async with await connect(port) as near:
            assert await is_reset(near)
        found = await only(place)
        assert dict(found.refused) == {"server": 1, "srchosts": 1}
        assert found.total == 1
        assert found.last_error == "the server in the target refused the connection"


async def test_entries_that_are_not_open_are_named(tmp_path: Path, place: Path) -> None:
    config = tmp_path / "config"
    write_config(config, free_port(), 1)
    (config / "fwd.work.bad").write_text("nonsense\x1b")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = port_of(taken)
        async with running_listener(
            config, FakeClient(tmp_path, "hang").command, status_dir=place
        ) as running:
            (bad,) = (await report_of(place)).problems
            write_config(config, port, 1, key="fwd.work.new")
            running.reload()
            problems = {problem.key: problem.text for problem in (await report_of(place)).problems}
    assert bad.key == "fwd.work.bad"
    assert problems == {
        "fwd.work.bad": bad.text,
        "fwd.work.new": f"127.0.0.1:{port}: the port is in use by this program itself, for another forward",
    }


async def test_an_answer_is_about_what_is_configured_when_it_is_asked_for(
    tmp_path: Path, place: Path, server: socket.socket
) -> None:
    config, port = tmp_path / "config", free_port()
    old = write_config(config, port, port_of(server))
    async with running_listener(config, FakeClient(tmp_path, "serve").command, status_dir=place):
        write_config(config, free_port(), 1, key="fwd.work.new")
        assert [forward.name for forward in (await report_of(place)).forwards] == ["new", "web"]
        async with await connect(port) as near, await accept(server) as far:
            await echo_once(near, far)
            old.unlink()
            found = await report_of(place)
            assert [forward.name for forward in found.forwards] == ["new"]
            assert found.draining == ()  # the connection was cut before the answer
            assert await is_reset(near)


@pytest.mark.usefixtures("long_trial")
async def test_a_trial_goes_all_the_way_and_is_not_counted(
    tmp_path: Path, place: Path, server: socket.socket
) -> None:
    config = tmp_path / "config"
    write_config(config, free_port(), port_of(server), transport="mux")
    async with running_listener(config, FakeClient(tmp_path, "serve").command, status_dir=place):
        assert (await tried(place)).answer is Answer.THROUGH
        async with await accept(server) as far:
            with trio.fail_after(BOUND_S):
                # It may be aborted as soon as it is known to have been taken.
                with suppress(trio.BrokenResourceError):
                    assert await far.receive_some() == b""
        found = await only(place)
        assert (found.connections, found.total, found.sent) == (0, 0, 0)


@pytest.mark.usefixtures("long_trial")
async def test_a_trial_by_a_call_of_its_own_is_through_when_the_server_ends_it(
    tmp_path: Path, place: Path, server: socket.socket
) -> None:
    config = tmp_path / "config"
    write_config(config, free_port(), port_of(server))
    found: list[Trial] = []

    async def try_it() -> None:
        found.append(await tried(place))

    async with running_listener(config, FakeClient(tmp_path, "serve").command, status_dir=place):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(try_it)
            async with await accept(server) as far:
                with trio.fail_after(BOUND_S):
                    assert await far.receive_some() == b""
        assert found[0].answer is Answer.THROUGH


@pytest.mark.parametrize("transport", ["call", "mux"])
async def test_a_trial_of_a_hanging_call_is_silent(
    tmp_path: Path, place: Path, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial.try_out, "__defaults__", (0.2,))
    config = tmp_path / "config"
    write_config(config, free_port(), 1, transport=transport)
    async with running_listener(config, FakeClient(tmp_path, "hang").command, status_dir=place):
        assert await tried(place) == Trial(Answer.SILENT, "", "no answer within 0.2 s")


@pytest.mark.usefixtures("long_trial")
async def test_a_trial_of_a_missing_server_says_so(tmp_path: Path, place: Path) -> None:
    config = tmp_path / "config"
    write_config(config, free_port(), free_port(), transport="mux")
    async with running_listener(config, FakeClient(tmp_path, "serve").command, status_dir=place):
        found = await tried(place)
        assert (found.answer, found.reason) == (Answer.REFUSED, "server")


@pytest.mark.parametrize("key", ["nonsense", "fwd.work.other", "fwd.\x1b.x"])
async def test_an_unknown_forward_is_not_tried(tmp_path: Path, place: Path, key: str) -> None:
    config = tmp_path / "config"
    write_config(config, free_port(), 1)
    client = FakeClient(tmp_path, "hang")
    async with running_listener(config, client.command, status_dir=place):
        assert (await tried(place, key)).answer is Answer.FAILED
        assert await asked(place / TRY, b"x" * 100) == b""
    assert client.calls == []


async def test_metrics_are_served_over_http(tmp_path: Path, place: Path) -> None:
    config = tmp_path / "config"
    write_config(config, free_port(), 1)
    async with running_listener(config, FakeClient(tmp_path, "hang").command, status_dir=place):
        answer = await asked(place / METRICS, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b'qubes_forward_connections{target="work",name="web",proto="tcp"} 0\n' in answer
        assert await asked(place / METRICS, b"GET /" + b"x" * 9000) == b""


@pytest.mark.usefixtures("bugs_are_wanted")
async def test_a_bug_in_an_answer_ends_that_answer_and_the_next_one_tells_of_it(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Listener) -> ListenerReport:
        raise ZeroDivisionError("a bug")

    config = tmp_path / "config"
    write_config(config, free_port(), 1)
    async with running_listener(config, FakeClient(tmp_path, "hang").command, status_dir=place):
        assert (await report_of(place)).bugs == 0
        with monkeypatch.context() as patch:
            patch.setattr(Listener, "report", fail)
            assert await asked(place / STATUS) == b""
        assert (await report_of(place)).bugs == 1


async def test_peers_that_do_not_read_the_answer_are_bounded_and_closed(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statussockets, "_PATIENCE_S", 3600.0)
    config = tmp_path / "config"
    write_config(config, free_port(), 1)
    async with running_listener(config, FakeClient(tmp_path, "hang").command, status_dir=place):
        with trio.fail_after(BOUND_S):
            with ExitStack() as crowd:
                for _ in range(statussockets.AT_ONCE_MAX):
                    sock = crowd.enter_context(socket.socket(socket.AF_UNIX))
                    sock.connect(str(place / METRICS))
                while await asked(place / STATUS) != b"":
                    pass
            while await asked(place / STATUS) == b"":
                pass
        # There is room again. Only now is anybody left, so that the room was not made by that.
        monkeypatch.setattr(statussockets, "_PATIENCE_S", 0.01)
        assert await asked(place / METRICS, b"GET /") == b""


_CROWD = """\
import os, socket, sys
os.setgid(65534)
os.setuid(65534)
crowd = [socket.socket(socket.AF_UNIX) for _ in range(20)]
for sock in crowd:
    sock.connect(sys.argv[1])
print("here", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may be another user")
async def test_no_user_can_take_the_places_of_another(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statussockets, "_PATIENCE_S", 3600.0)
    config = tmp_path / "config"
    write_config(config, free_port(), 1)
    async with running_listener(config, FakeClient(tmp_path, "hang").command, status_dir=place):
        command = [sys.executable, "-c", _CROWD, METRICS]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, cwd=place, stdin=pipe, stdout=pipe) as crowd:  # noqa: ASYNC220
            assert crowd.stdout is not None
            assert await trio.to_thread.run_sync(crowd.stdout.readline) == b"here\n"
            for _ in range(20):
                assert await asked(place / STATUS) != b""
            crowd.kill()


async def test_a_directory_that_cannot_be_used_is_said_and_the_listener_works(
    tmp_path: Path, server: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    port, config = free_port(), tmp_path / "config"
    write_config(config, port, port_of(server))
    (tmp_path / "file").write_text("")
    client = FakeClient(tmp_path, "serve").command
    async with running_listener(config, client, status_dir=tmp_path / "file"):  # noqa: SIM117
        async with await connect(port) as near, await accept(server) as far:
            await echo_once(near, far)
    assert any("the status of this listener is not available" in message for message in caplog.messages)


async def test_what_a_killed_listener_left_is_replaced_and_long_paths_work(tmp_path: Path) -> None:
    place = tmp_path / ("x" * 100)
    place.mkdir()
    (place / STATUS).write_text("")
    config = tmp_path / "config"
    write_config(config, free_port(), 1)
    async with running_listener(config, FakeClient(tmp_path, "hang").command, status_dir=place):
        modes = {path.name: path.stat().st_mode for path in place.iterdir() if path.is_socket()}
        found = {name: mode & 0o777 for name, mode in modes.items()}
        assert found == dict.fromkeys((STATUS, CLIENTS, METRICS, TRY), 0o666) | {CUT: 0o600}


@pytest.mark.parametrize(
    ("value", "found"),
    [(None, None), ("", None), ("/run/a", Path("/run/a")), ("/run/a:/run/b", Path("/run/a"))],
)
def test_the_directory_is_the_first_that_the_service_manager_names(
    value: str | None, found: Path | None
) -> None:
    assert runtime_directory(value) == found


async def test_a_shortage_of_descriptors_is_said_once_and_waited_out(
    tmp_path: Path, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tmp_path / "config"
    write_config(config, free_port(), 80)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def said() -> list[logging.LogRecord]:
        return [record for record in caplog.records if "configuration" not in record.getMessage()]

    caplog.set_level(logging.WARNING)
    async with running_listener(config, ("/bin/false",), status_dir=place):
        with socket.socket(socket.AF_UNIX) as asking:
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (asking.fileno() + 1, hard))
                filling = []
                with suppress(OSError):
                    while True:
                        filling.append(os.dup(asking.fileno()))
                asking.connect(str(place / STATUS))
                with trio.fail_after(BOUND_S):
                    while not said():
                        await trio.lowlevel.checkpoint()
                with trio.move_on_after(3 * SHORTAGE_PAUSE_S):
                    await trio.sleep_forever()
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                for fd in filling:
                    os.close(fd)
            asking.setblocking(False)
            with trio.fail_after(BOUND_S):
                await trio.lowlevel.wait_readable(asking)
            assert asking.recv(1)
    (record,) = said()
    assert record.getMessage() == "cannot answer who asks how this listener is: Too many open files"
    assert record.exc_info is None
