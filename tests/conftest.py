# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures of the programs in the qubes."""

import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import listening_socket, no_fds_left
from mux_bench import Joined, TunnelBench


@pytest.fixture(autouse=True)
def _restored_logging() -> Iterator[None]:
    """A program's ``main`` takes over the log of its process, which here is that of all tests."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def tunnel_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a tunnel's service finds in a qube: who calls, and where its note goes."""
    monkeypatch.setenv("QREXEC_REMOTE_DOMAIN", "sys-net")
    monkeypatch.setenv("QUBES_FORWARD_RUN_DIR", str(tmp_path / "run"))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where tunnels leave their notes; it is not there yet."""
    return tmp_path / "notes"


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """A listening, non-blocking TCP socket: the server in the target."""
    with listening_socket() as sock:
        yield sock


@pytest.fixture
def bench() -> Iterator[TunnelBench]:
    """Both ends of a tunnel, which leave no descriptor behind."""
    with no_fds_left(), TunnelBench() as bench:
        yield bench


@pytest.fixture
def stream(bench: TunnelBench) -> Joined:
    """One stream of that tunnel."""
    return bench.join()
