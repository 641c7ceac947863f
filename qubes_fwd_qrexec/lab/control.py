# SPDX-License-Identifier: GPL-2.0-or-later
"""The broker's control socket: what it runs, taking up changes, and losing calls on purpose.

Each side sends one JSON object in one packet; `asking` is the other side. File permissions say who may
use it.
"""

import json
import os
from contextlib import suppress
from typing import Any

import trio

from qubes_fwd_qrexec.common.errors import ForwardError, RefusedError

from .asking import PACKET_MAX, TIMEOUT_S
from .broker import Broker
from .requests import bind_packets
from .switches import Switches


async def serve_control(
    broker: Broker, switches: Switches, task_status: "trio.TaskStatus[None]" = trio.TASK_STATUS_IGNORED
) -> None:
    """Answer clients until cancelled."""

    async def serve(asker: trio.socket.SocketType) -> None:
        with asker, suppress(OSError):  # a client that does not wait
            with trio.move_on_after(TIMEOUT_S) as asking:
                untrusted_packet = await asker.recv(PACKET_MAX)
            if asking.cancelled_caught:
                return
            try:
                answer = await _answer(broker, switches, json.loads(untrusted_packet))
            except (ForwardError, ValueError, KeyError, TypeError) as error:
                answer = {"error": str(error)}
            await asker.send(json.dumps(answer).encode())

    with bind_packets(broker.view.lab.control_socket) as listener:
        task_status.started()
        async with trio.open_nursery() as nursery:
            while True:
                asker, _ = await listener.accept()
                nursery.start_soon(serve, asker)


async def _answer(broker: Broker, switches: Switches, order: dict[str, Any]) -> dict[str, object]:
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
            await switches.follow()
            return {}
        case "drop":
            return {"dropped": broker.drop(float(order["share"]), order.get("target"))}
        case other:
            raise RefusedError(f"{other!a}: the broker knows status, reload and drop")
