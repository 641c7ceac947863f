# SPDX-License-Identifier: GPL-2.0-or-later
"""What Qubes' tools do to the qubes of a lab, and what is refused as qubesd refuses it."""

from dataclasses import replace
from pathlib import Path

import pytest

from qubes_fwd_qrexec.common.errors import RefusedError, TextError, UsageError
from qubes_fwd_qrexec.common.services import FORWARD_SERVICE
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.lab import qubechanges
from qubes_fwd_qrexec.lab.blueprint import create_lab
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.qube import QubeClass


@pytest.fixture
def lab(tmp_path: Path) -> LabDirectory:
    """It is down."""
    return create_lab(tmp_path / "lab")


def set_property(lab: LabDirectory, text: str) -> None:
    """``QUBE KEY=VALUE``."""
    name, _, setting = text.partition(" ")
    key, _, value = setting.partition("=")
    qubechanges.set_property(lab, name, key, value)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("work netvm=sys-vpn", "netvm", "sys-vpn"),
        ("work netvm=", "netvm", None),
        ("work netvm=None", "netvm", None),
        ("work ip=10.137.0.77", "ip", "10.137.0.77"),
        ("work ip6=fd09::1", "ip6", "fd09::1"),
        ("vault provides-network=yes", "provides_network", True),
        ("sys-vpn provides_network=True", "provides_network", True),
        ("work template_for_dispvms=1", "template_for_dispvms", True),
        ("work label=gray", "label", "gray"),
    ],
)
def test_property_is_changed_and_nothing_else_is(
    lab: LabDirectory, text: str, key: str, value: str | bool | None
) -> None:
    name = text.partition(" ")[0]
    before = lab.qube(name)
    set_property(lab, text)
    assert lab.qube(name) == replace(before, **{key: value})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("work netvm=vault", "The vault qube does not provide network"),
        ("work netvm=none-such", "No such domain: 'none-such'"),
        ("sys-net netvm=sys-vpn", "Loops in network are unsupported"),
        ("sys-net netvm=sys-net", "Loops in network are unsupported"),
        (
            "sys-net provides_network=False",
            "The qube is still used by other qubes, change theirs 'netvm' first",
        ),
        ("work provides_network=perhaps", "Invalid literal for boolean property: 'perhaps'"),
        ("work ip=fd09::1", "Invalid value 'fd09::1' for property 'ip' of 'work'"),
        ("work ip6=10.0.0.1", "Invalid value '10.0.0.1' for property 'ip6' of 'work'"),
        ("work template=debian-12", "Cannot change template while qube is running"),
        ("work klass=DispVM", "'klass' of 'work' cannot be changed"),
        ("work icon=x", "'icon' of 'work' cannot be changed"),
        ("work label=pink", "Label does not exist: pink"),
    ],
)
def test_value_that_qubesd_refuses_is_refused(lab: LabDirectory, text: str, said: str) -> None:
    before = lab.qubes()
    with pytest.raises(RefusedError) as refused:
        set_property(lab, text)
    assert str(refused.value) == said
    assert lab.qubes() == before


def test_running_qube_cannot_get_a_netvm_that_is_halted(lab: LabDirectory) -> None:
    assert qubechanges.shutdown(lab, ["untrusted", "sys-vpn"]) == {}
    with pytest.raises(RefusedError, match="Cannot dynamically attach to stopped qube sys-vpn"):
        set_property(lab, "work netvm=sys-vpn")
    assert qubechanges.shutdown(lab, ["work"]) == {}
    set_property(lab, "work netvm=sys-vpn")
    qubechanges.start(lab, "work")
    assert lab.qube("sys-vpn").is_running


@pytest.mark.parametrize(
    "text", ["work memory=400", "dom0 netvm=sys-net", "debian-12 template=fedora-42", "x ip="]
)
def test_property_or_qube_that_there_is_not_is_a_usage_error(lab: LabDirectory, text: str) -> None:
    with pytest.raises(UsageError, match=r"no such (property|domain): "):
        set_property(lab, text)


def test_qube_offers_what_its_template_has(lab: LabDirectory) -> None:
    qubechanges.shutdown(lab, ["personal"])
    offered = lab.qube_dir("personal").service_dirs[-1] / FORWARD_SERVICE
    for template, has_it in (("fedora-42", True), ("debian-12", False)):
        set_property(lab, f"personal template={template}")
        assert offered.is_symlink() is has_it
    with pytest.raises(RefusedError, match="must be a TemplateVM, vault is none"):
        set_property(lab, "personal template=vault")


