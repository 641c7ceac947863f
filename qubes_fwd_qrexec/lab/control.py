# SPDX-License-Identifier: GPL-2.0-or-later
"""The broker's control socket: ask what it runs, have it take up changes, or lose calls on purpose.

Each side sends one JSON object in one packet. File permissions say who may use it.
"""

import json
import os
import socket
from typing import Any

import trio

from qubes_fwd_qrexec.common.errors import ForwardError, RefusedError, StoreError, why
from qubes_fwd_qrexec.system.unixsockets import socket_address

from .broker import Broker
from .directory import LabDirectory
from .requests import bind_packets

_PACKET_MAX = 65536
_TIMEOUT_S = 10.0


async def serve_control(
    broker: Broker, task_status: "trio.TaskStatus[None]" = trio.TASK_STATUS_IGNORED
) -> None:
    """Answer one client at a time, until cancelled."""
    with bind_packets(broker.view.lab.control_socket) as listener:
        task_status.started()
        while True:
            asker, _ = await listener.accept()
            with asker, trio.move_on_after(_TIMEOUT_S):
                try:
                    answer = await _answer(broker, json.loads(await asker.recv(_PACKET_MAX)))
                except (ForwardError, ValueError, KeyError, TypeError) as error:
                    answer = {"error": str(error)}
                try:
                    await asker.send(json.dumps(answer).encode())
                except OSError:
                    continue  # the client did not wait


async def _answer(broker: Broker, order: dict[str, Any]) -> dict[str, object]:
    match order["do"]:
        case "status":
            return {
                "pid": os.getpid(),
                "network": broker.places.kind,
                "why_no_ip": broker.places.why_no_ip,
                "judge": broker.view.judge_name,
                "calls": broker.used_slots(),
            }
        case "reload":
            await broker.reload()
            return {}
        case "drop":
            return {"dropped": broker.drop(float(order["share"]), order.get("target"))}
        case other:
            raise RefusedError(f"{other!a}: the broker knows status, reload and drop")


def ask(lab: LabDirectory, order: dict[str, object]) -> dict[str, Any]:
    """Ask the broker and return its answer. Blocks for at most 10 s.

    Raises `RefusedError` if it refuses, and `StoreError` if it is not there. Standard library only.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(_TIMEOUT_S)
        try:
            with socket_address(lab.control_socket) as address:
                sock.connect(address)
            sock.send(json.dumps(order).encode())
            answer: dict[str, Any] = json.loads(sock.recv(_PACKET_MAX))
        except (FileNotFoundError, ConnectionRefusedError):
            raise StoreError(f"{lab.root}: down; 'qvm-forward-lab up' starts it") from None
        except PermissionError:
            raise StoreError(f"{lab.root}: another user's lab, which only they can use") from None
        except (OSError, ValueError) as error:
            raise StoreError(f"{lab.control_socket}: the broker does not answer: {why(error)}") from error
    if "error" in answer:
        raise RefusedError(str(answer["error"]))
    return answer
