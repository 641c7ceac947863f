# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures of the programs in the qubes."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import listening_socket


@pytest.fixture
def tunnel_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a tunnel's service finds in a qube: who calls, and where its note goes."""
    monkeypatch.setenv("QREXEC_REMOTE_DOMAIN", "sys-net")
    monkeypatch.setenv("QUBES_FORWARD_RUN_DIR", str(tmp_path / "run"))


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """A listening, non-blocking TCP socket: the server in the target."""
    with listening_socket() as sock:
        yield sock
