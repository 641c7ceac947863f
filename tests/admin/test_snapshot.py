# SPDX-License-Identifier: GPL-2.0-or-later
"""Which of the stored rules a command means."""

import pytest
from worlds import qube, rule, world

from qubes_fwd_qrexec.admin.snapshot import ByName, Snapshot, read_rules
from qubes_fwd_qrexec.admin.states import Key
from qubes_fwd_qrexec.common.errors import RefusedError
from qubes_fwd_qrexec.common.values import QubeName

_LINE = str(rule().rule)
_WORK = {f"forward.{name}": _LINE for name in ("web-a", "web-b", "ssh")} | {"forward.web-bad": "x"}
_INVENTORY = world(qube("work", features=_WORK), qube("personal", features={"forward.one": _LINE}))
SYSTEM = Snapshot(_INVENTORY, read_rules(_INVENTORY))

CHOSEN = [
    ("work", ["ssh"], ["ssh"]),
    ("work", ["web-*"], ["web-a", "web-b", "web-bad"]),
    ("work", ["web-[ab]", "web-a", "ss?"], ["web-a", "web-b", "ssh"]),
    ("work", ["*"], ["ssh", "web-a", "web-b", "web-bad"]),
    ("personal", [], ["one"]),
    ("vault", ["*"], []),
    (None, ["*"], ["one", "ssh", "web-a", "web-b", "web-bad"]),
]


@pytest.mark.parametrize(("target", "names", "found"), CHOSEN)
def test_rules_are_chosen_by_name_pattern_or_as_the_only_one(
    target: str | None, names: list[str], found: list[str]
) -> None:
    chosen = SYSTEM.chosen(ByName(target, names))
    assert ([e.name for e in chosen] if target else sorted(e.name for e in chosen)) == found


def test_rules_are_chosen_by_their_keys_of_which_none_is_a_pattern() -> None:
    keys = [(QubeName("personal"), "one"), (QubeName("work"), "web-bad")]
    assert [(entry.target, entry.name) for entry in SYSTEM.chosen(keys)] == keys
    with pytest.raises(RefusedError, match="work has no forward 'web-\\*', only"):
        SYSTEM.chosen([(QubeName("work"), "web-*")])


def test_a_rule_that_is_read_again_is_the_same() -> None:
    """So that a plan which knows an earlier one need not judge it again."""
    again = world(qube("work", features={**_WORK, "forward.ssh": f"{_LINE} comment=x"}))
    before, after = SYSTEM.stored, read_rules(again)
    key: Key = (QubeName("work"), "web-a")
    assert after[key] is before[key]
    assert after[QubeName("work"), "ssh"] != before[QubeName("work"), "ssh"]


REFUSED = [
    ("work", [], "work has 4 forwards; name one of ssh, web-a, web-b, web-bad"),
    ("work", ["ssh", "mail-*"], "work has no forward 'mail-*', only ssh, web-a, web-b, web-bad"),
    ("work", ["WEB-A"], "work has no forward 'WEB-A', only"),
    ("vault", [], "vault has no forwards; 'qvm-forward list' shows those of all qubes"),
    ("vault", ["web-*"], "vault has no forwards"),
    ("gone", ["*"], "there is no qube 'gone'"),
]


@pytest.mark.parametrize(("target", "names", "words"), REFUSED)
def test_a_choice_of_none_is_refused_with_the_names_that_there_are(
    target: str, names: list[str], words: str
) -> None:
    with pytest.raises(RefusedError) as refused:
        SYSTEM.chosen(ByName(target, names))
    assert words in str(refused.value)
