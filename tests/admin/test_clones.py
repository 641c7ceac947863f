# SPDX-License-Identifier: GPL-2.0-or-later
"""A rule does not multiply: what clones and disposables inherit stays closed, with a way out."""

from dataclasses import replace

import pytest
from worlds import ADD, NOW, Command, qube, rule, world

from qubes_fwd_qrexec.admin.plan import plan
from qubes_fwd_qrexec.admin.states import Cause, State
from qubes_fwd_qrexec.admin.views import reasons
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.qube import QubeClass


def clone(lab: LabDirectory, source: str, name: str, klass: QubeClass = QubeClass.APP) -> None:
    """Make a qube of another, with all of its features, as Qubes does with clones and disposables."""
    old = lab.qube(source)
    template = old.name if klass is QubeClass.DISPOSABLE else old.template
    lab.write_qube(
        replace(old, name=QubeName(name), klass=klass, template=template, template_for_dispvms=False)
    )
    for key, value in lab.features(source).items():
        lab.set_feature(name, key, value)


def states(forward: Command) -> dict[str, str]:
    return {f["qube"]: f["state"] for f in forward("list", "--json").json["forwards"]}


def policy(lab: LabDirectory) -> str:
    return (lab.policy_dir / "30-forward.policy").read_text()


def test_a_clone_is_suspended_with_a_way_out_and_opens_nothing(forward: Command, lab: LabDirectory) -> None:
    forward(*ADD)
    clone(lab, "work", "office")
    assert states(forward) == {"office": "suspended", "work": "active"}
    (listed,) = forward("list", "office", "--json").json["forwards"]
    assert (listed["cause"], listed["reason"]) == (
        "cloned",
        "The rule was made for work and came to office by cloning or renaming; 'qvm-forward confirm office "
        "web' makes it a rule of office, 'qvm-forward remove office web' removes it.",
    )
    assert forward("apply").out == "Nothing to change: all is as the rules ask for.\n"


def test_the_clone_of_an_exposed_qube_is_told_to_stop_listening(forward: Command, lab: LabDirectory) -> None:
    forward(*ADD)
    clone(lab, "sys-net", "sys-net-2")
    assert lab.vm_config("sys-net-2").keys() == {"fwd.work.web"}
    assert forward("apply").out == "Changed:\n  sys-net-2: stop listening for fwd.work.web\n"
    assert lab.vm_config("sys-net-2") == {}
    assert lab.vm_config("sys-net").keys() == {"fwd.work.web"}


def test_the_clone_of_a_marked_tunnel_is_a_tunnel(forward: Command, lab: LabDirectory) -> None:
    forward("tunnel", "mark", "sys-firewall")
    clone(lab, "sys-firewall", "sys-fw-2")
    assert "sys-fw-2: feature forward.tunnel\n" in forward("tunnel", "list").out


def test_a_forward_of_a_disposable_template_opens_for_it_alone_and_says_so(
    forward: Command, lab: LabDirectory
) -> None:
    lab.write_qube(replace(lab.qube("work"), template_for_dispvms=True))
    added = forward(*ADD)
    assert added.status == 0
    assert (
        "Note: it opens work itself, not the disposables based on it, each of which needs a rule of "
        "its own.\n"
    ) in added.out
    clone(lab, "work", "disp42", QubeClass.DISPOSABLE)
    assert states(forward) == {"disp42": "suspended", "work": "active"}
    assert forward("apply").out == "Nothing to change: all is as the rules ask for.\n"
    assert "  work  allow" in policy(lab)
    assert "disp42" not in policy(lab)


def test_a_disposable_can_have_a_forward_of_its_own(forward: Command, lab: LabDirectory) -> None:
    lab.write_qube(replace(lab.qube("work"), template_for_dispvms=True))
    forward(*ADD)
    clone(lab, "work", "disp42", QubeClass.DISPOSABLE)
    told = forward("list", "disp42").out
    assert "The rule was made for work, and disp42 is a disposable that inherited it" in told
    assert "'qvm-forward confirm disp42 web' makes it a rule of disp42" in told
    assert "Rule work web already has port 80 of sys-net" in forward("confirm", "disp42", "web").err
    assert forward("add", "disp42", "81:8080", "--from", "any").status == 0
    assert "+8080+mux  sys-net  disp42  allow" in policy(lab)


@pytest.mark.parametrize(("klass", "state"), [("DispVM", State.SUSPENDED), ("AppVM", State.ACTIVE)])
def test_a_rule_without_owner_at_a_disposable_is_not_known_to_be_its_own(klass: str, state: State) -> None:
    inventory = world(qube("disp42", "sys-firewall", klass=klass))
    (forward,) = plan([rule("owner=", target="disp42")], inventory, NOW)
    assert forward.state is state
    if state is State.SUSPENDED:
        assert forward.cause is Cause.CLONED
        assert reasons.sentence(forward) == (
            "The rule does not say for which qube it was made, and disp42 is a disposable; 'qvm-forward "
            "confirm disp42 web' makes it a rule of disp42, 'qvm-forward remove disp42 web' removes it."
        )


def test_a_renamed_qube_keeps_its_rules_suspended_until_confirmed(
    forward: Command, lab: LabDirectory
) -> None:
    """Qubes Manager renames by cloning, and then removes what was cloned."""
    import shutil

    forward(*ADD)
    clone(lab, "work", "office")
    shutil.rmtree(lab.qube_dir("work").root)
    assert states(forward) == {"office": "suspended"}
    forward("apply")
    assert "  allow  " not in policy(lab)
    assert forward("confirm", "office", "web").status == 0
    assert "+8080+mux  sys-net  office  allow" in policy(lab)
