# SPDX-License-Identifier: GPL-2.0-or-later
"""``qvm-forward-lab verdicts``: the policy evaluator beside recorded verdicts of Qubes' own parser."""

import argparse
import json
from pathlib import Path

from .verdicts import OwnJudge, play

_DIFFERENCES_SHOWN = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="recorded verdicts of Qubes' policy parser")
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Say which verdicts differ; exit status 1 if any does."""
    comparison = play(arguments.file, OwnJudge())
    differences = comparison.differences
    if arguments.json:
        shown = [
            {
                "case": difference.index,
                "policy": difference.policy,
                "request": difference.request,
                "recorded": difference.recorded,
                "found": difference.found,
            }
            for difference in differences
        ]
        print(
            json.dumps(
                {"agree": comparison.agreed, "differ": len(differences), "differences": shown}, indent=2
            )
        )
    else:
        print(f"{comparison.agreed} verdicts agree, {len(differences)} differ")
        for difference in differences[:_DIFFERENCES_SHOWN]:
            print(f"case {difference.index}: {json.dumps(difference.request)}")
            print("".join(f"    {line}\n" for line in difference.policy.splitlines()), end="")
            print(f"  recorded {json.dumps(difference.recorded)}\n  found    {json.dumps(difference.found)}")
    return 1 if differences else 0
