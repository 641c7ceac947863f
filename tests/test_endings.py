# SPDX-License-Identifier: GPL-2.0-or-later
"""Endings through the lab, with every program as users run it, beside the direct connection."""

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from bounds import BOUND_S
from endings import (
    CLIENT_ABORTS,
    SCRIPTS,
    Script,
    play,
    play_directly,
    server_ends_first_and_gets_all,
    server_ends_without_a_byte,
)
from helpers import free_port, listening_socket, port_of

# Python runs it in each program that is started. After an abort the listener waits for the status of its
# call, however long a busy machine takes to end what the call is made of.
_PATIENT = """
import sys
if "qubes_fwd_qrexec.listener" in sys.orig_argv:
    from qubes_fwd_qrexec.exposed import call
    assert call.STATUS_WAIT_S < 1
    call.STATUS_WAIT_S = 600.0
"""


@contextmanager
def relay(target_port: int, transport: str, **environ: str) -> Iterator[tuple[str, int]]:
    """``qvm-forward-lab relay`` as a process; the address to connect to."""
    port = free_port()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "qubes_fwd_qrexec.lab.cli", "relay"),
            *("--transport", transport, f"127.0.0.1:{port}={target_port}"),
        ],
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        env=os.environ | environ,
    )
    assert process.stdout is not None
    with process.stdout:
        try:
            ready, _, _ = select.select([process.stdout], [], [], BOUND_S)
            assert ready, "the relay is not ready"
            assert process.stdout.readline() == f"ready 127.0.0.1:{port}\n".encode()
            yield "127.0.0.1", port
            process.send_signal(signal.SIGTERM)
            assert process.wait(BOUND_S) == 0
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def target() -> Iterator[socket.socket]:
    with listening_socket() as sock:
        yield sock


@pytest.fixture(scope="module")
def call_relay(target: socket.socket) -> Iterator[tuple[str, int]]:
    with relay(port_of(target), "call") as address:
        yield address


@pytest.fixture(scope="module")
def patient_relay(
    target: socket.socket, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, int]]:
    """By calls, for endings of which the status tells."""
    place = tmp_path_factory.mktemp("patient")
    (place / "sitecustomize.py").write_text(_PATIENT)
    with relay(port_of(target), "call", PYTHONPATH=str(place)) as address:
        yield address


@pytest.fixture(scope="module")
def mux_call_relay(target: socket.socket) -> Iterator[tuple[str, int]]:
    with relay(port_of(target), "mux") as address:
        yield address


@pytest.mark.parametrize("script", SCRIPTS + CLIENT_ABORTS, ids=lambda script: script.__name__)
async def test_a_mux_calls_stream_ends_as_the_direct_connection_does(
    target: socket.socket, mux_call_relay: tuple[str, int], script: Script
) -> None:
    assert await play(script, mux_call_relay, target) == await play_directly(script, target)


ABORTS = tuple(script for script in SCRIPTS if "abort" in script.__name__)
ENDS = tuple(script for script in SCRIPTS if script not in ABORTS)


@pytest.mark.parametrize("script", ENDS, ids=lambda script: script.__name__)
async def test_a_call_ends_as_the_direct_connection_does(
    target: socket.socket, call_relay: tuple[str, int], script: Script
) -> None:
    assert await play(script, call_relay, target) == await play_directly(script, target)


@pytest.mark.parametrize("script", ABORTS, ids=lambda script: script.__name__)
async def test_a_call_is_aborted_as_the_direct_connection_is(
    target: socket.socket, patient_relay: tuple[str, int], script: Script
) -> None:
    assert await play(script, patient_relay, target) == await play_directly(script, target)


@pytest.mark.parametrize("script", [server_ends_first_and_gets_all, server_ends_without_a_byte])
async def test_a_servers_clean_end_over_a_call_waits_for_no_status(
    target: socket.socket, patient_relay: tuple[str, int], script: Script
) -> None:
    """Which would take longer than this may: what the service tells on stderr comes all the way."""
    assert await play(script, patient_relay, target) == await play_directly(script, target)


@pytest.mark.parametrize("script", CLIENT_ABORTS, ids=lambda script: script.__name__)
async def test_a_call_turns_a_clients_abort_into_an_end(
    target: socket.socket, call_relay: tuple[str, int], script: Script
) -> None:
    """The one ending that raw qrexec cannot carry; docs/architecture.md says so."""
    directly = await play_directly(script, target)
    relayed = await play(script, call_relay, target)
    assert relayed.client == directly.client
    assert relayed.server == (*directly.server[:-1], "EOF")
    assert directly.server[-1] == "RST"
