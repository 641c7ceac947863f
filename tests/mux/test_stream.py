# SPDX-License-Identifier: GPL-2.0-or-later
from itertools import product

import pytest

from qubes_fwd_qrexec.common.errors import LocalProtocolError, RemoteProtocolError
from qubes_fwd_qrexec.mux.states import MOVES, OVER, Half
from qubes_fwd_qrexec.mux.stream import Stream
from qubes_fwd_qrexec.mux.wire import FrameType


@pytest.mark.parametrize(("half", "frame_type"), list(product(Half, FrameType)))
def test_a_move_is_made_if_it_is_in_the_table_and_refused_if_not(half, frame_type):
    stream = Stream(0, 0, 0)
    stream.local = stream.remote = half
    if (half, frame_type) in MOVES:
        stream.move_local(frame_type)
        stream.move_remote(frame_type)
        assert stream.local is stream.remote is MOVES[half, frame_type]
    else:
        with pytest.raises(LocalProtocolError, match=half.name):
            stream.move_local(frame_type)
        with pytest.raises(RemoteProtocolError, match=frame_type.name):
            stream.move_remote(frame_type)


@pytest.mark.parametrize(("local", "remote"), list(product(Half, Half)))
def test_what_a_pair_of_halves_means(local, remote):
    stream = Stream(1, 2, 3)
    stream.local, stream.remote = local, remote
    assert stream.is_over == ((local, remote) in OVER)
    assert stream.is_discarding == (local in (Half.RESET, Half.ENDED_RESET))
    can_come = remote in (Half.PENDING, Half.FLOWING)
    assert stream.is_receiving == (can_come and not stream.is_discarding)


def test_a_stream_has_no_dict_as_thousands_are_held():
    assert not hasattr(Stream(0, 0, 0), "__dict__")
