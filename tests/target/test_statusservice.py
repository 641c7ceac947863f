# SPDX-License-Identifier: GPL-2.0-or-later
"""What a qube answers to dom0, by the program and by its parts."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from bounds import BOUND_S
from helpers import free_port
from noted import MINE, just_now

from qubes_fwd_qrexec.common import report
from qubes_fwd_qrexec.common.allowance import Calls
from qubes_fwd_qrexec.common.errors import TextError
from qubes_fwd_qrexec.common.report import (
    Answer,
    CallsReport,
    Firewall,
    FirewallReport,
    ListenerReport,
    QubeReport,
    Trial,
)
from qubes_fwd_qrexec.common.values import Proto, QubeName, TargetPorts
from qubes_fwd_qrexec.target import listenersockets
from qubes_fwd_qrexec.target.callnotes import DIRECTORY_VARIABLE, Kind, left_note
from qubes_fwd_qrexec.target.callstart import TICKS_PER_S, boot_ticks
from qubes_fwd_qrexec.target.listenersockets import CLIENTS, LISTENER_DIRECTORY_VARIABLE, STATUS, TRY
from qubes_fwd_qrexec.target.statusservice import (
    FIREWALL_S,
    START_S,
    Places,
    answer,
)

# linux/in.h: an address that this machine does not have may be bound, too.
IP_FREEBIND = 15
NOWHERE = Path("/nonexistent")
REPORT = ListenerReport(since=1, forwards=())


def told(argument: str, listener_place: Path, notes_place: Path) -> QubeReport:
    return answer(argument, Places(listener_place, notes_place, NOWHERE, NOWHERE))


@contextmanager
def listener(place: Path, name: str, said: bytes) -> Iterator[list[bytes]]:
    """Answers one connection as a listener's socket would."""
    requests: list[bytes] = []
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(place / name))
        listening.listen()
        listening.settimeout(BOUND_S)

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                if name == TRY:
                    requests.append(connection.recv(100))
                connection.sendall(said)

        thread = threading.Thread(target=serve)
        thread.start()
        yield requests
        thread.join(BOUND_S)


def test_a_qube_without_a_listener_and_without_mux_calls_says_so(tmp_path: Path) -> None:
    found = told("", tmp_path / "none", tmp_path / "nothing")
    assert (found.listener, found.listener_problem) == (None, None)
    assert (found.calls, found.trial) == ((), None)


def test_what_the_listener_says_is_passed_on(tmp_path: Path) -> None:
    with listener(tmp_path, STATUS, report.dump(REPORT.as_json())):
        assert told("", tmp_path, tmp_path).listener == REPORT


@pytest.mark.parametrize("said", [b"", b"nonsense", b'{"version":2}'])
def test_a_listener_that_says_nonsense_is_a_problem(tmp_path: Path, said: bytes) -> None:
    with listener(tmp_path, STATUS, said):
        found = told("", tmp_path, tmp_path)
    assert found.listener is None
    assert found.listener_problem is not None
    assert found.listener_problem.startswith("the listener's answer cannot be read: ")


def test_a_listener_that_says_too_much_is_a_problem(tmp_path: Path) -> None:
    with listener(tmp_path, STATUS, b"x" * (report.REPORT_MAX_BYTES + 1)):
        assert (
            told("", tmp_path, tmp_path).listener_problem == "the listener does not answer: it does not end"
        )


def test_a_socket_left_by_a_dead_listener_is_no_listener(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / STATUS))
    assert told("", tmp_path, tmp_path).listener_problem is None


def test_a_listener_that_is_being_started_is_waited_for(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    flag.touch()
    with ExitStack() as stack:
        place, rests = Places(tmp_path, tmp_path, NOWHERE, flag), 0

        def rest(seconds: float) -> None:
            nonlocal rests
            rests += 1
            if rests == 3:
                stack.enter_context(listener(tmp_path, STATUS, report.dump(REPORT.as_json())))

        assert answer("", place, rest).listener == REPORT
        assert rests == 3


def test_a_listener_that_does_not_start_is_waited_for_so_long(tmp_path: Path) -> None:
    flag, rested = tmp_path / "flag", list[float]()
    place = Places(tmp_path, tmp_path, NOWHERE, flag)
    assert answer("", place, rested.append).listener_problem is None
    assert rested == []
    flag.touch()
    assert answer("", place, rested.append).listener_problem is None
    assert round(sum(rested), 3) == START_S


def test_a_listener_that_does_not_answer_is_given_up_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listenersockets, "LISTENER_TIMEOUT_S", 0.1)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / STATUS))
        silent.listen()
        found = told("", tmp_path, tmp_path)
    assert found.listener_problem == "the listener does not answer: timed out"


