# SPDX-License-Identifier: GPL-2.0-or-later
"""One flow of the target and a real server, without a call."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest
from flow_bench import ORIGIN
from helpers import no_fds_left
from hypothesis import given
from hypothesis import strategies as st
from udpservice_bench import udp_port, udp_server

from qubes_fwd_qrexec.mux import MAX_DATAGRAM_BYTES, MAX_SEGMENTS, FlowCode, FlowRequested, ProxyVersion
from qubes_fwd_qrexec.relay.loop import Loop
from qubes_fwd_qrexec.system.datagrams import READ_MAX_BYTES, READS_MAX, count
from qubes_fwd_qrexec.target.udpflow import BURSTS_MAX, UdpFlow, with_header


class _Owner:
    """Keeps what a flow says."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.lost_to_server = self.lost_by_kernel = self.kept_bytes = self.bursts = 0
        self.answers: list[bytes] = []
        self.ends: list[FlowCode] = []
        self.has_left = False

    def answer(self, flow_id: int, data: bytes, segment: int) -> None:
        self.answers.append(data)

    def end(self, flow_id: int, code: FlowCode) -> None:
        self.ends.append(code)

    def left(self, flow_id: int) -> None:
        self.has_left = True


@pytest.fixture
def owner() -> Iterator[_Owner]:
    owner = _Owner()
    with no_fds_left(), closing(owner.loop):
        yield owner
    assert owner.kept_bytes == owner.bursts == 0


def _flow_to(owner: _Owner, port: int) -> UdpFlow:
    return UdpFlow(owner, FlowRequested(1, port, ORIGIN, ProxyVersion.OFF))


def test_what_the_kernel_drops_is_counted_also_at_the_end_and_behind_the_last_that_came(
    owner: _Owner,
) -> None:
    with udp_server() as server, closing(_flow_to(owner, udp_port(server))) as flow:
        flow.deliver(memoryview(b"ask"), 0)
        _, client = server.recvfrom(100)
        for _ in range(1000):
            server.sendto(bytes(1000), client)
        assert owner.lost_by_kernel == 0
        assert not flow.look(time.monotonic())
        before = owner.lost_by_kernel
        assert 0 < before < 1000
        for _ in range(1000):
            server.sendto(bytes(1000), client)
        flow.close()
        assert owner.lost_by_kernel == before + 1000


def test_what_the_server_sent_before_its_port_was_closed_is_passed_on(owner: _Owner) -> None:
    with udp_server() as server, closing(_flow_to(owner, udp_port(server))) as flow:
        flow.deliver(memoryview(b"ask"), 0)
        _, client = server.recvfrom(100)
        server.sendto(b"last", client)
        server.close()
        flow.deliver(memoryview(b"more"), 0)
        owner.loop.run_once(0.0)
    assert owner.answers == [b"last"]
    assert owner.ends == [FlowCode.REFUSED]


def test_a_first_datagram_that_hears_of_a_closed_port_goes_to_the_next_address(owner: _Owner) -> None:
    with udp_server("::1") as server, closing(_flow_to(owner, udp_port(server))) as flow:
        for data in (
            b"one",
            b"two",
            b"three",
        ):  # the second one hears of it
            flow.deliver(memoryview(data), 0)
        assert [server.recv(100) for _ in range(3)] == [b"one", b"two", b"three"]
        assert owner.lost_to_server == 0


