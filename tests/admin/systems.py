# SPDX-License-Identifier: GPL-2.0-or-later
"""A system of qubes, and the command qvm-forward on it: as a lab, and as a Qubes system that is asked."""

import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import schema
from fake_admin import FakeQubes, install
from fake_policy import FakePolicyClient
from faulty import Panic, allowed
from nftlab import PATH, NftLab
from stages import Stage
from worlds import ADD, BY_NFT, NO_FORWARDS, NOW, Command, Result

from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.qubes.store import QubesStore
from qubes_fwd_qrexec.admin.views import cli
from qubes_fwd_qrexec.admin.views.tables import Style
from qubes_fwd_qrexec.lab.blueprint import create_lab
from qubes_fwd_qrexec.lab.directory import SEARCH_ROOTS, LabDirectory
from qubes_fwd_qrexec.lab.store import LabStore

__all__ = (
    "blueprint",
    "dom0",
    "expiring",
    "forward",
    "impatient",
    "kind",
    "lab",
    "nft_lab",
    "opened",
    "other_store",
    "over",
    "panic",
    "policy_client",
    "pytest_generate_tests",
    "qubesd",
    "run",
    "stage",
    "store",
    "watched",
)
"""What a conftest takes from here: the fixtures, and what pytest is to call."""

LAB, QUBES = "lab", "qubes"


@pytest.fixture(scope="session")
def blueprint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new lab, without the directories of services, which are two thirds of it: none is called here."""
    lab = create_lab(tmp_path_factory.mktemp("blueprint") / "lab")
    for name in lab.qube_names():
        for root in SEARCH_ROOTS:
            shutil.rmtree(lab.qube_dir(name).root / root, ignore_errors=True)
    return lab.root


@pytest.fixture
def lab(blueprint: Path, tmp_path: Path) -> LabDirectory:
    """The state of the system, whichever backend is asked for it."""
    return LabDirectory.open(shutil.copytree(blueprint, tmp_path / "lab"))


@pytest.fixture
def qubesd(lab: LabDirectory) -> FakeQubes:
    return FakeQubes(lab)


@pytest.fixture
def policy_client(lab: LabDirectory) -> FakePolicyClient:
    return FakePolicyClient(lab)


@pytest.fixture
def dom0(
    qubesd: FakeQubes, policy_client: FakePolicyClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> FakeQubes:
    """This machine is taken for the dom0 of a Qubes system."""
    install(monkeypatch, qubesd, policy_client)
    qubesd.root = tmp_path / "root"
    for directory in ("etc", "run/qubes"):
        (qubesd.root / directory).mkdir(parents=True)
    (qubesd.root / "etc/qubes-release").touch()
    return qubesd


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each test runs with both backends, unless it says with which."""
    says = any("kind" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "kind" in metafunc.fixturenames and not says:
        metafunc.parametrize("kind", [LAB, QUBES], indirect=True)


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> str:
    """Which backend the test is to run with."""
    name = str(getattr(request, "param", LAB))
    if name == QUBES:
        request.getfixturevalue("dom0")
    return name


@pytest.fixture
def other_store(lab: LabDirectory, kind: str, qubesd: FakeQubes) -> Callable[[], Backend]:
    """What makes a backend, as another program has it."""
    return lambda: LabStore(lab) if kind == LAB else QubesStore(qubesd.root)


@pytest.fixture
def store(other_store: Callable[[], Backend]) -> Backend:
    return other_store()


@pytest.fixture
def impatient(lab: LabDirectory, kind: str, qubesd: FakeQubes) -> Backend:
    """A backend that does not wait for the lock."""
    if kind == LAB:
        return LabStore(lab, lock_timeout_s=0.0)
    return QubesStore(qubesd.root, lock_timeout_s=0.0)


@pytest.fixture
def watched(store: Backend) -> Iterator[None]:
    """As where dom0's package is installed, `watch` runs; it does nothing here."""
    with store.watching():
        yield


@pytest.fixture
def forward(lab: LabDirectory, kind: str, qubesd: FakeQubes, watched: None) -> Command:
    """Run qvm-forward at a fixed time; on the lab at ``lab_dir``, if that is given."""

    def command(
        *argv: str,
        now: float = NOW,
        stdin: str = NO_FORWARDS,
        style: Style | None = None,
        lab_dir: Path | None = None,
    ) -> Result:
        out, err = io.StringIO(), io.StringIO()
        is_lab = lab_dir is not None or kind == LAB
        environ = {"QVM_FORWARD_LAB": str(lab_dir or lab.root)} if is_lab else {}
        status = cli.run(
            argv,
            environ=environ,
            now=now,
            stdin=io.StringIO(stdin),
            out=out,
            err=err,
            style=style or Style(),
            backend=None if is_lab else QubesStore(qubesd.root),
        )
        schema.check(argv, out.getvalue())
        return Result(status, out.getvalue(), err.getvalue())

    return command


@pytest.fixture
def stage(lab: LabDirectory, forward: Command) -> Stage:
    """A lab with one rule, not yet applied."""
    assert forward(*ADD, "--no-apply").status == 0
    return Stage(lab)


@pytest.fixture
def expiring(stage: Stage) -> Stage:
    """The rule ends in an hour."""
    line = stage.lab.features("work")["forward.web"]
    stage.lab.set_feature("work", "forward.web", f"{line} expire={NOW + 3600}")
    return stage


@pytest.fixture
def over() -> Command:
    """Run qvm-forward over a backend, at a fixed time."""

    def command(backend: Backend, *argv: str, stdin: str = NO_FORWARDS) -> Result:
        out, err, given = io.StringIO(), io.StringIO(), io.StringIO(stdin)
        status = cli.run(
            argv,
            environ={},
            now=NOW,
            stdin=given,
            out=out,
            err=err,
            style=Style(),
            backend=backend,
        )
        schema.check(argv, out.getvalue())
        return Result(status, out.getvalue(), err.getvalue())

    return command


@pytest.fixture
def panic(over: Command) -> Panic:
    """Run qvm-forward panic over a backend."""
    return lambda backend, *argv: over(backend, "panic", *argv)


@pytest.fixture
def opened(forward: Command, lab: LabDirectory) -> LabDirectory:
    """A lab with two forwards: one over mux that drains, and one over single calls."""
    forward(*ADD, "--on-expire", "drain")
    forward("add", "personal", "81", "--from", "any")
    assert len(allowed(lab)) == 2
    return lab


@pytest.fixture
def nft_lab(lab: LabDirectory) -> NftLab:
    for qube in PATH:
        for key, value in BY_NFT.items():
            lab.set_feature(qube, key, value)
    return NftLab(lab)


@pytest.fixture
def run(nft_lab: NftLab, over: Command) -> Command:
    def command(*argv: str) -> object:
        nft_lab.log.clear()
        return over(nft_lab, *argv)

    return command  # type: ignore[return-value]
