# SPDX-License-Identifier: GPL-2.0-or-later
"""What the pane of a rule tells is what `qvm-forward show` and `status` do."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from answered import REPORT, listening
from answering import Answering
from nftlab import NftLab, forgets
from test_drains import WEB, draining
from test_status_clients import ONE, OTHER, naming
from worlds import ADD, NOW, Command

from qubes_fwd_qrexec.admin.answers import AnswerError
from qubes_fwd_qrexec.admin.backend import Backend, PolicyCall, PolicyVerdict
from qubes_fwd_qrexec.admin.seen import Seen
from qubes_fwd_qrexec.admin.snapshot import look
from qubes_fwd_qrexec.admin.states import Key, State
from qubes_fwd_qrexec.admin.views.tables import Style
from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.store import LabStore
from qubes_fwd_qrexec.window.model import figures
from qubes_fwd_qrexec.window.model.about import About, about
from qubes_fwd_qrexec.window.model.figures import Figures
from qubes_fwd_qrexec.window.model.look import look_at

KEY: Key = (QubeName("work"), "web")


def told(backend: Backend, *, asks: bool = False) -> About:
    seen = look_at(backend, NOW)
    answers = figures.ask(backend, seen, NOW) if asks else None
    found = about(seen, answers, KEY, NOW)
    assert found is not None
    return found


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--disabled",),
        ("--expire", "1h", "--comment", "<b>&amp;"),
        ("--from", "any", "--via", "sys-firewall", "--internal"),
    ],
)
def test_it_tells_what_show_prints(store: Backend, forward: Command, options: tuple[str, ...]) -> None:
    words = ADD if "--from" not in options else ("add", "work", "80:8080", "--name", "web")
    forward(*words, *options)
    found, printed = told(store), forward("show", "work", "web", "--json").json
    assert (found.title, found.sentence, found.line) == ("work web", printed["reason"], printed["line"])
    assert (found.label, found.icon) == ("blue", "appvm-blue")
    assert found.state == printed["state"]
    assert [(check.name, check.verdict, check.text) for check in found.checks] == [
        (each["check"], each["verdict"], each["text"]) for each in printed["findings"]
    ]
    assert [list(map(list, check.ways_out)) for check in found.checks] == [
        each["ways_out"] for each in printed["findings"]
    ]
    assert list(found.policy) == printed["policy"]
    configs = [dict(zip(("qube", "feature", "value"), each, strict=True)) for each in found.told]
    assert configs == printed["configs"]
    assert found.seen == Seen.of(look(store), KEY)
    for width in (40, 100):
        shown = forward("show", "work", "web", style=Style(width)).out
        assert found.picture(width) in shown
    assert printed["line"] in found.text
    assert printed["mode_reason"] in found.text
    assert all(f"{each['feature']} = {each['value']}" in found.text for each in printed["configs"])


def test_what_cannot_be_read_shows_its_text_and_what_is_wrong(
    store: Backend, lab: LabDirectory, forward: Command
) -> None:
    lab.set_feature("work", "forward.web", "action=forward <b>&amp;")
    found = told(store)
    assert (found.state, found.forward, found.checks, found.picture(80)) == (State.BROKEN, None, (), "")
    assert found.text == "action=forward <b>&amp;"
    assert forward("show", "work", "web").out.startswith(f"{found.sentence}\n")


def test_there_is_nothing_about_a_rule_that_is_not_there(store: Backend) -> None:
    assert about(look_at(store, NOW), None, KEY, NOW) is None


def test_what_dom0s_policy_denies_shows_in_check_and_picture(
    store: Backend, forward: Command, lab: LabDirectory
) -> None:
    forward(*ADD)
    (lab.policy_dir / "20-mine.policy").write_text("* * @anyvm @anyvm deny\n")
    found = told(store)
    assert not found.is_allowed
    assert found.checks[-1].text.startswith("dom0 denies the call: ")
    rule = "qubes.ForwardTCP * @anyvm personal deny\n"
    (lab.policy_dir / "20-mine.policy").write_text(rule)
    forward("add", "personal", "81", "--from", "any")
    assert told(store).is_allowed
    (lab.policy_dir / "20-mine.policy").write_text("* * @anyvm @anyvm deny\n")
    assert "no policy" in found.picture(100)


class Unjudged(LabStore):
    """A system whose policy cannot be read from here, as that of a management qube, or not at all."""

    def __init__(self, lab: LabDirectory, error: StoreError | None = None) -> None:
        super().__init__(lab)
        self._error = error

    def verdicts(self, calls: Sequence[PolicyCall]) -> list[PolicyVerdict]:
        if self._error is not None:
            raise self._error
        return [PolicyVerdict(None, "this is not dom0") for _ in calls]


@pytest.mark.parametrize(
    ("error", "why"), [(None, "this is not dom0"), (StoreError("x"), "dom0's policy could not be asked")]
)
def test_what_is_not_known_of_policy_is_no_ok(
    lab: LabDirectory, over: Command, error: StoreError | None, why: str
) -> None:
    over(LabStore(lab), *ADD)
    found = told(Unjudged(lab, error))
    assert found.checks[-1].verdict == "note"
    assert found.checks[-1].text.endswith(f"whether another file denies it is not known: {why}")


def answering(lab: LabDirectory, over: Command, *argv: str) -> Callable[..., Answering]:
    def make(plain: object, clients: object) -> Answering:
        backend = Answering(
            lab,
            {("sys-net", "qubes.ForwardStatus+"): plain, ("sys-net", "qubes.ForwardStatus+clients"): clients},  # type: ignore[dict-item]
        )
        over(backend, *argv)
        lab.set_feature("sys-net", "service.qubes-forward-listener", "1")
        return backend

    return make


def test_clients_are_those_of_the_rule(lab: LabDirectory, over: Command) -> None:
    more = replace(ONE, port=1)
    backend = answering(lab, over, *ADD)(listening(REPORT), naming(ONE, more, OTHER))
    found = told(backend, asks=True)
    assert [(client.exposed, client.report) for client in found.clients] == [
        ("sys-net", ONE),
        ("sys-net", more),
    ]
    assert told(backend).clients == ()


def test_whom_the_qubes_do_not_tell_of_is_said(lab: LabDirectory, over: Command) -> None:
    make = answering(lab, over, *ADD)
    assert told(make(listening(REPORT), naming(ONE)), asks=True).figures[-1].endswith(" to clients")
    found = told(make(listening(REPORT), naming(ONE, left_out=3)), asks=True)
    assert found.figures[-1] == "sys-net has 3 more clients than it lists."
    silent = AnswerError("no")
    found = told(make(silent, silent), asks=True)
    assert found.figures[-1] == "Who is connected at sys-net is unknown: no answer."


def test_what_goes_on_of_a_closed_rule_is_said(lab: LabDirectory, over: Command) -> None:
    left = draining(WEB, replace(WEB, target=QubeName("personal")))
    backend = answering(lab, over, *ADD, "--disabled")(left, left)
    (line,) = told(backend, asks=True).goes_on
    assert line.startswith("work web: 2 connections at sys-net may go on for at most 50 min")


def test_by_nft_each_qube_of_the_path_says_how_it_stands(nft_lab: NftLab, over: Command) -> None:
    over(nft_lab, *ADD)
    assert told(nft_lab).hops == ()
    assert told(nft_lab).figures[-1] == "No qube reports who is connected by nft."
    found = told(nft_lab, asks=True)
    assert (found.checks[-1].name, found.checks[-1].text) == ("in force", "at sys-net, sys-firewall, work")
    nft_lab.says["sys-firewall"] = forgets
    found = told(nft_lab, asks=True)
    assert [check.verdict for check in found.checks[-2:]] == ["ok", "stops"]
    assert found.is_allowed
    assert "not in force" in found.picture(200)


def test_figures_of_another_look_are_not_those_of_the_rule(store: Backend, forward: Command) -> None:
    forward("add", "personal", "81", "--from", "any")
    old = look_at(store, NOW)
    answers = Figures(NOW, figures.ask(store, old, NOW).status)
    forward(*ADD)
    found = about(look_at(store, NOW), answers, KEY, NOW)
    assert found is not None
    assert (found.clients, found.goes_on, found.hops) == ((), (), ())
