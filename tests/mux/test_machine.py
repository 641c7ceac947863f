# SPDX-License-Identifier: GPL-2.0-or-later
"""Two connections wired together, against a model, with every frame and every byte late in any way.

Whatever two ends do that they may do: neither calls the other's frames wrong, no byte is lost, changed
or in another stream, no end holds more than it granted, and at last no slot and no credit is left.
"""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from qubes_fwd_qrexec.mux import (
    AcceptReceived,
    Connection,
    CreditReceived,
    CreditReturned,
    DataReceived,
    EofReceived,
    GoawayReceived,
    HelloReceived,
    OpenReceived,
    PongReceived,
    ResetCode,
    ResetReceived,
)
from qubes_fwd_qrexec.mux.limits import FRAME_COST_BYTES, MAX_FIRST_BYTES
from qubes_fwd_qrexec.mux.messages import GoawayCode

from .helpers import ORIGIN, PORTS, hello
from .two_ends import ENDS, LISTENER, PICK, TARGET, TwoEnds

WINDOW = 8192


class Side:
    """What one end has said and heard on one stream."""

    def __init__(self):
        self.is_asked = False  # OPEN has come here
        self.is_open = False  # data may be sent, as far as this end knows
        self.sent = b""
        self.said_eof = False
        self.said_reset = False
        self.got = b""
        self.got_eof = False
        self.got_reset = False
        self.unread = 0

    @property
    def can_send(self):
        return self.is_open and not (self.said_eof or self.said_reset or self.got_reset)


