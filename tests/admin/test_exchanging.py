# SPDX-License-Identifier: GPL-2.0-or-later
"""Rules out of a system and into it again, in every form."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from worlds import ADD, content

from qubes_fwd_qrexec.lab.directory import LabDirectory

Forward = Callable[..., Any]
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("form", ["line", "xml", "json"])
def test_an_export_imports_into_an_empty_system_to_the_same(
    forward: Forward, lab: LabDirectory, tmp_path: Path, form: str
) -> None:
    forward(*ADD, "--comment", "<&> 'x' \"y\"  two")
    forward("add", "personal", "80-82:90-92", "--from", "any", "--internal", "--expire", "+1d")
    forward("add", "vault", "22", "--from", "fd00::/8", "--via", "sys-net", "--disabled")
    before, exported = content(lab), forward("export", "--format", form).out
    for qube, name in (("work", "web"), ("personal", "tcp-80-82"), ("vault", "tcp-22")):
        forward("remove", qube, name)
    path = tmp_path / "export"
    path.write_text(exported)
    assert forward("import", str(path)).out.startswith("Imported 3 forwards.\n")
    assert content(lab) == before
    assert forward("export", "--format", form).out == exported
    assert forward("import", stdin=exported).status == 0


FIREWALL = """<firewall version="2"><rules>
<rule><properties><property name="action">accept</property>
<property name="dsthost">10.0.0.0/8</property></properties></rule>
<rule><properties><property name="action">forward</property>
<property name="forwardtype">external</property><property name="proto">tcp</property>
<property name="srchost">192.168.0.0/16</property><property name="srcports">80-80</property>
<property name="dstports">8080-8080</property></properties></rule>
</rules></firewall>"""


def test_a_firewall_file_of_2021_is_imported(forward: Forward, lab: LabDirectory) -> None:
    refused = forward("import", stdin=FIREWALL)
    assert refused.status == 1
    assert "say --qube QUBE" in refused.err
    result = forward("import", "--qube", "work", stdin=FIREWALL)
    assert result.out.startswith("Imported 1 forward.\nLeft out 1 rule of other actions than forward.\n")
    assert "srchosts=192.168.0.0/16 owner=work path=sys-firewall,sys-net" in (
        lab.feature("work", "forward.tcp-80") or ""
    )


RULE = "action=forward srcports=80 srchosts=any"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"work a {RULE}\nwork b action=forward", "line 2, option 'srcports': missing"),
        (f"work a {RULE}\nwork b {RULE} bogus=1", "line 2, option 'bogus' at column 48: unknown option"),
        (f"work a {RULE}\ngone b {RULE}", "there is no qube gone; nothing was imported"),
        (f"work a {RULE}\nwork a {RULE}", "work a stands twice; nothing was imported"),
        (f"work tunnel {RULE}", "the name tunnel stands for the mark of a tunnel qube"),
        (f"work web {RULE}", "work web exists already and is another rule"),
        ("work a", "line 1: a line is the qube's name, the rule's name and the rule"),
        ("{", "document: not JSON"),
        ("<a", "not XML"),
    ],
)
def test_a_bad_import_changes_nothing(forward: Forward, lab: LabDirectory, text: str, words: str) -> None:
    forward(*ADD)
    before = content(lab)
    result = forward("import", stdin=text)
    assert result.status == 1
    assert words in result.err
    assert content(lab) == before


def test_import_replaces_if_asked_to(forward: Forward, lab: LabDirectory) -> None:
    forward(*ADD)
    assert (
        forward("import", "--replace", "--json", stdin=f"# a comment\n\nwork web {RULE}\n").json["imported"]
        == 1
    )
    assert "srchosts=any" in (lab.feature("work", "forward.web") or "")


def test_the_store_is_put_back_if_one_of_several_writes_fails(
    forward: Forward, lab: LabDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward(*ADD)
    before = content(lab)
    (lab.qube_dir("personal").features / "forward.b").mkdir()
    text = f"work web {RULE}\npersonal b {RULE}\n"
    monkeypatch.setattr(LabDirectory, "features", _features_without_b(LabDirectory.features))
    result = forward("import", "--replace", stdin=text)
    assert result.status == 1
    assert content(lab) == before


def _features_without_b(real: Callable[..., dict[str, str]]) -> Callable[..., dict[str, str]]:
    """A directory stands where a file should, as an error that comes only when it is written to."""

    def features(self: LabDirectory, name: str) -> dict[str, str]:
        return {} if name == "personal" else real(self, name)

    return features
