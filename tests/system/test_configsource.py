# SPDX-License-Identifier: GPL-2.0-or-later
import os
from pathlib import Path

import pytest
from helpers import write_config

from qubes_fwd_qrexec.common.entries import VALUE_MAX
from qubes_fwd_qrexec.common.errors import ConfigError
from qubes_fwd_qrexec.system import configsource
from qubes_fwd_qrexec.system.configsource import Configuration, FileSource

WEB = "fwd.work.web"


@pytest.fixture
def line(tmp_path: Path) -> str:
    return write_config(tmp_path / "model", 80, 8080).read_text()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "config").mkdir()
    return tmp_path / "config"


def test_each_file_of_a_directory_is_a_forward(directory: Path, line: str) -> None:
    (directory / "fwd.work.web").write_text(line + "\n")
    (directory / "fwd.my.qube.ssh").write_text(line)
    (directory / "other").write_text("not ours")
    (directory / ".fwd.work.tmp").write_text("half")
    found = FileSource(directory).read()
    assert set(found.forwards) == {WEB, "fwd.my.qube.ssh"}
    assert not found.errors
    assert str(found.forwards[WEB]) == line


def test_each_line_of_a_file_is_a_forward(directory: Path, line: str) -> None:
    file = directory / "all"
    file.write_text(f"# comment\n\n  fwd.work.web   {line}  \r\nfwd.work.ssh {line}")
    found = FileSource(file).read()
    assert set(found.forwards) == {WEB, "fwd.work.ssh"}
    assert not found.errors


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0",
        b"\xff\xfe binary \x80",
        b"version=1",
        b"x" * (1 << 20),
        b"version=1 " * 400,
    ],
)
def test_a_bad_file_is_an_error_of_its_own(directory: Path, line: str, content: bytes) -> None:
    (directory / "fwd.work.web").write_text(line)
    (directory / "fwd.work.bad").write_bytes(content)
    found = FileSource(directory).read()
    assert set(found.forwards) == {WEB}
    assert list(found.errors) == ["fwd.work.bad"]
    assert "fwd.work.bad" in str(found.errors["fwd.work.bad"])
    assert len(str(found.errors["fwd.work.bad"])) < 2 * VALUE_MAX


@pytest.mark.parametrize(
    "name", ["fwd.work", "fwd.", "fwd.work.web\n", "fwd.w\x1b.x", "fwd.w.\udcff", "fwd.1.x"]
)
def test_a_bad_key_is_an_error_of_its_own(directory: Path, line: str, name: str) -> None:
    (directory / "fwd.work.web").write_text(line)
    (directory / name).write_text(line)
    found = FileSource(directory).read()
    assert set(found.forwards) == {WEB}
    assert list(found.errors) == [name]
    assert str(found.errors[name]).isprintable()


@pytest.mark.parametrize("cut", range(0, 120, 7))
def test_a_half_written_value_is_never_a_wider_one(directory: Path, line: str, cut: int) -> None:
    (directory / "fwd.work.web").write_text(line[:cut])
    found = FileSource(directory).read()
    assert len(found.forwards) + len(found.errors) == 1
    for config in found.forwards.values():
        assert str(config.sources).startswith("127.0.0.0/")


def test_an_unreadable_entry_is_an_error_of_its_own(directory: Path, line: str) -> None:
    (directory / "fwd.work.web").write_text(line)
    (directory / "fwd.work.dir").mkdir()
    (directory / "fwd.work.loop").symlink_to("fwd.work.loop")
    found = FileSource(directory).read()
    assert set(found.forwards) == {WEB}
    assert set(found.errors) == {"fwd.work.dir", "fwd.work.loop"}


def test_an_entry_that_is_gone_already_is_no_error(directory: Path, line: str) -> None:
    (directory / "fwd.work.web").symlink_to("nowhere")
    found = FileSource(directory).read()
    assert found == Configuration()


def test_an_entry_that_is_there_twice_is_refused(directory: Path, line: str) -> None:
    file = directory / "all"
    file.write_text(f"fwd.work.web {line}\nfwd.work.web {line}\nfwd.work.ssh {line}\n")
    found = FileSource(file).read()
    assert set(found.forwards) == {"fwd.work.ssh"}
    assert "twice" in str(found.errors["fwd.work.web"])


@pytest.mark.parametrize("separator", ["\x0b", "\x0c", "\x1c", "\x85", "\r"])
def test_only_a_newline_ends_a_line(directory: Path, line: str, separator: str) -> None:
    file = directory / "all"
    file.write_bytes(f"# comment{separator}fwd.work.web {line}\n".encode("latin-1"))
    assert FileSource(file).read() == Configuration()


def test_a_source_that_is_gone_or_too_large_is_an_error(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        FileSource(directory / "missing").read()
    (directory / "all").write_bytes(b"\n" * (configsource.FILE_MAX + 1))
    with pytest.raises(ConfigError, match="more than"):
        FileSource(directory / "all").read()
    monkeypatch.setattr(configsource, "ENTRIES_MAX", 1)
    for name in ("fwd.a.a", "fwd.a.b"):
        (directory / name).touch()
    with pytest.raises(ConfigError, match="2 entries"):
        FileSource(directory).read()


def test_the_stamp_differs_when_something_changed(directory: Path, line: str) -> None:
    source = FileSource(directory)
    seen = [source.stamp()]
    file = directory / "fwd.work.web"

    def changed() -> None:
        assert source.stamp() == source.stamp()
        assert source.stamp() not in seen
        seen.append(source.stamp())

    file.write_text(line)
    changed()
    file.write_text(line + " ")
    changed()
    os.utime(file, ns=(1, 1))
    changed()
    file.rename(directory / "fwd.work.other")
    changed()
    (directory / "fwd.work.other").unlink()
    assert source.stamp() == seen[0]
    directory.rmdir()
    changed()
    assert source.stamp() is None


def test_the_configuration_is_named_by_its_path(directory: Path) -> None:
    assert str(FileSource(directory)) == str(directory)
    (directory / "all").touch()
    assert FileSource(directory / "all").stamp() is not None


def test_tcp_and_udp_of_one_rule_are_two_forwards(directory: Path, line: str) -> None:
    (directory / WEB).write_text(line)
    (directory / "udp.work.web").write_text(
        line.replace("qubes.ForwardTCP transport=call", "qubes.ForwardUDP transport=mux")
    )
    found = FileSource(directory).read()
    assert {key: config.proto for key, config in found.forwards.items()} == {
        WEB: "tcp",
        "udp.work.web": "udp",
    }
