# SPDX-License-Identifier: GPL-2.0-or-later
"""qvm-forward on a lab: what its changes say and leave behind, and how it refuses."""

import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from worlds import ADD, NOW, content

from qubes_fwd_qrexec.admin.views import parser
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.lab.directory import LabDirectory

Forward = Callable[..., Any]


def change(lab: LabDirectory, name: str, **more: Any) -> None:

    lab.write_qube(replace(lab.qube(name), **more))


def test_add_opens_and_says_for_whom(forward: Forward, lab: LabDirectory) -> None:
    result = forward(*ADD, "--mode=qrexec", "--expire", "+8h", "--comment", "demo for the office")
    assert (result.status, result.err) == (0, "")
    assert result.out.startswith(
        "Forward work web is stored and active. Connections to port 80 of sys-net (outer side) from "
        "192.168.0.0/16 reach port 8080 of work.\nIt ends "
    )
    assert "(in 8 h)" in result.out
    assert "sees every client as 127.0.0.1; make it ask for a password, or use proxy=v2." in result.out
    assert lab.feature("work", "forward.web") == (
        "action=forward mode=qrexec forwardtype=external proto=tcp srcports=80-80 dstports=8080-8080 "
        f"srchosts=192.168.0.0/16 owner=work path=sys-firewall,sys-net expire={NOW + 8 * 3600} "
        "comment=demo for the office"
    )
    assert lab.vm_config("sys-net").keys() == {"fwd.work.web"}
    policy = (lab.policy_dir / "30-forward.policy").read_text()
    assert "qubes.ForwardTCP  +8080+mux  sys-net  work  allow  autostart=no  notify=no\n" in policy


def test_add_takes_all_options(forward: Forward, lab: LabDirectory) -> None:
    options = (
        "--via sys-firewall --listen 10.137.0.6 --transport call --proxy off --autostart --on-expire drain"
    )
    more = "--follow-netvm --bypass-tunnel --proto tcp --expire never"
    result = forward("add", "work", "80-81:90-91", "--from", "10.0.0.0/8", *options.split(), *more.split())
    assert result.status == 0
    assert lab.feature("work", "forward.tcp-80-81") == (
        "action=forward mode=qrexec forwardtype=external via=sys-firewall proto=tcp srcports=80-81 "
        "dstports=90-91 srchosts=10.0.0.0/8 listen=10.137.0.6 transport=call autostart=yes on-expire=drain "
        "owner=work path=sys-firewall,sys-net follow-netvm=yes bypass-tunnel=yes"
    )


def test_several_sources_by_repetition_or_commas(forward: Forward, lab: LabDirectory) -> None:
    forward("add", "work", "80", "--from", "10.0.0.0/8,fd00::/8", "--from", "192.0.2.1")
    assert "srchosts=10.0.0.0/8,192.0.2.1/32,fd00::/8" in (lab.feature("work", "forward.tcp-80") or "")


def test_names_are_made_up_and_stay_unique(forward: Forward, lab: LabDirectory) -> None:
    for listen in ("127.0.0.1", "127.0.0.2", "127.0.0.3"):
        assert forward("add", "work", "80", "--from", "any", "--listen", listen).status == 0
    assert forward("add", "work", "60000-60010", "--from", "any").status == 0
    keys = {key for key in lab.features("work") if key.startswith("forward.")}
    assert keys == {"forward.tcp-80", "forward.tcp-80-2", "forward.tcp-80-3", "forward.tcp-60000-60010"}


