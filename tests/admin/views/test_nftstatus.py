# SPDX-License-Identifier: GPL-2.0-or-later
"""What status and show say of forwards by nft: how each qube of the path stands, and what it has counted."""

import io
import os
import signal
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace

import pytest
from nftlab import FEATURE, PATH, NftLab, forgets, hangs
from worlds import ADD, NOW, Command

from qubes_fwd_qrexec.admin.answers import AnswerError
from qubes_fwd_qrexec.admin.views.session import Session
from qubes_fwd_qrexec.admin.views.status import watch
from qubes_fwd_qrexec.admin.views.tables import Style
from qubes_fwd_qrexec.common.nftreport import NftReport, PathReport, Why
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.lab.qube import QubeState
from qubes_fwd_qrexec.system.ending import Ending

OTHER = PathReport(key="nft.work.old", digest="0" * 16, connections=1)


def also(*more: PathReport) -> Callable[[NftReport], NftReport]:
    """A qube that has more in force than it is told."""
    return lambda report: replace(report, forwards=(*report.forwards, *more))


@pytest.fixture
def forward(run: Command) -> Command:
    """With one forward that is in force everywhere."""
    assert run(*ADD).status == 0
    return run


def test_status_has_what_the_exposed_qube_counts_and_how_many_have_it_in_force(forward: Command) -> None:
    status = forward("status")
    assert status.status == 0
    titles, row = (line.split("  ") for line in status.out.splitlines())
    cells = dict(zip(filter(None, map(str.strip, titles)), filter(None, map(str.strip, row)), strict=True))
    assert cells == {
        "QUBE": "work",
        "NAME": "web",
        "STATE": "active",
        "EXPOSED AT": "sys-net:80",
        "THEN": "sys-firewall - work",
        "IN FORCE": "3 of 3",
        "CONNECTIONS": "3",
        "PACKETS": "40",
        "FROM CLIENTS": "2.0 KiB",
        "TO CLIENTS": "5",
    }
    (found,) = forward("status", "--json").json["forwards"]
    assert found["path"] == ["sys-firewall", "sys-net"]  # as plan, list and show have it
    figures = {"is_known": True, "total": 3, "packets": 40, "sent": 2048, "received": 5}
    assert found["figures"] == {**figures, "is_least": False}
    roles = ("exposed", "hop", "target")
    assert [(hop["qube"], hop["role"]) for hop in found["answers"]] == [*zip(PATH, roles, strict=True)]
    assert {(hop["state"], hop["cause"], hop["reason"]) for hop in found["answers"]} == {
        ("in-force", None, None)
    }
    # A target does not count what it sends.
    assert [hop["figures"]["received"] for hop in found["answers"]] == [5, 5, None]


def test_an_empty_line_parts_the_forwards_over_qrexec_from_those_by_nft(forward: Command) -> None:
    assert forward("add", "work", "81", "--from=any", "--mode=qrexec").status == 0
    over_qrexec, by_nft = forward("status").out.split("\n\n")[:2]
    assert (over_qrexec.split()[:2], by_nft.split()[:2]) == (["QUBE", "NAME"], ["QUBE", "NAME"])


def test_a_qube_that_does_not_have_it_in_force_makes_the_forward_wait(
    forward: Command, nft_lab: NftLab
) -> None:
    nft_lab.says["sys-firewall"] = forgets
    status = forward("status")
    assert status.status == 1
    assert "work  web   waiting  sys-net:80  sys-firewall - work  2 of 3 " in status.out
    assert status.out.endswith(
        "\n\nwork web is waiting: sys-firewall does not have it in force; 'qvm-forward diagnose work web' "
        "says what helps.\n"
    )
    (found,) = forward("status", "--json").json["forwards"]
    assert (found["state"], found["cause"]) == ("waiting", "not-in-force")
    assert found["figures"]["is_known"] is True
    hop = found["answers"][1]
    reason = "sys-firewall does not have it in force"
    assert (hop["state"], hop["reason"]) == ("not-in-force", reason)
    assert hop["figures"] == {"is_known": False, "reason": reason}


def test_of_a_qube_that_does_not_answer_nothing_is_known(forward: Command, nft_lab: NftLab) -> None:
    nft_lab.says["sys-net"] = hangs
    status = forward("status")
    assert status.status == 0
    assert "  active  sys-net:80  sys-firewall - work  2 of 3    unknown " in status.out
    assert status.out.endswith("\nWhat is forwarded by nft at sys-net is unknown: it hangs.\n")
    data = forward("status", "--json").json
    assert data["silent"] == ["sys-net"]
    (found,) = data["forwards"]
    assert (found["state"], found["answers"][0]["state"]) == ("active", "no-answer")


