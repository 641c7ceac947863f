# SPDX-License-Identifier: GPL-2.0-or-later
"""The command tunnel: what a mark closes, what opens again without it, and whose marks are whose."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from faulty import Faulty
from worlds import ADD, Command, content, rule

from qubes_fwd_qrexec.lab.directory import LabDirectory

POLICY = "qubes.ForwardTCP  +8080+mux  sys-net  work  allow"


def policy(lab: LabDirectory) -> str:
    return (lab.policy_dir / "30-forward.policy").read_text()


def change(lab: LabDirectory, name: str, **more: Any) -> None:
    lab.write_qube(replace(lab.qube(name), **more))


def test_a_mark_closes_at_once_what_goes_round_it_and_says_which(forward: Command, lab: LabDirectory) -> None:
    forward(*ADD)
    forward("add", "personal", "81", "--from", "any", "--internal")
    assert POLICY in policy(lab)
    result = forward("tunnel", "mark", "sys-firewall")
    assert result.status == 0
    assert result.out.startswith(
        "sys-firewall is marked as a tunnel. Neither it nor the qubes behind it (personal, "
        "sys-vpn, untrusted, work) may be exposed outside of it.\nClosed at sys-net: work web. work "
        "is behind a tunnel, marked at sys-firewall (feature forward.tunnel), and listening at sys-net would "
        "bypass it"
    )
    assert "personal tcp-81" not in result.out
    assert POLICY not in policy(lab)
    assert lab.vm_config("sys-net") == {}
    assert lab.feature("sys-firewall", "forward.tunnel") == "1"
    assert forward("apply").out == "Nothing to change: all is as the rules ask for.\n"


def test_a_mark_of_the_target_itself_closes_what_goes_round_it(forward: Command, lab: LabDirectory) -> None:
    """A VPN that runs in the target: every listener elsewhere is outside of it."""
    forward(*ADD)
    result = forward("tunnel", "mark", "work")
    assert (result.status, result.err) == (0, "")
    assert result.out.endswith(
        "\nClosed at sys-net: work web. work is a tunnel itself (feature forward.tunnel), and "
        "listening at sys-net would bypass it; do not expose it, or accept that with bypass-tunnel=yes "
        "(--bypass-tunnel).\n"
    )
    assert POLICY not in policy(lab)
    assert lab.vm_config("sys-net") == {}
    refused = forward("add", "work", "81", "--from", "any")
    assert (refused.status, "work tcp-81 was not added. work is a tunnel itself" in refused.err) == (1, True)
    shown = " ".join(forward("show", "work", "web").out.split())
    assert shown.count("work is a tunnel itself (feature forward.tunnel), and listening at sys-net") == 2
    diagnosed = forward("diagnose", "work", "web")
    assert (diagnosed.status, "work is a tunnel itself (feature forward.tunnel)" in diagnosed.out) == (
        1,
        True,
    )
    assert forward("tunnel", "list").out.startswith(
        "sys-vpn: feature service.vpn-handler-openvpn\n  behind it: untrusted\n"
        "work (has forwards): feature forward.tunnel\n  behind it: nothing\n"
    )
    assert forward("set", "work", "web", "bypass-tunnel=yes").out.startswith(
        "Forward work web is changed and active."
    )
    assert "note: bypasses the tunnel work (feature forward.tunnel)\n" in forward("list").out
    assert POLICY in policy(lab)


def test_a_vpn_qubes_own_service_is_for_those_behind_it(forward: Command, lab: LabDirectory) -> None:
    words = ("add", "sys-vpn", "80", "--from", "any")
    assert "sys-vpn is a tunnel itself (feature service.vpn-handler-openvpn)" in forward(*words).err
    assert forward(*words, "--via", "untrusted", "--name", "inside").status == 0
    assert forward(*words, "--bypass-tunnel", "--name", "outside").status == 0
    lab.set_feature("sys-vpn", "forward.third", lab.features("sys-vpn")["forward.outside"].replace(
        " bypass-tunnel=yes", "").replace("=80-80", "=81-81"))  # fmt: skip
    lab.set_feature("sys-vpn", "forward.tunnel", "1")
    assert "Forward sys-vpn third stays refused. " in forward("tunnel", "unmark", "sys-vpn").out


def test_unmark_opens_again_and_says_so(forward: Command, lab: LabDirectory) -> None:
    forward(*ADD)
    before = content(lab)
    forward("tunnel", "mark", "sys-firewall")
    result = forward("tunnel", "unmark", "sys-firewall")
    assert (result.status, result.err) == (0, "")
    assert result.out.startswith(
        "sys-firewall is no longer marked as a tunnel.\nOpened at sys-net: work web. Connections to "
    )
    assert content(lab) == before


def test_what_the_rule_accepts_stays_open_and_is_named(forward: Command, lab: LabDirectory) -> None:
    forward(*ADD, "--bypass-tunnel")
    result = forward("tunnel", "mark", "sys-firewall")
    assert result.out.endswith(
        "Forward work web stays open: it bypasses the tunnel sys-firewall (feature forward.tunnel), as its "
        "rule accepts.\n"
    )
    assert POLICY in policy(lab)


def test_a_second_mark_changes_nothing_and_one_with_nothing_behind_says_so(
    forward: Command, lab: LabDirectory
) -> None:
    assert forward("tunnel", "mark", "vault").out == (
        "vault is marked as a tunnel. Neither it nor the qubes behind it (none yet) may be exposed "
        "outside of it.\n"
    )
    before = content(lab)
    assert forward("tunnel", "mark", "vault").out.startswith("vault is already marked as a tunnel.")
    assert content(lab) == before


def test_another_mark_keeps_its_qube_a_tunnel(forward: Command, lab: LabDirectory) -> None:
    forward("add", "untrusted", "80", "--from", "any", "--bypass-tunnel", "--no-apply")
    forward("set", "untrusted", "tcp-80", "bypass-tunnel=", "--no-apply")
    lab.set_feature("sys-vpn", "forward.tunnel", "1")
    result = forward("tunnel", "unmark", "sys-vpn")
    assert result.out.startswith(
        "sys-vpn has lost the mark of qvm-forward and is still a tunnel: feature "
        "service.vpn-handler-openvpn, which "
        "'qvm-features --unset sys-vpn service.vpn-handler-openvpn' removes.\n"
    )


def test_what_stays_refused_by_another_tunnel_is_said(forward: Command, lab: LabDirectory) -> None:
    forward("add", "untrusted", "80", "--from", "any", "--bypass-tunnel")
    lab.set_feature("untrusted", "forward.tcp-80", (lab.feature("untrusted", "forward.tcp-80") or "").replace(
        " bypass-tunnel=yes", ""))  # fmt: skip
    lab.set_feature("sys-firewall", "forward.tunnel", "1")
    result = forward("tunnel", "unmark", "sys-firewall")
    assert (
        "Forward untrusted tcp-80 stays refused. untrusted is behind a tunnel, marked at sys-vpn"
        in result.out
    )


WHOSE: list[tuple[Callable[[LabDirectory], object], str, str]] = [
    (lambda lab: None, "sys-firewall", "sys-firewall is not marked as a tunnel; marked are sys-vpn"),
    (lambda lab: lab.remove_feature("sys-vpn", "service.vpn-handler-openvpn"), "vault", "; no qube is"),
    (
        lambda lab: None,
        "sys-vpn",
        "sys-vpn is marked as a tunnel by other means, which qvm-forward does not change: feature "
        "service.vpn-handler-openvpn, which 'qvm-features --unset sys-vpn service.vpn-handler-openvpn' "
        "removes",
    ),
    (
        lambda lab: change(lab, "sys-firewall", tags=["anon-gateway"]),
        "sys-firewall",
        "tag anon-gateway, which 'qvm-tags sys-firewall del anon-gateway' removes",
    ),
    (
        lambda lab: lab.set_feature("fedora-42", "whonix-gw", "1"),
        "sys-firewall",
        "feature whonix-gw, which 'qvm-features --unset fedora-42 whonix-gw' removes",
    ),
    (
        lambda lab: lab.set_feature("sys-firewall", "whonix-gw", "1"),
        "sys-firewall",
        "feature whonix-gw, which 'qvm-features --unset sys-firewall whonix-gw' removes",
    ),
    (
        lambda lab: lab.set_feature("fedora-42", "forward.tunnel", "1"),
        "sys-firewall",
        "feature forward.tunnel, which 'qvm-forward tunnel unmark fedora-42' removes",
    ),
]


@pytest.mark.parametrize(("prepare", "qube", "words"), WHOSE)
def test_marks_of_others_stay_and_the_way_to_take_them_away_is_told(
    forward: Command, lab: LabDirectory, prepare: Callable[[LabDirectory], object], qube: str, words: str
) -> None:
    prepare(lab)
    before = content(lab)
    result = forward("tunnel", "unmark", qube)
    assert (result.status, result.out) == (1, "")
    assert words in result.err
    assert content(lab) == before


def test_a_templates_mark_is_its_qubes_mark(forward: Command, lab: LabDirectory) -> None:
    result = forward("tunnel", "mark", "debian-12")
    assert result.out == "debian-12 is marked as a tunnel. That marks every qube made from it: personal.\n"
    assert "debian-12: feature forward.tunnel" in forward("tunnel", "list").out
    assert forward("tunnel", "unmark", "debian-12").status == 0


def test_what_a_mark_closes_keeps_its_port_and_gets_it_back(forward: Command, lab: LabDirectory) -> None:
    """A rule that was stored by hand meanwhile is second by its name."""
    forward("add", "personal", "80", "--from", "any")
    forward("tunnel", "mark", "sys-firewall")
    lab.set_feature("vault", "forward.tcp-80", str(rule("via=sys-net", target="vault").rule))
    forward("apply")
    assert lab.vm_config("sys-net") == {}
    result = forward("tunnel", "unmark", "sys-firewall")
    assert "Opened at sys-net: personal tcp-80. " in result.out
    assert lab.vm_config("sys-net").keys() == {"fwd.personal.tcp-80"}


def test_the_list_has_every_mark_and_what_is_behind(forward: Command, lab: LabDirectory) -> None:
    forward("add", "untrusted", "80", "--from", "any", "--internal")
    lab.set_feature("sys-vpn", "forward.tunnel", "1")
    change(lab, "vault", tags=["anon-vm"])
    assert forward("tunnel", "list").out == (
        "sys-vpn: feature forward.tunnel, feature service.vpn-handler-openvpn\n"
        "  behind it: untrusted (has forwards)\n"
        "vault: tag anon-vm, may be reached through its tunnel only\n"
    )
    assert forward("tunnel", "list", "--json").json == {
        "version": 1,
        "tunnels": [
            {
                "qube": "sys-vpn",
                "marks": ["feature forward.tunnel", "feature service.vpn-handler-openvpn"],
                "behind": ["untrusted"],
                "targets": ["untrusted"],
            }
        ],
        "anonymous": [{"qube": "vault", "mark": "tag anon-vm"}],
    }


def test_a_list_of_nothing_says_how_to_mark(forward: Command, lab: LabDirectory) -> None:
    lab.remove_feature("sys-vpn", "service.vpn-handler-openvpn")
    assert forward("tunnel", "list").out.startswith("No tunnel qubes. 'qvm-forward tunnel mark QUBE'")


def test_json_of_a_mark(forward: Command) -> None:
    forward(*ADD)
    data = forward("tunnel", "mark", "sys-firewall", "--json").json
    assert (data["qube"], data["marks"]) == ("sys-firewall", ["feature forward.tunnel"])
    assert data["steps"][-1]["feature"] == "vm-config.fwd.work.web"
    data = forward("tunnel", "unmark", "sys-firewall", "--json").json
    assert (data["marks"], data["steps"][-1]["feature"]) == ([], "vm-config.fwd.work.web")


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        (("mark",), 2, "mark needs a qube"),
        (("list", "work"), 2, "list shows all tunnel qubes; leave work out"),
        (("mark", "gone"), 1, "there is no qube 'gone'"),
        (("mark", "dom0"), 1, "is the administrative qube"),
    ],
)
def test_what_is_wrong_is_said(
    forward: Command, lab: LabDirectory, argv: tuple[str, ...], status: int, words: str
) -> None:
    before = content(lab)
    result = forward("tunnel", *argv)
    assert result.status == status
    assert words in result.err
    assert content(lab) == before


def test_a_mark_that_could_not_be_applied_is_kept_and_said(
    forward: Command, over: Command, lab: LabDirectory
) -> None:
    forward(*ADD)
    result = over(Faulty(lab, "policy"), "tunnel", "mark", "sys-firewall")
    assert result.status == 1
    assert "the change is stored, but " in result.err
    assert lab.feature("sys-firewall", "forward.tunnel") == "1"


def test_what_else_comes_into_force_is_named(forward: Command, lab: LabDirectory) -> None:
    forward(*ADD)
    forward("add", "vault", "81", "--from", "any", "--via", "sys-net", "--no-apply")
    out = forward("tunnel", "mark", "sys-firewall").out
    assert "\nClosed at sys-net: work web. work is behind a tunnel" in out
    assert "\nOpened at sys-net: vault tcp-81. Connections to port 81 of sys-net" in out
    assert "vault" not in forward("tunnel", "unmark", "sys-firewall").out
