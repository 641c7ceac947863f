# SPDX-License-Identifier: GPL-2.0-or-later
"""qvm-forward on a lab: what its commands on rules that are there say and leave behind."""

from dataclasses import replace

import pytest
from test_cli import Forward, change
from worlds import ADD, NOW, Command, content

from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.qube import QubeState


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


def test_set_takes_the_options_of_add(forward: Forward, lab: LabDirectory) -> None:
    forward(*ADD, "--expire", "1h")
    options = "--from 10.0.0.0/8 --comment x --on-expire drain --follow-netvm --extend 1h"
    assert forward("set", "work", "web", *options.split()).status == 0
    assert (lab.feature("work", "forward.web") or "").endswith(
        f"srchosts=10.0.0.0/8 on-expire=drain owner=work path=sys-firewall,sys-net follow-netvm=yes "
        f"expire={NOW + 7200} comment=x"
    )


def test_one_client_more_and_one_less(forward: Forward, lab: LabDirectory) -> None:
    forward(*ADD)
    out = forward("set", "work", "srchosts+=10.0.0.0/8", "srchosts-=192.168.0.0/16").out
    assert "from 10.0.0.0/8 reach" in out
    assert "Note: connections that it no longer allows are cut.\n" in out
    assert "srchosts=10.0.0.0/8" in lab.vm_config("sys-net")["fwd.work.web"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("enable work", "Forward work web is enabled already and active."),
        ("confirm work web", "Forward work web is confirmed already and active."),
        ("set work comment=", "Forward work web is as it was and active."),
    ],
)
def test_what_is_so_already_is_said_and_no_error(forward: Forward, words: str, said: str) -> None:
    forward(*ADD)
    result = forward(*words.split())
    assert (result.status, said in result.out) == (0, True)


def test_all_of_a_qube_and_all_of_the_system_are_closed_and_opened(
    forward: Forward, lab: LabDirectory
) -> None:
    assert forward("disable", "--all").out == "No forwards.\n"
    for port in ("80", "81"):
        forward("add", "work", port, "--from", "any")
    forward("add", "personal", "82", "--from", "any")
    assert forward("disable", "work", "--all").out.count(" is disabled and closed") == 2
    assert lab.vm_config("sys-net").keys() == {"fwd.personal.tcp-82"}
    out = forward("disable", "--all").out
    assert (out.count(" is disabled and closed"), out.count(" is disabled already and closed")) == (1, 2)
    assert lab.vm_config("sys-net") == {}
    assert forward("enable", "--all").out.count(" is enabled and active") == 3
    assert forward("confirm", "work", "--all").status == 0
    assert forward("remove", "work", "--all").out.count(" is removed and closed") == 2
    assert forward("remove", "work", "--all").out == "No forwards.\n"
    assert lab.vm_config("sys-net").keys() == {"fwd.personal.tcp-82"}


def test_of_many_that_are_enabled_the_one_that_finds_its_port_taken_is_named(
    forward: Forward, lab: LabDirectory
) -> None:
    forward("add", "personal", "80", "--from", "any", "--name", "late", "--disabled")
    forward("add", "vault", "81", "--via", "sys-net", "--from", "any", "--disabled")
    forward(*ADD)
    before = content(lab)
    result = forward("enable", "--all")
    assert (result.status, result.out) == (1, "")
    assert "personal late was not enabled. Rule work web already has port 80 of sys-net" in result.err
    assert content(lab) == before


def test_a_pattern_stands_for_names_and_leaves_out_what_cannot_be_read(
    forward: Forward, lab: LabDirectory
) -> None:
    for name in ("web-a", "web-b", "ssh"):
        port = str(80 + len(lab.features("work")))
        forward("add", "work", port, "--from", "any", "--name", name)
    lab.set_feature("work", "forward.web-bad", "x")
    result = forward("set", "work", "web-*", "comment=x")
    assert result.out.count(" is changed and active") == 2
    assert result.err.count("work 'web-bad' stays as it is, since it cannot be read\n") == 1
    assert "comment=x" not in (lab.feature("work", "forward.ssh") or "")
    result = forward("disable", "work", "web-?", "web-bad")
    assert (result.status, "cannot be read" in result.err) == (1, True)
    assert "stays as it is" in forward("disable", "work", "--all").err
    forward("remove", "work", "web-*")
    assert {key for key in lab.features("work") if key.startswith("forward.")} == {"forward.ssh"}


