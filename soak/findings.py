# SPDX-License-Identifier: GPL-2.0-or-later
"""What a run found."""

import sys
from collections import Counter
from dataclasses import dataclass, field

# As many are printed, and end a run.
PROBLEMS_MAX = 20


@dataclass(slots=True)
class Findings:
    """What a run found. ``problems`` is empty if all is well."""

    played: Counter[str] = field(default_factory=Counter)
    disturbed: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def note(self, problem: str) -> None:
        if len(self.problems) < PROBLEMS_MAX:
            print(problem, file=sys.stderr, flush=True)
        self.problems.append(problem)
