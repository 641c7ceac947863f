# SPDX-License-Identifier: GPL-2.0-or-later
"""One try now and then, for everybody who waits."""

from qubes_fwd_qrexec.exposed.brake import TRY_S, Brake


def test_it_holds_nothing_back_before_it_is_put_on() -> None:
    brake = Brake()
    assert not brake.is_on
    assert brake.admits(10_000, 0)


def test_one_call_at_a_time_tries_again() -> None:
    brake = Brake()
    brake.put_on(2, 10.0, "full")
    assert brake.is_on
    assert brake.admits(1, 5)
    assert not brake.admits(2, 9.9)
    assert brake.admits(2, 10)
    brake.begins("one", 2, 100)
    assert not brake.admits(2, 1000)
    assert brake.admits(1, 100)


def test_a_try_for_room_that_hangs_keeps_others_from_trying_for_a_while_only() -> None:
    brake = Brake()
    brake.in_vain(0, 10.0, "no room", 8.0, 0.25)
    brake.begins("one", 0, 10)
    assert not brake.admits(1, 10 + TRY_S - 0.1)
    assert brake.admits(1, 10 + TRY_S)
    brake.begins("two", 1, 20)
    assert not brake.admits(2, 20)
    brake.ended("one")
    assert not brake.admits(1, 20)
    assert brake.is_through("two")
    assert not brake.is_on


def test_it_goes_on_where_that_call_is_refused_and_ends_where_it_is_through() -> None:
    brake = Brake()
    brake.put_on(0, 10.0, "refused")
    brake.begins("one", 0, 10)
    brake.put_on(0, 12.0, "refused again")
    brake.ended("one")
    assert brake.why == "refused again"
    assert not brake.admits(0, 11)
    assert brake.admits(0, 12)
    brake.begins("two", 0, 12)
    brake.is_through("one")  # it was begun before: it says nothing
    assert brake.is_on
    brake.is_through("two")
    assert not brake.is_on


def test_a_call_that_ends_without_a_verdict_lets_another_find_out() -> None:
    brake = Brake()
    brake.put_on(0, 10.0, "refused")
    brake.begins("one", 0, 10)
    brake.ended("one")
    assert brake.admits(0, 10)


def test_several_refusals_at_once_are_one_wait() -> None:
    brake = Brake()
    brake.put_on(0, 10.0, "refused")
    brake.put_on(0, 9.0, "refused")
    assert not brake.admits(0, 9.5)
    assert brake.admits(0, 10)
