# SPDX-License-Identifier: GPL-2.0-or-later
"""The broker's control socket: what it runs, taking up changes, and losing calls on purpose.

Each side sends one JSON object in one packet; `asking` is the other side. File permissions say who may
use it.
"""

import json
import os
from typing import Any

import trio

from qubes_fwd_qrexec.common.errors import ForwardError, RefusedError

from .asking import PACKET_MAX, TIMEOUT_S
from .broker import Broker
from .requests import bind_packets


async def serve_control(
    broker: Broker, task_status: "trio.TaskStatus[None]" = trio.TASK_STATUS_IGNORED
) -> None:
    """Answer one client at a time, until cancelled."""
    with bind_packets(broker.view.lab.control_socket) as listener:
        task_status.started()
        while True:
            asker, _ = await listener.accept()
            with asker, trio.move_on_after(TIMEOUT_S):
                try:
                    answer = await _answer(broker, json.loads(await asker.recv(PACKET_MAX)))
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