REFUSED = [
    (("add", "work", "80"), 2, "--from is missing: say who may connect"),
    (("add", "work", "80", "--from", "10.0.0.1/8"), 2, "10.0.0.0/8 would be right"),
    (("add", "work", "80", "--from", "any,10.0.0.0/8"), 2, "any lets in everybody, and stands alone"),
    (
        ("add", "work", "80", "--from", "10.0.0.0/33"),
        2,
        "add: --from: '10.0.0.0/33' is not a network such as",
    ),
    (
        ("add", "work", "80", "--from", "personal"),
        2,
        "an external forward lets in no qubes, such as personal;",
    ),
    (("add", "work", "80", "--from", "office", "--internal"), 1, "there is no qube 'office'; 'qvm-ls' lists"),
    (("add", "work", "80", "--from", "untrusted", "--internal"), 1, "forward there with via=sys-vpn (--via"),
    (
        ("add", "work", "80", "--from", "@tag:x", "--internal"),
        1,
        "none of the qubes that the rule names is left",
    ),
    (("add", "work", "80", "--from", "any", "--expire", "soon"), 2, "add: --expire: 'soon' is not a time"),
    (("add", "work", "80", "--from", "any", "--expire", "1"), 2, "expire: that time is in the past"),
    (("add", "work", "80-81:90", "--from", "any"), 2, "both must have the same number"),
    (("add", "work", "80", "--from", "any", "--proto", "udp", "--proxy", "v1"), 2, "TCP alone; use proxy=v2"),
    (("add", "personal", "80", "--from", "any", "--proto", "udp"), 1, "does not offer qubes.ForwardUDP"),
    (("add", "work", "80", "--from", "any", "--mode", "nft"), 1, "or send it over qrexec with mode=qrexec"),
    (
        ("add", "work", "81", "--from", "any", "--proxy", "v2", "--transport", "call"),
        2,
        "use transport=mux",
    ),
    (("add", "personal", "81", "--from", "any", "--proxy", "v2"), 1, "leave proxy out"),
    (("add", "personal", "81", "--from", "any", "--transport", "mux"), 1, "leave transport=mux out"),
    (("add", "work", "0", "--from", "any"), 2, "add: PORT: '0' is not a port or range"),
    (("add", "work", "80:", "--from", "any"), 2, "add: PORT: '' is not"),
    (("add", "work", "80", "--from", "any", "--name", "tunnel"), 2, "--name: 'tunnel' is not a free name"),
    (("add", "work", "80", "--from", "any", "--comment", "a\nb"), 2, "printable ASCII on one line"),
    (("add", "work", "80", "--from", "any", "--mode", "fast"), 2, "add: --mode: 'fast' is not one of auto,"),
    (("add", "wo rk", "80", "--from", "any"), 1, "there is no qube 'wo rk'"),
    (("add", "gone", "80", "--from", "any"), 1, "there is no qube 'gone'; 'qvm-ls' lists all qubes"),
    (("add", "dom0", "80", "--from", "any"), 1, "is the administrative qube"),
    (("add", "vault", "80", "--from", "any"), 1, "--via QUBE"),
    (("add", "untrusted", "80", "--from", "any"), 1, "behind a tunnel, marked at sys-vpn"),
    (("add", "work", "81", "--from", "any", "--name", "web"), 1, "work web exists already"),
    (("add", "personal", "80", "--from", "any"), 1, "Rule work web already has port 80 of sys-net"),
    (("add", "vault", "80", "--from", "any", "--disabled"), 1, "--via QUBE"),
    (("set", "work", "web", "bogus=1"), 2, "option 'bogus': unknown option"),
    (("set", "work", "web", "bogus="), 2, "option 'bogus': unknown option"),
    (("set", "work", "web", "expire"), 2, "an option is written name=value"),
    (("set", "work", "web", "expire=x"), 2, "option 'expire': 'x' is not a time"),
    (("set", "work", "web", "srchosts="), 2, "option 'srchosts': missing"),
    (("set", "work", "web", "via=a", "via=b"), 2, "option 'via': given twice"),
    (("set", "work", "web"), 2, "set: nothing to change: say what to change, such as expire=8h"),
    (("set", "work", "web", "--via", "work"), 1, "work web was not changed. work cannot listen for itself"),
    (("set", "work", "--listen", "x"), 2, "work web was not changed: --listen: 'x' is not an IPv4 or IPv6"),
    (
        ("set", "work", "srchosts-=10.0.0.0/8"),
        2,
        "10.0.0.0/8 is not in the list; the rule lets in 192.168.0.0/16",
    ),
    (("set", "work", "web", "via=work"), 1, "work web was not changed. work cannot listen for itself"),
    (
        ("set", "work", "web", "srchosts=personal"),
        2,
        "an external forward lets in no qubes, such as personal;",
    ),
    (
        ("set", "work", "web", "srchosts=x", "forwardtype=internal"),
        2,
        "option 'srchosts': there is no qube x",
    ),
    (("set", "work", "nope", "via=a"), 1, "work has no forward 'nope', only web"),
    (("set", "gone", "web", "via=a"), 1, "there is no qube 'gone'"),
    (("remove", "work", "web", "nope"), 1, "work has no forward 'nope'"),
    (("remove", "vault", "web"), 1, "vault has no forwards; 'qvm-forward list' shows those of all qubes"),
    (("remove", "work"), 2, "remove: name the rules to remove, or use --all"),
    (("remove", "work", "web", "--all"), 2, "--all already stands for all names"),
    (("remove", "work", "mail-*"), 1, "work has no forward 'mail-*', only web"),
    (("enable", "work", "nope"), 1, "work has no forward"),
    (("disable",), 2, "disable: name the qube, or use --all for all forwards of all qubes"),
    (("confirm", "vault"), 1, "vault has no forwards"),
    (("diagnose", "vault"), 1, "vault has no forwards"),
    (("show", "work", "nope"), 1, "work has no forward"),
    (("list", "gone"), 1, "there is no qube 'gone'"),
    (("export", "gone"), 1, "there is no qube 'gone'"),
    (("export", "--json", "--format", "xml"), 2, "leave one out"),
    (("import", "/does/not/exist"), 1, "/does/not/exist: No such file or directory"),
]


