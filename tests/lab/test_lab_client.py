# SPDX-License-Identifier: GPL-2.0-or-later
"""The client stand-in: its command line, what it does with what is no socket, and its messages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import trio
from bounds import BOUND_S
from helpers import until

from qubes_fwd_qrexec.lab.clientcall import ExitError, Options, replace_characters
from qubes_fwd_qrexec.lab.running import RunningLab

from .lab_calls import bounded_lab, give_service, read_all


def parse(*words: str) -> Options:
    return Options(["client", *words])


@pytest.mark.parametrize(
    "words",
    [
        ["--agent-socket=/s", "--prefix-data=p", "--source-qube=q", "-t", "-T", "--buffer-size=65536"],
        ["--agent-socket", "/s", "--prefix-data", "p", "--source-qube", "q", "-tT"],
        ["-a/s", "-pp", "-sq", "-tTa", "/s"],
        ["--agent=/s", "--pre=p", "--source=q", "-T", "-t", "--"],
    ],
)
def test_options_are_read_in_every_form_of_getopt_long(words: list[str]) -> None:
    options = parse(*words, "work", "test.Service+1")
    assert (options.agent_socket, options.prefix, options.source) == (b"/s", "p", "q")
    assert options.filters == {"t": True, "T": True}
    assert (options.target, options.service, options.program) == ("work", "test.Service+1", [])


def test_options_end_at_the_target() -> None:
    options = parse("--no-filter-escape-chars-stdout", "work", "test.Service", "/bin/sh", "-t")
    assert options.program == ["/bin/sh", "-t"]
    assert options.filters == {"t": False}


def test_old_keywords_and_long_targets_are_taken_as_the_real_client_takes_them() -> None:
    assert parse("$dispvm", "s").target == "@dispvm"
    assert parse("x" * 40, "s").target == "x" * 31


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["-h"], 0, "usage:"),
        ([], 2, "usage:"),
        (["work"], 2, "usage:"),
        (["-x", "work", "s"], 2, "invalid option -- 'x'"),
        (["-p"], 2, "requires an argument -- 'p'"),
        (["--prefix-data"], 2, "requires an argument"),
        (["--help=x", "work", "s"], 2, "doesn't allow an argument"),
        (["--nonsense", "work", "s"], 2, "unrecognized option"),
        (["--filter", "work", "s"], 2, "unrecognized option"),
        (["-pa", "-pb", "work", "s"], 2, "usage:"),
        (["-sa", "-sb", "work", "s"], 2, "usage:"),
        (["--buffer-size=x", "work", "s"], 1, "does not begin with a number"),
        (["--buffer-size=1x", "work", "s"], 1, "trailing junk"),
        (["--buffer-size=99999999999", "work", "s"], 1, "too large"),
    ],
)
def test_bad_command_line_says_what_is_wrong(words: list[str], status: int, said: str) -> None:
    with pytest.raises(ExitError) as caught:
        parse(*words)
    assert caught.value.status == status
    assert said in caught.value.message


def test_filter_keeps_text_and_replaces_the_rest() -> None:
    assert replace_characters(b"a~ \t\n\r\a\b\x1b\x00\xff") == b"a~ \t\n\r\a\b___"


async def run(
    lab: RunningLab, *words: str, data: bytes = b"", variable: bool = False
) -> subprocess.CompletedProcess[bytes]:
    """Run the client on pipes."""
    command = lab.client_command("sys-net")
    env = dict(os.environ)
    if variable:
        env["QUBES_LAB_AGENT_SOCKET"] = command[1].partition("=")[2]
        command = command[:1]
    done: subprocess.CompletedProcess[bytes] = await trio.run_process(
        [*command, *words], stdin=data, capture_stdout=True, capture_stderr=True, check=False, env=env
    )
    return done


async def test_pipes_are_copied_whole(tmp_path: Path) -> None:
    data = os.urandom(1_000_003)
    async with bounded_lab(tmp_path) as lab:
        give_service(lab, "cat; exit 7")
        done = await run(lab, "work", "test.Service", data=data, variable=True)
    assert (done.returncode, done.stderr) == (7, b"")
    assert done.stdout == data


async def test_output_that_is_read_late_is_written_whole_before_the_client_ends(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab:
        give_service(lab, "head -c 150000 /dev/zero; touch ended")
        process = await trio.lowlevel.open_process(
            [*lab.client_command("sys-net"), "work", "test.Service"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        # More than a pipe takes: the client cannot have written it all when the call has ended.
        ended = lab.directory.qube_dir("work").root / "ended"
        await until(lambda: ended.exists() and not lab.broker.joined)
        assert process.stdout is not None
        assert await read_all(process.stdout) == bytes(150_000)
        assert await process.wait() == 0


async def test_output_and_stderr_are_filtered_on_demand(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab:
        give_service(lab, r"printf '\033[1m'; printf '\033[2m' >&2")
        plain = await run(lab, "work", "test.Service")
        filtered = await run(lab, "-t", "-T", "work", "test.Service")
    assert (plain.stdout, plain.stderr) == (b"\033[1m", b"\033[2m")
    assert (filtered.stdout, filtered.stderr) == (b"_[1m", b"_[2m")


async def test_refused_call_on_pipes_is_126(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path, policy="") as lab:
        done = await run(lab, "work", "test.Service", data=b"x" * 300_000)
    assert (done.returncode, done.stdout, done.stderr) == (126, b"", b"Request refused\n")


async def test_source_qube_is_refused_as_a_lab_has_no_remote_vm(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab:
        give_service(lab, "exit 0")
        assert (await run(lab, "-s", "personal", "work", "test.Service")).returncode == 126


@pytest.mark.parametrize(
    ("service", "program", "status"),
    [("exit 0", "exit 5", 5), ("exit 4", "exit 5", 4), ("exit 0", "kill -9 $$", 137)],
)
async def test_remote_status_counts_before_the_local_programs(
    tmp_path: Path, service: str, program: str, status: int
) -> None:
    async with bounded_lab(tmp_path) as lab:
        give_service(lab, service)
        done = await run(lab, "work", "test.Service", "/bin/sh", "-c", program)
    assert done.returncode == status


async def test_local_program_talks_to_the_service_and_to_the_saved_descriptors(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab:
        give_service(lab, "read line; echo got $line")
        script = "echo hello; read answer; echo $answer >&$SAVED_FD_1"
        done = await run(lab, "work", "test.Service", "/bin/sh", "-c", script)
    assert (done.returncode, done.stdout) == (0, b"got hello\n")


async def test_local_program_that_is_missing_is_255_and_never_runs_for_a_refused_call(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab:
        give_service(lab, "exit 0")
        assert (await run(lab, "work", "test.Service", "/nonexistent")).returncode == 255
        lab.write_policy("")
        mark = tmp_path / "mark"
        assert (await run(lab, "work", "test.Service", "/bin/touch", str(mark))).returncode == 126
    assert not mark.exists()


async def test_stdin_socket_must_be_one(tmp_path: Path) -> None:
    async with bounded_lab(tmp_path) as lab:
        done = await run(lab, "--use-stdin-socket", "work", "test.Service")
    assert done.returncode == 2
    assert b"not a stream socket" in done.stderr


def test_without_an_agent_socket_the_client_says_what_to_set(tmp_path: Path) -> None:
    env = {key: value for key, value in os.environ.items() if key != "QUBES_LAB_AGENT_SOCKET"}
    command = [sys.executable, "-m", "qubes_fwd_qrexec.lab.client", "work", "s"]
    for extra, said in (([], b"QUBES_LAB_AGENT_SOCKET"), ([f"-a{tmp_path}/none"], b"is the lab up?")):
        done = subprocess.run(
            [*command[:3], *extra, *command[3:]], env=env, capture_output=True, timeout=BOUND_S, check=False
        )
        assert done.returncode == 1
        assert said in done.stderr


def test_client_imports_neither_socket_nor_os_nor_trio() -> None:
    program = "import sys; import qubes_fwd_qrexec.lab.client; print(*sys.modules)"
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-IS", "-c", f"import sys; sys.path.insert(0, {root!r}); {program}"],
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=True,
    )
    assert not {"socket", "os", "trio", "enum", "re"} & set(done.stdout.split())
