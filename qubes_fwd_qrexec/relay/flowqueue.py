# SPDX-License-Identifier: GPL-2.0-or-later
"""Datagrams of many flows that wait for their mux call, and which of them goes next.

Nothing here makes anybody wait. There is a bound on what each flow and all of them together may have waiting,
and on how long; what does not fit, or has waited for too long, is dropped, the oldest first, and counted.
Where all together have too much, the flow with the most loses, so a flood drops its own.

Flows take turns by bytes (deficit round robin), and one that had nothing waiting goes first, so that a few
datagrams never wait behind a bulk transfer. It goes first once: then it has its turn like the others.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Protocol

from qubes_fwd_qrexec.mux import MAX_DATAGRAM_BYTES, MAX_SEGMENTS
from qubes_fwd_qrexec.system.datagrams import count

# docs/behaviours.md, 55: how long a datagram may wait for its call.
WAIT_S = 0.05
# A flow has room for four of the largest batches, and four flows fill what all of them have: the burst of a
# moment. At the 100 MiB/s of a call it is gone after 10 ms.
FLOW_BYTES = 256 << 10
CALL_BYTES = 1 << 20
# What a batch takes here beside its bytes, so that empty datagrams have a bound, too.
COST_BYTES = 256
# How much a flow sends in one turn, and less where others have waited longer.
TURN_BYTES = 16 << 10

Batch = tuple[bytes, int]
"""The bytes of one datagram (0), or of several of equal size, of which only the last may be shorter."""
_Waiting = tuple[bytes, int, float]
"""A batch, and until when it may wait."""


class DroppedCall(Protocol):
    """Hears that so many datagrams of a flow were dropped, and whether for their age or for lack of room."""

    def __call__(self, flow_id: int, datagrams: int, *, is_old: bool) -> None: ...


class _Flow:
    """What one flow has waiting. ``left`` is what it may still send in its turn."""

    __slots__ = ("batches", "bytes", "flow_id", "left", "size")

    def __init__(self, flow_id: int) -> None:
        self.flow_id = flow_id
        self.batches: deque[_Waiting] = deque()
        self.bytes = 0
        self.left = TURN_BYTES
        self.size = 0


_Flows = OrderedDict[int, _Flow]


class FlowQueue:
    """What waits for one mux call; times are of `time.monotonic`, and given by the caller.

    ``dropped_full`` and ``dropped_old`` count datagrams: those that there was no room for or that were too
    long, and those that waited for too long or whose flow ended first. ``tell`` hears of each with its flow.
    """

    def __init__(self, tell: DroppedCall) -> None:
        self.bytes = 0
        """How much waits, with what it costs to keep it."""
        self.dropped_full = 0
        self.dropped_old = 0
        self._tell = tell
        self._flows: dict[int, _Flow] = {}
        # Those that go first, and those that go round.
        self._new: _Flows = OrderedDict()
        self._old: _Flows = OrderedDict()
        # By the number of bits of what each has waiting: so one with the most is found at once.
        self._by_size: list[_Flows] = [OrderedDict() for _ in range(FLOW_BYTES.bit_length() + 1)]

    @property
    def flows(self) -> int:
        """How many flows it keeps anything of."""
        return len(self._flows)

    def add(self, flow_id: int, data: bytes, segment: int, now: float) -> None:
        """Have a batch wait, however many datagrams it has; one datagram that is too long is dropped."""
        until = now + WAIT_S
        if len(data) <= MAX_DATAGRAM_BYTES and (not segment or len(data) <= segment * MAX_SEGMENTS):
            self._add(flow_id, data, segment, until)
        elif not segment:
            self._count(flow_id, 1, is_old=False)
        else:
            most = min(MAX_SEGMENTS, MAX_DATAGRAM_BYTES // segment) * segment
            for start in range(0, len(data), most):
                part = data[start : start + most]
                self._add(flow_id, part, segment if len(part) > segment else 0, until)

    def take(self, most: int, now: float) -> Iterator[tuple[int, bytes, int]]:
        """Whose turn it is, each with a batch of its own: about ``most`` bytes in all, or all there is.

        What was taken is gone. Flow, bytes and segment; datagrams of equal size that follow each other are
        put together.
        """
        while most > 0 and (flows := self._new or self._old):
            flow = next(iter(flows.values()))
            if flow.left <= 0:
                flow.left += TURN_BYTES
                del flows[flow.flow_id]
                self._old[flow.flow_id] = flow
            elif batch := self._next_batch(flow, now):
                data, segment = batch
                flow.left -= len(data) + COST_BYTES
                most -= len(data) + COST_BYTES
                yield flow.flow_id, data, segment
            else:
                del flows[flow.flow_id]
                if flows is self._new:  # it keeps its place in the round, so that it is not new again at once
                    self._old[flow.flow_id] = flow
                else:
                    self._forget(flow)

    def rest(self, flow_id: int, now: float) -> Iterator[Batch]:
        """Take all that a flow has waiting, as it ends."""
        flow = self._flows.get(flow_id)
        while flow is not None and (batch := self._next_batch(flow, now)):
            yield batch

    def drop_late(self, flow_id: int, data: bytes, segment: int) -> None:
        """Drop a batch of a flow that is over."""
        self._count(flow_id, count(len(data), segment), is_old=True)

    def end(self, flow_id: int) -> None:
        """Forget a flow; what it has waiting is dropped."""
        flow = self._flows.get(flow_id)
        if flow is not None:
            while flow.batches:
                self._drop(flow, is_old=True)
            self._new.pop(flow_id, None)
            self._old.pop(flow_id, None)
            self._forget(flow)

    def _add(self, flow_id: int, data: bytes, segment: int, until: float) -> None:
        flow = self._flows.get(flow_id)
        if flow is None:
            flow = self._flows[flow_id] = self._new[flow_id] = _Flow(flow_id)
            self._by_size[0][flow_id] = flow
        cost = len(data) + COST_BYTES
        while flow.bytes + cost > FLOW_BYTES:
            self._drop(flow, is_old=False)
        while self.bytes + cost > CALL_BYTES:
            self._drop(self._longest(), is_old=False)
        flow.batches.append((data, segment, until))
        self._resize(flow, cost)

    def _next_batch(self, flow: _Flow, now: float) -> Batch | None:
        """Take the next datagrams of a flow that have not waited for too long, as many as go in one frame."""
        batches = flow.batches
        while batches and batches[0][2] < now:
            self._drop(flow, is_old=True)
        if not batches:
            return None
        data, segment, _ = batches.popleft()
        parts, length, size = [data], len(data), segment or len(data)
        most = min(size * MAX_SEGMENTS, MAX_DATAGRAM_BYTES)
        while batches and size and not length % size and _continues(batches[0], size, most - length):
            parts.append(batches.popleft()[0])
            length += len(parts[-1])
        self._resize(flow, -length - len(parts) * COST_BYTES)
        return (b"".join(parts), size) if len(parts) > 1 else (data, segment)

    def _drop(self, flow: _Flow, *, is_old: bool) -> None:
        """Drop what a flow has had waiting for longest."""
        data, segment, _ = flow.batches.popleft()
        self._resize(flow, -len(data) - COST_BYTES)
        self._count(flow.flow_id, count(len(data), segment), is_old=is_old)

    def _count(self, flow_id: int, datagrams: int, *, is_old: bool) -> None:
        if is_old:
            self.dropped_old += datagrams
        else:
            self.dropped_full += datagrams
        self._tell(flow_id, datagrams, is_old=is_old)

    def _longest(self) -> _Flow:
        """One with the most waiting, within a factor of two."""
        for flows in reversed(self._by_size):
            if flows:
                return next(iter(flows.values()))
        raise AssertionError("nothing waits")

    def _resize(self, flow: _Flow, change: int) -> None:
        self.bytes += change
        flow.bytes += change
        size = flow.bytes.bit_length()
        if size != flow.size:
            del self._by_size[flow.size][flow.flow_id]
            self._by_size[size][flow.flow_id] = flow
            flow.size = size

    def _forget(self, flow: _Flow) -> None:
        del self._flows[flow.flow_id]
        del self._by_size[flow.size][flow.flow_id]


def _continues(waiting: _Waiting, size: int, room: int) -> bool:
    """Whether it can go behind datagrams of ``size`` bytes each."""
    data, segment, _ = waiting
    return 0 < len(data) <= room and (segment == size if segment else len(data) <= size)
