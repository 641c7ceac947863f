# SPDX-License-Identifier: GPL-2.0-or-later
"""A short soak: what `make soak` does for ten minutes, here for some seconds and with a fixed seed."""

import subprocess
import sys

from soak.scripts import How, make

SEED = 20_260_101
SECONDS = 8
LIMIT_S = 600


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
