# SPDX-License-Identifier: GPL-2.0-or-later
import itertools

from qubes_fwd_qrexec.common.config import ListenerConfig
from qubes_fwd_qrexec.exposed.unopened import RETRY_MAX_S, Unopened

CONFIG = ListenerConfig.parse(
    "fwd.work.web",
    "version=1 service=qubes.ForwardTCP transport=call side=outer "
    "listen=127.0.0.1 srcports=80 dstports=80 srchosts=any",
)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_it_is_tried_after_a_second_and_ever_more_seldom_up_to_a_minute() -> None:
    clock = Clock()
    unopened = Unopened(clock)
    assert unopened.due() == []
    tried_at = []
    unopened.failed(CONFIG.key, CONFIG, "in use")
    for _ in range(400):
        clock.now += 1
        if unopened.due():
            assert unopened.due() == [(CONFIG.key, CONFIG)]
            tried_at.append(clock.now)
            unopened.failed(CONFIG.key, CONFIG, "in use")
    assert tried_at[:7] == [1, 3, 7, 15, 31, 63, 123]
    assert {later - earlier for earlier, later in itertools.pairwise(tried_at[6:])} == {RETRY_MAX_S}


def test_the_same_problem_is_news_once() -> None:
    unopened = Unopened(Clock())
    found = [unopened.failed(CONFIG.key, CONFIG, problem) for problem in ("x", "x", "y", "y")]
    assert found == [True, False, True, False]


def test_what_is_forgotten_is_not_tried() -> None:
    clock = Clock()
    unopened = Unopened(clock)
    for forget in (lambda: unopened.forget(CONFIG.key), unopened.forget_all):
        unopened.failed(CONFIG.key, CONFIG, "x")
        forget()
        clock.now += 100
        assert unopened.due() == []
        assert len(unopened) == 0
    unopened.forget(CONFIG.key)
