# SPDX-License-Identifier: GPL-2.0-or-later
"""The ends of UDP that the bench measures with: a server and a client in processes of their own."""

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from helpers import BOUND_S

from bench.processes import Child

HOST = "127.0.0.1"


class Ends:
    """``address`` is the server's."""

    def __init__(self, server: Child, client: Child, port: int) -> None:
        self.server, self.client = server, client
        self.address = (HOST, port)

    def ask(self, order: str, **details: Any) -> dict[str, Any]:
        """Have the client do something with the server."""
        return self.client.ask({"order": order, "address": self.address, **details}, BOUND_S)


def heard(end: Child, what: str, number: int) -> dict[str, Any]:
    """What an end has heard, once it is so much."""
    deadline = time.monotonic() + BOUND_S
    while (found := end.ask({"order": "heard"}, BOUND_S))[what] != number:
        assert time.monotonic() < deadline, found
    return found


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[Ends]:
    with ExitStack() as undo:
        server = Child.of_module("bench.udpend", [HOST, "0"], tmp_path)
        undo.callback(server.end)
        client = Child.of_module("bench.udpend", [], tmp_path)
        undo.callback(client.end)
        yield Ends(server, client, server.answer(BOUND_S)["port"])


def test_a_flood_is_counted_at_both_ends_and_goes_back_to_who_wrote_last(ends: Ends) -> None:
    assert len(ends.ask("round_trips", count=3)["seconds"]) == 3
    for size, batch in ((64, 1), (1400, 20)):
        for sender, other, to in (
            (ends.client, ends.server, {"address": ends.address}),
            (ends.server, ends.client, {}),
        ):
            other.ask({"order": "listen_for", "size": size}, BOUND_S)
            flood = {"order": "flood", "rate": 4000, "size": size, "batch": batch, "for_s": 0.02}
            sent = sender.ask(flood | to, BOUND_S)["sent"]
            assert 0 < sent <= 4000 * 0.02 + batch
            assert sent % batch == 0
            assert heard(other, "whole", sent)["bytes"] == sent * size


def test_what_arrives_in_another_size_is_no_whole_datagram(ends: Ends) -> None:
    ends.server.ask({"order": "listen_for", "size": 64}, BOUND_S)
    sent = ends.ask("flood", rate=1000, size=128, batch=1, for_s=0.02)["sent"]
    assert heard(ends.server, "bytes", 128 * sent)["whole"] == 0


def test_flows_are_held_until_one_has_no_answer(ends: Ends) -> None:
    assert ends.ask("hold", count=5, limit_s=BOUND_S)["alive"] == 5
    ended = ends.ask("hold", count=6, limit_s=0.0)
    assert ended["alive"] == 5
    assert "none within 0 s" in ended["failure"]


def test_what_is_not_answered_is_sent_again_and_said_to_be_lost(tmp_path: Path) -> None:
    with ExitStack() as undo:
        server = undo.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        server.settimeout(BOUND_S)
        server.bind((HOST, 0))
        client = Child.of_module("bench.udpend", [], tmp_path)
        undo.callback(client.end)
        order = {"order": "round_trips", "address": server.getsockname(), "count": 1}
        asked = undo.enter_context(ThreadPoolExecutor()).submit(client.ask, order, BOUND_S)
        first, who = server.recvfrom(100)
        server.sendto(b"an answer to something else", who)
        again = server.recv(100)
        server.sendto(again, who)
        assert first == again
        assert asked.result()["lost"] >= 1
