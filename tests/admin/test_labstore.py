# SPDX-License-Identifier: GPL-2.0-or-later
"""The backend over a lab's directory: what a Qubes backend will have to do too."""

import pytest

from qubes_fwd_qrexec.admin.backend import NEW, Backend
from qubes_fwd_qrexec.admin.labstore import LabStore
from qubes_fwd_qrexec.errors import StoreError
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.values import QubeName

WORK = QubeName("work")


@pytest.fixture
def store(lab: LabDirectory) -> Backend:
    return LabStore(lab)


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


def test_what_cannot_be_written_is_a_store_error(store: Backend, lab: LabDirectory) -> None:
    with pytest.raises(StoreError):
        store.set_feature(QubeName("gone"), "a", "x")
    with pytest.raises(StoreError):
        store.set_feature(WORK, "a", "\n")
    (lab.qube_dir("work").features / "dir").mkdir()
    with pytest.raises(StoreError):
        store.remove_feature(WORK, "dir")


def test_policy_is_replaced_only_as_it_was_read(store: Backend, lab: LabDirectory) -> None:
    assert store.read_policy() == (None, NEW)
    store.replace_policy("# one\n", NEW)
    one = store.read_policy()
    assert one.text == (lab.policy_dir / "30-forward.policy").read_text() == "# one\n"
    with pytest.raises(StoreError, match="somebody else changed it just now; try again"):
        store.replace_policy("# two\n", NEW)
    store.replace_policy("# two\n", one.token)
    with pytest.raises(StoreError, match="somebody else"):
        store.replace_policy("# three\n", one.token)
    assert store.read_policy().text == "# two\n"


def test_policy_that_cannot_be_read_is_not_written(store: Backend) -> None:
    with pytest.raises(StoreError, match="not written, as it could not be read"):
        store.replace_policy("qubes.ForwardTCP nonsense\n", NEW)
    assert store.read_policy().text is None


def test_a_policy_file_that_is_no_text_is_a_store_error(store: Backend, lab: LabDirectory) -> None:
    (lab.policy_dir / "30-forward.policy").write_bytes(b"\xff")
    with pytest.raises(StoreError, match=r"30-forward\.policy"):
        store.read_policy()


def test_a_lock_that_cannot_be_taken_is_a_store_error(store: Backend, lab: LabDirectory) -> None:
    with store.locked():
        pass
    lab.lock_file.unlink()
    lab.lock_file.mkdir()
    with pytest.raises(StoreError, match="Is a directory"), store.locked():
        pass
