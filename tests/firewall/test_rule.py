# SPDX-License-Identifier: GPL-2.0-or-later
"""What every rule of ours is made of."""

import re

from hypothesis import given
from hypothesis import strategies as st

from qubes_fwd_qrexec.common.entries import KEY_MAX
from qubes_fwd_qrexec.firewall.rule import Rule


@given(st.text(alphabet="abc.-_XYZ019", min_size=1, max_size=KEY_MAX), st.text(max_size=3))
def test_a_comment_fits_tells_rules_apart_and_needs_no_escape(label: str, text: str) -> None:
    comment = Rule(label, text).comment
    assert re.fullmatch(r"[a-zA-Z0-9._-]+ [0-9a-f]{12}", comment)
    assert len(comment) < 128
    assert comment != Rule(label, text + " ").comment
