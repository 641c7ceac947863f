# SPDX-License-Identifier: GPL-2.0-or-later
"""Pictures are XML, the same for the same numbers, and everything is drawn within them."""

from collections.abc import Sequence
from xml.etree import ElementTree

import pytest

from bench.svg import HEIGHT, WIDTH, Bars, Lines, draw

NS = "{http://www.w3.org/2000/svg}"
COLOURS = {"ours": "#00798c", "theirs": "#d1495b"}


def lines(is_log: bool = False, ys: Sequence[float] = (0.5, 40, 1234)) -> Lines:
    points = {"ours": list(zip((1, 10, 100), ys, strict=True)), "theirs": [(10.0, 3.0)]}
    return Lines("a < b", "held", (1, 10, 100), points, is_log=is_log, limit=(4.0, "goal & limit"))


def parsed(*panels: Lines | Bars) -> ElementTree.Element:
    text = draw(panels, COLOURS)
    assert text == draw(panels, COLOURS)
    return ElementTree.fromstring(text)  # noqa: S314 - it is ours


@pytest.mark.parametrize("is_log", [False, True])
@pytest.mark.parametrize("ys", [(0.5, 40, 1234), (1, 1, 1), (0.001, 0.002, 0.01)])
def test_every_point_lies_within_its_panel(is_log: bool, ys: Sequence[float]) -> None:
    circles = list(parsed(lines(is_log, ys)).iter(f"{NS}circle"))
    assert len(circles) == 4
    for circle in circles:
        assert 0 < float(circle.attrib["cx"]) < WIDTH
        assert 0 < float(circle.attrib["cy"]) < HEIGHT


def test_more_is_higher_and_further_right() -> None:
    for is_log in (False, True):
        places = [
            (float(circle.attrib["cx"]), float(circle.attrib["cy"]))
            for circle in parsed(lines(is_log)).iter(f"{NS}circle")
        ][:3]
        assert places == sorted(places)
        assert [y for _, y in places] == sorted((y for _, y in places), reverse=True)


def test_words_are_text_whatever_is_in_them() -> None:
    words = {text.text for text in parsed(lines()).iter(f"{NS}text")}
    assert {"a < b", "goal & limit", "ours", "theirs", "100"} <= words


def test_parts_of_a_bar_lie_end_to_end_and_their_sum_is_told() -> None:
    svg = parsed(Bars("time", "ms", {"mux": {"ours": 1.0, "theirs": 3.0}, "call": {"theirs": 2.0}}))
    boxes = [box for box in svg.iter(f"{NS}rect") if box.attrib.get("fill") in COLOURS.values()]
    ours, theirs, other = (box.attrib for box in boxes[:3])
    assert float(ours["x"]) + float(ours["width"]) == pytest.approx(float(theirs["x"]), abs=0.2)
    assert float(theirs["width"]) == pytest.approx(3 * float(ours["width"]), abs=0.2)
    assert float(other["width"]) == pytest.approx(2 * float(ours["width"]), abs=0.2)
    assert {"4", "2", "mux", "call"} <= {text.text for text in svg.iter(f"{NS}text")}


def test_panels_stand_two_in_a_row() -> None:
    sizes = [parsed(*[lines()] * count).attrib["viewBox"] for count in (1, 2, 3)]
    assert sizes == [f"0 0 {WIDTH} {HEIGHT}", f"0 0 {2 * WIDTH} {HEIGHT}", f"0 0 {2 * WIDTH} {2 * HEIGHT}"]