def test_what_is_refused_is_explained_and_changes_nothing(forward: Forward, lab: LabDirectory) -> None:
    forward(*ADD)
    before = content(lab)
    for argv, status, words in REFUSED:
        result = forward(*argv)
        assert (result.status, result.out) == (status, ""), argv
        assert words in result.err, argv
        assert content(lab) == before, argv


USAGE = [
    ((), "COMMAND"),
    (("nonsense",), "'nonsense' is none of add, set, remove,"),
    (("lits",), "; did you mean 'list'?\n"),
    (("tunnel", "marc"), "'marc' is none of mark, unmark, list; did you mean 'mark'?\n"),
    (
        ("panic", "work"),
        "qvm-forward panic: error: unrecognized arguments: work\nsee qvm-forward panic --help\n",
    ),
    (("import", "a", "b"), "qvm-forward import: error: unrecognized arguments: b\n"),
    (("list", "--jsn"), "unrecognized arguments: --jsn; did you mean '--json'?\n"),
    (("add", "work", "80", "--form=any"), "--form=any; did you mean '--from'?\n"),
    (("remove",), "qvm-forward remove: error: the following arguments are required: QUBE\n"),
    (("set",), "qvm-forward set: error: the following arguments are required: QUBE\n"),
    (("add", "work"), "usage: qvm-forward add QUBE PORT[:PORT]\nqvm-forward add: error: "),
]


