# SPDX-License-Identifier: GPL-2.0-or-later
"""Names on the command line, of which there is a list."""

import argparse
from collections.abc import Sequence
from typing import Any


def names(known: Sequence[str], what: str) -> Any:
    """What parses some of these, apart by commas, for argparse; the known order stays."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!a} is no {what}; there are {', '.join(known)}")
        return [name for name in known if name in names]

    return parse
