# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the program qvm-forward begins: Ctrl-C is no traceback even while the rest is imported."""

import sys


def main() -> int:
    try:
        from . import cli
    except KeyboardInterrupt:
        sys.stderr.write("qvm-forward: interrupted\n")
        return 130
    return cli.main()
