# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m soak``: exit status 0 when nothing was found."""

import argparse
import secrets
import sys

import trio

from bench import road

from . import nft, udp
from .findings import Findings
from .run import soak


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m soak", description="Random connections, for long.")
    parser.add_argument(
        "what",
        nargs="?",
        choices=("mux", "nft", "udp"),
        default="mux",
        help="connections through mux calls (default), datagrams, or, as root, forwards by nft that change",
    )
    parser.add_argument("--seconds", type=float, default=600.0, metavar="N", help="how long (default: 600)")
    parser.add_argument("--seed", type=int, metavar="N", help="play what a run with this seed has played")
    parser.add_argument(
        "--grace",
        type=float,
        default=1.0,
        metavar="SECONDS",
        help="nft: how late after a change, of which no qube was asked, is still in time (default: 1)",
    )
    return parser


def main() -> int:
    args = _parser().parse_args()
    if args.what == "nft" and (problem := road.why_unavailable()) is not None:
        print(f"forwards by nft cannot be tried: {problem}", file=sys.stderr)
        return 1
    seed = secrets.randbelow(1 << 32) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    findings: Findings
    if args.what == "nft":
        findings = trio.run(nft.soak, seed, args.seconds, args.grace, strict_exception_groups=True)
    elif args.what == "udp":
        findings = trio.run(udp.soak, seed, args.seconds, strict_exception_groups=True)
    else:
        findings = trio.run(soak, seed, args.seconds, strict_exception_groups=True)
    for what, count in (*findings.played.items(), *findings.disturbed.items()):
        print(f"{count} {what}")
    if findings.problems:
        again = f"python -m soak {args.what} --seed {seed} --seconds {args.seconds:g}"
        print(f"{len(findings.problems)} problems; again with: {again}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
