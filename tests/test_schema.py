# SPDX-License-Identifier: GPL-2.0-or-later
"""The JSON Schema, its manual page and the code say the same. That each output is as the schema says is
checked wherever a test runs a command with --json (`schema.check`).
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
import schema
from jsonschema import Draft202012Validator

from qubes_fwd_qrexec.admin.apply import Kind
from qubes_fwd_qrexec.admin.states import State, Verdict
from qubes_fwd_qrexec.admin.views import session
from qubes_fwd_qrexec.admin.views.nftstatus import Standing
from qubes_fwd_qrexec.admin.views.parser import COMMANDS
from qubes_fwd_qrexec.admin.views.render import Role
from qubes_fwd_qrexec.common import exchange
from qubes_fwd_qrexec.common.config import Side
from qubes_fwd_qrexec.common.report import Way
from qubes_fwd_qrexec.common.rules import Transport
from qubes_fwd_qrexec.common.values import Proto

ROOT = Path(__file__).parent.parent
DEFINITIONS: dict[str, Any] = schema.schema()["$defs"]


def test_it_is_a_schema() -> None:
    Draft202012Validator.check_schema(schema.schema())


def test_the_manual_page_is_made_from_it(tmp_path: Path) -> None:
    for folder in ("docs", "tools"):
        (tmp_path / folder).mkdir()
    copies = [tmp_path / path for path in ("docs/qvm-forward.schema.json", "tools/jsonpage.py")]
    for path in copies:
        path.write_text((ROOT / path.relative_to(tmp_path)).read_text())
    subprocess.run([sys.executable, copies[1]], check=True)
    made, kept = ((root / "docs/qvm-forward-json.rst").read_text() for root in (tmp_path, ROOT))
    assert made == kept, "'make guide' writes the page"


def test_each_command_has_a_definition_and_each_definition_is_used() -> None:
    commands = {each["$ref"].rpartition("/")[2] for each in schema.schema()["anyOf"]}
    assert commands == COMMANDS.keys()
    used = set(re.findall(r"#/\$defs/(\w+)", json.dumps(schema.schema())))
    assert used == DEFINITIONS.keys()


def objects(found: Any) -> Iterator[dict[str, Any]]:
    """All that describes objects with fields, or fields."""
    if isinstance(found, dict):
        if "properties" in found:
            yield found
        for value in found.values():
            yield from objects(value)
    elif isinstance(found, list):
        for value in found:
            yield from objects(value)


def test_each_field_is_described() -> None:
    for found in objects(DEFINITIONS):
        for name, field in found["properties"].items():
            assert field.get("description") or field == {"$ref": "#/$defs/version"}, name


def test_nothing_that_is_printed_may_have_other_fields() -> None:
    extended = {found["$ref"] for found in DEFINITIONS.values() if "$ref" in found}
    extended |= {found["$ref"] for found in DEFINITIONS["show"]["anyOf"]}
    for name, definition in DEFINITIONS.items():
        if "properties" in definition and f"#/$defs/{name}" not in extended:
            assert definition["unevaluatedProperties"] is False, name


@pytest.mark.parametrize(
    ("printed", "says"),
    [
        ('{"version": 1, "policy": "", "installed": ""}', "'is_installed' is a required property"),
        ('{"version": 2, "policy": "", "installed": "", "is_installed": true}', "version: 1 was expected"),
        ('{"version": 1, "policy": "", "installed": "", "is_installed": true, "new": 1}', "'new'"),
    ],
)
def test_what_it_does_not_describe_is_seen(printed: str, says: str) -> None:
    with pytest.raises(AssertionError, match=re.escape(says)):
        schema.check(["policy", "--json"], printed)


def test_the_versions_are_those_of_the_code() -> None:
    assert DEFINITIONS["version"]["const"] == session.VERSION
    assert DEFINITIONS["export"]["properties"]["version"]["const"] == exchange.VERSION


def field(definition: str, name: str) -> list[str]:
    words: list[str] = DEFINITIONS[definition]["properties"][name]["enum"]
    return words


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (DEFINITIONS["state"]["enum"], State),
        (DEFINITIONS["transport"]["enum"], Transport),
        (DEFINITIONS["side"]["enum"], Side),
        (DEFINITIONS["proto"]["enum"], Proto),
        (field("step", "step"), Kind),
        (field("answer", "state"), Standing),
        (field("answer", "role"), Role),
        (field("figures", "way"), Way),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_its_words_are_those_of_the_code(words: list[str], kind: type[StrEnum]) -> None:
    assert sorted(words) == sorted(kind)


def test_its_verdicts_are_those_of_the_code_and_unknown() -> None:
    assert sorted(DEFINITIONS["verdict"]["enum"]) == sorted([*Verdict, "unknown"])