@pytest.mark.parametrize(("argv", "words"), USAGE)
def test_a_wrong_command_line_is_a_usage_error(
    forward: Forward, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], words: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        forward(*argv)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_help_of_a_command_has_examples_that_it_takes_and_names_its_page(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in parser.COMMANDS:
        with pytest.raises(SystemExit):
            parser.parse([name, "--help"])
        text = capsys.readouterr().out
        assert re.search(r"^qvm-forward-[a-z]+\(1\) says more\.$", text, re.MULTILINE), name
        for line in re.findall(r"^  qvm-forward (.*?)(?: >.*)?$", text, re.MULTILINE):
            assert parser.parse(shlex.split(line)).command == name


def test_each_example_of_add_opens_a_forward(
    forward: Forward, lab: LabDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parser.parse(["add", "--help"])
    examples = re.findall(r"^  qvm-forward (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert examples
    for line in examples:
        result = forward(*shlex.split(line))
        assert (result.status, result.err) == (0, ""), line


def test_what_has_two_names_is_one_command(forward: Forward) -> None:
    forward(*ADD)
    assert forward("ls").out == forward("list").out
    assert forward("rm", "work", "web").out == "Forward work web is removed and closed.\n"


def test_who_misspells_a_qube_a_forward_or_an_option_is_asked_for_the_nearest(forward: Forward) -> None:
    forward(*ADD)
    assert (
        forward("show", "wrok", "web").err
        == "qvm-forward show: there is no qube 'wrok'; did you mean 'work'?\n"
    )
    assert forward("show", "work", "wbe").err.endswith(
        "has no forward 'wbe', only web; did you mean 'web'?\n"
    )
    for typed, meant in (
        ("srchost=any", "srchosts"),
        ("transprot=", "transport"),
        ("srchost+=any", "srchosts"),
    ):
        said = forward("set", "work", "web", typed).err
        assert said.endswith(f"; did you mean '{meant}'?\n")


def test_json_may_be_said_before_the_command_and_after_it(forward: Forward) -> None:
    forward(*ADD)
    assert forward("--json", "list").out == forward("list", "--json").out != forward("list").out


def test_over_a_broken_rule_add_advises_what_is_possible(forward: Forward, lab: LabDirectory) -> None:
    lab.set_feature("work", "forward.web", "garbage")
    result = forward(*ADD)
    assert (result.status, result.out) == (1, "")
    assert "remove it first with 'qvm-forward remove work web'" in result.err
    assert "set" not in result.err
    assert forward("remove", "work", "web").status == 0
    assert forward(*ADD).status == 0


@pytest.mark.parametrize(
    ("netvm", "problem"),
    [
        ("gone", "The netvm of sys-firewall, gone, does not exist; set another"),
        ("sys-firewall", "The netvms of work form a loop at sys-firewall; change its netvm"),
    ],
)
def test_half_a_way_is_not_confirmed_nor_imported(
    forward: Forward, lab: LabDirectory, netvm: str, problem: str
) -> None:
    forward(*ADD)
    change(lab, "sys-firewall", netvm=QubeName(netvm))
    before = content(lab)
    result = forward("confirm", "work", "web")
    assert (result.status, result.out) == (1, "")
    assert f"work web was not confirmed. {problem}" in result.err
    result = forward("import", stdin="work x action=forward srcports=81 srchosts=any\n")
    assert (result.status, f"{problem}; nothing was imported" in result.err) == (1, True)
    assert content(lab) == before


def test_a_directory_that_is_no_lab_is_refused(forward: Forward, tmp_path: Path) -> None:
    result = forward("list", lab_dir=tmp_path)
    assert result.status == 1
    assert "not a lab" in result.err


def test_lab_is_taken_before_and_after_the_command(
    forward: Forward, lab: LabDirectory, tmp_path: Path
) -> None:
    assert forward("--lab", str(lab.root), "list", lab_dir=tmp_path).status == 0
    assert forward("list", "--lab", str(lab.root), lab_dir=tmp_path).status == 0


def _without_delivery(lab: LabDirectory, name: str) -> Path:
    """Put a file where the listener's directory was: its configuration can no longer be delivered."""
    place = lab.qube_dir(name).vm_config
    place.rmdir()
    place.write_text("")
    return place


def test_what_cannot_be_delivered_is_said_and_closed_again_and_apply_finishes(
    forward: Forward, lab: LabDirectory
) -> None:
    place = _without_delivery(lab, "sys-net")
    result = forward(*ADD)
    assert (result.status, result.out) == (1, "")
    assert "the change is stored, but not everything could be done" in result.err
    assert "Done: policy: from now on qubes.ForwardTCP +8080+mux sys-net" in result.err
    assert "Not done: sys-net: listen for fwd.work.web" in result.err
    assert "; policy: no longer qubes.ForwardTCP +8080+mux sys-net" in result.err
    assert "+8080" not in (lab.policy_dir / "30-forward.policy").read_text()
    place.unlink()
    place.mkdir()
    assert forward("apply").status == 0
    assert lab.vm_config("sys-net").keys() == {"fwd.work.web"}


def test_the_mark_of_a_tunnel_is_not_taken_for_a_rule(forward: Forward, lab: LabDirectory) -> None:
    lab.set_feature("sys-firewall", "forward.tunnel", "1")
    assert forward("list").out == "No forwards.\n"
    assert "marked at sys-firewall (feature forward.tunnel)" in forward(*ADD).err
