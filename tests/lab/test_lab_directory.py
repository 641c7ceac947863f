# SPDX-License-Identifier: GPL-2.0-or-later
"""The lab's directory: what init makes, what is kept, and what is refused."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from bounds import BOUND_S

from qubes_fwd_qrexec.common.errors import RefusedError, StoreError, TextError
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.lab.blueprint import create_lab, write_client
from qubes_fwd_qrexec.lab.cli import main
from qubes_fwd_qrexec.lab.directory import LabDirectory, write_text
from qubes_fwd_qrexec.lab.knobs import Knobs
from qubes_fwd_qrexec.lab.qube import Qube, QubeClass, QubeState


@pytest.fixture
def lab(tmp_path: Path) -> LabDirectory:
    return create_lab(tmp_path / "lab")


def test_init_makes_a_system_of_qubes_that_opens_again(lab: LabDirectory) -> None:
    opened = LabDirectory.open(lab.root)
    assert opened.qube_names() == [
        "debian-12",
        "dom0",
        "fedora-42",
        "personal",
        "sys-firewall",
        "sys-net",
        "sys-vpn",
        "untrusted",
        "vault",
        "work",
    ]
    assert opened.qube("work").ip == "10.137.0.10"
    assert [opened.qube(name).netvm for name in ("work", "sys-net", "vault", "untrusted")] == [
        "sys-firewall",
        None,
        None,
        "sys-vpn",
    ]
    assert opened.feature("sys-vpn", "service.vpn-handler-openvpn") == "1"
    for service in ("qubes.ForwardTCP", "qubes.ForwardUDP"):
        assert opened.feature("work", f"supported-rpc.{service}", with_template=True) == "1"
        assert opened.feature("work", f"supported-rpc.{service}") is None
        assert opened.feature("personal", f"supported-rpc.{service}", with_template=True) is None
    assert json.loads(opened.file.read_text(encoding="utf-8"))["version"] == 1


def test_init_refuses_a_directory_that_holds_something(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(RefusedError, match="not empty"):
        create_lab(tmp_path)
    with pytest.raises(StoreError, match="x"):
        create_lab(tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_what_is_no_lab_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="qvm-forward-lab init"):
        LabDirectory.open(tmp_path)
    (tmp_path / "lab.json").write_text('{"version": 2}', encoding="utf-8")
    with pytest.raises(StoreError, match=r"lab\.json"):
        LabDirectory.open(tmp_path)
    (tmp_path / "lab.json").write_text('{"version": 1}', encoding="utf-8")
    with pytest.raises(StoreError, match="qubes: missing"):
        LabDirectory.open(tmp_path)


def test_running_qube_sees_a_delivered_feature_at_once(lab: LabDirectory) -> None:
    lab.set_feature("sys-net", "vm-config.fwd.work.web", "a b=c")
    lab.set_feature("sys-net", "forward.x", "not delivered")
    assert lab.vm_config("sys-net") == {"fwd.work.web": "a b=c"}
    lab.remove_feature("sys-net", "vm-config.fwd.work.web")
    lab.remove_feature("sys-net", "vm-config.fwd.work.web")
    assert lab.vm_config("sys-net") == {}
    assert lab.features("sys-net") == {"forward.x": "not delivered"}


def test_halted_qube_sees_features_at_its_start(lab: LabDirectory) -> None:
    lab.set_feature("work", "vm-config.a", "1")
    lab.set_state("work", QubeState.HALTED)
    assert lab.vm_config("work") == {}
    lab.set_feature("work", "vm-config.b", "2")
    assert lab.vm_config("work") == {}
    lab.set_state("work", QubeState.RUNNING)
    assert lab.vm_config("work") == {"a": "1", "b": "2"}


@pytest.mark.parametrize("key", ["", ".", "..", "a/b", ".hidden", "a b", "a\n", "ä"])
def test_feature_names_stay_inside_their_directory(lab: LabDirectory, key: str) -> None:
    with pytest.raises(StoreError):
        lab.set_feature("work", key, "x")
    with pytest.raises(StoreError):
        lab.remove_feature("work", key)


@pytest.mark.parametrize("value", ["a\nb", "ä", "\x1b"])
def test_feature_values_are_printable_ascii(lab: LabDirectory, value: str) -> None:
    with pytest.raises(StoreError):
        lab.set_feature("work", "x", value)
    assert lab.features("work") == {}


@pytest.mark.parametrize("name", ["nosuch", "../work", "", "x" * 32])
def test_qubes_that_are_not_there_are_named_in_the_error(lab: LabDirectory, name: str) -> None:
    with pytest.raises(StoreError):
        lab.qube(name)
    with pytest.raises(StoreError):
        lab.set_feature(name, "x", "y")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("klass", "VM"),
        ("state", "Paused"),
        ("netvm", "a b"),
        ("ip", "1.2.3"),
        ("tags", "x"),
        ("tags", [1]),
        ("provides_network", 1),
        ("nosuch", 1),
    ],
)
def test_bad_qube_file_names_file_and_key(lab: LabDirectory, key: str, value: object) -> None:
    path = lab.qube_dir("work").file
    data = json.loads(path.read_text(encoding="utf-8")) | {key: value}
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(StoreError, match=r"work/qube\.json"):
        lab.qube("work")


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_qube_file_that_is_no_object_is_refused(lab: LabDirectory, text: str) -> None:
    lab.qube_dir("work").file.write_text(text, encoding="utf-8")
    with pytest.raises(StoreError, match=r"work/qube\.json"):
        lab.qubes()


def test_a_qube_of_an_earlier_release_has_the_label_that_qubes_gives_by_itself(lab: LabDirectory) -> None:
    path = lab.qube_dir("work").file
    data = json.loads(path.read_text(encoding="utf-8"))
    del data["label"]
    path.write_text(json.dumps(data), encoding="utf-8")
    assert lab.qube("work").label == "red"


@pytest.mark.parametrize(
    ("klass", "provides_network", "icon"),
    [
        ("AppVM", False, "appvm-blue"),
        ("AppVM", True, "servicevm-blue"),
        ("DispVM", False, "dispvm-blue"),
        ("DispVM", True, "servicevm-blue"),
        ("StandaloneVM", False, "standalonevm-blue"),
        ("TemplateVM", True, "templatevm-blue"),
    ],
)
def test_a_qube_has_the_icon_that_qubes_gives_it(klass: str, provides_network: bool, icon: str) -> None:
    qube = Qube(name=QubeName("x"), klass=QubeClass(klass), provides_network=provides_network, label="blue")
    assert qube.icon == icon
    assert replace(qube, template_for_dispvms=True).icon == "templatevm-blue"


def test_qube_prints_what_it_parses(lab: LabDirectory) -> None:
    qube = replace(lab.qube("work"), tags=("a", "b"), netvm=None, template_for_dispvms=True)
    assert Qube.parse("work", str(qube), "here") == qube


def test_two_writers_exclude_each_other(lab: LabDirectory) -> None:
    with lab.locked(), pytest.raises(StoreError, match="another program"), lab.locked(0.05):
        pass
    with lab.locked():
        pass


def test_write_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(StoreError, match="taken"):
        write_text(tmp_path / "taken", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_knobs_print_what_they_parse(lab: LabDirectory) -> None:
    knobs = Knobs(calls_per_target=3, latency_ms=4, refuse=("work/test.S+1",), hang=("*",))
    lab.write_knobs(knobs)
    assert lab.knobs() == knobs
    assert knobs.refuses("work", "test.S+1")
    assert not knobs.refuses("work", "test.S+2")
    assert knobs.hangs("vault", "x+")


@pytest.mark.parametrize(
    "data",
    [
        [],
        {"x": 1},
        {"latency_ms": "1"},
        {"latency_ms": True},
        {"latency_ms": -1},
        {"patience": 0},
        {"calls_per_target": 10**6},
        {"hang": "x"},
        {"hang": [""]},
        {"refuse": ["a/b/c"]},
    ],
)
def test_bad_knobs_are_named(data: object) -> None:
    with pytest.raises(StoreError, match="here"):
        Knobs.parse(data, "here")


@pytest.mark.parametrize(
    ("name", "text"), [("nosuch", "1"), ("latency_ms", "x"), ("latency_ms", "1.5"), ("hang", "a b")]
)
def test_bad_knob_words_are_refused(name: str, text: str) -> None:
    with pytest.raises(TextError):
        Knobs().with_text(name, text)


def test_knob_words_are_numbers_and_lists() -> None:
    knobs = Knobs().with_text("latency_ms", "7").with_text("refuse", "work,vault/s")
    assert (knobs.latency_ms, knobs.refuse) == (7, ("work", "vault/s"))
    assert knobs.with_text("refuse", "").refuse == ()


def test_client_program_runs_under_an_interpreter_with_a_blank_in_its_path(
    lab: LabDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "a b"
    link.symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(link))
    write_client(lab)
    done = subprocess.run([str(lab.client_program), "-h"], capture_output=True, timeout=BOUND_S, check=True)
    assert done.stdout.startswith(b"usage:")


def test_directory_is_quick_to_import_and_free_of_trio() -> None:
    program = "import sys; import qubes_fwd_qrexec.lab.directory; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=BOUND_S, check=True
    )
    assert not {"trio", "socket", "subprocess", "asyncio", "ctypes"} & set(done.stdout.split())


def test_what_a_killed_writer_left_between_feature_and_delivery_is_mended(lab: LabDirectory) -> None:
    work = lab.qube_dir("work")
    lab.set_feature("work", "other", "is for dom0 alone")
    lab.set_feature("work", "vm-config.fwd.gone", "x")
    lab.set_feature("work", "vm-config.fwd.changed", "old")
    (work.features / "vm-config.fwd.new").write_text("value", encoding="ascii")
    (work.features / "vm-config.fwd.changed").write_text("new", encoding="ascii")
    (work.features / "vm-config.fwd.gone").unlink()
    lab.qube_dir("vault").file.write_text("{", encoding="ascii")  # is no reason not to mend others
    with lab.locked():
        assert lab.vm_config("work") == {"fwd.new": "value", "fwd.changed": "new"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vm-config.fwd.x", "x" * 3072),
        ("vm-config." + "x" * 53, ""),
        ("forward.x", "x" * 65536),
    ],
)
def test_bounds_of_qubes_hold(lab: LabDirectory, key: str, value: str) -> None:
    before = lab.features("work")
    with pytest.raises(StoreError, match=r"QubesDB takes|Admin API takes"):
        lab.set_feature("work", key, value)
    assert lab.features("work") == before


def test_largest_values_fit(lab: LabDirectory) -> None:
    lab.set_feature("work", "vm-config." + "x" * 52, "x" * 3071)
    lab.set_feature("work", "forward.x", "x" * 65000)
    assert len(lab.vm_config("work")["x" * 52]) == 3071


def test_templates_announce_what_real_ones_do(lab: LabDirectory) -> None:
    """An executable file is announced; the stock qubes.ConnectTCP is a link to no file."""
    assert set(lab.features("debian-12")) == {"qrexec"}
    assert set(lab.features("fedora-42")) - {"qrexec"} == {
        f"supported-rpc.qubes.Forward{name}" for name in ("TCP", "UDP", "Cut", "Nft", "Revoke", "Status")
    }


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may be another user")
@pytest.mark.parametrize("is_closed", [True, False])
@pytest.mark.parametrize(
    "words", ["status", "up", "down", "run work -- true", "prefs work netvm sys-vpn", "knob"]
)
def test_another_users_lab_is_said_to_be_one(
    words: str, is_closed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with tempfile.TemporaryDirectory() as home:
        Path(home).chmod(0o755)
        lab = create_lab(Path(home, "lab"))
        lab.root.chmod(0o700 if is_closed else 0o755)
        os.seteuid(65534)
        try:
            assert main(["--lab", str(lab.root), *words.split()]) == 1
        finally:
            os.seteuid(0)
        said = capsys.readouterr().err
        assert said == f"qvm-forward-lab: {lab.root}: a lab of the user root, which only they can use\n"
        assert lab.qube("work").netvm == "sys-firewall"
