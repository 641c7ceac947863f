# SPDX-License-Identifier: GPL-2.0-or-later
"""Asking the broker at its control socket (`control`), for programs that should start quickly."""

import json
import socket
from typing import Any

from qubes_fwd_qrexec.common.errors import RefusedError, StoreError, why
from qubes_fwd_qrexec.system.unixsockets import socket_address

from .directory import LabDirectory

PACKET_MAX = 65536
TIMEOUT_S = 60.0


class DownError(StoreError):
    """The lab is down."""


def ask(lab: LabDirectory, order: dict[str, object], timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    """Ask the broker and return its answer. Blocks for at most ``timeout_s``.

    Raises `RefusedError` if it refuses, `DownError` if it is not there, and `StoreError`.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(timeout_s)
        try:
            with socket_address(lab.control_socket) as address:
                sock.connect(address)
            sock.send(json.dumps(order).encode())
            answer: dict[str, Any] = json.loads(sock.recv(PACKET_MAX))
        except (FileNotFoundError, ConnectionRefusedError):
            raise DownError(f"{lab.root}: down; 'qvm-forward-lab up' starts it") from None
        except PermissionError:
            raise StoreError(
                f"{lab.root}: another user has brought it up, and only they can use it now"
            ) from None
        except (OSError, ValueError) as error:
            raise StoreError(f"{lab.control_socket}: the broker does not answer: {why(error)}") from error
    if "error" in answer:
        raise RefusedError(str(answer["error"]))
    return answer
