# SPDX-License-Identifier: GPL-2.0-or-later
from itertools import product

from qubes_fwd_qrexec.mux.states import MOVES, OVER, Half
from qubes_fwd_qrexec.mux.wire import FrameType

FREEING = (FrameType.EOF, FrameType.RESET)


def test_data_is_legal_only_while_flowing_as_the_fast_path_assumes():
    rows = [(half, new) for (half, frame), new in MOVES.items() if frame is FrameType.DATA]
    assert rows == [(Half.FLOWING, Half.FLOWING)]


def test_nothing_follows_a_reset():
    assert not [move for move in MOVES if move[0] in (Half.RESET, Half.ENDED_RESET)]


def test_every_half_that_is_not_reset_can_be():
    resettable = {half for (half, frame) in MOVES if frame is FrameType.RESET}
    assert resettable == set(Half) - {Half.RESET, Half.ENDED_RESET}


def play(order_here, order_there, crossing):
    """Two halves as two ends see them: each end's own frames at once, the other's after ``crossing``.

    Returns which end sees the stream over, when all frames were sent, answered and delivered.
    """
    ends = [[Half.FLOWING, Half.FLOWING], [Half.FLOWING, Half.FLOWING]]
    wires = [[], []]
    over = [False, False]

    def say(end, frame):
        move = None if over[end] else MOVES.get((ends[end][0], frame))
        if move is not None:
            ends[end][0] = move
            over[end] = tuple(ends[end]) in OVER
            wires[1 - end].append(frame)

    def hear(end):
        frame = wires[end].pop(0)
        if over[end]:
            return
        ends[end][1] = MOVES[ends[end][1], frame]
        over[end] = tuple(ends[end]) in OVER
        if frame is FrameType.RESET and not over[end] and ends[end][0] < Half.RESET:
            ends[end][0] = Half.MUST_RESET
            say(end, FrameType.RESET)

    plans = [list(order_here), list(order_there)]
    for step in crossing:
        end, is_say = step
        if is_say and plans[end]:
            say(end, plans[end].pop(0))
        elif not is_say and wires[end]:
            hear(end)
    for end in (0, 1):
        while plans[end]:
            say(end, plans[end].pop(0))
    while wires[0] or wires[1]:
        for end in (0, 1):
            if wires[end]:
                hear(end)
    return over


def test_both_ends_free_their_slot_however_eof_and_reset_cross():
    endings = [(FrameType.EOF,), (FrameType.RESET,), (FrameType.EOF, FrameType.RESET)]
    steps = list(product((0, 1), (True, False)))
    for here, there in product(endings, endings):
        for crossing in product(steps, repeat=5):
            assert play(here, there, crossing) == [True, True], (here, there, crossing)
