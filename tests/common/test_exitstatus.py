# SPDX-License-Identifier: GPL-2.0-or-later
import pytest

from qubes_fwd_qrexec.common.exitstatus import ExitStatus, meaning, refusal
from qubes_fwd_qrexec.common.refusals import Refusal


def test_each_status_has_words_of_its_own() -> None:
    assert len({meaning(status).split(" (")[0] for status in ExitStatus}) == len(ExitStatus)


@pytest.mark.parametrize("status", list(ExitStatus))
def test_the_words_name_the_number(status: ExitStatus) -> None:
    assert meaning(status).endswith(f"(exit status {status.value})")


@pytest.mark.parametrize("status", [3, 255, -9, 0])
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
        (1, Refusal.BUSY),
    ],
)
def test_what_a_status_counts_as(status: int, counted: Refusal) -> None:
    assert refusal(status) is counted


def test_status_1_of_the_client_says_what_gives_more_room_and_that_of_a_service_does_not() -> None:
    assert "parameter limit of xen-gntalloc" in meaning(1)
    assert refusal(1) == "busy"
    assert meaning(1, is_through=True) == "the call ended with exit status 1"
