# SPDX-License-Identifier: GPL-2.0-or-later
"""Rules out of a system and into it again, in every form."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from worlds import ADD, content

from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.qube import QubeClass

Forward = Callable[..., Any]


@pytest.mark.parametrize(
    ("form", "ending"), [("line", ""), ("xml", ""), ("json", ""), ("yaml", ".yaml"), ("yaml", ".yml")]
)
def test_an_export_imports_into_an_empty_system_to_the_same(
    forward: Forward, lab: LabDirectory, tmp_path: Path, form: str, ending: str
) -> None:
    forward(*ADD, "--comment", "<&> 'x' \"y\"  two")
    forward("add", "personal", "80-82:90-92", "--from", "any", "--internal", "--expire", "1d")
    forward("add", "vault", "22", "--from", "fd00::/8", "--via", "sys-net", "--disabled")
    before, exported = content(lab), forward("export", "--format", form).out
    for qube, name in (("work", "web"), ("personal", "tcp-80-82"), ("vault", "tcp-22")):
        forward("remove", qube, name)
    path = tmp_path / f"export{ending}"
    path.write_text(exported)
    assert forward("import", str(path)).out.startswith("Imported 3 forwards.\n")
    assert content(lab) == before
    assert forward("export", "--format", form).out == exported
    assert forward("import", "--format", form, stdin=exported).out == (
        "Imported 0 forwards.\nUnchanged: personal tcp-80-82, vault tcp-22, work web.\n"
    )


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
    assert "give --qube QUBE" in refused.err
    result = forward("import", "--qube", "work", stdin=FIREWALL)
    assert result.out.startswith("Imported 1 forward.\nwork tcp-")
    assert result.out.endswith("\nLeft out 1 rule whose action is not forward.\n")
    assert "srchosts=192.168.0.0/16 owner=work path=sys-firewall,sys-net" in (
        lab.feature("work", "forward.tcp-80") or ""
    )


RULE = "action=forward srcports=80 srchosts=any"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"work a {RULE}\nwork b action=forward", "line 2, option 'srcports': missing"),
        (f"work a {RULE}\nwork b {RULE} bogus=1", "line 2, option 'bogus' at column 48: unknown option"),
        (f"work a {RULE}\ngone b {RULE}", "there is no qube 'gone'; nothing was imported"),
        (f"work a {RULE}\nwork a {RULE}", "work a appears twice; nothing was imported"),
        (f"work tunnel {RULE}", "the name tunnel stands for the mark of a tunnel qube"),
        (f"work web {RULE}", "work web already exists and differs"),
        ("work a", "line 1: a line is the qube's name, the rule's name and the rule"),
        ("", "line 1: there is nothing to import"),
        (" \n\n", "line 1: there is nothing to import"),
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
    told = forward("import", "--replace", "--json", stdin=f"# a comment\n\nwork web {RULE}\n").json
    assert (told["replaced"], told["added"]) == ([{"qube": "work", "name": "web"}], [])
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


def test_the_marks_of_tunnels_are_part_of_an_export(forward: Forward, lab: LabDirectory) -> None:
    forward("tunnel", "mark", "sys-firewall")
    lab.set_feature("sys-net", "forward.tunnel", "")
    assert forward("export").out == "version 2\nsys-firewall tunnel yes\nsys-net tunnel no\n"
    assert forward("export", "sys-net").out == "version 2\nsys-net tunnel no\n"
    assert forward("export", "--json").json["tunnels"] == {"sys-firewall": True, "sys-net": False}


def test_an_imported_mark_closes_what_goes_round_it_and_says_so(forward: Forward, lab: LabDirectory) -> None:
    forward(*ADD)
    result = forward("import", stdin="version 2\nsys-firewall tunnel yes\n")
    assert result.status == 0
    assert result.out.startswith(
        "Imported 0 forwards.\nsys-firewall is marked as a tunnel.\nClosed at sys-net: work web. "
        "work is behind a "
    )
    assert lab.vm_config("sys-net") == {}
    assert forward("import", "--json", stdin="sys-firewall tunnel yes").json["tunnels"] == {}


@pytest.mark.parametrize(("marked", "state"), [("sys-firewall", "active"), ("fedora-42", "refused")])
def test_an_import_takes_no_mark_away_unless_asked_to(
    forward: Forward, lab: LabDirectory, marked: str, state: str
) -> None:
    # Of another template than sys-firewall: a mark of its own would be one of the target too. sys-net has it
    # from there, and stays a tunnel beside its own network devices.
    forward("add", "personal", "80", "--from", "any", "--name", "web")
    forward("tunnel", "mark", marked)
    before = content(lab)
    text = "version 2\nsys-firewall tunnel no\n"
    result = forward("import", stdin=text)
    assert result.status == 1
    assert "sys-firewall is marked as a tunnel, and the import says that it is not one" in result.err
    assert content(lab) == before
    result = forward("import", "--replace", stdin=text)
    assert "sys-firewall is not marked as a tunnel.\n" in result.out
    assert forward("list", "--json").json["forwards"][0]["state"] == state


def test_a_mark_of_a_qube_that_is_not_here_is_refused(forward: Forward, lab: LabDirectory) -> None:
    before = content(lab)
    result = forward("import", stdin="gone tunnel yes")
    assert "there is no qube 'gone', whose mark as a tunnel the file sets" in result.err
    assert content(lab) == before


FORMS = [
    f"work web {RULE}\n",
    f"version 2\nwork web {RULE}\n",
    json.dumps(
        {
            "version": 2,
            "tunnels": {},
            "forwards": [
                {"qube": "work", "name": "web", "rule": dict(word.split("=") for word in RULE.split())}
            ],
        }
    ),
]


@pytest.mark.parametrize("text", FORMS)
def test_owner_and_path_that_a_document_does_not_say_are_recorded(
    forward: Forward, lab: LabDirectory, text: str
) -> None:
    result = forward("import", stdin=text)
    assert (lab.feature("work", "forward.web") or "").endswith(" owner=work path=sys-firewall,sys-net")
    assert "note: no owner recorded" not in result.out


def test_what_a_disposable_inherited_is_not_opened_by_an_export(forward: Forward, lab: LabDirectory) -> None:
    lab.write_qube(replace(lab.qube("work"), klass=QubeClass.DISPOSABLE))
    result = forward("import", stdin=f"version 2\nwork web {RULE}\n")
    assert "work web: suspended." in result.out
    assert lab.vm_config("sys-net") == {}


def test_what_is_open_and_not_in_the_import_is_named(forward: Forward) -> None:
    forward("add", "work", "81", "--from", "any", "--name", "old")
    forward("add", "vault", "82", "--from", "any", "--via", "sys-net", "--name", "far")
    forward("add", "work", "83", "--from", "any", "--name", "off", "--disabled")
    words = (
        "Still open, and not in the import: {}. 'qvm-forward remove QUBE NAME' closes one, and {} removes "
        "what the file does not have.\n"
    )
    told = forward("import", stdin=f"work web {RULE}\n").out
    assert told.endswith(words.format("work old", "--prune"))
    text = f"version 2\nwork web {RULE}\n"
    told = forward("import", "--replace", stdin=text).out
    assert told.endswith(words.format("vault far, work old", "--prune-all"))
    left = forward("import", "--replace", "--json", stdin=text).json["left"]
    assert left == [{"qube": "vault", "name": "far"}, {"qube": "work", "name": "old"}]
    whole = forward("export").out
    assert "left open" not in forward("import", stdin=whole).out


def test_api_lines_of_2021_are_imported(forward: Forward, lab: LabDirectory) -> None:
    text = (
        "action=accept proto=icmp\n"
        "action=forward forwardtype=external proto=tcp src4=192.168.0.0/16 srcports=443-443 "
        "dstports=10443-10443\n"
        "action=forward forwardtype=external proto=tcp src6=fd00::/8 srcports=443-443 dstports=10443-10443\n"
    )
    result = forward("import", "--qube", "work", stdin=text)
    assert result.out.startswith("Imported 1 forward.\nwork tcp-")
    assert result.out.endswith("\nLeft out 1 rule whose action is not forward.\n")
    assert "srchosts=192.168.0.0/16,fd00::/8 owner=work" in (lab.feature("work", "forward.tcp-443") or "")


def test_two_forwards_of_2021_to_one_port_are_refused_together(forward: Forward, lab: LabDirectory) -> None:
    before = content(lab)
    text = (
        "action=forward proto=tcp src4=10.0.0.0/8 srcports=80 dstports=80\n"
        "action=forward proto=tcp src4=10.1.0.0/16 srcports=80 dstports=81\n"
    )
    result = forward("import", "--qube", "work", stdin=text)
    assert (
        "work tcp-80-2 was not imported, nor was anything else. Rule work tcp-80 already has port 80"
        in result.err
    )
    assert content(lab) == before
