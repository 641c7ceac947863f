# SPDX-License-Identifier: GPL-2.0-or-later
import pytest

from qubes_fwd_qrexec.exitstatus import ExitStatus, meaning


def test_each_status_has_words_of_its_own() -> None:
    assert len({meaning(status).split(" (")[0] for status in ExitStatus}) == len(ExitStatus)


@pytest.mark.parametrize("status", list(ExitStatus))
def test_the_words_name_the_number(status: ExitStatus) -> None:
    assert meaning(status).endswith(f"(exit status {status.value})")


@pytest.mark.parametrize("status", [1, 255, -9, 0])
def test_any_other_status_is_named_by_its_number(status: int) -> None:
    assert meaning(status) == f"the call ended with exit status {status}"
