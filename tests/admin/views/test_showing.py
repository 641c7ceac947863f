# SPDX-License-Identifier: GPL-2.0-or-later
"""What is listed, shown and explained, for people and for programs."""

import os
from collections.abc import Callable
from typing import Any

import pytest
from worlds import ADD

from qubes_fwd_qrexec.admin.views import cli
from qubes_fwd_qrexec.admin.views.tables import Style
from qubes_fwd_qrexec.lab.directory import LabDirectory

Forward = Callable[..., Any]
KEY = "vm-config.fwd.work.web"


def test_broken_rules_are_shown_escaped_and_can_be_removed(forward: Forward, lab: LabDirectory) -> None:
    lab.set_feature("work", "forward.bad", "action=drop <x>")
    (lab.qube_dir("work").features / "forward.esc").write_text("action=\x1b[31m\u202e\n")
    listed = forward("list")
    assert "work  bad   broken" in listed.out
    assert "option 'action' at column 1: 'drop' is not 'forward'" in listed.out
    assert all(c == "\n" or " " <= c <= "~" for c in listed.out + forward("show", "work", "esc").out)
    assert forward("apply").status == 1
    assert "It opens nothing" in forward("apply").err
    assert forward("list", "--json").json["broken"][0]["text"] == "action=drop <x>"
    assert forward("show", "work", "bad", "--json").json["state"] == "broken"
    assert "cannot be read" in forward("set", "work", "bad", "via=a").err
    assert "left out" in forward("export").err
    assert forward("remove", "work", "bad", "esc").status == 0
    assert forward("apply").status == 0


def test_list_shows_what_passes_through_a_qube_in_any_role(forward: Forward) -> None:
    forward(*ADD)
    forward("add", "vault", "22", "--from", "any", "--via", "personal")
    names = {q: [f["qube"] for f in forward("list", q, "--json").json["forwards"]] for q in
             ("sys-net", "sys-firewall", "work", "vault", "personal", "sys-vpn")}  # fmt: skip
    assert names == {
        "sys-net": ["work"],
        "sys-firewall": ["work"],
        "work": ["work"],
        "vault": ["vault"],
        "personal": ["vault"],
        "sys-vpn": [],
    }


def test_list_of_a_qube_says_its_role(forward: Forward, lab: LabDirectory) -> None:
    forward(*ADD)
    forward("add", "vault", "22", "--from", "any", "--via", "work", "--name", "ssh", "--disabled")
    lab.set_feature("work", "forward.bad", "x")
    assert [line.split()[:4] for line in forward("list", "work").out.splitlines()[:4]] == [
        ["QUBE", "NAME", "ROLE", "STATE"],
        ["vault", "ssh", "exposed", "disabled"],
        ["work", "web", "target", "active"],
        ["work", "bad", "target", "broken"],
    ]
    assert "work  web   path  active  qrexec  sys-net:80  tcp 8080" in forward("list", "sys-firewall").out
    assert "work   web   sys-net exposed, work target  active" in forward("list", "sys-net", "work").out
    listed = forward("list", "sys-net", "work", "--json").json["forwards"]
    assert [entry["roles"] for entry in listed] == [
        {"work": "exposed"},
        {"sys-net": "exposed", "work": "target"},
    ]
    assert "roles" not in forward("list", "--json").json["forwards"][0]


def test_what_is_closed_is_listed_where_it_would_be_open(forward: Forward, lab: LabDirectory) -> None:
    forward(*ADD, "--expire", "+60", "--disabled")
    assert "disabled  qrexec  sys-net:80" in forward("list", "sys-net").out
    assert "disabled  qrexec  sys-net:80" in forward("list", "sys-firewall").out


def test_list_says_how_far_off_the_end_is_and_show_says_when(forward: Forward) -> None:
    forward(*ADD, "--expire", "+8h")
    assert "  192.168.0.0/16  in 8 h\n" in forward("list").out
    assert " (in 8 h)\n" in forward("show", "work", "web").out


FIVE = (
    (
        "work",
        "80:8080",
        "--from",
        "192.168.0.0/16,10.0.0.0/8",
        "--expire",
        "8h",
        "--comment",
        "demo for the office",
    ),
    ("work", "443:8443", "--from", "any", "--name", "web-secure"),
    ("work", "22", "--from", "192.168.1.7", "--comment", "backups, from the machine in the cellar alone"),
    ("personal", "5000-5010", "--from", "10.0.0.0/8"),
    ("personal", "8080", "--from", "fd00::/8", "--disabled", "--name", "old"),
)


