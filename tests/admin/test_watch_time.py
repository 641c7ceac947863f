# SPDX-License-Identifier: GPL-2.0-or-later
"""`watch` closes rules when their time is over, whatever becomes of the clock."""

from stages import Stage
from worlds import NOW, rule

from qubes_fwd_qrexec.admin.inventory import Inventory
from qubes_fwd_qrexec.admin.plan import plan
from qubes_fwd_qrexec.admin.watch import QUIET_S, TICK_S, next_end


def test_a_rule_ends_at_its_time(expiring: Stage) -> None:
    expiring.run(lambda: expiring.hands.pass_by(3599.9), lambda: expiring.hands.pass_by(0.1))
    assert not expiring.is_open
    assert "work web was active and is expired." in expiring.out.getvalue()


def test_a_time_that_no_timer_takes_is_a_broken_rule_and_ends_nothing(expiring: Stage) -> None:
    lab = expiring.lab
    line = lab.features("work")["forward.web"].replace(f"expire={NOW + 3600}", "expire=9223372036854775808")
    lab.set_feature("work", "forward.later", line.replace("80-80", "81-81"))
    expiring.run(lambda: lab.set_feature("work", "forward.other", line), lambda: expiring.hands.pass_by(3600))
    assert not expiring.is_open
    assert expiring.err.getvalue() == ""
    assert "work later is new" not in expiring.out.getvalue()
    assert "work other is new, and broken. option 'expire' at column" in expiring.out.getvalue()


def test_a_rule_ends_in_time_though_the_clock_was_set_back(expiring: Stage) -> None:
    hands = expiring.hands

    def set_back() -> None:
        hands.wall -= 7200

    expiring.run(set_back, lambda: hands.pass_by(3600))
    assert not expiring.is_open
    assert expiring.err.getvalue() == (
        "qvm-forward: the clock was set back by 7200 s; until 'qvm-forward watch' is restarted, rules "
        "expire as if it had not been\n"
    )


def test_a_rule_ends_when_the_machine_resumes_after_its_time(expiring: Stage) -> None:
    def suspend() -> None:
        expiring.hands.elapsed += 4000  # and the wall clock is not right yet

    expiring.run(suspend)
    assert not expiring.is_open


def test_a_rule_ends_when_the_clock_is_set_past_its_end(expiring: Stage) -> None:
    def set_forward() -> None:
        expiring.hands.wall += 4000

    expiring.run(set_forward)
    assert not expiring.is_open


def test_an_end_that_comes_while_it_works_is_not_slept_over(expiring: Stage) -> None:
    inventory = expiring.inventory

    def slow(*, with_config: bool = True) -> Inventory:
        if not expiring.looks:
            expiring.hands.pass_by(4000)
        return inventory()

    expiring.inventory = slow  # type: ignore[method-assign]
    expiring.run()
    assert expiring.waits[0] == 0  # its end is past
    assert not expiring.is_open


def test_while_nothing_happens_only_the_clock_is_looked_at(expiring: Stage) -> None:
    expiring.run(*[lambda: expiring.hands.pass_by(30)] * 20)
    assert expiring.looks == [0, 0]
    assert set(expiring.waits) <= {QUIET_S, TICK_S}


def test_the_last_wait_before_an_end_is_as_long_as_is_left(expiring: Stage) -> None:
    expiring.run(lambda: expiring.hands.pass_by(3590))
    assert any(QUIET_S < wait <= 10 for wait in expiring.waits)


def test_an_ended_rule_stays_so_after_a_restart_with_a_clock_that_was_set_back(expiring: Stage) -> None:
    expiring.run(lambda: expiring.hands.pass_by(3600))
    expiring.hands.wall -= 7200
    expiring.run()
    assert not expiring.is_open


def test_a_new_end_is_noticed(expiring: Stage) -> None:
    line = expiring.lab.features("work")["forward.web"]

    def sooner() -> None:
        new = line.replace(f"expire={NOW + 3600}", f"expire={NOW + 60}")
        expiring.lab.set_feature("work", "forward.web", new)

    expiring.run(sooner, lambda: expiring.hands.pass_by(60))
    assert not expiring.is_open


def test_only_the_ends_of_enabled_rules_to_come_are_waited_for(stage: Stage) -> None:
    rules = [
        rule(f"expire={NOW + 1} ended=yes", name="ended"),
        rule("expire=1"),
        rule(f"expire={NOW}", name="now"),
        rule(f"expire={NOW + 5} enabled=no", name="disabled"),
        rule(f"expire={NOW + 20}", name="later"),
        rule(f"expire={NOW + 10}", name="next", target="nowhere"),
        rule(name="never"),
    ]
    assert next_end(plan(rules, stage.inventory(), NOW), NOW) == NOW + 10
    assert next_end(plan([], stage.inventory(), NOW), NOW) is None