def test_a_qube_of_the_path_that_is_halted_is_named_and_not_asked(forward: Command, nft_lab: NftLab) -> None:
    nft_lab.lab.set_state("sys-firewall", QubeState.HALTED)
    nft_lab.says["sys-firewall"] = hangs
    status = forward("status")
    assert status.status == 0
    assert "work web is waiting: sys-firewall is halted; 'qvm-forward diagnose work web' says" in status.out
    assert "hangs" not in status.out
    (found,) = forward("status", "--json").json["forwards"]
    assert found["state"] == "waiting"
    assert [hop["state"] for hop in found["answers"]] == ["in-force", "halted", "in-force"]


def test_what_a_qube_forwards_though_nothing_tells_it_to_is_said_first(
    forward: Command, nft_lab: NftLab
) -> None:
    nft_lab.says["sys-net"] = also(OTHER, replace(OTHER, key="nft.work.late", digest=None, why=Why.OVER))
    status = forward("status")
    assert status.status == 1
    assert status.out.splitlines()[0] == (
        "No rule asks for this: sys-net still forwards work old by nft; restart "
        "sys-net, or cut off the target with 'qvm-prefs work netvm '''."
    )
    data = forward("status", "--json").json
    assert data["leftovers"] == [{"qube": "sys-net", "what": "nft.work.old"}]
    # However much it says, that is one line.
    many = [replace(OTHER, key=f"nft.work.n{number}") for number in range(7)]
    nft_lab.says["sys-net"] = also(*many)
    named = "work n0, work n1, work n2, work n3, work n4 and 2 more"
    assert f"sys-net still forwards {named} by nft" in forward("status").out
    # About other qubes it is not asked.
    assert "still forwards" not in forward("status", "vault").out


def test_what_dom0_itself_tells_a_qube_is_said_with_what_ends_it_and_once(
    forward: Command, nft_lab: NftLab
) -> None:
    value = nft_lab.lab.features("sys-net")[FEATURE]
    nft_lab.lab.set_feature("sys-net", "vm-config.nft.gone.web", value)
    first, *rest = forward("status").out.splitlines()
    assert first == (
        "No rule asks for this: sys-net is told to forward nft.gone.web; 'qvm-forward apply' ends it."
    )
    assert "gone web" not in "".join(rest)


@pytest.mark.parametrize(("expire", "left_s"), [(NOW - 600, 3000), (None, 3600)])
def test_connections_that_may_finish_are_no_fault(
    run: Command, nft_lab: NftLab, expire: int | None, left_s: int
) -> None:
    run(*ADD, "--on-expire", "drain", "--disabled")
    if expire is not None:
        nft_lab.lab.set_feature(
            "work", "forward.web", f"{nft_lab.lab.features('work')['forward.web']} expire={expire}"
        )
    drains = PathReport(key="nft.work.web", why=Why.OVER, draining=True, connections=2)
    nft_lab.says = dict.fromkeys(PATH, also(drains))
    status = run("status")
    assert status.status == 0
    # Every qube of the path has them, and they are said once.
    listed = run("list")
    for printed in (status.out, listed.out):
        assert printed.count("draining") == 1
        rows = [" ".join(line.split()) for line in printed.splitlines()]
        assert f"work web draining sys-firewall connections in {left_s // 60} min" in rows
    (draining,) = run("status", "--json").json["draining"]
    assert (draining["connections"], draining["left_s"]) == (None, left_s)


def test_what_a_firewall_says_is_wrong_with_it_is_said(forward: Command, nft_lab: NftLab) -> None:
    nft_lab.says["work"] = lambda report: replace(report, problem="nft: no such file")
    status = forward("status")
    assert status.status == 1
    assert "work: its firewall for forwards by nft is not as it should be: nft: no such file.\n" in status.out
    assert forward("status", "--json").json["problems"] == {"work": "nft: no such file"}


def test_a_qube_without_our_program_has_nothing_in_force(run: Command, nft_lab: NftLab) -> None:
    nft_lab.says = dict.fromkeys(PATH, lambda _: AnswerError("no such service", 127))
    assert run("status", "vault").out.startswith("Nothing is open.\n")