@pytest.mark.parametrize("width", [60, 80, 110, 120, 200])
def test_a_list_of_five_rules_is_five_rows_and_a_heading(forward: Forward, width: int) -> None:
    for rule in FIVE:
        assert forward("add", *rule).status == 0
    table = forward("list", style=Style(width)).out.split("\n\n")[0].splitlines()
    assert (len(table), max(map(len, table)) <= width) == (6, True)
    titles = {
        60: "QUBE NAME STATE EXPOSED AT FROM",
        80: "QUBE NAME STATE EXPOSED AT FROM EXPIRES",
        110: "QUBE NAME STATE EXPOSED AT TARGET FROM EXPIRES COMMENT",
        120: "QUBE NAME STATE MODE EXPOSED AT TARGET FROM EXPIRES COMMENT",
        200: "QUBE NAME STATE MODE EXPOSED AT TARGET FROM EXPIRES COMMENT",
    }
    assert " ".join(table[0].split()) == titles[width]
    assert ("..." in "".join(table)) == (width < 200)


def test_what_is_left_out_of_a_list_is_in_show(forward: Forward) -> None:
    forward(*ADD, "--comment", "a comment that is longer than any column has room for on a terminal of 80")
    assert "for on a terminal of 80" in forward("list").out
    assert "  a comment that is longer than...\n" in forward("list", style=Style(110)).out
    assert forward("list", style=Style(40)).out.startswith(
        "work web: active\n  mode qrexec\n  exposed at sys-net:80\n"
    )


def test_colours_only_if_asked_for(forward: Forward) -> None:
    forward(*ADD)
    assert "\x1b" not in forward("list").out
    assert "\x1b[32mactive" in forward("list", style=Style(None, True)).out
    assert "\x1b[32mactive" in forward("list", style=Style(40, True)).out


def test_nothing_to_list(forward: Forward) -> None:
    assert forward("list").out == forward("plan").out == "No forwards.\n"


def test_show_has_rule_plan_policy_and_configuration(forward: Forward) -> None:
    forward(*ADD)
    shown = forward("show", "work", "web").out
    for words in ("work web: active", "rule:\n  action=forward", "policy:\n  qubes.ForwardTCP", KEY):
        assert words in shown
    data = forward("show", "work", "web", "--json").json
    assert data["configs"][0]["feature"] == KEY
    assert data["policy"] == ["qubes.ForwardTCP  +8080+mux  sys-net  work  allow  autostart=no  notify=no"]
    forward("disable", "work", "web")
    assert "policy:\n  none\nlistener:\n  none\n" in forward("show", "work", "web").out
    assert forward("show", "work", "web", "--json").json["configs"] == []


def test_show_draws_the_way_and_gives_the_verdict_of_each_check(forward: Forward) -> None:
    forward(*ADD)
    shown = forward("show", "work", "web").out
    assert "\n  | 192.168.0.0/16 | -------> | port 80 | =====> | 127.0.0.1:8080 |\n" in shown
    assert "\nok  side     outer: by sys-net's own network devices, " in shown
    assert "\nok  policy   dom0 allows the call\n" in shown
    found = {
        entry["check"]: entry["verdict"]
        for entry in forward("show", "work", "web", "--json").json["findings"]
    }
    assert found == dict.fromkeys(["sources", "side", "path", "owner", "tunnel", "expiry", "policy"], "ok")
    causes = [entry["cause"] for entry in forward("show", "work", "web", "--json").json["findings"]]
    assert causes == ["sources", "side", "agreed", "own", "no-tunnel", "in-time", ""]
    assert "\n  # mux\n" not in forward("show", "work", "web", style=Style(80)).out
    assert "\n    # mux\n" in forward("show", "work", "web", style=Style(40)).out
    assert "\x1b[32mok" in forward("show", "work", "web", style=Style(80, True)).out


JSON = {
    "add": ("personal", "81", "--from", "any"),
    "set": ("work", "web", "expire=never"),
    "remove": ("work", "web"),
    "enable": ("work", "web"),
    "disable": ("work", "web"),
    "confirm": ("work", "web"),
    "list": (),
    "show": ("work", "web"),
    "status": (),
    "cut": ("work", "web"),
    "diagnose": ("work", "web"),
    "plan": (),
    "apply": (),
    "policy": (),
    "tunnel": ("list",),
    "panic": (),
    "resume": ("--dry-run",),
    "export": (),
    "import": (),
}


