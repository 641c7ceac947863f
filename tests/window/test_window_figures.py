# SPDX-License-Identifier: GPL-2.0-or-later
"""What the qubes say of forwards, in words; and what is in force and should not be."""

from dataclasses import replace

import pytest
from answered import REPORT, listening
from answered import look as status
from answering import Answering
from fake_admin import FakeQubes
from nftlab import NftLab, forgets, hangs
from test_nftstatus import OTHER, also
from test_status_clients import ASKED, FLOW, ONE, naming
from worlds import ADD, NOW, Command

from qubes_fwd_qrexec.admin.answers import AnswerError
from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.states import Key
from qubes_fwd_qrexec.common.report import QubeReport, dump
from qubes_fwd_qrexec.common.values import Proto, QubeName
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.qube import QubeState
from qubes_fwd_qrexec.window.model import figures
from qubes_fwd_qrexec.window.model.figures import Figures, clients, leftovers, lines
from qubes_fwd_qrexec.window.model.look import look_at

KEY: Key = (QubeName("work"), "web")
BYTES = "999 from clients, 1.5 KiB to clients"


def said(store: Backend, **answers: QubeReport | AnswerError) -> tuple[str, ...]:
    """What is said of the rule where the qubes answer that."""
    return lines(Figures(NOW, status(store, **answers)), KEY)


def test_figures_are_those_of_the_listener(forward: Command, store: Backend) -> None:
    forward(*ADD)
    report = replace(REPORT, refused={"srchosts": 2, "rate": 1})
    found = status(store, sys_net=listening(report))
    # No parsed report has it; it is no markup or escape even so.
    (row,) = found.rows
    untrusted = replace(report, last_error="no \x1bserver")
    row = row._replace(uptake=row.uptake._replace(report=untrusted))
    assert lines(Figures(NOW, found._replace(rows=(row,))), KEY) == (
        "3 now, 40 accepted, 3 refused",
        BYTES,
        "work web: refused: 1 over the rate limit, 2 from sources that are not allowed.",
        "work web: last error: no \\x1bserver.",
    )


def test_each_protocol_of_a_rule_has_its_own(forward: Command, store: Backend) -> None:
    forward(*ADD, "--proto", "both")
    flows = replace(REPORT, proto=Proto.UDP, connections=7)
    found = said(store, sys_net=listening(REPORT, flows))
    assert found[:3] == ("TCP: 3 now, 40 accepted, 0 refused", BYTES, "UDP: 7 now, 40 accepted, 0 refused")


def test_why_there_are_none_is_said(forward: Command, store: Backend, lab: LabDirectory) -> None:
    forward(*ADD)
    helps = "'qvm-forward diagnose work web' says what helps"
    assert said(store, sys_net=AnswerError("it hangs")) == ("Figures are unknown: it hangs.",)
    assert said(store, sys_net=QubeReport(program="1")) == (
        f"It is not open: sys-net does not listen: no listener is running; {helps}.",
    )
    assert said(store, sys_net=listening()) == (
        f"It is not open: sys-net does not have it open yet; {helps}.",
    )
    lab.set_state("sys-net", QubeState.HALTED)
    assert said(store) == ("Figures are unknown: sys-net is halted.",)


def test_what_is_open_in_part_has_figures_and_says_so(forward: Command, store: Backend) -> None:
    forward(*ADD)
    found = said(store, sys_net=listening(replace(REPORT, is_listening=False)))
    assert found[0] == "3 now, 40 accepted, 0 refused"
    assert found[2].startswith("work web is waiting: sys-net does not have it open: not all of its ports")


def test_nothing_is_said_of_what_is_closed_and_before_anybody_was_asked(
    forward: Command, store: Backend
) -> None:
    forward(*ADD, "--disabled")
    assert said(store) == ()
    assert lines(None, KEY) == ("The qubes have not been asked yet.",)
    assert clients(None, KEY) == ()


@pytest.fixture
def nft(nft_lab: NftLab, run: Command) -> NftLab:
    """With one forward that is in force everywhere."""
    assert run(*ADD).status == 0
    return nft_lab


def asked(backend: Backend) -> Figures:
    return figures.ask(backend, look_at(backend, NOW), NOW)


def test_by_nft_the_exposed_qube_counts(nft: NftLab) -> None:
    assert lines(asked(nft), KEY) == ("3 accepted, 40 packets", "2.0 KiB from clients, 5 to clients")


def test_by_nft_it_is_said_which_qube_has_it_not_in_force_or_does_not_answer(nft: NftLab) -> None:
    nft.says["sys-firewall"] = forgets
    first, *counts = lines(asked(nft), KEY)
    assert first.startswith("It is not open all the way: sys-firewall ")
    assert len(counts) == 2
    nft.says["sys-net"] = hangs
    found = lines(asked(nft), KEY)
    assert found[0] == first
    assert found[1].startswith("Figures are unknown: sys-net ")


def test_by_nft_what_was_not_counted_is_said(nft_lab: NftLab, run: Command) -> None:
    run(*ADD, "--via", "sys-firewall")
    assert lines(asked(nft_lab), KEY)[-1].startswith("More may have passed: while a flowtable ")


def test_clients_are_those_of_the_forward(lab: LabDirectory, over: Command) -> None:
    backend = Answering(lab, {})
    over(backend, *ADD)
    other = replace(ONE, target=QubeName("personal"))
    backend.says[ASKED] = naming(ONE, other, FLOW)
    found = asked(backend)
    assert [(one.exposed, one.report) for one in clients(found, KEY)] == [("sys-net", ONE), ("sys-net", FLOW)]
    assert [one.report for one in clients(found, (QubeName("personal"), "web"))] == [other]
    assert clients(found, (QubeName("work"), "none")) == ()


def test_a_qubes_system_is_asked_as_a_lab_is(
    dom0: FakeQubes, store: Backend, forward: Command, kind: str
) -> None:
    forward(*ADD)
    if kind == "qubes":
        dom0.says["sys-net", ASKED[1]] = dump(naming(ONE).as_json())
        found = asked(store)
        assert (lines(found, KEY)[0], len(clients(found, KEY))) == ("3 now, 40 accepted, 0 refused", 1)
    else:  # which is down
        assert lines(asked(store), KEY)[0].startswith("Figures are unknown: ")


def test_what_is_in_force_and_asked_for_by_no_rule_is_left(
    forward: Command, store: Backend, lab: LabDirectory
) -> None:
    forward(*ADD)
    assert leftovers(look_at(store, NOW), None) == ()
    lab.remove_feature("work", "forward.web")
    gone = look_at(store, NOW)
    assert leftovers(gone, None) == (
        "No rule asks for this: dom0's policy allows 'qubes.ForwardTCP +8080+mux sys-net work allow "
        "autostart=no notify=no'; 'qvm-forward apply' ends it.",
        "No rule asks for this: sys-net is told to listen for fwd.work.web; 'qvm-forward apply' ends it.",
    )
    forward("apply")
    answered = Figures(NOW, status(store, sys_net=listening(REPORT)))
    assert leftovers(look_at(store, NOW), answered) == (
        "work web should be closed, but sys-net still has 3 connections of it.",
    )


def test_what_a_qube_still_forwards_by_nft_is_left(nft: NftLab) -> None:
    nft.says["sys-firewall"] = also(OTHER)
    (left,) = leftovers(look_at(nft, NOW), asked(nft))
    assert left.startswith("No rule asks for this: sys-firewall still forwards work old by nft")
