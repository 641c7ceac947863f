# SPDX-License-Identifier: GPL-2.0-or-later
"""What qvm-forward prints with --json, held to its JSON Schema."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from qubes_fwd_qrexec.admin.views.parser import COMMANDS

PATH = Path(__file__).parents[1] / "docs" / "qvm-forward.schema.json"


@cache
def schema() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(PATH.read_text())
    return found


@cache
def _validator(definition: str) -> Any:
    from jsonschema import Draft202012Validator

    return Draft202012Validator({"$ref": f"#/$defs/{definition}", "$defs": schema()["$defs"]})


def check(argv: Sequence[str], printed: str) -> None:
    """Raises an AssertionError if a command with --json has printed what the schema does not describe."""
    if not printed or "--json" not in argv:
        return
    command = next(word for word in argv if word in COMMANDS)
    # Those that print again and again print an object on each line.
    is_many = command == "watch" or "--watch" in argv
    for text in printed.splitlines() if is_many else [printed]:
        for error in _validator(command).iter_errors(json.loads(text)):
            wrong = f"{'.'.join(map(str, error.absolute_path))}: {error.message}"
            raise AssertionError(f"{command} --json is not as docs/qvm-forward.schema.json says: {wrong}")
