# SPDX-License-Identifier: GPL-2.0-or-later
"""Two ends of a call wired together, for state machines in which each byte may be late in any way."""

import contextlib

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from qubes_fwd_qrexec.common.errors import LocalProtocolError

from .helpers import take, told

LISTENER, TARGET = 0, 1
ENDS = st.sampled_from((LISTENER, TARGET))
PICK = st.integers(0, 1000)


class TwoEnds(RuleBasedStateMachine):
    """`ends` are made by the machine, whose `hear` takes what one hears."""

    def __init__(self):
        super().__init__()
        self.ends = []
        self.wires = [b"", b""]  # towards the listener side, towards the target side

    def hear(self, end, event):
        raise NotImplementedError

    def flush(self, end):
        self.wires[1 - end] += take(self.ends[end])

    def deliver(self, end, amount):
        chunk, self.wires[end] = self.wires[end][:amount], self.wires[end][amount:]
        for event in told(self.ends[end].receive_data(chunk)):
            self.hear(end, event)

    def deliver_all(self):
        for _ in range(4):
            for end in (LISTENER, TARGET):
                self.flush(end)
                self.deliver(1 - end, len(self.wires[1 - end]))

    @rule(end=ENDS)
    def write(self, end):
        self.flush(end)

    @rule(end=ENDS, amount=st.integers(1, 200))
    def read(self, end, amount):
        self.deliver(end, amount)

    @rule(end=ENDS)
    def read_all(self, end):
        self.deliver(end, len(self.wires[end]))

    @rule(end=ENDS)
    def ping(self, end):
        with contextlib.suppress(LocalProtocolError):  # one is under way
            self.ends[end].ping(b"12345678")

    @rule(end=ENDS)
    def tick(self, end):
        self.ends[end].tick()
