# SPDX-License-Identifier: GPL-2.0-or-later
"""A run that is written is the same when it is read."""

from pathlib import Path

from bench import record
from bench.lines import Line, Result
from bench.record import Record


def a_run() -> Record:
    line = Line("bulk-upload", "one stream", "MiB/s", is_less_better=False)
    line.fill({"call": [[10.0, 20.0], [30.0]], "mux": [[1.5]]}, max)
    lost = Line("many-lost", "failed", "", is_compared=False, values={"mux": 0})
    return Record({"processor": "two"}, {"bulk": Result("2 x 1 MiB", [line, lost], ["socat failed: gone"])})


def test_what_was_written_is_read(tmp_path: Path) -> None:
    record.write(tmp_path / "run.json", a_run())
    assert record.read(tmp_path / "run.json") == a_run()


def test_a_line_is_found_by_its_key() -> None:
    line = a_run().line("bulk-upload")
    assert line.values == {"call": 30, "mux": 1.5}
    assert line.rounds == {"call": [20, 30], "mux": [1.5]}


def test_numbers_are_written_with_four_digits_and_one_line_for_each_line(tmp_path: Path) -> None:
    run = a_run()
    run.line("bulk-upload").values["mux"] = 1.23456
    record.write(tmp_path / "run.json", run)
    (line,) = [text for text in (tmp_path / "run.json").read_text().splitlines() if "bulk-upload" in text]
    assert '"mux": 1.235' in line
    assert "many-lost" not in line
