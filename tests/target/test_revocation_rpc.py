# SPDX-License-Identifier: GPL-2.0-or-later
"""The RPC by which dom0 says what it allows: its stdin, its answer and its exit status."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from noted import BOUND_S, ENDED, Call, spoil_mode

from qubes_fwd_qrexec.common.allowance import ALLOWANCE_MAX_BYTES
from qubes_fwd_qrexec.target import callnotes

NOTHING = "version=1 drains=keep\n"


def run_rpc(place: Path, stdin: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "qubes_fwd_qrexec.target.revocation", *arguments],
        env=os.environ | {callnotes.DIRECTORY_VARIABLE: str(place)},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=False,
    )


@pytest.mark.parametrize("arguments", [(), ("",)])
def test_it_says_how_many_it_has_ended(place: Path, arguments: tuple[str, ...]) -> None:
    with Call(place) as call:
        done = run_rpc(place, NOTHING, *arguments)
        assert (done.returncode, done.stdout, done.stderr) == (0, "version=1 ended=1 draining=0\n", "")
        assert call.status == ENDED


@pytest.mark.parametrize(
    "stdin",
    ["", "version=2 drains=keep\n", f"{NOTHING}keep 80 a\n", NOTHING + "x" * ALLOWANCE_MAX_BYTES, "\u00fc"],
)
def test_what_it_does_not_understand_ends_nothing_and_is_status_2(place: Path, stdin: str) -> None:
    with Call(place) as call:
        done = run_rpc(place, stdin)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("qubes.ForwardRevoke: ")
        assert len(done.stderr.splitlines()) == 1
        assert call.lives
        assert not (place / "allowance").exists()


@pytest.mark.parametrize("arguments", [("8080-8080+sys-net",), ("--help",)])
def test_it_takes_no_argument(place: Path, arguments: tuple[str, ...]) -> None:
    done = run_rpc(place, NOTHING, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert not place.exists()


def test_it_says_what_stands_in_its_way_with_status_125(place: Path) -> None:
    spoil_mode(place)
    done = run_rpc(place, NOTHING)
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr.startswith(f"qubes.ForwardRevoke: {place}: must belong to the user")


def test_a_list_that_does_not_end_is_given_up_on(place: Path) -> None:
    code = (
        "import sys; from qubes_fwd_qrexec.target import revocation\n"
        "revocation.READ_S = 0.1; sys.argv = ['x']; sys.exit(revocation.main())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {callnotes.DIRECTORY_VARIABLE: str(place)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    process.stdin.write(NOTHING.encode())
    process.stdin.flush()
    assert process.wait(BOUND_S) == 125
    stderr = process.communicate()[1]
    assert b"did not end within" in stderr
    assert not place.exists()
