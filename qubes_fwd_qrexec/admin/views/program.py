# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the program qvm-forward begins: Ctrl-C is no traceback even while the rest is imported."""

import signal
import sys


def main() -> int:
    status = None
    try:
        from . import cli

        status = cli.main()
        # All is done and said. Ctrl-C would interrupt Python's own end, with a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    except KeyboardInterrupt:
        if status is None:
            sys.stderr.write("qvm-forward: interrupted\n")
            return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
