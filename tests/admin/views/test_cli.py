# SPDX-License-Identifier: GPL-2.0-or-later
"""qvm-forward on a lab: what its changes say and leave behind, and how it refuses."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from worlds import ADD, NOW, Command, content

from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.qube import QubeState

Forward = Callable[..., Any]


def change(lab: LabDirectory, name: str, **more: Any) -> None:
    from dataclasses import replace

    lab.write_qube(replace(lab.qube(name), **more))


def test_add_opens_and_says_for_whom(forward: Forward, lab: LabDirectory) -> None:
    result = forward(*ADD, "--mode=qrexec", "--expire", "+8h", "--comment", "demo for the office")
    assert (result.status, result.err) == (0, "")
    assert result.out.startswith(
        "Forward work web is stored and active. Connections to port 80 of sys-net (outer side) from "
        "192.168.0.0/16 reach port 8080 of work.\nIt ends "
    )
    assert "(in 8 h)" in result.out
    assert "come from 127.0.0.1, which some servers trust" in result.out
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
    (("add", "work", "80", "--from", "any", "--expire", "1"), 2, "expire: that time is over already"),
    (("add", "work", "80-81:90", "--from", "any"), 2, "both must have the same number"),
    (("add", "work", "80", "--from", "any", "--proto", "udp", "--mode", "qrexec"), 2, "udp needs mode=nft"),
    (("add", "work", "80", "--from", "any", "--proto", "udp"), 1, "which mode=nft needs at every qube"),
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
    (("add", "work", "80", "--from", "any", "--name", "tunnel"), 2, "--name: 'tunnel' is not free"),
    (("add", "work", "80", "--from", "any", "--comment", "a\nb"), 2, "printable ASCII on one line"),
    (("add", "work", "80", "--from", "any", "--mode", "fast"), 2, "add: --mode: 'fast' is not one of auto,"),
    (("add", "wo rk", "80", "--from", "any"), 1, "there is no qube 'wo rk'"),
    (("add", "gone", "80", "--from", "any"), 1, "there is no qube 'gone'; 'qvm-ls' lists all qubes"),
    (("add", "dom0", "80", "--from", "any"), 1, "is the administrative qube"),
    (("add", "vault", "80", "--from", "any"), 1, "--via QUBE"),
    (("add", "untrusted", "80", "--from", "any"), 1, "behind a tunnel, marked at sys-vpn"),
    (("add", "work", "81", "--from", "any", "--name", "web"), 1, "work web exists already"),
    (("add", "personal", "80", "--from", "any"), 1, "Rule work web has port 80 of sys-net already"),
    (("add", "vault", "80", "--from", "any", "--disabled"), 1, "--via QUBE"),
    (("set", "work", "web", "bogus=1"), 2, "option 'bogus': unknown option"),
    (("set", "work", "web", "bogus="), 2, "option 'bogus': unknown option"),
    (("set", "work", "web", "expire"), 2, "an option is written name=value"),
    (("set", "work", "web", "expire=x"), 2, "option 'expire': 'x' is not a time"),
    (("set", "work", "web", "srchosts="), 2, "option 'srchosts': missing"),
    (("set", "work", "web", "via=a", "via=b"), 2, "option 'via': given twice"),
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
    (("enable", "work", "nope"), 1, "work has no forward"),
    (("show", "work", "nope"), 1, "work has no forward"),
    (("list", "gone"), 1, "there is no qube 'gone'"),
    (("export", "gone"), 1, "there is no qube 'gone'"),
    (("export", "--json", "--format", "xml"), 2, "leave one out"),
    (("import", "/does/not/exist"), 1, "/does/not/exist: No such file or directory"),
]


@pytest.mark.parametrize(("argv", "status", "words"), REFUSED)
def test_what_is_refused_is_explained_and_changes_nothing(
    forward: Forward, lab: LabDirectory, argv: tuple[str, ...], status: int, words: str
) -> None:
    forward(*ADD)
    before = content(lab)
    result = forward(*argv)
    assert (result.status, result.out) == (status, "")
    assert words in result.err
    assert content(lab) == before


USAGE = [
    ((), "COMMAND"),
    (("nonsense",), "invalid choice"),
    (("panic", "work"), "qvm-forward panic: error: unrecognized arguments: work"),
    (("list", "--jsn"), "usage: qvm-forward list"),
]


@pytest.mark.parametrize(("argv", "words"), USAGE)
def test_a_wrong_command_line_is_a_usage_error(
    forward: Forward, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], words: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        forward(*argv)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


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
        ("sys-firewall", "The netvms of work lead in a circle at sys-firewall; mend its netvm"),
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


def test_set_changes_options_and_empties_them(forward: Forward, lab: LabDirectory) -> None:
    forward(*ADD, "--comment", "old")
    result = forward("set", "work", "web", "expire=+1h", "srchosts=10.0.0.0/8", "comment=a new one")
    assert result.status == 0
    line = lab.feature("work", "forward.web") or ""
    assert f"srchosts=10.0.0.0/8 owner=work path=sys-firewall,sys-net expire={NOW + 3600}" in line
    assert line.endswith("comment=a new one")
    assert "srchosts=10.0.0.0/8" in lab.vm_config("sys-net")["fwd.work.web"]
    forward("set", "work", "web", "expire=never", "comment=", "dstports=")
    assert "expire" not in (lab.feature("work", "forward.web") or "")
    assert "dstports=80-80" in (lab.feature("work", "forward.web") or "")


def test_disable_closes_and_enable_opens(forward: Forward, lab: LabDirectory) -> None:
    forward(*ADD)
    opened = content(lab)
    assert "is disabled and closed" in forward("disable", "work", "web").out
    assert lab.vm_config("sys-net") == {}
    assert "+8080" not in (lab.policy_dir / "30-forward.policy").read_text()
    assert "is enabled and active" in forward("enable", "work", "web").out
    assert content(lab) == opened


def test_enable_does_not_take_a_port_that_is_taken(forward: Forward) -> None:
    forward(*ADD, "--disabled")
    assert forward("add", "personal", "80", "--from", "any").status == 0
    result = forward("enable", "work", "web")
    assert result.status == 1
    assert "work web was not enabled. Rule personal tcp-80 has port 80 of sys-net already" in result.err


def test_a_disabled_rule_may_wait_for_a_port_that_is_taken(forward: Forward) -> None:
    forward(*ADD)
    result = forward("add", "personal", "80", "--from", "any", "--disabled")
    assert result.status == 0
    assert "stored and closed. 'qvm-forward enable" in result.out


def test_remove_leaves_nothing_behind(forward: Forward, lab: LabDirectory) -> None:
    forward("apply")
    before = content(lab)
    forward(*ADD)
    assert forward("remove", "work", "web").out == "Forward work web is removed and closed.\n"
    assert content(lab) == before


def test_a_dry_run_shows_which_mux_calls_would_end(forward: Forward) -> None:
    forward(*ADD)
    forward("remove", "work", "web", "--no-apply")
    assert "\n  work: end connections that are not allowed any more\n" in forward("apply", "--dry-run").out
    steps = forward("apply", "--dry-run", "--json").json["steps"]
    assert [step["step"] for step in steps] == ["close-policy", "revoke", "remove-config"]
    assert steps[1] == {"step": "revoke", "allowances": {"work": "version=1 drains=keep\n"}}
    assert forward("apply", "--json").json["steps"] == steps


def test_no_apply_leaves_the_rest_to_apply(forward: Forward, lab: LabDirectory) -> None:
    forward("apply")
    result = forward(*ADD, "--no-apply")
    assert "is stored; 'qvm-forward apply' puts it in force. Then: Connections to port 80" in result.out
    assert lab.vm_config("sys-net") == {}
    dry = forward("apply", "--dry-run")
    assert dry.out.startswith("This would change:\n  policy: from now on qubes.ForwardTCP +8080+mux sys-net")
    assert lab.vm_config("sys-net") == {}
    assert forward("apply").out.startswith("Changed:\n")
    assert forward("apply").out == "Nothing to change: all is as the rules ask for.\n"
    assert "'qvm-forward apply' closes it" in forward("remove", "work", "web", "--no-apply").out
    assert lab.vm_config("sys-net") != {}


def test_single_calls_come_with_a_note_of_what_a_socket_service_cannot_tell(forward: Forward) -> None:
    note = (
        "Note: where work serves calls by qubes-forward-service.socket, an answer that breaks off may look "
        "complete to the client.\n"
    )
    assert note in forward(*ADD, "--transport", "call").out
    assert note not in forward("set", "work", "web", "comment=x").out
    forward("set", "work", "web", "transport=mux")
    assert note in forward("set", "work", "web", "transport=call").out


def test_a_warning_is_told_again_only_when_it_is_news(forward: Forward) -> None:
    assert "to the server in work all these connections come from 127.0.0.1" in forward(*ADD).out
    assert "127.0.0.1" not in forward("set", "work", "web", "comment=x").out
    forward("disable", "work", "web")
    assert (
        "to the server in work all these connections come from 127.0.0.1"
        in forward("enable", "work", "web").out
    )


def test_apply_says_why_a_forward_is_closed_that_waits_for_a_word(
    forward: Forward, lab: LabDirectory
) -> None:
    forward(*ADD)
    lab.write_qube(replace(lab.qube("work"), netvm=None))
    said = "work web is suspended. The netvms of work were sys-firewall - sys-net when"
    assert said in forward("apply", "--dry-run").out
    done = forward("apply")
    assert (done.status, done.out.count(said)) == (0, 1)
    assert forward("apply", "--json").json["forwards"][0]["state"] == "suspended"


def test_a_rule_expires_at_the_next_apply(forward: Forward, lab: LabDirectory) -> None:
    forward(*ADD, "--expire", "+60")
    assert forward("apply", now=NOW + 60).status == 0
    assert lab.vm_config("sys-net") == {}
    assert forward("list", "--json", now=NOW + 60).json["forwards"][0]["state"] == "expired"


def test_a_changed_netvm_suspends_until_confirmed(forward: Forward, lab: LabDirectory) -> None:
    forward(*ADD)
    change(lab, "work", netvm=QubeName("sys-net"))
    assert "netvms of work were sys-firewall - sys-net" in forward("list").out
    forward("apply")
    assert lab.vm_config("sys-net") == {}
    assert "is confirmed and active" in forward("confirm", "work", "web").out
    assert "path=sys-net" in (lab.feature("work", "forward.web") or "")


def test_a_clone_exposes_nothing_until_confirmed(forward: Forward, lab: LabDirectory) -> None:
    forward(*ADD)
    lab.set_feature("personal", "forward.web", lab.feature("work", "forward.web") or "")
    listed = forward("list", "personal", "--json").json["forwards"]
    assert [entry["cause"] for entry in listed] == ["cloned"]
    result = forward("confirm", "personal", "web")
    assert result.status == 1
    assert "personal web was not confirmed. Rule work web has port 80" in result.err
    forward("remove", "work", "web")
    assert forward("confirm", "personal", "web").status == 0


def test_a_halted_qube_waits_and_is_delivered_at_its_start(forward: Forward, lab: LabDirectory) -> None:
    lab.set_state("sys-net", QubeState.HALTED)
    assert "is stored and waiting. sys-net is halted" in forward(*ADD).out
    lab.set_state("sys-net", QubeState.RUNNING)
    assert lab.vm_config("sys-net").keys() == {"fwd.work.web"}


def test_a_stored_rule_that_is_refused_fails_apply_and_the_rest_is_done(
    forward: Forward, lab: LabDirectory
) -> None:
    lab.set_feature("work", "forward.udp", "action=forward proto=udp srcports=53 srchosts=any owner=work")
    forward(*ADD, "--no-apply")
    result = forward("apply")
    assert result.status == 1
    assert "work udp is refused. UDP goes only by nft" in result.err
    assert lab.vm_config("sys-net").keys() == {"fwd.work.web"}


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


@pytest.mark.parametrize(
    ("ending", "words"),
    [
        ("cut", "Note: connections that it no longer allows are cut.\n"),
        ("drain", "Note: connections that it no longer allows may go on for up to an hour, because of "),
    ],
)
def test_set_says_what_becomes_of_those_it_shuts_out(forward: Forward, ending: str, words: str) -> None:
    forward(*ADD)
    assert words in forward("set", "work", "web", "srchosts=192.168.1.0/24", f"on-expire={ending}").out
    assert words not in forward("set", "work", "web", "srchosts=192.168.0.0/16").out


def test_whatever_else_is_opened_or_closed_is_named(forward: Forward, lab: LabDirectory) -> None:
    """As by a backup that was restored, or by Qubes' own tools, since the last command."""
    forward(*ADD)
    forward("add", "personal", "81", "--from", "any", "--no-apply")
    lab.remove_feature("work", "forward.web")
    lab.set_feature("sys-net", "vm-config.fwd.odd", "x")
    out = forward("add", "work", "82", "--from", "any").out
    assert "\nClosed at sys-net: fwd.odd.\nClosed at sys-net: work web.\n" in out
    assert "\nOpened at sys-net: personal tcp-81. Connections to port 81 of sys-net" in out
    assert forward("remove", "work", "tcp-82").out == "Forward work tcp-82 is removed and closed.\n"