def test_a_server_that_sends_much_leaves_others_their_turn(owner: _Owner) -> None:
    with udp_server() as server, closing(_flow_to(owner, udp_port(server))) as flow:
        flow.deliver(memoryview(b"ask"), 0)
        _, client = server.recvfrom(100)
        for _ in range(READS_MAX + 6):
            server.sendto(b"answer", client)
        for answers in (1, READS_MAX + 1, READS_MAX + 6):  # after a pause one is looked for, and then all
            owner.loop.run_once(0.0)
            assert len(owner.answers) == answers
        for _ in range(4):
            server.sendto(bytes(45_000), client)
        owner.loop.run_once(0.0)
        assert len(owner.answers) == READS_MAX + 6 + -(-READ_MAX_BYTES // 45_000)


def test_the_more_flows_have_something_the_less_is_received_for_each(owner: _Owner) -> None:
    with udp_server() as server, ExitStack() as flows:
        for _ in range(4):
            flow = flows.enter_context(closing(_flow_to(owner, udp_port(server))))
            flow.deliver(memoryview(b"ask"), 0)
            _, client = server.recvfrom(100)
            for _ in range(READS_MAX):
                server.sendto(b"answer", client)
        for answers in (4, 4 + READS_MAX):
            owner.loop.run_once(0.0)
            assert len(owner.answers) == answers


def test_after_its_end_it_takes_nothing_and_says_so_in_numbers(owner: _Owner) -> None:
    with udp_server() as server:
        flow = _flow_to(owner, udp_port(server))
        flow.deliver(memoryview(b"ask"), 0)
        flow.ended(FlowCode.DONE)
        flow.close()
        assert owner.has_left
        flow.deliver(memoryview(b"aabbc"), 2)
        assert owner.lost_to_server == 3
        assert owner.ends == []
        flow.fail()
        assert owner.ends == [FlowCode.INTERNAL]


def test_of_more_flows_than_have_room_for_a_burst_those_have_it_in_which_something_moves(
    owner: _Owner,
) -> None:
    def answers_of_a_burst(flow: UdpFlow) -> int:
        flow.deliver(memoryview(b"ask"), 0)
        _, client = server.recvfrom(100)
        before = len(owner.answers)
        for _ in range(50):
            server.sendto(bytes(1400), client)
        for _ in range(2):
            owner.loop.run_once(0.0)
        return len(owner.answers) - before

    with udp_server() as server, ExitStack() as stack:
        flows = [
            stack.enter_context(closing(_flow_to(owner, udp_port(server)))) for _ in range(BURSTS_MAX + 2)
        ]
        early, late = flows[:BURSTS_MAX], flows[BURSTS_MAX:]
        for flow in early:
            assert answers_of_a_burst(flow) == 50
        assert answers_of_a_burst(late[0]) < 50
        now = time.monotonic()
        for _ in range(2):  # nothing has moved between the two
            for flow in reversed(flows):
                flow.look(now)
        assert owner.bursts == BURSTS_MAX // 2
        for flow in (*late, early[0]):
            assert answers_of_a_burst(flow) == 50
        assert owner.bursts == BURSTS_MAX // 2 + len(late)


_HEADER = b"H" * 28


@given(st.sampled_from([1, 2, 512, 1400, 21_000, 32_753, 65_479, 65_480, 65_506]), st.integers(0, 64 * 1400))
def test_each_datagram_of_a_batch_has_the_header(segment: int, length: int) -> None:
    length = min(max(length, segment + 1), segment * MAX_SEGMENTS, MAX_DATAGRAM_BYTES)
    data = bytes(length)
    batches = list(with_header(_HEADER, memoryview(data), segment))
    datagrams = [
        batch[start : start + (its_segment or len(batch))]
        for batch, its_segment in batches
        for start in range(0, len(batch), its_segment or len(batch))
    ]
    expected = [_HEADER + data[start : start + segment] for start in range(0, length, segment)]
    assert datagrams == [datagram for datagram in expected if len(datagram) <= MAX_DATAGRAM_BYTES]
    for batch, its_segment in batches:
        assert len(batch) <= MAX_DATAGRAM_BYTES
        assert count(len(batch), its_segment) <= MAX_SEGMENTS
        assert not 0 < len(batch) <= its_segment


@pytest.mark.parametrize("length", [0, 1, MAX_DATAGRAM_BYTES - len(_HEADER)])
def test_one_datagram_has_the_header(length: int) -> None:
    assert list(with_header(_HEADER, memoryview(bytes(length)), 0)) == [(_HEADER + bytes(length), 0)]


def test_one_that_the_header_makes_too_long_is_left_out() -> None:
    too_long = bytes(MAX_DATAGRAM_BYTES - len(_HEADER) + 1)
    assert list(with_header(_HEADER, memoryview(too_long), 0)) == []
