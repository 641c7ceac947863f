# SPDX-License-Identifier: GPL-2.0-or-later
"""What the listener of an exposed qube says to dom0: of a forward with clients, and one that is quiet."""

from typing import Any

_MINUTE, _HOUR, _DAY = 60, 3600, 86_400


def status(now: int) -> dict[str, Any]:
    """The answer to ``qubes.ForwardStatus`` at that time, of forwards ``web`` and ``photos`` of ``work``."""
    forward = {
        "target": "work",
        "since": now - _HOUR,
        "refused": {},
        "transport": "mux",
        "is_listening": True,
        "last_error": None,
        "last_error_at": None,
    }
    quiet = {"connections": 0, "total": 0, "sent": 0, "received": 0, "way": "idle", "mux_calls": 0}
    busy = {"connections": 3, "total": 120, "sent": 48_000_000, "received": 912_000, "way": "open"}
    listener = {
        "version": 1,
        "since": now - _DAY,
        "forwards": [
            {**forward, **quiet, "name": "photos"},
            {**forward, **busy, "name": "web", "mux_calls": 1, "refused": {"srchosts": 2}},
        ],
        "problems": [],
        "left_out": 0,
        "draining": [],
        "bugs": 0,
        "clients": [_client(now, number) for number in (12, 35, 71)],
        "clients_left_out": 0,
    }
    return {
        "version": 1,
        "program": "0.1.0",
        "listener": listener,
        "listener_problem": None,
        "calls": [],
        "bugs": 0,
        "trial": None,
        "firewall": {"ip": "open", "ip6": "open", "waiting": []},
    }


def _client(now: int, number: int) -> dict[str, Any]:
    return {
        "target": "work",
        "name": "web",
        "proto": "tcp",
        "address": f"192.168.1.{number}",
        "port": 40_000 + 137 * number,
        "since": now - _MINUTE * number,
        "sent": 1_400_000 * number,
        "received": 20_400 * number,
        "idle_s": 7 * number,
        "is_draining": False,
    }