def test_who_is_connected_is_asked_for_at_a_socket_of_its_own(tmp_path: Path) -> None:
    with_clients = ListenerReport(since=1, forwards=(), clients=())
    with listener(tmp_path, CLIENTS, report.dump(with_clients.as_json())):
        assert told("clients", tmp_path, tmp_path).listener == with_clients


def test_a_listener_from_before_an_update_says_what_it_can(tmp_path: Path) -> None:
    with listener(tmp_path, STATUS, report.dump(REPORT.as_json())):
        found = told("clients", tmp_path, tmp_path)
    assert (found.listener, found.listener_problem, found.trial) == (REPORT, None, None)
    assert told("clients", tmp_path / "none", tmp_path).listener_problem is None


def test_calls_are_counted_by_caller_and_ports_while_they_live(place: Path, tmp_path: Path) -> None:
    single = Calls(TargetPorts(80, 80), QubeName("sys-net"))
    with (
        left_note(Kind.MUX, MINE, just_now(), place, 1),
        left_note(Kind.MUX, MINE, just_now(), place, 2) as soon,
        left_note(Kind.SINGLE, MINE, just_now(), place, 3) as late,
        left_note(Kind.SINGLE, single, just_now(), place, 4),
    ):
        (place / "other").write_text("")
        soon.set_until(boot_ticks() + 10 * TICKS_PER_S)
        late.set_until(boot_ticks() + 100 * TICKS_PER_S)
        one, other = told("", tmp_path / "none", place).calls
        assert one == CallsReport(source=single.caller, ports=single.ports, singles=1)
        assert other.drain_left_s in range(70, 101)
        assert other == CallsReport(
            source=MINE.caller,
            ports=MINE.ports,
            mux_calls=2,
            singles=1,
            draining=2,
            drain_left_s=other.drain_left_s,
        )
    assert told("", tmp_path / "none", place).calls == ()


def test_calls_that_carry_udp_are_counted_apart(place: Path, tmp_path: Path) -> None:
    udp = MINE._replace(proto=Proto.UDP)
    with left_note(Kind.MUX, MINE, just_now(), place, 1), left_note(Kind.UDP, udp, just_now(), place, 2):
        found = told("", tmp_path / "none", place).calls
    assert {(calls.proto, calls.mux_calls, calls.singles) for calls in found} == {
        (Proto.TCP, 1, 0),
        (Proto.UDP, 1, 0),
    }


def test_where_notes_cannot_be_read_there_are_no_figures(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    assert told("", tmp_path / "none", tmp_path / "run").calls == ()


FIREWALL = FirewallReport(Firewall.OPEN, Firewall.CLOSED, ("fwd.work.web",))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (report.dump(FIREWALL.as_json()), FIREWALL),
        (b"open\n", FirewallReport()),
        (b"", FirewallReport()),
        (b"\xff", FirewallReport()),
        (report.dump(FIREWALL.as_json()) + b" " * report.REPORT_MAX_BYTES, FirewallReport()),
        (None, FirewallReport()),
    ],
)
def test_the_firewall_is_what_its_program_says(
    tmp_path: Path, content: bytes | None, found: FirewallReport
) -> None:
    state = tmp_path / "state"
    if content is not None:
        state.write_bytes(content)
    assert answer("", Places(tmp_path, tmp_path, state, NOWHERE)).firewall == found


def test_the_firewall_is_waited_for_as_it_follows_the_listener(tmp_path: Path) -> None:
    state, rests = tmp_path / "state", 0
    old, new = FirewallReport(Firewall.OPEN, Firewall.OPEN, ("fwd.work.web",)), FirewallReport(Firewall.OPEN)
    state.write_bytes(report.dump(old.as_json()))

    def rest(seconds: float) -> None:
        nonlocal rests
        rests += 1
        if rests == 3:
            state.write_bytes(report.dump(new.as_json()))
            os.utime(state, (time.time(), time.time() + 1))

    def asked() -> FirewallReport:
        with listener(tmp_path, STATUS, report.dump(REPORT.as_json())):
            found = answer("", Places(tmp_path, tmp_path, state, NOWHERE), rest).firewall
        (tmp_path / STATUS).unlink()
        return found

    os.utime(state, (0, 0))
    assert (asked(), rests) == (old, 0)  # nobody keeps it
    recently = time.time() - FIREWALL_S / 2
    os.utime(state, (recently, recently))
    assert (asked(), rests) == (new, 3)


