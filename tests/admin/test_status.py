# SPDX-License-Identifier: GPL-2.0-or-later
"""The command status: what is open, what is not known, and what is not in force yet."""

import io
from argparse import Namespace
from typing import Any

from worlds import ADD, NOW, Command

from qubes_fwd_qrexec.admin.figures import Figures, Unknown
from qubes_fwd_qrexec.admin.labstore import LabStore
from qubes_fwd_qrexec.admin.session import Session
from qubes_fwd_qrexec.admin.states import Forward
from qubes_fwd_qrexec.admin.status import status
from qubes_fwd_qrexec.admin.tables import Style
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.qube import QubeState


def test_figures_are_unknown_and_the_reason_is_said_once(forward: Command) -> None:
    forward(*ADD)
    forward("add", "personal", "81", "--from", "any")
    assert forward("status").out == (
        "QUBE      NAME    STATE   EXPOSED AT  POLICY  OPEN NOW  ACCEPTED  REFUSED\n"
        "personal  tcp-81  active  sys-net:81  allows  unknown   unknown   unknown\n"
        "work      web     active  sys-net:80  allows  unknown   unknown   unknown\n"
        "Figures are unknown: this version cannot ask the listeners.\n"
    )
    narrow = forward("status", "work", style=Style(40)).out
    assert narrow.startswith(
        "work web: active\n  exposed at sys-net:80\n  policy allows\n  open now unknown\n"
    )


def test_nothing_open_is_said_with_what_is_closed(forward: Command) -> None:
    forward(*ADD, "--disabled")
    forward("apply")
    result = forward("status")
    assert (result.status, result.out) == (
        0,
        "Nothing is open.\nNot open: 1 disabled; 'qvm-forward list' says why.\n",
    )


def test_what_is_not_in_force_yet_is_counted_and_fails(forward: Command) -> None:
    forward("apply")
    forward(*ADD, "--no-apply")
    result = forward("status")
    assert result.status == 1
    assert "work  web   active  sys-net:80  denies" in result.out
    assert "Not in force yet: 2 changes; 'qvm-forward apply' makes them.\n" in result.out
    data = forward("status", "vault", "--json")
    assert (data.status, data.json["forwards"]) == (1, [])
    assert [step["step"] for step in data.json["due"]] == ["open-policy", "set-config"]


def test_a_halted_listener_is_not_asked(forward: Command, lab: LabDirectory) -> None:
    forward(*ADD)
    lab.set_state("sys-net", QubeState.HALTED)
    assert "Figures are unknown: sys-net is halted.\n" in forward("status").out
    assert forward("status", "--json").json["forwards"] == [
        {
            "qube": "work",
            "name": "web",
            "state": "waiting",
            "exposed": "sys-net",
            "ports": "80",
            "is_allowed": True,
            "figures": {"is_known": False, "reason": "sys-net is halted"},
        }
    ]


class Asked:
    """A source that knows one forward, and refuses to be asked about others."""

    def __init__(self, answer: Figures | Unknown) -> None:
        self._answer = answer

    def figures(self, forward: Forward) -> Figures | Unknown:
        assert str(forward.source) == "work web"
        return self._answer


def _with(lab: LabDirectory, answer: Figures | Unknown, *, is_json: bool = False) -> tuple[int, str]:
    out = io.StringIO()
    session = Session(LabStore(lab), NOW, {}, io.StringIO(), out, io.StringIO(), Style(), is_json)
    return status(Namespace(qube=[]), session, Asked(answer)), out.getvalue()


def test_figures_are_shown_where_a_source_has_them(forward: Command, lab: LabDirectory) -> None:
    forward(*ADD)
    code, shown = _with(lab, Figures(connections=3, accepted=40, refused=5))
    assert (code, "Figures" in shown) == (0, False)
    assert " ".join(shown.splitlines()[1].split()) == "work web active sys-net:80 allows 3 40 5"


def test_what_a_listener_complains_of_is_shown_and_fails(forward: Command, lab: LabDirectory) -> None:
    forward(*ADD)
    trouble = Figures(0, 0, 0, "another program has port 80 of sys-net")
    assert _with(lab, trouble)[0] == 1
    assert "work web: another program has port 80 of sys-net.\n" in _with(lab, trouble)[1]
    import json

    data: Any = json.loads(_with(lab, trouble, is_json=True)[1])
    assert data["forwards"][0]["figures"] == {
        "is_known": True,
        "connections": 0,
        "accepted": 0,
        "refused": 0,
        "problem": "another program has port 80 of sys-net",
    }