def test_who_makes_a_forward_hears_that_nothing_watches_over_it(
    lab: LabDirectory, over: Command, kind: str, store: Backend
) -> None:
    note = "Note: 'qvm-forward watch' is not running, so nothing closes this when its time is over"
    assert note in over(store, *ADD).out
    assert over(store, *ADD[:-1], "again", "--json").status == 1
    for command in ("set work web comment=x", "enable work web", "confirm work web"):
        assert note in over(store, *command.split()).out
    assert note not in over(store, "disable", "work", "web").out
    with store.watching():
        assert note not in over(store, "enable", "work", "web").out
        assert over(store, "enable", "work", "web", "--json").json["is_watched"] is True


def test_a_running_target_keeps_its_transport_until_it_starts_again(
    forward: Forward, lab: LabDirectory
) -> None:
    forward("add", "personal", "80", "--from", "any", "--name", "web")
    lab.set_feature("debian-12", "supported-rpc.qubes.ForwardTCP", "1")
    assert "Nothing to change" in forward("apply").out
    assert "restart personal" in forward("show", "personal", "web").out
    change(lab, "personal", state=QubeState.HALTED)
    forward("apply")
    assert "transport=mux" in lab.vm_config("sys-net")["fwd.personal.web"]
    change(lab, "personal", state=QubeState.RUNNING)
    assert "Nothing to change" in forward("apply").out
    assert "transport=mux" in lab.vm_config("sys-net")["fwd.personal.web"]