def test_a_port_is_tried(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(BOUND_S)
        port = server.getsockname()[1]
        trial = told(str(port), tmp_path, tmp_path).trial
        assert trial is not None
        assert trial.answer is Answer.THROUGH
        taken, _ = server.accept()
        with taken:
            taken.settimeout(BOUND_S)
            assert taken.recv(1) == b""  # a clean end, which no server complains of
    port = free_port()
    assert told(str(port), tmp_path, tmp_path).trial == Trial(
        Answer.REFUSED, "server", f"port {port}: Connection refused"
    )


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
@pytest.mark.parametrize(
    ("host", "answered", "reason"),
    [
        ("127.0.0.1", Answer.REFUSED, "loopback"),
        ("::1", Answer.REFUSED, "loopback"),
        # As systemd-resolved does: neither packets of others nor calls get there.
        ("127.0.0.53", Answer.REFUSED, "not-at-loopback"),
        ("0.0.0.0", Answer.THROUGH, ""),
        ("::", Answer.THROUGH, ""),
        # Of nobody here (RFC 5737): packets would get there, and calls do not.
        ("192.0.2.1", Answer.THROUGH, "not-at-loopback"),
    ],
)
def test_a_server_is_looked_for_where_packets_of_others_get(
    tmp_path: Path, kind: socket.SocketKind, host: str, answered: Answer, reason: str
) -> None:
    proto = "tcp" if kind is socket.SOCK_STREAM else "udp"
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind) as server:
        if ":" in host:
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        else:
            server.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
        server.bind((host, 0))
        port = server.getsockname()[1]
        if kind is socket.SOCK_STREAM:
            server.listen()
        trial = told(f"{proto}.{port}", tmp_path, tmp_path).trial
        assert trial == Trial(answered, reason, f"{proto} port {port}: a server listens at {host}")
        # Nothing is sent to it.
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept() if kind is socket.SOCK_STREAM else server.recv(1)


def test_a_port_without_a_server_and_a_kernel_that_does_not_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    nothing = Trial(Answer.REFUSED, "server", f"tcp port {port}: nothing listens there")
    assert told(f"tcp.{port}", tmp_path, tmp_path).trial == nothing
    # To this number the kernel has no list.
    monkeypatch.setattr(socket, "IPPROTO_UDP", socket.IPPROTO_ICMP)
    trial = told(f"udp.{port}", tmp_path, tmp_path).trial
    assert trial is not None
    assert trial.answer is Answer.FAILED
    assert trial.text.startswith(f"udp port {port}: the kernel does not list its sockets")


@pytest.mark.parametrize("key", ["fwd.work.web", "udp.work.dns"])
def test_a_forward_is_tried_by_the_listener(tmp_path: Path, key: str) -> None:
    trial = Trial(Answer.REFUSED, "policy", "no")
    with listener(tmp_path, TRY, report.dump(trial.as_json())) as requests:
        assert told(key, tmp_path, tmp_path).trial == trial
    assert requests == [f"{key}\n".encode()]


def test_a_forward_is_not_tried_where_nobody_listens(tmp_path: Path) -> None:
    trial = told("fwd.work.web", tmp_path, tmp_path).trial
    assert trial is not None
    assert (trial.answer, trial.text.startswith("the listener does not answer")) == (Answer.FAILED, True)


@pytest.mark.parametrize(
    "argument",
    [
        "0",
        "080",
        "x",
        "fwd.x",
        "fwd.work.web\n",
        "80-90",
        "65536",
        "fwd.",
        "udp.x",
        "udp..x",
        "udp.work.dns\n",
        "both.53",
        "tcp.",
        "tcp.0",
        "icmp.1",
        "tcp.80.1",
    ],
)
def test_any_other_argument_is_refused(tmp_path: Path, argument: str) -> None:
    with pytest.raises(TextError):
        told(argument, tmp_path, tmp_path)


@pytest.mark.parametrize(("argument", "status"), [([], 0), ([""], 0), (["x\x1b"], 2)])
def test_the_program_answers_on_stdout_or_says_what_is_wrong(
    tmp_path: Path, argument: list[str], status: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qubes_fwd_qrexec.target.statusservice", *argument],
        capture_output=True,
        env=os.environ | {LISTENER_DIRECTORY_VARIABLE: str(tmp_path), DIRECTORY_VARIABLE: str(tmp_path)},
        timeout=BOUND_S,
        check=False,
    )
    assert done.returncode == status
    if status:
        assert done.stdout == b""
        assert done.stderr.startswith(b"qubes.ForwardStatus: 'x\\x1b' is not a port")
    else:
        assert QubeReport.parse(done.stdout).listener_problem is None