@pytest.mark.parametrize("name", JSON)
def test_every_command_speaks_json_and_nothing_else(forward: Forward, name: str, kind: str) -> None:
    forward(*ADD)
    result = forward(name, *JSON[name], "--json")
    # There is no listener here that diagnose could find, nor status where a qube says that it has none.
    is_found = name in ("cut", "diagnose") or (name, kind) == ("status", "qubes")
    assert (result.status, result.err) == (is_found, "")
    assert isinstance(result.json, dict)


def test_no_command_that_ends_is_left_out_above() -> None:
    assert cli.parser.COMMANDS.keys() - JSON.keys() <= {"watch"}


def test_show_gives_reasons(forward: Forward) -> None:
    forward(*ADD)
    forward("add", "personal", "81", "--from", "any", "--via", "sys-vpn", "--name", "via")
    forward("add", "personal", "82", "--from", "any", "--internal", "--name", "internal")
    told = forward("show", "work", "web").out
    assert "mode qrexec: the rule says so." in told
    assert "listening at sys-net: the outermost netvm, work - sys-firewall - sys-net." in told
    told = forward("show", "personal", "via").out
    assert "listening at sys-vpn: the rule names it with via." in told
    assert "transport call over qubes.ConnectTCP: personal does not offer qubes.ForwardTCP" in told
    assert "listening at sys-firewall: the target's netvm" in forward("show", "personal", "internal").out


def test_plan_explains_each_forward_as_show_does(forward: Forward, lab: LabDirectory) -> None:
    forward(*ADD)
    forward("add", "personal", "81", "--from", "any", "--name", "all")
    lab.set_feature("personal", "forward.bad", "action=drop")
    work, personal = forward("plan", "work").out, forward("plan", "personal").out
    assert forward("show", "work", "web").out.startswith(work)
    assert work.startswith("work web: active\n  Connections to port 80 of sys-net")
    assert "\npersonal bad: broken. " in personal
    heads = [line.partition(":")[0] for line in forward("plan").out.splitlines() if line[:1].strip()]
    assert heads == ["personal all", "work web", "personal bad"]
    data = forward("plan", "--json").json
    assert [(entry["qube"], entry["state"]) for entry in data["forwards"]] == [
        ("personal", "active"),
        ("work", "active"),
    ]
    assert ([entry["name"] for entry in data["broken"]], data["is_held"]) == (["bad"], False)
    assert len(forward("plan", "work", "--json").json["forwards"]) == 1


def test_policy_prints_what_the_rules_ask_for(forward: Forward) -> None:
    result = forward("policy")
    assert result.out.endswith("qubes.ForwardUDP  *  @anyvm  @anyvm  deny  notify=no\n")
    assert "'qvm-forward apply' writes this one" in result.err
    forward("apply")
    assert forward("policy").err == ""
    assert forward("policy", "--json").json["is_installed"] is True


def test_json_of_changes(forward: Forward) -> None:
    data = forward(*ADD, "--json").json
    assert data["applied"] is True
    assert data["forwards"][0]["state"] == "active"
    assert "127.0.0.1" in data["forwards"][0]["warnings"][-1]
    steps = forward("apply", "--dry-run", "--json").json
    assert (steps["dry_run"], steps["steps"]) == (True, [])
    removed = forward("remove", "work", "web", "--json").json
    assert (removed["removed"], removed["applied"]) == ([{"qube": "work", "name": "web"}], True)
    assert [step["step"] for step in removed["steps"]] == ["close-policy", "revoke", "remove-config"]
    assert (removed["ended"][0]["target"], removed["goes_on"]) == ("work", [])


@pytest.mark.parametrize(
    ("environ", "style"),
    [
        ({"COLUMNS": "90"}, Style(90, True)),
        ({"COLUMNS": "90", "NO_COLOR": "1"}, Style(90, False)),
        ({"COLUMNS": "90", "TERM": "dumb"}, Style(90, False)),
    ],
)
def test_style_follows_terminal_and_environment(environ: dict[str, str], style: Style) -> None:
    master, slave = os.openpty()
    with open(slave, "w", encoding="ascii") as terminal:
        assert cli.style_of(terminal, environ) == style
        assert cli.style_of(terminal, {"NO_COLOR": "1"}).has_colour is False
    os.close(master)
    with open(os.devnull, "w", encoding="ascii") as nowhere:
        assert cli.style_of(nowhere, environ) == Style(None, False)
