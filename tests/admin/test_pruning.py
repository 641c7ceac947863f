# SPDX-License-Identifier: GPL-2.0-or-later
"""A document is what a system has to be: what it does not have is removed, and --dry-run shows all of it."""

from dataclasses import replace
from pathlib import Path

import pytest
from worlds import ADD, Command, content

from qubes_fwd_qrexec.lab.directory import LabDirectory

RULE = "action=forward srcports=80 srchosts=any"
SAME = "work same action=forward srcports=84 srchosts=any\n"
FILE = f"work web {RULE}\n"


@pytest.fixture
def system(forward: Command, lab: LabDirectory) -> LabDirectory:
    """Rules of the qube of FILE and of others, and marks."""
    forward("add", "work", "81", "--from", "any", "--name", "old")
    forward("add", "work", "82", "--from", "any", "--name", "off", "--disabled")
    forward("add", "vault", "83", "--from", "any", "--via", "sys-net", "--name", "far")
    lab.set_feature("work", "forward.bad", "x")
    forward("tunnel", "mark", "sys-vpn")
    return lab


def rules(lab: LabDirectory) -> set[str]:
    found = {f"{qube} {key}" for qube in lab.qube_names() for key in lab.features(qube)}
    return {name for name in found if name.split()[1].startswith("forward.")}


OTHERS = {"vault forward.far", "sys-vpn forward.tunnel"}


@pytest.mark.parametrize(
    ("option", "left"),
    [
        ("--replace", {*OTHERS, "work forward.old", "work forward.off", "work forward.bad"}),
        ("--prune", OTHERS),
        ("--prune-all", {"sys-vpn forward.tunnel"}),
    ],
)
def test_what_the_file_does_not_have_goes_for_those_who_are_asked(
    forward: Command, system: LabDirectory, option: str, left: set[str]
) -> None:
    assert forward("import", option, stdin=FILE).status == 0
    assert rules(system) == {"work forward.web", *left}


def test_a_qube_that_the_file_only_marks_is_one_that_it_names(forward: Command, system: LabDirectory) -> None:
    forward("import", "--prune", stdin="version 2\nvault tunnel no\n")
    assert "vault forward.far" not in rules(system)
    assert "work forward.old" in rules(system)


def test_what_is_removed_is_closed_and_said(forward: Command, system: LabDirectory) -> None:
    told = forward("import", "--prune", stdin=FILE)
    assert told.out.splitlines()[:4] == [
        "Imported 1 forward.",
        "work bad is removed and closed.",
        "work off is removed and closed.",
        "work old is removed and closed.",
    ]
    assert "Still open" not in told.out
    assert "fwd.work.old" not in system.vm_config("sys-net")


def test_no_mark_goes_that_the_file_does_not_take_away(forward: Command, system: LabDirectory) -> None:
    forward("import", "--prune-all", "--replace", stdin="version 2\n")
    assert rules(system) == {"sys-vpn forward.tunnel"}
    told = forward("import", "--prune-all", "--replace", stdin="version 2\nsys-vpn tunnel no\n").out
    assert "sys-vpn is not marked as a tunnel.\n" in told


def test_a_dry_run_shows_the_difference_and_changes_nothing(forward: Command, system: LabDirectory) -> None:
    forward("import", stdin=SAME)
    before = content(system)
    text = (
        f"version 2\n{FILE}{SAME}work old action=forward srcports=81 srchosts=10.0.0.0/8 comment=new\n"
        "sys-vpn tunnel no\n"
    )
    told = forward("import", "--dry-run", "--replace", "--prune", stdin=text)
    assert content(system) == before
    assert (told.status, told.err) == (0, "")
    lines = told.out.splitlines()
    assert lines[:6] == [
        "This would change:",
        "  sys-vpn: take the mark of a tunnel away",
        "  work bad: remove",
        "  work off: remove",
        "  work web: add action=forward mode=auto forwardtype=external proto=tcp srcports=80-80 "
        "dstports=80-80 srchosts=any owner=work path=sys-firewall,sys-net",
        "  work old: mode=auto instead of qrexec; srchosts=10.0.0.0/8 instead of any; comment=new instead of "
        "its default",
    ]
    assert {line.split(":")[0] for line in lines[6:-2]} == {"  policy", "  sys-net"}
    assert lines[-2:] == [
        "Unchanged: work same.",
        "Still open, and not in the import: vault far. 'qvm-forward remove QUBE NAME' closes one, and "
        "--prune-all removes what the file does not have.",
    ]


def test_a_dry_run_says_what_the_import_then_does(forward: Command, system: LabDirectory) -> None:
    argv = ("import", "--replace", "--prune-all", "--json")
    seen = forward(*argv, "--dry-run", stdin=FILE).json
    done = forward(*argv, stdin=FILE).json
    assert (seen["dry_run"], done["dry_run"], seen["applied"], done["applied"]) == (True, False, False, True)
    for key in ("added", "replaced", "unchanged", "removed", "left", "tunnels", "steps"):
        assert seen[key] == done[key]
    assert {name["name"] for name in done["removed"]} == {"far", "bad", "off", "old"}


def test_a_dry_run_says_if_there_is_nothing_to_do(
    forward: Command, system: LabDirectory, tmp_path: Path
) -> None:
    path = tmp_path / "export"
    path.write_text(forward("export", "vault").out)
    told = forward("import", "--dry-run", "--prune", str(path)).out
    assert told.startswith("Nothing to change.\nUnchanged: vault far.\n")


def test_a_dry_run_refuses_what_the_import_refuses(forward: Command, lab: LabDirectory) -> None:
    forward(*ADD)
    words = "work b was not imported, nor was anything else. Rule work web already has port 80"
    for more in ([], ["--dry-run"]):
        result = forward("import", *more, stdin=f"work b {RULE}\n")
        assert result.status == 1
        assert words in result.err


def test_a_dry_run_of_what_would_only_be_stored_shows_no_step(forward: Command) -> None:
    told = forward("import", "--dry-run", "--no-apply", stdin=FILE).out
    assert [line.split(":")[0] for line in told.splitlines()] == ["This would change", "  work web"]


def test_a_file_without_owner_and_path_agrees_to_no_other_netvms(forward: Command, lab: LabDirectory) -> None:
    forward("import", stdin=FILE)
    lab.write_qube(replace(lab.qube("work"), netvm="sys-vpn"))
    assert "Unchanged: work web." in forward("import", stdin=FILE).out
    changed = forward("import", "--replace", stdin=f"work web {RULE} comment=x\n").out
    assert "work web: suspended." in changed
    assert (lab.feature("work", "forward.web") or "").endswith("path=sys-firewall,sys-net comment=x")


def test_a_file_without_owner_does_not_confirm_what_a_clone_has(forward: Command, lab: LabDirectory) -> None:
    forward("import", stdin=FILE)
    lab.set_feature("personal", "forward.web", lab.feature("work", "forward.web") or "")
    changed = forward("import", "--replace", stdin=f"personal web {RULE} comment=x\n").out
    assert "personal web: suspended." in changed
    assert " owner=work " in (lab.feature("personal", "forward.web") or "")


def test_many_unchanged_rules_are_counted(forward: Command) -> None:
    many = "".join(f"work r{n} action=forward srcports={n} srchosts=any\n" for n in range(1, 12))
    forward("import", stdin=many)
    assert "\nUnchanged: 11 forwards.\n" in forward("import", "--dry-run", stdin=many).out
    ten = many[: many.index("work r11")]
    assert "r10.\n" in forward("import", "--dry-run", stdin=ten).out