def test_clone_has_everything_but_its_name_and_addresses(lab: LabDirectory) -> None:
    lab.set_feature("work", "vm-config.x", "1")
    qubechanges.change_tags(lab, "work", ["office", "a"], is_added=True)
    qubechanges.clone(lab, "work", "work2")
    made = lab.qube("work2")
    assert (made.ip, made.ip6) == ("10.137.0.14", "fd09:24ef:4179::a89:e")
    assert not made.is_running
    like = replace(made, name=QubeName("work"), ip=lab.qube("work").ip, ip6=lab.qube("work").ip6)
    assert replace(like, state=lab.qube("work").state) == lab.qube("work")
    assert lab.features("work2") == lab.features("work")
    assert lab.vm_config("work2") == {}
    qubechanges.start(lab, "work2")
    assert lab.vm_config("work2") == {"x": "1"}
    assert (lab.qube_dir("work2").service_dirs[-1] / FORWARD_SERVICE).is_symlink()
    qubechanges.clone(lab, "work2", "work3")
    assert lab.qube("work3").ip == "10.137.0.15"


def test_disposable_is_like_its_template_and_has_addresses_of_disposables(lab: LabDirectory) -> None:
    lab.set_feature("work", "forward.web", "x")
    properties = {"template": "work", "provides_network": "True"}
    with pytest.raises(
        RefusedError, match="template of disp1 must have template_for_dispvms set, work has not"
    ):
        qubechanges.create(lab, "disp1", "DispVM", properties)
    assert "disp1" not in lab.qube_names()
    set_property(lab, "work template_for_dispvms=True")
    qubechanges.create(lab, "disp1", "DispVM", properties)
    made = lab.qube("disp1")
    assert (made.klass, made.template, made.netvm) == (QubeClass.DISPOSABLE, "work", "sys-firewall")
    assert (made.ip, made.provides_network) == ("10.138.0.1", True)
    assert lab.features("disp1") == {"forward.web": "x"}
    with pytest.raises(RefusedError, match="Cannot change template_for_dispvms to False while it is in use"):
        set_property(lab, "work template_for_dispvms=False")


def test_new_qube_is_as_qubes_makes_it(lab: LabDirectory) -> None:
    qubechanges.create(lab, "new", "AppVM", {"netvm": "sys-vpn"})
    made = lab.qube("new")
    assert (made.template, made.netvm, made.ip) == ("fedora-42", "sys-vpn", "10.137.0.14")
    assert (lab.qube_dir("new").service_dirs[-1] / FORWARD_SERVICE).is_symlink()


@pytest.mark.parametrize(
    ("name", "klass", "error"),
    [
        ("work", "AppVM", RefusedError),
        ("../x", "AppVM", TextError),
        ("new", "AdminVM", UsageError),
        ("new", "RemoteVM", UsageError),
        ("new", "DispVM", RefusedError),
    ],
)
def test_qube_that_cannot_be_made_leaves_nothing(
    lab: LabDirectory, name: str, klass: str, error: type[Exception]
) -> None:
    before = sorted(path.name for path in lab.qubes_dir.iterdir())
    with pytest.raises(error):
        qubechanges.create(lab, name, klass, {})
    assert sorted(path.name for path in lab.qubes_dir.iterdir()) == before


def test_netvms_are_halted_after_the_qubes_behind_them_in_whatever_order(lab: LabDirectory) -> None:
    failed = qubechanges.shutdown(lab, ["sys-net", "sys-vpn", "untrusted"])
    assert failed == {"sys-net": "There are other VMs connected to this VM: sys-firewall"}
    assert not lab.qube("sys-vpn").is_running
    assert lab.qube("sys-net").is_running
    assert qubechanges.shutdown(lab, ["sys-net", "dom0"], force=True) == {"dom0": "dom0 cannot be shut down"}
    # One that is halted is no error; a qube brings its netvms with it.
    assert qubechanges.shutdown(lab, ["sys-net"]) == {}
    qubechanges.start(lab, "untrusted")
    assert all(lab.qube(name).is_running for name in ("untrusted", "sys-vpn", "sys-net"))
    with pytest.raises(RefusedError, match="Domain is already running"):
        qubechanges.start(lab, "untrusted")


def test_qube_is_removed_when_it_is_halted_and_nobody_needs_it(lab: LabDirectory) -> None:
    with pytest.raises(RefusedError, match="Domain is not powered off: 'sys-vpn'"):
        qubechanges.remove(lab, "sys-vpn")
    qubechanges.shutdown(lab, ["sys-vpn"], force=True)
    with pytest.raises(qubechanges.InUseError, match="Domain is in use: 'sys-vpn'"):
        qubechanges.remove(lab, "sys-vpn")
    assert qubechanges.users_of(lab, "sys-vpn") == [("netvm", "untrusted")]
    set_property(lab, "untrusted netvm=")
    qubechanges.remove(lab, "sys-vpn")
    assert not [path for path in lab.qubes_dir.iterdir() if "sys-vpn" in path.name]
