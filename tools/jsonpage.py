#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""qvm-forward-json(7), made from docs/qvm-forward.schema.json: `python3 tools/jsonpage.py` writes it."""

import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"
SCHEMA = DOCS / "qvm-forward.schema.json"
PAGE = DOCS / "qvm-forward-json.rst"
_WIDTH = 108
# What is in every object that is printed is said once.
_VERSION = {"$ref": "#/$defs/version"}
_HEAD = """\
.. SPDX-License-Identifier: GPL-2.0-or-later
   tools/jsonpage.py makes this from qvm-forward.schema.json.

================
qvm-forward-json
================

NAME
====

qvm-forward-json - what qvm-forward prints for programs

DESCRIPTION
===========

With ``--json`` each command prints one JSON object, and **watch** and ``status --watch`` one on each line.
Its *version* is {version}, and that of an export {export}. Fields may be added under the same number, so
ignore fields that you do not know. The number changes if a field is removed or changes its meaning. Errors
and warnings are text on standard error, with ``--json`` too, and the exit status is that of qvm-forward(1).

/usr/share/qubes-fwd-qrexec/qvm-forward.schema.json says the same as a JSON Schema (draft 2020-12): the
definition with a command's name is what that prints. It allows no other fields than those here.

A field is always there if it is not marked *optional*. Times are UNIX seconds, and sentences are for
people: they may change at any time. What qubes say of themselves is untrusted. It is checked for its form,
but it may be a lie.
"""


def page(schema: dict[str, Any]) -> str:
    """The page's text."""
    definitions: dict[str, Any] = schema["$defs"]
    commands = [_name(each) for each in schema["anyOf"]]
    parts = [
        _HEAD.format(
            version=definitions["version"]["const"],
            export=definitions["export"]["properties"]["version"]["const"],
        ),
        "COMMANDS\n========\n",
        *(_section(name, definitions[name]) for name in commands),
        "TYPES\n=====\n",
        *(_section(name, found) for name, found in definitions.items() if name not in (*commands, "version")),
        "SEE ALSO\n========\n\nqvm-forward(1), qvm-forward-list(1)\n",
    ]
    return "\n".join(parts)


def _section(name: str, definition: dict[str, Any]) -> str:
    """One definition: what it is, and its fields."""
    text = definition["description"]
    if "enum" in definition:
        text += f" One of {_words(definition)}."
    if "anyOf" in definition:
        text += f" {' or '.join(f'*{_name(each)}*' for each in definition['anyOf']).capitalize()}."
    fields = {key: value for key, value in definition.get("properties", {}).items() if value != _VERSION}
    if "$ref" in definition:
        text += f" All fields of *{_name(definition)}*{', and:' if fields else '.'}"
    lines = [f"{name}\n{'-' * len(name)}\n", *_wrapped(text, ""), ""]
    for field, value in fields.items():
        is_optional = field not in definition.get("required", ())
        lines.append(f"*{field}* ({_type(value)}{', optional' if is_optional else ''})")
        lines += _wrapped(value.get("description", ""), "    ")
        lines.append("")
    return "\n".join(lines)


def _type(value: dict[str, Any]) -> str:
    """What a field may be, in words."""
    if "$ref" in value:
        return f"*{_name(value)}*"
    if "const" in value:
        return json.dumps(value["const"])
    if "anyOf" in value:
        return " or ".join(map(_type, value["anyOf"]))
    if "enum" in value:
        return _words(value)
    if value["type"] == "array":
        return f"list of {_type(value['items'])}"
    if value["type"] == "object":
        return f"object of {_type(value['additionalProperties'])}"
    return " or ".join([value["type"]] if isinstance(value["type"], str) else value["type"])


def _words(value: dict[str, Any]) -> str:
    return ", ".join(f"*{word}*" for word in value["enum"])


def _name(value: dict[str, Any]) -> str:
    return str(value["$ref"]).rpartition("/")[2]


def _wrapped(text: str, indent: str) -> Iterator[str]:
    yield from textwrap.wrap(
        re.sub(r"\s+", " ", text),
        _WIDTH,
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
    )


if __name__ == "__main__":
    PAGE.write_text(page(json.loads(SCHEMA.read_text())))