class MuxCall(TwoEnds):
    def __init__(self):
        super().__init__()
        self.streams = {}

    @initialize(max_streams=st.integers(1, 6), is_begun=st.booleans())
    def connect(self, max_streams, is_begun):
        self.ends = [
            Connection(hello("listener", window_bytes=WINDOW), PORTS),
            Connection(hello("target", window_bytes=WINDOW, max_streams=max_streams), PORTS),
        ]
        self.deliver_all()
        if is_begun:
            # Most of what can go wrong does so on streams that flow.
            self.open(WINDOW)
            self.deliver_all()
            self.accept(0, 2048)
            self.deliver_all()

    def pick(self, number, end, condition):
        found = [i for i, sides in self.streams.items() if condition(sides[end])]
        return found[number % len(found)] if found else None

    def hear(self, end, event):
        if isinstance(event, OpenReceived):
            assert end == TARGET
            # The listener side may have fewer by now: it hears of a last EOF before this end does.
            assert self.ends[TARGET].open_streams <= self.ends[TARGET].hello.max_streams
            side = self.streams[event.stream_id][TARGET]
            side.is_asked = True
            side.got = event.first
            side.unread = len(event.first) + FRAME_COST_BYTES if event.first else 0
            return
        if not hasattr(event, "stream_id"):
            assert isinstance(event, HelloReceived | PongReceived | GoawayReceived)
            return
        side = self.streams[event.stream_id][end]
        other = self.streams[event.stream_id][1 - end]
        assert not side.said_reset
        assert not side.got_reset
        match event:
            case AcceptReceived():
                assert end == LISTENER
                side.is_open = True
            case DataReceived():
                assert not side.got_eof
                side.got += event.data
                side.unread += event.cost
                assert other.sent.startswith(side.got)
            case EofReceived():
                assert other.said_eof
                assert side.got == other.sent
                side.got_eof = True
            case CreditReturned():
                assert 0 < event.amount <= WINDOW - 2048
            case CreditReceived():
                assert self.ends[end].send_limit(event.stream_id) > 0
            case ResetReceived():
                assert other.said_reset or event.code is ResetCode.LEASE_OVER
                side.got_reset = True

    @rule(
        credit=st.sampled_from((0, 2048, WINDOW)), first=st.sampled_from((b"", b"f", bytes(MAX_FIRST_BYTES)))
    )
    def open(self, credit, first=b""):
        if self.ends[LISTENER].open_room:
            stream_id = self.ends[LISTENER].open_stream(8080, ORIGIN, credit, first=first)
            self.streams[stream_id] = (Side(), Side())
            self.streams[stream_id][LISTENER].sent = first

    @rule(number=PICK, credit=st.sampled_from((0, 2048, WINDOW)))
    def accept(self, number, credit):
        stream_id = self.pick(
            number,
            TARGET,
            lambda side: side.is_asked and not (side.is_open or side.said_reset or side.got_reset),
        )
        if stream_id:
            if self.streams[stream_id][TARGET].got:
                credit = max(credit, 2048)
            self.ends[TARGET].accept_stream(stream_id, credit)
            self.streams[stream_id][TARGET].is_open = True

    @rule(end=ENDS, number=PICK, size=st.sampled_from((1, 500, WINDOW)), byte=st.integers(0, 255))
    def send(self, end, number, size, byte):
        stream_id = self.pick(number, end, lambda side: side.can_send)
        if stream_id:
            limit = self.ends[end].send_limit(stream_id)
            data = bytes([byte]) * min(size, limit)
            if data:
                self.ends[end].send_data(stream_id, data)
                self.streams[stream_id][end].sent += data

    @rule(end=ENDS, number=PICK)
    def eof(self, end, number):
        stream_id = self.pick(number, end, lambda side: side.can_send)
        if stream_id:
            self.ends[end].send_eof(stream_id)
            self.streams[stream_id][end].said_eof = True

    @rule(end=ENDS, number=PICK)
    def reset(self, end, number):
        stream_id = self.pick(
            number, end, lambda side: (end == LISTENER or side.is_asked) and not side.said_reset
        )
        if stream_id:
            side = self.streams[stream_id][end]
            before = self.ends[end].bytes_queued
            self.ends[end].reset_stream(stream_id)
            is_over = side.said_eof and side.got_eof
            assert (self.ends[end].bytes_queued > before) == (not is_over)
            side.said_reset = True

    @rule(end=ENDS, number=PICK, amount=st.sampled_from((1, 1000, WINDOW)))
    def consume(self, end, number, amount):
        stream_id = self.pick(number, end, lambda side: side.unread and side.is_open)
        if stream_id:
            side = self.streams[stream_id][end]
            amount = min(amount, side.unread)
            side.unread -= amount
            self.ends[end].grant(stream_id, amount)

    @rule(end=ENDS, number=PICK, keep=st.sampled_from((2048, 3000, WINDOW)))
    def recall(self, end, number, keep):
        stream_id = self.pick(number, end, lambda side: side.is_open)
        if stream_id:
            before = self.ends[end].bytes_queued
            is_asked = self.ends[end].recall(stream_id, keep)
            assert self.ends[end].bytes_queued - before == 12 * is_asked

    @precondition(lambda self: len(self.streams) > 3)
    @rule()
    def lease_over(self):
        self.ends[TARGET].drain(GoawayCode.LEASE_OVER)

    @invariant()
    def no_more_is_held_than_was_granted(self):
        for end, connection in enumerate(self.ends):
            total = 0
            for stream_id, stream in connection._streams.items():
                if stream.is_receiving:
                    total += stream.granted
                    assert stream.granted + self.streams[stream_id][end].unread <= WINDOW
            assert connection.granted_bytes == total == sum(map(connection.granted, self.streams))

    @invariant()
    def the_target_side_never_has_a_stream_more_than_the_listener_side(self):
        if not any(self.wires) and not any(end.bytes_queued for end in self.ends):
            assert len({end.open_streams for end in self.ends}) <= 1

    def teardown(self):
        if not self.ends:
            return
        self.deliver_all()
        for end in (LISTENER, TARGET):
            for stream_id, sides in self.streams.items():
                if sides[end].got_reset or not sides[end].can_send:
                    continue
                self.ends[end].send_eof(stream_id)
                sides[end].said_eof = True
        self.deliver_all()
        for stream_id, sides in self.streams.items():
            for end, (here, there) in enumerate((sides, sides[::-1])):
                if not (here.said_reset or there.said_reset or here.got_reset or there.got_reset):
                    if here.is_open:
                        assert here.got == there.sent
                        assert here.got_eof
                    else:
                        self.ends[end].reset_stream(stream_id)
                        here.said_reset = True
        self.deliver_all()
        for end in (LISTENER, TARGET):
            for stream_id, sides in self.streams.items():
                if sides[end].got_reset:
                    self.ends[end].reset_stream(stream_id)
        self.deliver_all()
        for connection in self.ends:
            assert connection.open_streams == connection.granted_bytes == 0
        self.ends[LISTENER].close()
        self.deliver_all()
        self.ends[TARGET].receive_eof()


TestMux = MuxCall.TestCase
TestMux.settings = settings(max_examples=50, stateful_step_count=50, deadline=None, derandomize=True)
