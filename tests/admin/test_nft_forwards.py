# SPDX-License-Identifier: GPL-2.0-or-later
"""Forwards by nft from rule to qubes, and back: what is told, asked, shown, and closed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from nftlab import FEATURE, PATH, NftLab, drains, forgets, hangs, strange
from stages import Stage
from worlds import ADD, NOW, Command

from qubes_fwd_qrexec.admin import policy
from qubes_fwd_qrexec.admin.answers import AnswerError
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.lab.directory import LabDirectory


class Hanging(Stage):
    """What `watch` works on, with qubes that do not answer."""

    def ask(self, qube: QubeName, service: str, *_: object, **__: object) -> bytes:
        raise AnswerError("it hangs")


def told(nft_lab: NftLab) -> set[str]:
    return {qube for qube in nft_lab.lab.qube_names() if FEATURE in nft_lab.lab.features(qube)}


def test_a_forward_goes_by_nft_where_nothing_is_against_it_and_opens_from_the_target(
    run: Command, nft_lab: NftLab
) -> None:
    added = run(*ADD)
    assert (added.status, added.err) == (0, "")
    assert (
        "Forward work web is stored and active. Connections to port 80 of sys-net (outer side)" in added.out
    )
    assert (
        "Note: it goes by nft, as packets can go sys-net - sys-firewall - work; 'qvm-forward set work web "
        "mode=qrexec' sends it over qrexec.\n"
    ) in added.out
    assert "the network stack of work itself faces the clients" in added.out
    assert " mode=nft " in nft_lab.lab.features("work")["forward.web"]
    sets = [entry for entry in nft_lab.log if FEATURE in entry]
    assert sets == [f"set {qube} {FEATURE}" for qube in reversed(PATH)]
    assert policy.allowing(nft_lab.read_policy().text) == frozenset()


def test_it_closes_from_the_exposed_qube_and_is_closed_when_one_has_closed_it(
    run: Command, nft_lab: NftLab
) -> None:
    run(*ADD)
    nft_lab.says["sys-net"] = hangs
    removed = run("remove", "work", "web")
    assert nft_lab.log[1:] == [f"remove {qube} {FEATURE}" for qube in PATH]
    assert (removed.status, removed.out) == (0, "Forward work web is removed and closed.\n")
    assert removed.err == "qvm-forward: note: work web: sys-net does not answer: it hangs\n"


def test_what_no_qube_says_is_closed_counts_as_open(run: Command, nft_lab: NftLab) -> None:
    run(*ADD)
    nft_lab.says = dict.fromkeys(PATH, hangs)
    removed = run("disable", "work", "web")
    assert removed.status == 1
    assert removed.out.startswith("Forward work web is disabled, but no qube confirms that it is closed.")
    assert "still open: work web: sys-net does not answer: it hangs; it may still let in" in removed.err
    assert "'qvm-prefs work netvm ''' closes it whatever the qubes of its path do\n" in removed.err


@pytest.mark.parametrize("command", ["set", "apply", "import", "expire"])
def test_what_a_silent_qube_may_let_in_as_before_counts_as_open(
    run: Command, nft_lab: NftLab, tmp_path: Path, command: str
) -> None:
    run(*ADD)
    nft_lab.says = dict.fromkeys(PATH, hangs)
    narrower = nft_lab.lab.features("work")["forward.web"].replace("192.168.0.0/16", "192.168.1.0/24")
    if command == "set":
        narrowed = run("set", "work", "web", "srchosts=192.168.1.0/24")
        assert ", but sys-firewall and sys-net and work may still let in more, as before. " in narrowed.out
    elif command == "expire":
        narrowed = run("set", "work", "web", "expire=+1h")
    elif command == "apply":
        nft_lab.lab.set_feature("work", "forward.web", narrower)
        narrowed = run("apply")
    else:
        document = tmp_path / "narrower"
        document.write_text(run("export", "work").out.replace("192.168.0.0/16", "192.168.1.0/24"))
        narrowed = run("import", "--replace", str(document))
    assert narrowed.status == 1
    assert (
        "qvm-forward: still open: work web: sys-net does not answer: it hangs; it may still let in "
        "192.168.0.0/16 to tcp port 80\n"
    ) in narrowed.err
    assert "'qvm-prefs work netvm ''' closes it whatever the qubes of its path do\n" in narrowed.err


def test_of_both_protocols_both_are_named(run: Command, nft_lab: NftLab) -> None:
    run(*ADD, "--proto", "both", "--mode", "nft")
    nft_lab.says = dict.fromkeys(PATH, hangs)
    narrowed = run("set", "work", "web", "proto=tcp")
    assert narrowed.status == 1
    assert "it may still let in 192.168.0.0/16 to tcp and udp port 80\n" in narrowed.err


def test_one_qube_that_lets_in_fewer_is_enough(run: Command, nft_lab: NftLab) -> None:
    run(*ADD)
    nft_lab.says = {"sys-net": hangs, "sys-firewall": hangs}
    narrowed = run("set", "work", "web", "srchosts=192.168.1.0/24", "--json")
    assert (narrowed.status, narrowed.json["still_open"]) == (0, [])
    assert [doubt["qube"] for doubt in narrowed.json["unconfirmed"]] == ["sys-net", "sys-firewall"]
    # Where the target lets in fewer, that says nothing of the port at which they come.
    moved = run("set", "work", "web", "srcports=81", "srchosts=192.168.1.0/25", "--json")
    assert moved.status == 1
    assert [doubt["qube"] for doubt in moved.json["still_open"]] == ["sys-net", "sys-firewall"]


def test_an_entry_that_nobody_has_told_counts_as_open(run: Command, nft_lab: NftLab) -> None:
    nft_lab.says["sys-net"] = strange
    added = run(*ADD)
    assert added.status == 1
    assert (
        "still open: work web: sys-net has another entry of it in force, which may let in more\n" in added.err
    )
    status = run("status")
    assert status.status == 1
    assert "which may let in more; 'qvm-forward diagnose work web'" in status.out
    # It is to let in more than before, but what it has in force is not what it was told before.
    widened = run("set", "work", "web", "srchosts=192.0.0.0/8")
    assert widened.status == 1
    assert "still open: work web: sys-net has another" in widened.err


def test_a_hold_that_is_lifted_says_what_is_not_closed(run: Command, nft_lab: NftLab) -> None:
    run(*ADD)
    run("panic")
    nft_lab.says["sys-net"] = strange
    resumed = run("resume")
    assert resumed.status == 1
    assert "still open: work web: sys-net has another" in resumed.err


def test_what_is_closed_is_asked_for_though_another_rule_is_in_trouble(run: Command, nft_lab: NftLab) -> None:
    run(*ADD)
    run("add", "work", "81", "--from", "any", "--name", "other", "--mode", "nft")
    nft_lab.says = dict.fromkeys(PATH, hangs)
    waits = run("set", "work", "other", "mode=qrexec")
    assert "has not confirmed that nft.work.other is closed" in waits.err
    disabled = run("disable", "work", "web")
    assert disabled.status == 1
    assert "still open: work web: work does not answer: it hangs; it may still let in 192.168" in disabled.err
    assert "'qvm-prefs work netvm ''' closes it whatever the qubes of its path do\n" in disabled.err


def test_a_qube_that_does_not_have_it_in_force_is_named(run: Command, nft_lab: NftLab) -> None:
    nft_lab.says["sys-firewall"] = forgets
    added = run(*ADD, "--json")
    (doubt,) = json.loads(added.out)["unconfirmed"]
    assert (doubt["qube"], doubt["lack"], doubt["is_opening"]) == ("sys-firewall", "not-in-force", True)


def test_it_is_shown_at_every_qube_on_its_way(run: Command) -> None:
    run(*ADD)
    roles = {qube: run("list", qube).out.splitlines()[1].split()[2] for qube in PATH}
    assert roles == {"sys-net": "exposed", "sys-firewall": "hop", "work": "target"}
    shown = run("show", "work", "web")
    # Too wide for what is no terminal.
    assert "  sys-net, port 80\n    | nft\n    v\n  sys-firewall, port 80\n    | nft\n    v\n" in shown.out
    assert "firewall at sys-firewall:\n  vm-config.nft.work.web = version=1 role=hop" in shown.out
    assert "policy:\n  none\n" in shown.out
    data = run("show", "work", "web", "--json").json
    assert (data["mode"], data["hops"]) == ("nft", ["sys-net", "sys-firewall"])
    assert [config["qube"] for config in data["configs"]] == ["work", "sys-firewall", "sys-net"]
    (listed,) = run("list", "--json").json["forwards"]
    assert listed["is_allowed"] is True


def test_a_changed_netvm_closes_it_everywhere(run: Command, nft_lab: NftLab) -> None:
    run(*ADD)
    work = nft_lab.lab.qube("work")
    nft_lab.lab.write_qube(replace(work, netvm=QubeName("sys-net")))
    assert "is suspended" in run("apply").out
    assert told(nft_lab) == set()
    run("confirm", "work", "web")
    assert told(nft_lab) == {"sys-net", "work"}


def test_panic_closes_it_and_says_what_no_qube_confirms(run: Command, nft_lab: NftLab) -> None:
    run(*ADD)
    nft_lab.says["work"] = hangs
    held = run("panic")
    assert told(nft_lab) == set()
    assert held.status == 1
    assert "still open: work does not answer: it hangs\n" in held.err
    nft_lab.says.clear()
    assert "unconfirmed" in run("panic", "--json").json
    run("resume")
    assert told(nft_lab) == set(PATH)


def test_a_rule_changes_its_mode_and_never_has_both_open(run: Command, nft_lab: NftLab) -> None:
    run(*ADD)
    run("set", "work", "web", "mode=qrexec")
    assert told(nft_lab) == set()
    removes = [entry for entry in nft_lab.log if entry.startswith("remove")]
    assert nft_lab.log.index(removes[-1]) < nft_lab.log.index("policy 1")
    run("set", "work", "web", "mode=nft")
    assert nft_lab.log.index("policy 0") < nft_lab.log.index(f"set work {FEATURE}")
    assert nft_lab.log.index("remove sys-net vm-config.fwd.work.web") < nft_lab.log.index(
        f"set work {FEATURE}"
    )


def test_what_was_stored_undecided_stays_with_qrexec(run: Command, nft_lab: NftLab) -> None:
    line = "action=forward mode=auto srcports=80-80 srchosts=10.0.0.0/8 owner=work path=sys-firewall,sys-net"
    nft_lab.lab.set_feature("work", "forward.web", line)
    run("apply")
    assert told(nft_lab) == set()
    assert len(policy.allowing(nft_lab.read_policy().text)) == 1
    assert "mode qrexec: mode=auto is decided when the rule is changed or confirmed." in run("plan").out
    assert "by nft, as packets" in run("set", "work", "web", "comment=x").out
    assert told(nft_lab) == set(PATH)


@pytest.mark.parametrize(
    ("options", "features", "why"),
    [
        (("--proxy", "v2"), {}, "proxy is asked for; "),
        (("--transport", "mux"), {}, "transport is asked for"),
        (("--autostart",), {}, "autostart is asked for"),
        (("--via", "sys-vpn"), {}, "sys-vpn is not a netvm of work"),
        (
            (),
            {("sys-firewall", "supported-rpc.qubes.ForwardNft"): ""},
            "sys-firewall does not offer",
        ),
        (
            (),
            {("work", "service.qubes-forward-nft"): ""},
            "work has the service qubes-forward-nft switched off",
        ),
        (("--listen", "127.0.0.1"), {}, "it listens at a loopback address"),
    ],
)
def test_auto_becomes_qrexec_where_something_is_against_nft_and_says_what(
    run: Command, nft_lab: NftLab, options: tuple[str, ...], features: dict[tuple[str, str], str], why: str
) -> None:
    for (qube, key), value in features.items():
        nft_lab.lab.set_feature(qube, key, value)
    added = run(*ADD, *options)
    assert added.status == 0
    assert f"Note: it goes over qrexec, as {why}" in added.out
    assert "'qvm-forward set work web mode=nft' says what nft would need.\n" in added.out
    assert " mode=qrexec " in nft_lab.lab.features("work")["forward.web"]


@pytest.mark.parametrize(("proto", "what"), [("udp", "UDP packets"), ("both", "Connections and UDP packets")])
def test_udp_goes_by_nft_where_packets_can_go_and_else_over_qrexec(
    run: Command, nft_lab: NftLab, proto: str, what: str
) -> None:
    nft_lab.lab.set_feature("work", "service.qubes-forward-nft", "")
    added = run(*ADD, "--proto", proto)
    reach = "to port 80 of sys-net (outer side) from 192.168.0.0/16 reach port 8080 of work"
    assert f"{what} {reach}" in added.out
    assert "Note: it goes over qrexec, as work has the service qubes-forward-nft switched off" in added.out
    assert "vm-config.udp.work.web" in nft_lab.lab.features("sys-net")
    nft_lab.lab.set_feature("work", "service.qubes-forward-nft", "1")
    run("set", "work", "web", "mode=auto")
    assert told(nft_lab) == set(PATH)
    assert f" proto={proto} " in nft_lab.lab.features("sys-net")[FEATURE]
    assert "vm-config.udp.work.web" not in nft_lab.lab.features("sys-net")


def test_what_is_stored_undecided_goes_over_qrexec_whatever_it_forwards(
    run: Command, nft_lab: NftLab
) -> None:
    nft_lab.lab.set_feature(
        "work", "forward.web", "action=forward proto=both srcports=80 srchosts=any owner=work"
    )
    run("apply")
    assert told(nft_lab) == set()
    assert {"vm-config.fwd.work.web", "vm-config.udp.work.web"} <= nft_lab.lab.features("sys-net").keys()


def test_time_that_is_over_closes_it(run: Command, nft_lab: NftLab) -> None:
    run(*ADD, "--expire", "+300")
    assert f"expire={NOW + 300}" in nft_lab.lab.features("sys-firewall")[FEATURE]
    line = nft_lab.lab.features("work")["forward.web"]
    nft_lab.lab.set_feature("work", "forward.web", line.replace(f"expire={NOW + 300}", f"expire={NOW}"))
    run("apply")
    assert told(nft_lab) == set()


def test_a_server_that_listens_at_loopback_alone_is_reached_over_qrexec(
    run: Command, nft_lab: NftLab
) -> None:
    nft_lab.listens = "tcp.8080 loopback"
    added = run(*ADD)
    assert (
        "Note: it goes over qrexec, as the server in work listens at loopback alone; 'qvm-forward set "
        "work web "
        "mode=nft' is faster if it listens elsewhere too.\n"
    ) in added.out
    run("set", "work", "web", "mode=nft")
    assert run("diagnose", "work", "web").status == 1


def test_watch_applies_it_and_says_what_no_qube_confirms(
    nft_lab: NftLab, forward: Command, lab: LabDirectory
) -> None:
    forward(*ADD, "--mode", "nft", "--no-apply")
    assert told(nft_lab) == set()
    stage = Hanging(lab)
    stage.run(lambda: forward("disable", "work", "web", "--no-apply"))
    assert "work: let packets through for nft.work.web: version=1 role=target" in stage.out.getvalue()
    assert "sys-net: let no packets through for nft.work.web" in stage.out.getvalue()
    assert (
        "still open: work web: sys-firewall does not answer: it hangs; it may still " in stage.err.getvalue()
    )
    assert told(nft_lab) == set()


def test_what_may_finish_after_its_time_is_not_called_closed(run: Command, nft_lab: NftLab) -> None:
    run(*ADD, "--expire", "+300", "--on-expire", "drain")
    line = nft_lab.lab.features("work")["forward.web"]
    nft_lab.lab.set_feature("work", "forward.web", line.replace(f"expire={NOW + 300}", f"expire={NOW}"))
    nft_lab.says = dict.fromkeys(PATH, drains)
    closed = run("apply")
    assert (closed.status, closed.err.count("note: work web: ")) == (0, 3)
    removed = run("remove", "work", "web")
    assert removed.status == 0
    assert removed.out == (
        "Forward work web is removed and accepts no new connections; open ones may go on.\n"
    )
    assert "note: work web: sys-net lets its connections go on for up to an hour" in removed.err


def test_panic_says_what_closes_a_forward_of_which_no_qube_answers(run: Command, nft_lab: NftLab) -> None:
    run(*ADD)
    nft_lab.says = dict.fromkeys(PATH[1:], hangs)
    assert "'qvm-prefs work netvm '''" not in run("panic").err
    run("resume")
    nft_lab.says = dict.fromkeys(PATH, hangs)
    assert "'qvm-prefs work netvm ''' closes it whatever the qubes of its path do\n" in run("panic").err
