# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures of the programs in the qubes."""

import socket
from collections.abc import Iterator

import pytest
from helpers import listening_socket


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """A listening, non-blocking TCP socket: the server in the target."""
    with listening_socket() as sock:
        yield sock