def test_where_a_flowtable_hides_packets_that_is_said(run: Command) -> None:
    run(*ADD, "--via", "sys-firewall")
    status = run("status")
    assert status.out.endswith(
        "\nsys-firewall may have passed on more packets and bytes: while a flowtable speeds up a "
        "connection, its packets are not counted.\n"
    )
    assert run("status", "--json").json["forwards"][0]["figures"]["is_least"] is True
    run("set", "work", "web", "forwardtype=internal")
    assert "flowtable" not in run("status").out


def test_a_watch_shows_forwards_by_nft_too(forward: Command, nft_lab: NftLab) -> None:
    out, err = io.StringIO(), io.StringIO()
    session = Session(nft_lab, NOW, {}, io.StringIO(), out, err, Style(), is_json=False, warned=set())
    with Ending() as ending:
        os.kill(os.getpid(), signal.SIGTERM)
        assert watch(Namespace(qube=[], watch=True, clients=False), session, ending) == 0
    assert (out.getvalue().count("3 of 3"), err.getvalue()) == (1, "")


def test_show_says_how_it_stands_at_each_qube_and_what_is_less_safe(
    forward: Command, nft_lab: NftLab
) -> None:
    nft_lab.says["sys-firewall"], nft_lab.says["work"] = forgets, hangs
    shown = forward("show", "work", "web")
    lines = [line.split(maxsplit=3) for line in shown.out.splitlines() if "  in force  " in line]
    assert lines == [
        ["ok", "in", "force", "at sys-net"],
        ["stops", "in", "force", "sys-firewall does not have it in force"],
        ["unknown", "in", "force", "at work: work does not answer: it hangs"],
    ]
    # Whether anything gets to a qube that does not answer is not known.
    assert "    | nft\n    X\n  sys-firewall, port 80, not in force\n" in shown.out
    assert "    | nft\n    v\n  work, port 8080, no answer\n" in shown.out
    assert "note     safety    the network stack of work itself faces the clients, every qube" in shown.out
    data = forward("show", "work", "web", "--json").json
    assert [hop["state"] for hop in data["answers"]] == ["in-force", "not-in-force", "no-answer"]
    nft_lab.lab.set_state("work", QubeState.HALTED)
    assert "note   in force  work is halted\n" in forward("show", "work", "web").out
    nft_lab.says["sys-net"] = forgets
    assert "    | outer\n    X\n  sys-net, port 80, not in force\n" in forward("show", "work", "web").out


def test_who_adds_one_is_told_what_is_less_safe_and_not_what_is_about_qrexec(run: Command) -> None:
    added = run(*ADD).out
    assert "and dom0 judges the rule, not each connection.\n" in added
    assert "Note: the server in work must listen on more than 127.0.0.1.\n" in added
    assert "sees every client as 127.0.0.1" not in added
    over_qrexec = run("set", "work", "web", "mode=qrexec")
    assert "network stack" not in over_qrexec.out
    assert "sees every client as 127.0.0.1" in over_qrexec.out


def test_who_opens_one_that_qubes_do_not_confirm_is_told_once_what_says_more(
    run: Command, nft_lab: NftLab
) -> None:
    nft_lab.says["sys-firewall"], nft_lab.says["work"] = forgets, hangs
    assert run(*ADD).err.splitlines() == [
        "qvm-forward: note: work web: work does not answer: it hangs",
        "qvm-forward: note: work web: sys-firewall does not have it in force",
        "qvm-forward: 'qvm-forward diagnose work web' says what helps",
    ]
    # Of one that closes there is nothing to diagnose.
    assert "diagnose" not in run("remove", "work", "web").err


def test_a_listener_is_never_asked_for_a_forward_by_nft(forward: Command, nft_lab: NftLab) -> None:
    nft_lab.log.clear()
    for words in (("status",), ("set", "work", "web", "comment=x"), ("enable", "work", "web")):
        said = forward(*words)
        assert "have it open" not in said.out + said.err, words
        assert "Figures are unknown" not in said.out, words


def test_a_qube_that_names_what_is_no_forward_cannot_be_read(forward: Command, nft_lab: NftLab) -> None:
    nft_lab.says[QubeName("sys-net")] = also(replace(OTHER, key="nft.\\x1b"))
    status = forward("status")
    assert (
        "What is forwarded by nft at sys-net is unknown: the answer of sys-net cannot be read: "
    ) in status.out
    assert "key must be nft.TARGET.NAME" in status.out
