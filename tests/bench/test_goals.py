# SPDX-License-Identifier: GPL-2.0-or-later
"""A goal is met or missed by what the runs found, and says by how much."""

from bench.admin import Row
from bench.adminlab import Spent
from bench.goals import Found, Goal, goals, render
from bench.held import Held
from bench.lines import Line, Result
from bench.record import Record

LESS = ("connect-median", "round-trip-median", "processor-upload-own", "processor-download-own")


def run(**values: dict[str, float]) -> Record:
    lines = []
    for name, value in values.items():
        key = name.replace("_", "-")
        is_less_better = key in LESS or key.startswith("fair-")
        lines.append(Line(key, key, "", is_less_better, values=value))
    return Record({}, {"all": Result("", lines)})


def found(
    mux: float = 100.0, each_kib: float = 2.0, count: int = 50_000, list_s: float = 0.5, many: float = 100
) -> Found:
    """Where mux takes or gets so many percent of `call`, and before it was twice as slow."""
    same = {"mux": mux, "call": 100.0, "call-ours": 100.0, "direct": 1.0}
    return Found(
        before=run(many_rate={"mux": 40}, connect_median={"mux": 200}),
        since=run(many_rate={"mux": many}, connect_median={"mux": 100}),
        connect=run(many_rate=same, connect_median=same),
        stream=run(
            bulk_upload=same,
            bulk_download=same,
            round_trip_median=same,
            processor_upload_own=same,
            processor_download_own=same,
        ),
        fair=run(fair_upload=same, fair_download={"mux": 3.0}, fair_stalled={"mux": 49.0}),
        held=[
            Held(10_000, 10_000, each_kib * 10_000, 0.0, 0.0, 0.0, 1),
            Held(count, count, 0.0, 0.0, 0.0, 0.0, 4),
        ],
        why_not_all=None if count == 50_000 else "few files",
        admin=[Row("list", [Spent(9.0, list_s)], 0.6), Row("export", [Spent(9.0, 9.0)])],
        turn_s=0.05,
    )


def by_text(given: Found) -> dict[str, Goal]:
    return {goal.text: goal for goal in goals(given)}


def test_every_goal_is_met_where_mux_is_as_good_as_call() -> None:
    assert [goal.text for goal in goals(found()) if not goal.is_met] == [
        "99 of 100 round trips beside a stream to the server take under 20 ms, in the worst round"
    ]


def test_a_slower_mux_misses_those_that_it_decides() -> None:
    missed = [goal for goal in goals(found(mux=130.0)) if not goal.is_met]
    assert any("round trip takes" in goal.text and goal.found == "1.30 times" for goal in missed)
    assert any("processor time" in goal.text and goal.found.startswith("1.30 times") for goal in missed)
    assert any(goal.text.startswith("one stream") for goal in goals(found(mux=90.0)) if not goal.is_met)


def test_memory_and_how_many_are_held_are_judged_by_what_was_held() -> None:
    assert not by_text(found(each_kib=4.5))["at most 4 KiB for each of 10,000 held connections"].is_met
    few = by_text(found(count=15_000))["50,000 held in one listener, and alive"]
    assert few.found == "15000 of 15000 alive, all that the machine lets it hold"
    assert few.is_met is None


def test_of_dom0_and_window_only_what_has_a_goal_is_judged() -> None:
    *_, listed, turn = goals(found(list_s=0.7))
    assert listed == ("dom0, list: at most 0.6 s of processor time", "0.7 s", False)
    assert turn == ("no turn of the window takes longer than 50 ms, but for its start", "50 ms", True)


def test_what_is_compared_with_before_is_compared_with_the_run_beside_it() -> None:
    text = "16 clients get 2.5 times the connections of before"
    assert by_text(found(many=100))[text] == (text, "2.50 times", True)
    assert by_text(found(many=80))[text] == (text, "2.00 times", False)
    assert by_text(found())["a new connection takes at most half of the time"].found == "0.50 of it"


def test_a_table_says_what_was_missed() -> None:
    three = [Goal("a", "1", True), Goal("b", "2", False), Goal("c", "3", None)]
    header, _, met, missed, unknown = render(iter(three)).splitlines()
    assert header.split() == ["|", "goal", "|", "found", "|", "|"]
    assert met.split() == ["|", "a", "|", "1", "|", "met", "|"]
    assert missed.split() == ["|", "b", "|", "2", "|", "**missed**", "|"]
    assert unknown.endswith("| not measured |")
