# SPDX-License-Identifier: GPL-2.0-or-later
"""An answer is read with bounds, whatever a real process does with its two ends."""

import os
from subprocess import PIPE, Popen
from threading import Barrier, Lock

import pytest
from bounds import BOUND_S

from qubes_fwd_qrexec.admin.answers import AnswerError, ask_status, at_once, both, read_answer, waiting
from qubes_fwd_qrexec.common.values import QubeName

SHORT_S = 0.1


def shell(script: str) -> Popen[bytes]:
    return Popen(["/bin/sh", "-c", script], stdin=PIPE, stdout=PIPE)


def test_a_call_is_given_its_input_to_the_end_and_heard_to_the_end() -> None:
    assert (
        read_answer(shell("cat; echo over"), "x" * 60_000, 60_005, "it", BOUND_S) == b"x" * 60_000 + b"over\n"
    )


def test_a_call_that_says_more_is_ended_at_once() -> None:
    process = shell("exec yes")
    with pytest.raises(AnswerError, match=r"^it said more than 100 bytes$"):
        read_answer(process, "", 100, "it", BOUND_S)
    assert process.returncode == -9


@pytest.mark.parametrize("script", ["exec tail -f /dev/null", "exec >/dev/null; exec tail -f /dev/null"])
@pytest.mark.parametrize("given", ["", "x" * 200_000])
def test_a_call_that_does_not_end_is_ended(script: str, given: str) -> None:
    """Whether it says nothing, has closed its output, or reads nothing of what it is given."""
    process = shell(script)
    with pytest.raises(AnswerError, match=r"^it did not end within 0\.1 s$") as caught:
        read_answer(process, given, 100, "it", SHORT_S)
    assert (process.returncode, caught.value.status) == (-9, None)


@pytest.mark.parametrize("script", ["printf a; exec tail -f /dev/null", "while printf a; do :; done"])
def test_an_endless_trickle_within_the_bound_is_ended(script: str) -> None:
    with pytest.raises(AnswerError, match="did not end"):
        read_answer(shell(script), "", 1 << 30, "it", SHORT_S)


@pytest.mark.parametrize("given", ["", "x" * 200_000])
def test_a_call_that_ends_badly_says_how_even_if_it_reads_nothing(given: str) -> None:
    with pytest.raises(AnswerError, match=r"^it ended with exit status 3$") as caught:
        read_answer(shell("echo said; exit 3"), given, 100, "it", BOUND_S)
    assert caught.value.status == 3


def test_a_process_without_pipes_is_a_mistake_of_ours() -> None:
    with Popen(["/bin/true"]) as process, pytest.raises(ValueError, match="both pipes"):
        read_answer(process, "", 100, "it", BOUND_S)


def test_two_kinds_of_questions_are_asked_at_the_same_time() -> None:
    together = Barrier(2, timeout=BOUND_S)

    def one() -> str:
        together.wait()
        return "listeners"

    def other() -> int:
        together.wait()
        return 7

    assert both(one, other) == ("listeners", 7)


def test_of_those_that_are_asked_at_once_all_wait_and_one_works() -> None:
    together, at_work = Barrier(5, timeout=BOUND_S), Lock()

    def work() -> None:
        assert at_work.acquire(blocking=False), "another one works"
        for _ in range(300):
            os.stat("/")  # here others would begin
        at_work.release()

    def ask(number: int) -> int:
        work()
        with waiting():
            together.wait()
        work()
        return -number

    assert at_once(ask, range(5)) == {number: -number for number in range(5)}


def test_one_that_fails_while_it_waits_holds_up_nobody() -> None:
    def ask(number: int) -> int:
        with waiting():
            raise AnswerError(f"no {number}")

    with pytest.raises(AnswerError, match=r"^no 0$"):
        at_once(ask, range(20))


@pytest.mark.parametrize("said", [b"\x1b[2J", b"{}"])
def test_what_cannot_be_read_is_no_answer(said: bytes) -> None:
    class Liar:
        def ask(self, *_: object, **__: object) -> bytes:
            return said

    with pytest.raises(AnswerError, match="the answer of sys-net cannot be read: the answer"):
        ask_status(Liar(), QubeName("sys-net"))  # type: ignore[arg-type]
