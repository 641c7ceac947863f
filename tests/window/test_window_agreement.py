# SPDX-License-Identifier: GPL-2.0-or-later
"""Who confirms a rule is shown what was, what would be, and what that opens; and that is what happens."""

from dataclasses import replace

import pytest
from worlds import ADD, BY_NFT, NOW, Command

from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.seen import Seen
from qubes_fwd_qrexec.admin.snapshot import look
from qubes_fwd_qrexec.admin.states import Key
from qubes_fwd_qrexec.admin.views import reasons
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.window.model import actions
from qubes_fwd_qrexec.window.model.agreement import Agreement, Turn, agreement
from qubes_fwd_qrexec.window.model.look import look_at

KEY: Key = (QubeName("work"), "web")


def agreed(store: Backend, key: Key = KEY) -> Agreement:
    found = agreement(look_at(store, NOW), key, NOW)
    assert found is not None
    return found


def move(lab: LabDirectory, qube: str, netvm: str | None) -> None:
    lab.write_qube(replace(lab.qube(qube), netvm=None if netvm is None else QubeName(netvm)))


def test_a_changed_netvm_shows_the_old_way_and_the_new_one(
    store: Backend, forward: Command, lab: LabDirectory
) -> None:
    lab.set_feature("sys-firewall", "service.qubes-forward-listener", "1")
    forward("add", "work", "80", "--from", "10.137.0.0/16", "--internal", "--name", "web")
    move(lab, "work", "sys-net")
    found = agreed(store)
    assert found.turns == (
        Turn("Made for", "work", "work"),
        Turn("Netvms of work", "sys-firewall - sys-net", "sys-net"),
        Turn("Exposed at", "sys-firewall (vifs side)", "sys-net (vifs side)"),
        Turn("Who may connect", "10.137.0.0/16", "10.137.0.0/16"),
        Turn("Mode", "qrexec", "qrexec"),
    )
    assert [turn.is_same for turn in found.turns] == [True, False, False, True, True]
    assert found.opens == (
        "OPEN. Connections to port 80 of sys-net (vifs side) from 10.137.0.0/16 reach port 80 of work."
    )
    assert (found.problem, found.seen) == (None, Seen.of(look(store), KEY))


def test_what_is_shown_is_what_becomes_of_it(store: Backend, forward: Command, lab: LabDirectory) -> None:
    forward(*ADD)
    move(lab, "work", "sys-net")
    found = agreed(store)
    assert actions.confirm(store, NOW, KEY, found.seen).is_well
    (now,) = look(store).plan(NOW)
    assert f"OPEN. {reasons.sentence(now)}" == found.opens


def test_a_clone_shows_for_whom_the_rule_was_made(
    store: Backend, forward: Command, lab: LabDirectory
) -> None:
    forward(*ADD)
    forward("disable", "work", "web")
    line = lab.feature("work", "forward.web") or ""
    lab.set_feature("personal", "forward.web", line.replace(" enabled=no", ""))
    found = agreed(store, (QubeName("personal"), "web"))
    assert found.turns[0] == Turn("Made for", "work", "personal")
    assert found.turns[2].is_same


def test_what_was_never_recorded_is_said(store: Backend, lab: LabDirectory) -> None:
    lab.set_feature("work", "forward.web", "action=forward srcports=80 srchosts=any")
    found = agreed(store)
    assert found.turns[:2] == (
        Turn("Made for", "not recorded", "work"),
        Turn("Netvms of work", "not recorded", "sys-firewall - sys-net"),
    )


def test_names_say_whom_they_would_stand_for(store: Backend, forward: Command) -> None:
    forward("add", "vault", "80", "--via", "sys-firewall", "--internal", "--from", "work", "--name", "web")
    turn = agreed(store, (QubeName("vault"), "web")).turns[3]
    assert turn.was == "work"
    assert turn.will_be.startswith("work (10.137.")


def test_what_would_be_refused_cannot_be_agreed_to_and_says_why(
    store: Backend, forward: Command, lab: LabDirectory
) -> None:
    forward(*ADD)
    move(lab, "work", "sys-vpn")
    lab.set_feature("sys-vpn", "service.vpn-handler-openvpn", "1")
    found = agreed(store)
    assert found.problem is not None
    assert found.problem.startswith("work is behind a tunnel, marked at sys-vpn")


def test_netvms_that_lead_nowhere_cannot_be_agreed_to(
    store: Backend, forward: Command, lab: LabDirectory
) -> None:
    forward(*ADD)
    move(lab, "sys-net", "sys-firewall")
    found = agreed(store)
    assert (found.turns, found.problem is not None) == ((), True)
    assert found.problem is not None
    assert found.problem.startswith("work web was not confirmed. ")


@pytest.mark.parametrize("line", [None, "nonsense"])
def test_what_is_gone_or_broken_has_nothing_to_agree_to(
    store: Backend, lab: LabDirectory, line: str | None
) -> None:
    if line is not None:
        lab.set_feature("work", "forward.web", line)
    assert agreement(look_at(store, NOW), KEY, NOW) is None


def test_a_mode_that_is_decided_anew_is_said_to_be(store: Backend, lab: LabDirectory) -> None:
    for qube in ("work", "sys-firewall", "sys-net"):
        for key, value in BY_NFT.items():
            lab.set_feature(qube, key, value)
    lab.set_feature("work", "forward.web", "action=forward srcports=80 srchosts=any mode=auto")
    assert agreed(store).turns[-1].will_be == "nft, unless the server in work asks for the other"
