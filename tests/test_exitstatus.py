# SPDX-License-Identifier: GPL-2.0-or-later
import pytest

from qubes_fwd_qrexec.counters import Refusal
from qubes_fwd_qrexec.exitstatus import ExitStatus, meaning, refusal


def test_each_status_has_words_of_its_own() -> None:
    assert len({meaning(status).split(" (")[0] for status in ExitStatus}) == len(ExitStatus)


@pytest.mark.parametrize("status", list(ExitStatus))
def test_the_words_name_the_number(status: ExitStatus) -> None:
    assert meaning(status).endswith(f"(exit status {status.value})")


@pytest.mark.parametrize("status", [1, 255, -9, 0])
def test_any_other_status_is_named_by_its_number(status: int) -> None:
    assert meaning(status) == f"the call ended with exit status {status}"


@pytest.mark.parametrize(
    ("status", "counted"),
    [
        (126, Refusal.POLICY),
        (127, Refusal.NO_SERVICE),
        (69, Refusal.SERVER),
        (75, Refusal.SERVER),
        (125, Refusal.NO_CALL),
        (1, Refusal.NO_CALL),
    ],
)
def test_what_a_status_counts_as(status: int, counted: Refusal) -> None:
    assert refusal(status) is counted
