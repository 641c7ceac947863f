# SPDX-License-Identifier: GPL-2.0-or-later
"""The fake of the package ``qubesdb`` has the traps of the real one."""

import select
from collections.abc import Callable

import pytest
from fake_qubesdb import DisconnectedError, Error, FakeQubesDB
from helpers import BOUND_S

KEY, LINE = "fwd.work.web", b"version=1"
PATH = f"/vm-config/{KEY}"


@pytest.fixture
def qubesdb() -> FakeQubesDB:
    return FakeQubesDB({KEY: LINE})


def failing(call: Callable[[], object]) -> Error:
    """How a command fails."""
    with pytest.raises(Error) as caught:
        call()
    return caught.value


def test_the_fake_queues_an_event_that_comes_before_a_command(qubesdb: FakeQubesDB) -> None:
    handle = qubesdb.QubesDB()
    handle.watch("/vm-config/")
    qubesdb.set(KEY, LINE)
    assert select.select([handle.watch_fd()], [], [], BOUND_S)[0]
    handle.read("/vm-config/other")
    assert not select.select([handle.watch_fd()], [], [], 0)[0]
    assert handle.read_watch() == PATH
    handle.close()
    assert failing(handle.watch_fd).args[0] == 22


def test_the_fakes_handle_connects_again_without_its_watch(qubesdb: FakeQubesDB) -> None:
    handle = qubesdb.QubesDB()
    handle.watch("/vm-config/")
    qubesdb.end()
    assert isinstance(failing(handle.read_watch), DisconnectedError)
    assert isinstance(failing(lambda: handle.read("/a")), DisconnectedError)
    qubesdb.begin()
    assert handle.read(PATH) == LINE
    assert qubesdb.watchers == []
    handle.close()