def test_the_only_rule_of_a_qube_needs_no_name(forward: Forward) -> None:
    forward(*ADD)
    assert forward("show", "work").out == forward("show", "work", "web").out
    assert forward("show", "work", "--json").json["name"] == "web"
    assert forward("diagnose", "work").out == forward("diagnose", "work", "web").out
    assert forward("diagnose", "work", "--json").json["name"] == "web"
    assert "is disabled and closed" in forward("disable", "work").out
    forward("add", "work", "81", "--from", "any")
    for command in ("show", "diagnose", "confirm", "enable"):
        result = forward(command, "work")
        assert (result.status, result.out) == (1, "")
        assert "work has 2 forwards; name one of tcp-81, web\n" in result.err


def test_words_may_stand_before_and_behind_the_options(forward: Forward) -> None:
    forward(*ADD)
    assert "is changed and active" in forward("set", "work", "--comment", "x", "web", "via=").out
    assert forward("list", "work", "--json", "vault").status == 0


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
    assert "work web was not enabled. Rule personal tcp-80 already has port 80 of sys-net" in result.err


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


def test_a_warning_is_told_again_only_when_it_is_news(forward: Forward) -> None:
    assert "the server in work sees every client as 127.0.0.1" in forward(*ADD).out
    assert "127.0.0.1" not in forward("set", "work", "web", "comment=x").out
    forward("disable", "work", "web")
    assert "127.0.0.1" not in forward("enable", "work", "web").out
    assert "127.0.0.1" not in forward("add", "work", "81:8080", "--from", "any").out
    assert "127.0.0.1" in forward("add", "work", "82", "--from", "any").out
    assert "note: the server in work sees every client as 127.0.0.1" in forward("show", "work", "web").out


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
    assert "personal web was not confirmed. Rule work web already has port 80" in result.err
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
    line = "action=forward proto=udp srcports=53 srchosts=any owner=personal"
    lab.set_feature("personal", "forward.udp", line)
    forward(*ADD, "--no-apply")
    result = forward("apply")
    assert result.status == 1
    assert "personal udp is refused. personal does not offer qubes.ForwardUDP" in result.err
    assert lab.vm_config("sys-net").keys() == {"fwd.work.web"}


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


def test_a_protocol_that_a_rule_gives_up_shuts_out_its_own(forward: Forward) -> None:
    forward(*ADD, "--proto", "both", "--mode", "qrexec")
    out = forward("set", "work", "web", "srchosts=192.168.1.0/24").out
    assert "Note: connections and UDP flows that it no longer allows are cut.\n" in out
    assert (
        "Note: UDP flows that it no longer allows are cut.\n"
        in forward("set", "work", "web", "proto=tcp").out
    )
    assert "Note: connections that it" in forward("set", "work", "web", "proto=udp").out
    assert "no longer allows" not in forward("set", "work", "web", "proto=both").out


def test_another_rule_that_gives_up_a_protocol_is_not_said_to_be_closed(
    forward: Forward, lab: LabDirectory
) -> None:
    forward(*ADD, "--mode", "qrexec")
    line = lab.features("work")["forward.web"]
    lab.set_feature("work", "forward.web", line.replace("proto=tcp", "proto=udp"))
    out = forward("add", "work", "81", "--from", "any").out
    assert "\nChanged at sys-net: work web. UDP packets to port 80 of sys-net" in out
    assert "Closed at" not in out


def test_a_protocol_that_a_rule_gives_up_ends_as_it_was_told(forward: Forward) -> None:
    forward(*ADD, "--proto", "both", "--mode", "qrexec", "--on-expire", "drain")
    changes = ("proto=tcp", "on-expire=cut", "srchosts=192.168.1.0/24")
    out = forward("set", "work", "web", *changes).out
    assert "Note: connections that it no longer allows are cut.\n" in out
    assert "Note: UDP flows that it no longer allows may go on for up to an hour, because of " in out


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
    note = "Note: 'qvm-forward watch' is not running, so dom0 does nothing when a rule expires"
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
