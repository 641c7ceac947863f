# SPDX-License-Identifier: GPL-2.0-or-later
"""The client's quick start: the same calls, words and statuses as the Python client, by fewer means."""

import array
import os
import platform
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from bounds import BOUND_S
from helpers import until

from qubes_fwd_qrexec.lab import shortclient
from qubes_fwd_qrexec.lab.blueprint import create_lab, write_client
from qubes_fwd_qrexec.lab.directory import LabDirectory

from .lab_calls import bounded_lab, calling, give_service, read_exactly

HAS_PERL = shutil.which("perl") is not None and platform.machine() in ("x86_64", "aarch64")
pytestmark = pytest.mark.skipif(not HAS_PERL, reason="no Perl here that the script is made for")


@pytest.fixture
def lab(tmp_path: Path) -> LabDirectory:
    return create_lab(tmp_path / "lab")


def both(lab: LabDirectory) -> list[Path]:
    (long_client,) = (path for path in lab.client_program.parent.iterdir() if path.suffix == ".py")
    return [lab.client_program, long_client]


class Agent:
    """An agent's socket that answers as it is told, and what it is asked."""

    def __init__(self, path: Path, answers: list[bytes]) -> None:
        self._answers = answers
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._listener.settimeout(BOUND_S)

    def serve(self) -> tuple[bytes, int]:
        """One call; the request, and how many descriptors came with it."""
        with self._listener:
            agent, _ = self._listener.accept()
            with agent:
                agent.settimeout(BOUND_S)
                packet, ancillary, _, _ = agent.recvmsg(1 << 18, socket.CMSG_SPACE(16))
                fds = array.array("i")
                for _, _, data in ancillary:
                    fds.frombytes(data)
                for fd in fds:
                    os.close(fd)
                for answer in self._answers:
                    agent.send(answer)
        return packet, len(fds)


def run(program: Path, agent: Path, words: list[str], answers: list[bytes]) -> tuple[int, bytes, bytes, int]:
    """Status, stderr, request and descriptors of a call on sockets."""
    agent.unlink(missing_ok=True)
    served = Agent(agent, answers)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = subprocess.Popen(
            [str(program), f"--agent-socket={agent}", *words],
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
            stderr=subprocess.PIPE,
        )
        packet, count = served.serve()
        _, stderr = process.communicate(timeout=BOUND_S)
    return process.returncode, stderr, packet, count


@pytest.mark.parametrize(
    "answers",
    [
        [],
        [b"c"],
        [b"c", b"x0"],
        [b"c", b"x137"],
        [b"c", b"eone\n", b"etwo\n\x07\xff", b"x126"],
        [b"c", b"e" + b"y" * 65536, b"x1"],
        [b"nno room\n"],
    ],
)
@pytest.mark.parametrize(
    "words",
    [
        ["--", "work", "test.Service+8080"],
        ["--use-stdin-socket", "--", "work", "test.Service"],
        ["--buffer-size=16384", "$dispvm:" + "x" * 40, "test.Service"],
    ],
)
def test_both_clients_ask_say_and_end_the_same(
    lab: LabDirectory, tmp_path: Path, words: list[str], answers: list[bytes]
) -> None:
    short, long = (run(program, tmp_path / "agent", words, answers) for program in both(lab))
    assert short == long


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["-h"],
        ["work"],
        ["--nonsense", "work", "test.Service"],
        ["--buffer-size=x", "work", "test.Service"],
        ["--agent-socket", "/nonexistent", "work", "test.Service"],
        ["--agent-socket=/nonexistent", "work", "test.Service"],
        ["--agent-socket=/" + "x" * 200, "work", "test.Service"],
        ["--use-stdin-socket", "--use-stdin-socket", "work", "test.Service"],
        ["work", "test.Service"],
    ],
)
def test_what_the_quick_start_does_not_know_the_python_client_says(
    lab: LabDirectory, words: list[str]
) -> None:
    short, long = (
        subprocess.run(
            [str(program), *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=BOUND_S,
            check=False,
            env={"PATH": os.environ["PATH"]},
        )
        for program in both(lab)
    )
    assert (short.returncode, short.stdout, short.stderr) == (long.returncode, long.stdout, long.stderr)


@pytest.mark.parametrize("single", [True, False])
async def test_call_of_a_listener_needs_no_python(tmp_path: Path, single: bool) -> None:
    async with bounded_lab(tmp_path) as lab:
        give_service(lab, "echo up; cat")
        async with calling(lab, single=single) as call:
            assert await read_exactly(call.stdout, 3) == b"up\n"
            program = os.readlink(f"/proc/{call.process.pid}/exe")
            assert Path(program).name.startswith("perl")
            if not single:
                # It keeps none of the call's descriptors: what the caller closes is closed.
                await call.stdin.send_eof()
                assert await call.read_all() == b""
                assert await call.status() == 0
            call.process.terminate()
            await call.status()
            await until(lambda: not lab.broker.used_slots())


def test_without_a_perl_the_client_is_python(lab: LabDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    write_client(lab)
    assert "-IS" in lab.client_program.read_text().splitlines()[0]
    done = subprocess.run([str(lab.client_program), "-h"], capture_output=True, timeout=BOUND_S, check=True)
    assert done.stdout.startswith(b"usage:")


@pytest.mark.parametrize("text", ["exit 1", "sleep 1000"])
def test_a_perl_that_is_not_fit_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    perl = tmp_path / "perl"
    perl.write_text(f"#!/bin/sh\nexec {text}\n", encoding="ascii")
    perl.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(perl))
    monkeypatch.setattr(shortclient, "_TIMEOUT_S", 0.2)
    assert shortclient.script("/usr/bin/python3", tmp_path / "client.py") is None


def test_paths_with_quotes_are_quoted(tmp_path: Path) -> None:
    place = tmp_path / "it's \\ odd"
    lab = create_lab(place / "lab")
    done = subprocess.run([str(lab.client_program), "-h"], capture_output=True, timeout=BOUND_S, check=False)
    assert done.stdout.startswith(b"usage:")
