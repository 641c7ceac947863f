# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m soak``: exit status 0 when nothing was found."""

import argparse
import secrets
import sys

import trio

from .run import soak


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m soak", description="Random connections, for long.")
    parser.add_argument("--seconds", type=float, default=600.0, metavar="N", help="how long (default: 600)")
    parser.add_argument("--seed", type=int, metavar="N", help="play what a run with this seed has played")
    args = parser.parse_args()
    seed = secrets.randbelow(1 << 32) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    findings = trio.run(soak, seed, args.seconds, strict_exception_groups=True)
    for what, count in (*findings.played.items(), *findings.kills.items()):
        print(f"{count} {what}")
    if findings.problems:
        again = f"python -m soak --seed {seed} --seconds {args.seconds:g}"
        print(f"{len(findings.problems)} problems; again with: {again}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
