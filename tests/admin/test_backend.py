# SPDX-License-Identifier: GPL-2.0-or-later
"""What every backend does alike: the tests run over a lab and over a Qubes system that is asked."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from fake_admin import FakeQubes
from helpers import without_rights

from qubes_fwd_qrexec.admin.backend import NEW, Backend, PolicyCall, PolicyFile
from qubes_fwd_qrexec.admin.qubes.errors import WHO_MAY
from qubes_fwd_qrexec.admin.qubes.store import QubesStore
from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.qube import QubeClass, QubeState
from qubes_fwd_qrexec.lab.store import LabStore

WORK = QubeName("work")


def test_the_inventory_has_all_qubes_with_their_features(store: Backend) -> None:
    qubes = store.inventory().qubes
    work = qubes[WORK]
    assert (work.klass, work.netvm, work.is_running, work.template) == (
        "AppVM",
        "sys-firewall",
        True,
        "fedora-42",
    )
    assert work.ip == "10.137.0.10"
    assert qubes[QubeName("sys-net")].provides_network
    assert qubes[QubeName("sys-vpn")].features == {"service.vpn-handler-openvpn": "1"}
    assert qubes[QubeName("dom0")].klass == "AdminVM"


def test_features_are_set_delivered_and_removed(store: Backend, lab: LabDirectory) -> None:
    store.set_feature(WORK, "vm-config.fwd.a.b", "x")
    assert store.inventory().qubes[WORK].features == {"vm-config.fwd.a.b": "x"}
    assert lab.vm_config("work") == {"fwd.a.b": "x"}
    store.remove_feature(WORK, "vm-config.fwd.a.b")
    store.remove_feature(WORK, "vm-config.fwd.a.b")
    assert store.inventory().qubes[WORK].features == lab.vm_config("work") == {}


def test_who_only_looks_is_not_told_what_listeners_are(store: Backend) -> None:
    store.set_feature(WORK, "vm-config.fwd.a.b", "x")
    store.set_feature(WORK, "forward.web", "y")
    assert store.inventory(with_config=False).qubes[WORK].features == {"forward.web": "y"}


def test_what_cannot_be_written_is_a_store_error(store: Backend, lab: LabDirectory) -> None:
    with pytest.raises(StoreError, match="gone"):
        store.set_feature(QubeName("gone"), "a", "x")
    with pytest.raises(StoreError, match="gone"):
        store.remove_feature(QubeName("gone"), "a")
    (lab.qube_dir("work").features / "dir").mkdir()
    with pytest.raises(StoreError):
        store.remove_feature(WORK, "dir")


def test_why_nothing_can_be_changed_is_known_before_anybody_tries(blueprint: Path, dom0: FakeQubes) -> None:
    with TemporaryDirectory() as place:  # another user may look into it
        os.chmod(place, 0o755)  # noqa: S103
        lab = LabDirectory.open(shutil.copytree(blueprint, Path(place, "lab")))
        assert LabStore(lab).read_only() is None
        with without_rights(lab.policy_dir):
            problem = LabStore(lab).read_only()
        assert problem == f"{lab.policy_dir}: this user cannot write there; whoever made this lab can"
    assert QubesStore(dom0.root).read_only() is None
    with without_rights(dom0.root / "run/qubes"):
        problem = QubesStore(dom0.root).read_only()
    assert problem == f"{dom0.root}/run/qubes: Permission denied; {WHO_MAY}"


def test_policy_is_replaced_only_as_it_was_read(store: Backend, lab: LabDirectory) -> None:
    assert store.read_policy() == PolicyFile(None, NEW)
    store.replace_policy("# one\n", NEW)
    one = store.read_policy()
    assert one.text == (lab.policy_dir / "30-forward.policy").read_text() == "# one\n"
    with pytest.raises(StoreError, match="somebody else has just changed it; try again"):
        store.replace_policy("# two\n", NEW)
    store.replace_policy("# two\n", one.token)
    with pytest.raises(StoreError, match="somebody else"):
        store.replace_policy("# three\n", one.token)
    assert store.read_policy().text == "# two\n"


def test_policy_that_cannot_be_read_is_not_written(store: Backend) -> None:
    with pytest.raises(StoreError, match=r"not written, as .*could not be read"):
        store.replace_policy("qubes.ForwardTCP nonsense\n", NEW)
    assert store.read_policy().text is None


def test_a_policy_file_that_is_no_text_is_a_store_error(store: Backend, lab: LabDirectory) -> None:
    (lab.policy_dir / "30-forward.policy").write_bytes(b"\xff")
    with pytest.raises(StoreError, match=r"30-forward\.policy"):
        store.read_policy()


def test_both_backends_see_the_same(store: Backend, lab: LabDirectory) -> None:
    dvm = replace(lab.qube("vault"), name=QubeName("dvm"), template_for_dispvms=True, tags=("anon-vm", "a"))
    disp = replace(dvm, name=QubeName("disp1"), klass=QubeClass.DISPOSABLE, template=dvm.name)
    for one in (dvm, disp, replace(lab.qube("untrusted"), ip6=None, state=QubeState.HALTED)):
        lab.write_qube(one)
    for key in ("forward.a", "forward.tunnel", "vm-config.fwd.a.b", "service.vpn-handler", "whonix-gw"):
        lab.set_feature("disp1", key, "1")
    lab.set_feature("disp1", "forward.empty", "")
    assert store.inventory() == LabStore(lab).inventory()


def test_features_that_do_not_matter_are_left_out(store: Backend, lab: LabDirectory) -> None:
    for key in ("os-version", "vm-config.other", "supported-rpc.qubes.Filecopy", "service.crond", "forward"):
        lab.set_feature("work", key, "1")
    assert store.inventory().qubes[WORK].features == {}


CALL = PolicyCall("qubes.ForwardTCP", "+80+mux", QubeName("sys-net"), WORK)
LINE = "qubes.ForwardTCP  +80+mux  sys-net  work"


def test_a_verdict_is_that_of_the_whole_policy(store: Backend, lab: LabDirectory) -> None:
    assert store.verdicts([CALL])[0].is_allowed is False
    store.replace_policy(f"{LINE}  allow  autostart=no\n", NEW)
    assert store.verdicts([CALL])[0].is_allowed is True
    lab.set_state("work", QubeState.HALTED)
    assert store.verdicts([CALL])[0].is_allowed is True  # as if it ran
    assert store.verdicts([CALL._replace(argument="+81+mux")])[0].is_allowed is False
    before = lab.policy_dir / "20-before.policy"
    before.write_text(f"{LINE}  ask\n")
    assert store.verdicts([CALL])[0].is_allowed is False
    before.write_text(f"{LINE}  allow  target=vault\n")
    assert store.verdicts([CALL])[0].is_allowed is False
    before.write_text("nonsense\n")
    verdict = store.verdicts([CALL])[0]
    assert verdict.is_allowed is False
    assert "20-before.policy" in verdict.reason


def test_two_at_once_exclude_each_other(store: Backend, impatient: Backend) -> None:
    with store.locked(), pytest.raises(StoreError, match=r"another .* (changes|is changing) this"):
        impatient.locked().__enter__()
    with impatient.locked():
        pass
