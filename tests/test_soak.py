# SPDX-License-Identifier: GPL-2.0-or-later
"""A short soak: what `make soak` does for ten minutes, here for some seconds and with a fixed seed."""

import subprocess
import sys

import pytest

from bench import road
from soak.datagrams import Heard
from soak.permits import Permit
from soak.scripts import How, make

SEED = 20_260_101
SECONDS = 2
LIMIT_S = 600
UDP_SECONDS = 3
NFT_SECONDS = 3
# A busy machine is late; what is judged here is what passes when all qubes say that it does not.
NFT_GRACE_S = 20


def test_a_short_soak_finds_nothing() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "soak", "--seed", str(SEED), "--seconds", str(SECONDS)],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert f"seed {SEED}" in found.stdout
    assert "as the direct connection" in found.stdout


def test_a_short_soak_of_datagrams_finds_nothing() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "soak", "udp", "--seed", str(SEED), "--seconds", str(UDP_SECONDS)],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    for what in (" questions", " answers", "datagrams sent: calm", "\n0 not counted by anybody: calm"):
        assert what in found.stdout


@pytest.mark.skipif(road.why_unavailable() is not None, reason=str(road.why_unavailable()))
def test_a_short_soak_of_forwards_by_nft_finds_nothing() -> None:
    how = ["--seed", str(SEED), "--seconds", str(NFT_SECONDS), "--grace", str(NFT_GRACE_S)]
    found = subprocess.run(
        [sys.executable, "-m", "soak", "nft", *how],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    for what in ("packets that must not pass", "a message by", "in which all that is allowed passes"):
        assert what in found.stdout


def test_a_packet_may_pass_while_a_rule_allows_it_and_a_little_longer() -> None:
    permit = Permit(grace_s=1.0)
    assert permit.late_s(sent=5.0, received=5.1) == float("inf")
    permit.open(10.0)
    permit.close(20.0)
    assert permit.late_s(sent=9.0, received=9.5) == float("inf")
    assert permit.late_s(sent=9.0, received=10.5) == 0  # it may have waited on its way
    assert permit.late_s(sent=20.9, received=25.0) == 0
    assert permit.late_s(sent=21.5, received=25.0) == 0.5
    permit.open(24.0)
    assert permit.late_s(sent=21.5, received=25.0) == 0
    assert permit.late_s(sent=21.5, received=23.0) == 0.5


def test_what_is_said_to_be_closed_lets_nothing_pass_from_then_on() -> None:
    permit = Permit(grace_s=1.0)
    permit.open(10.0)
    permit.close(20.0)
    permit.confirm(asked=19.0, now=20.1)  # about an earlier moment
    assert permit.late_s(sent=20.5, received=20.6) == 0
    permit.confirm(asked=20.0, now=20.25)
    assert permit.late_s(sent=20.25, received=20.6) == 0
    assert permit.late_s(sent=20.5, received=20.6) == 0.25


def test_an_end_that_was_told_beforehand_comes_by_itself() -> None:
    permit = Permit(grace_s=1.0)
    permit.open(10.0, until=15.0)
    assert permit.allows(14.0)
    assert not permit.allows(15.0)
    assert not permit.is_open
    assert permit.late_s(sent=16.5, received=17.0) == 0.5
    permit.open(30.0)
    assert permit.is_open
    permit.forget(before=20.0)
    assert permit.late_s(sent=15.5, received=17.0) == float("inf")


def test_a_datagram_comes_once_and_in_calm_behind_those_that_were_sent_before() -> None:
    heard = Heard()
    assert heard.problem(0, is_calm=True) is None
    assert heard.problem(5, is_calm=True) is None  # those between are lost
    assert heard.problem(3, is_calm=True) == "number 3 has come behind a later one"
    assert heard.problem(4, is_calm=False) is None
    assert heard.problem(3, is_calm=False) == "number 3 has come twice"
    assert heard.problem(6, is_calm=True) is None


def test_a_script_is_made_of_its_seed_and_number_alone() -> None:
    assert make(SEED, 7) == make(SEED, 7)
    assert make(SEED, 7) != make(SEED, 8)
    assert make(SEED, 7) != make(SEED + 1, 7)


def test_at_most_one_side_aborts_and_no_two_wait_for_each_other() -> None:
    scripts = [make(SEED, number) for number in range(500)]
    assert all(script.client.how is How.FIN or script.server.how is How.FIN for script in scripts)
    assert not any(script.client.waits and script.server.waits for script in scripts)
    assert {script.client.how for script in scripts} == set(How)
    assert {script.server.how for script in scripts} == set(How)


def test_no_two_sides_send_the_same() -> None:
    script = make(
        SEED, next(n for n in range(500) if make(SEED, n).client.size >= 32 <= make(SEED, n).server.size)
    )
    assert script.data(SEED, "client")[:32] != script.data(SEED, "server")[:32]
    assert len(script.data(SEED, "client")) == script.client.size
