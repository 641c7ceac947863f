# SPDX-License-Identifier: GPL-2.0-or-later
"""What of a lab is news. The kernel tells at once, so a wait of no length sees it: nobody sleeps here."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from bounds import BOUND_S

from qubes_fwd_qrexec.admin.inventory import feature_matters
from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.lab.blueprint import create_lab
from qubes_fwd_qrexec.lab.changes import LabChanges
from qubes_fwd_qrexec.lab.directory import LabDirectory, write_text
from qubes_fwd_qrexec.lab.qube import Qube, QubeState
from qubes_fwd_qrexec.system.inotify import IN_Q_OVERFLOW, Inotify, Notice

POLICY = "30-forward.policy"
NEW = Qube(name=QubeName("new"))


@pytest.fixture
def lab(tmp_path: Path) -> LabDirectory:
    made = create_lab(tmp_path / "lab")
    made.set_feature("work", "forward.old", "x")
    made.set_feature("work", "gui", "1")
    return made


@pytest.fixture
def changes(lab: LabDirectory) -> Iterator[LabChanges]:
    with LabChanges(lab, feature_matters) as made:
        assert made.wait(BOUND_S)  # that it stands is news itself
        assert not made.wait(0)
        yield made


def set_netvm(lab: LabDirectory) -> None:
    lab.write_qube(replace(lab.qube("work"), netvm=None))


NEWS: list[Callable[[LabDirectory], object]] = [
    set_netvm,
    lambda lab: lab.set_state("vault", QubeState.HALTED),
    lambda lab: lab.set_feature("work", "forward.web", "x"),
    lambda lab: lab.set_feature("work", "vm-config.fwd.work.web", "x"),
    lambda lab: lab.set_feature("sys-net", "whonix-gw", "1"),
    lambda lab: lab.set_feature("sys-net", "service.vpn-handler-x", "1"),
    lambda lab: lab.set_feature("work", "supported-rpc.qubes.ForwardTCP", "1"),
    lambda lab: lab.remove_feature("work", "forward.old"),
    lambda lab: (lab.qube_dir("work").features / "forward.old").write_text("written in place"),
    lambda lab: lab.write_qube(NEW),
    lambda lab: shutil.rmtree(lab.qube_dir("work").root),
    lambda lab: lab.qube_dir("work").root.rename(lab.qubes_dir / "job"),
    lambda lab: lab.qube_dir("work").features.rename(lab.qube_dir("work").root / "away"),
    lambda lab: write_text(lab.policy_dir / POLICY, "# mine\n"),
    lambda lab: (lab.policy_dir / POLICY).write_text("# mine, written in place\n"),
    lambda lab: write_text(lab.policy_dir / "30-user.policy", "# theirs, which may deny calls\n"),
]
NO_NEWS: list[Callable[[LabDirectory], object]] = [
    lambda lab: lab.set_feature("work", "internal", "1"),
    lambda lab: lab.remove_feature("work", "gui"),
    lambda lab: (lab.qube_dir("work").features / ".forward.web.1.tmp").write_text("half"),
    lambda lab: (lab.qube_dir("work").vm_config / "fwd.work.web").write_text("what the qube sees"),
    lambda lab: (lab.policy_dir / "30-user.policy.rpmsave").touch(),
    lambda lab: (lab.policy_dir / ".30-user.policy").touch(),
    lambda lab: (lab.qubes_dir / ".work.tmp").mkdir(),
    lambda lab: (lab.qube_dir("work").root / "notes").write_text("x"),
    lambda lab: lab.features("work"),
    lambda lab: lab.write_knobs(lab.knobs()),
    lambda lab: (lab.root / "file").touch(),
]


@pytest.mark.parametrize("do", NEWS)
def test_news(lab: LabDirectory, changes: LabChanges, do: Callable[[LabDirectory], object]) -> None:
    do(lab)
    assert changes.wait(BOUND_S)
    assert not changes.wait(0)


@pytest.mark.parametrize("do", NO_NEWS)
def test_no_news(lab: LabDirectory, changes: LabChanges, do: Callable[[LabDirectory], object]) -> None:
    do(lab)
    assert not changes.wait(0)


def test_all_that_is_there_counts_as_one(lab: LabDirectory, changes: LabChanges) -> None:
    for number in range(500):
        lab.set_feature("work", "forward.web", str(number))
    assert changes.wait(BOUND_S)
    assert not changes.wait(0)


def test_a_file_that_is_being_written_is_no_news_yet(lab: LabDirectory, changes: LabChanges) -> None:
    with open(lab.qube_dir("work").features / "forward.web", "w") as file:
        file.write("half")
        file.flush()
        assert not changes.wait(0)
    assert changes.wait(0)


def test_a_new_qube_is_watched(lab: LabDirectory, changes: LabChanges) -> None:
    lab.write_qube(NEW)
    assert changes.wait(0)
    lab.set_feature("new", "forward.web", "x")
    assert changes.wait(0)
    lab.write_qube(replace(NEW, netvm=QubeName("sys-net")))
    assert changes.wait(0)


def test_a_qube_whose_features_come_later_is_watched(lab: LabDirectory, changes: LabChanges) -> None:
    (lab.qubes_dir / "new").mkdir()
    assert changes.wait(0)
    lab.write_qube(NEW)
    assert changes.wait(0)
    lab.set_feature("new", "forward.web", "x")
    assert changes.wait(0)


def test_a_qube_that_was_renamed_is_watched_under_its_new_name(
    lab: LabDirectory, changes: LabChanges
) -> None:
    lab.qube_dir("work").root.rename(lab.qubes_dir / "job")
    assert changes.wait(0)
    lab.set_feature("job", "forward.web", "x")
    assert changes.wait(0)


def test_a_qube_that_was_moved_out_of_the_lab_is_none_of_ours(
    lab: LabDirectory, changes: LabChanges, tmp_path: Path
) -> None:
    lab.qube_dir("work").root.rename(tmp_path / "work")
    assert changes.wait(0)
    (tmp_path / "work" / "features" / "forward.web").write_text("x")
    assert not changes.wait(0)


def test_a_qube_that_was_made_again_is_watched(lab: LabDirectory, changes: LabChanges) -> None:
    shutil.rmtree(lab.qube_dir("work").root)
    lab.write_qube(Qube(name=QubeName("work")))
    assert changes.wait(0)
    lab.set_feature("work", "forward.web", "x")
    assert changes.wait(0)


def test_a_qube_that_is_gone_is_forgotten(lab: LabDirectory, changes: LabChanges) -> None:
    assert changes._watches is not None
    before = len(changes._watches._watched)
    lab.write_qube(NEW)
    assert changes.wait(0)
    assert len(changes._watches._watched) == before + 2
    shutil.rmtree(lab.qube_dir("new").root)
    assert changes.wait(0)
    assert len(changes._watches._watched) == before


def test_a_file_among_the_qubes_is_passed_over(lab: LabDirectory, changes: LabChanges) -> None:
    (lab.qubes_dir / "file").touch()
    lab.set_feature("work", "forward.web", "x")
    assert changes.wait(0)


def test_after_an_overflow_everything_is_looked_at_and_watched(
    lab: LabDirectory, changes: LabChanges, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(self: Inotify) -> list[Notice]:
        read(self)
        return [Notice(-1, IN_Q_OVERFLOW, "")]

    read = Inotify.read
    lab.write_qube(NEW)
    with monkeypatch.context() as patch:
        patch.setattr(Inotify, "read", lose)
        assert changes.wait(0)
    assert not changes.wait(0)
    lab.set_feature("new", "forward.web", "x")
    assert changes.wait(0)


@pytest.mark.parametrize("name", ["root", "qubes_dir", "policy_dir"])
def test_a_lab_that_is_moved_or_removed_is_an_error(
    lab: LabDirectory, changes: LabChanges, tmp_path: Path, name: str
) -> None:
    getattr(lab, name).rename(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="it was moved or removed"):
        changes.wait(BOUND_S)


def test_a_lab_that_cannot_be_watched_is_an_error_of_the_first_wait(
    lab: LabDirectory, tmp_path: Path
) -> None:
    lab.root.rename(tmp_path / "elsewhere")
    with (
        LabChanges(lab, feature_matters) as changes,
        pytest.raises(StoreError, match="lab: No such file"),
    ):
        changes.wait(BOUND_S)
    with LabChanges(lab, feature_matters):
        pass  # nobody waited


def test_a_waker_ends_the_wait_and_is_not_read(lab: LabDirectory) -> None:
    read_fd, write_fd = os.pipe()
    with LabChanges(lab, feature_matters, [read_fd]) as changes:
        assert changes.wait(BOUND_S)
        os.write(write_fd, b"x")
        begun = time.monotonic()
        assert not changes.wait(BOUND_S)
        assert not changes.wait(BOUND_S)
        assert time.monotonic() - begun < BOUND_S
        lab.set_feature("work", "forward.web", "x")
        assert changes.wait(BOUND_S)
        assert os.read(read_fd, 9) == b"x"
    os.close(read_fd)
    os.close(write_fd)


def test_a_wait_is_over_after_its_time(changes: LabChanges) -> None:
    assert not changes.wait(0.01)
