# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m bench all [RUN,...]``: the runs that docs/numbers.md shows, each into its file in docs/numbers.

All of them take about ten minutes on a machine that does nothing else. Then the page is made.
"""

import argparse
import shlex
import subprocess
import sys

from . import page
from .names import names

RUNS = {
    "connect": "--rows connect,many",
    "stream": "--rows round-trip,bulk,processor",
    "payload": "--rows payload",
    "streams": "--rows streams",
    "fair": "--rows fair --peers direct,socat,call,mux",
    "memory": "--rows memory,stock",
    "growth": "growth",
    "held": "held --idle 2",
    "admin": "admin --calls",
    "window": "window",
    "guard": "guard --store",
}
"""What each is started with, after ``python -m bench``."""


def main(arguments: list[str]) -> int:
    """Exit status 1 if a run failed."""
    parser = argparse.ArgumentParser(prog="python -m bench all", description=__doc__)
    parser.add_argument(
        "runs",
        type=names(list(RUNS), "run"),
        nargs="?",
        default=list(RUNS),
        metavar="RUN,...",
        help=", ".join(RUNS),
    )
    parser.add_argument("--no-page", action="store_true", help="leave the page as it is")
    args = parser.parse_args(arguments)
    root, status = page.PAGE.parents[1], 0
    for run in args.runs:
        print(f"{run} ...", file=sys.stderr)
        # A relative path, as the command stands in the file.
        words = [*shlex.split(RUNS[run]), "--json", str(page.PLACE.relative_to(root) / f"{run}.json")]
        done = subprocess.run([sys.executable, "-m", "bench", *words], cwd=root, check=False)
        status = max(status, done.returncode)
    return status or (0 if args.no_page else page.main([]))
