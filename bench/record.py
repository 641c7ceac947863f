# SPDX-License-Identifier: GPL-2.0-or-later
"""A run as a file of JSON: the machine, the command, and what each row has found, also in each round."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .lines import Line, Result


@dataclass(frozen=True, slots=True)
class Record:
    """One run: facts about the machine, and what each row has found."""

    machine: Mapping[str, str]
    results: Mapping[str, Result]

    def line(self, key: str) -> Line:
        """Raises KeyError."""
        return {line.key: line for result in self.results.values() for line in result.lines}[key]


def write(file: Path, record: Record) -> None:
    """Numbers get four digits that count; more of them are chance."""
    rows = {row: _rounded(asdict(result)) for row, result in record.results.items()}
    # One line of text for each line of the table, so that git shows what has changed.
    parts = []
    for row, found in rows.items():
        lines = ",\n".join(json.dumps(line) for line in found.pop("lines"))
        parts.append(f'"{row}": {json.dumps(found)[:-1]}, "lines": [\n{lines}]}}')
    machine, told = json.dumps(dict(record.machine), indent=1), ",\n".join(parts)
    file.write_text(f'{{"machine": {machine},\n"rows": {{\n{told}}}}}\n', encoding="utf-8")


def read(file: Path) -> Record:
    """Raises OSError."""
    found = json.loads(file.read_text(encoding="utf-8"))
    results = {
        row: Result(**{**result, "lines": [Line(**line) for line in result["lines"]]})
        for row, result in found["rows"].items()
    }
    return Record(found["machine"], results)


def _rounded(value: Any) -> Any:
    match value:
        case float():
            return float(f"{value:.4g}")
        case list():
            return [_rounded(each) for each in value]
        case dict():
            return {key: _rounded(each) for key, each in value.items()}
    return value
