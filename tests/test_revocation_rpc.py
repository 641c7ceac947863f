# SPDX-License-Identifier: GPL-2.0-or-later
"""The RPC by which dom0 ends tunnels: its argument, and the program with its exit status."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from noted import BOUND_S, Tunnel, spoil_mode

from qubes_fwd_qrexec import revocation
from qubes_fwd_qrexec.errors import TextError
from qubes_fwd_qrexec.revocation import argument, parse_argument
from qubes_fwd_qrexec.rules import OnExpire
from qubes_fwd_qrexec.values import QubeName, TargetPorts


@pytest.mark.parametrize("ports", ["1-1", "8080-8090", "65535-65535"])
@pytest.mark.parametrize("source", ["sys-net", "a", "disp1234", "A.b_c-d", "x" * 31])
@pytest.mark.parametrize("how", OnExpire)
def test_an_argument_that_is_made_is_understood(ports: str, source: str, how: OnExpire) -> None:
    text = argument(TargetPorts.parse(ports), QubeName(source), how)
    assert parse_argument(text) == (TargetPorts.parse(ports), source, how)


BAD = [
    "",
    "+",
    "8080-8090",
    "8080-8090+",
    "+sys-net",
    "8080+sys-net",
    "8080-8090+sys-net+1",
    "8080-8090+sys-net+",
    "8080-8090+sys-net+cut",
    "8080-8090+sys-net+drain+",
    "8080-8090+sys-net+drain+drain",
    "8080-8090+tunnel+sys-net",
    "8090-8080+sys-net",
    "0-1+sys-net",
    "1-65536+sys-net",
    "08080-8090+sys-net",
    "8080-8090+sys net",
    "8080-8090+sys-net\n",
    "8080-8090+../../x",
    "8080-8090+*",
    "8080-8090+@anyvm",
    "8080-8090+1x",
    f"8080-8090+{'x' * 32}",
    "8080-8090+s\u00fcs",
    "*+*",
]


@pytest.mark.parametrize("untrusted", BAD)
def test_any_other_argument_is_refused(untrusted: str) -> None:
    with pytest.raises(TextError):
        parse_argument(untrusted)


def run_rpc(place: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "qubes_fwd_qrexec.revocation", *arguments],
        env=os.environ | {revocation.DIRECTORY_VARIABLE: str(place)},
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=False,
    )


@pytest.mark.parametrize(
    "arguments", [(), ("",), ("8080-8090+*",), ("8080-8090+sys-net", "more"), ("--help",)]
)
def test_the_rpc_refuses_what_it_does_not_understand_with_status_2(
    place: Path, arguments: tuple[str, ...]
) -> None:
    done = run_rpc(place, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("qubes.ForwardRevoke: ")
    assert len(done.stderr.splitlines()) == 1
    assert not place.exists()


def test_the_rpc_says_how_many_it_ended(place: Path) -> None:
    with Tunnel(place) as tunnel:
        done = run_rpc(place, "8080-8090+sys-net")
        assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")
        assert tunnel.status == -signal.SIGTERM


def test_the_rpc_says_what_stands_in_its_way_with_status_125(place: Path) -> None:
    spoil_mode(place)
    done = run_rpc(place, "8080-8090+sys-net")
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr.startswith(f"qubes.ForwardRevoke: {place}: must belong to the user")
