# SPDX-License-Identifier: GPL-2.0-or-later
"""What Qubes delivers is read, and read again: over a fake of the package, whose descriptors are real."""

import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
from fake_qubesdb import DisconnectedError, Error, FakeQubesDB
from helpers import BOUND_S, no_fds_left, until

from qubes_fwd_qrexec.common.errors import ConfigError
from qubes_fwd_qrexec.system import qubesdbsource
from qubes_fwd_qrexec.system.qubesdbsource import QubesDBSource, open_qubesdb

LINE = (
    b"version=1 service=qubes.ForwardTCP transport=call side=outer "
    b"listen=0.0.0.0 srcports=80-80 dstports=8080-8080 "
    b"srchosts=10.0.0.0/8"
)
TARGET = b"version=1 role=target side=uplink proto=tcp srcports=80-80 dstports=80-80 srchosts=10.0.0.0/8"
HOP = TARGET.replace(b"role=target", b"role=hop") + b" to4=10.137.0.9"
WEB, SSH, DNS = "fwd.work.web", "fwd.work.ssh", "udp.work.dns"
AT_ONCE = (0.0, 0.001)


@pytest.fixture
def qubesdb() -> FakeQubesDB:
    return FakeQubesDB({WEB: LINE})


def opened(qubesdb: FakeQubesDB) -> AbstractContextManager[QubesDBSource]:
    return open_qubesdb(qubesdb, start_s=BOUND_S, backoff_s=AT_ONCE)


def names(source: QubesDBSource) -> set[str]:
    return {config.name for config in source.read().forwards.values()}


def readers() -> int:
    """The source's own threads; those that trio keeps for a while come and go."""
    return sum(thread.name == "qubesdb" for thread in threading.enumerate())


@contextmanager
def nothing_left(qubesdb: FakeQubesDB) -> Iterator[None]:
    assert readers() == 0
    with no_fds_left():
        yield
    assert qubesdb.handles == []
    assert readers() == 0


@pytest.mark.parametrize("name", [b"work", b"disp1234", b"work-clone", None])
def test_a_target_s_entry_is_for_the_qube_of_that_name_alone(name: bytes | None) -> None:
    """A clone and a disposable have it as well, until dom0 takes it away."""
    qubesdb = FakeQubesDB({"nft.work.web": TARGET, "nft.vault.web": HOP})
    if name is not None:
        qubesdb.entries["/name"] = name
    with opened(qubesdb) as source:
        found = source.read()
    assert set(found.paths) == {"nft.vault.web"} | ({"nft.work.web"} if name == b"work" else set())
    for key, error in found.path_errors.items():
        assert str(error) == f"{key}: it is for work, and this qube is {(name or b'').decode()!a}"
    assert len(found.paths) + len(found.path_errors) == 2


async def test_every_kind_of_entry_that_dom0_writes_is_read(qubesdb: FakeQubesDB) -> None:
    """A forward of UDP has a key of its own kind, and so has the firewall's part of one by nft."""
    with opened(qubesdb) as source:
        qubesdb.set(DNS, LINE.replace(b"ForwardTCP transport=call", b"ForwardUDP transport=mux"))
        qubesdb.set("nft.work.game", HOP)
        await until(lambda: source.read().paths)
        found = source.read()
    assert {key: str(config.proto) for key, config in found.forwards.items()} == {WEB: "tcp", DNS: "udp"}
    assert set(found.paths) == {"nft.work.game"}
    assert not found.errors
    assert not found.path_errors


async def test_what_is_there_is_read_and_changes_are_noticed(qubesdb: FakeQubesDB) -> None:
    qubesdb.entries["/qubes-ip"] = b"10.137.0.5"
    qubesdb.entries["/vm-config/forward"] = b"not ours"
    with nothing_left(qubesdb), opened(qubesdb) as source:
        assert names(source) == {"web"}
        assert source.problem is None
        before = source.stamp()
        qubesdb.set(SSH, LINE)
        await until(lambda: source.stamp() != before)
        assert names(source) == {"web", "ssh"}
        qubesdb.remove(WEB)
        await until(lambda: names(source) == {"ssh"})


async def test_a_change_of_something_else_is_no_change(qubesdb: FakeQubesDB) -> None:
    with opened(qubesdb) as source:
        before = source.stamp()
        (watching,) = qubesdb.watchers
        assert watching.watches == ["/vm-config/"]
        reads = qubesdb.opened
        qubesdb.set("other", b"1")
        await until(lambda: qubesdb.opened > reads)
        await until(lambda: len(qubesdb.handles) == 1)
        assert source.stamp() == before


async def test_a_change_between_watch_and_first_read_is_seen(qubesdb: FakeQubesDB) -> None:
    def change() -> None:
        qubesdb.before_list = lambda: None
        qubesdb.set(SSH, LINE)

    qubesdb.before_list = change
    with opened(qubesdb) as source:
        await until(lambda: names(source) == {"web", "ssh"})


async def test_a_change_during_a_read_is_seen(qubesdb: FakeQubesDB) -> None:
    """Its event would be queued inside a handle that both reads and watches."""
    with opened(qubesdb) as source:

        def change(path: str) -> None:
            if path.endswith("ssh"):
                qubesdb.before_read = lambda path: None
                qubesdb.set(WEB, LINE.replace(b"10.0.0.0/8", b"10.9.0.0/16"))

        qubesdb.before_read = change
        qubesdb.set(SSH, LINE)
        await until(lambda: "10.9.0.0/16" in str(source.read().forwards[WEB]))


async def test_what_was_written_before_somebody_asks_is_known_when_the_answer_comes(
    qubesdb: FakeQubesDB,
) -> None:
    with nothing_left(qubesdb), opened(qubesdb) as source:
        qubesdb.entries[f"/vm-config/{SSH}"] = LINE  # whoever watches has not heard of it yet
        done = threading.Event()
        source.refresh(done.set)
        assert done.wait(BOUND_S)
        assert names(source) == {"web", "ssh"}


async def test_those_who_ask_during_a_read_share_the_next(qubesdb: FakeQubesDB) -> None:
    go_on, done = threading.Event(), [threading.Event() for _ in range(20)]
    with opened(qubesdb) as source:
        before = qubesdb.opened
        qubesdb.before_list = lambda: assert_set(go_on)
        source.refresh(done[0].set)
        await until(lambda: qubesdb.opened > before)
        for each in done[1:]:
            source.refresh(each.set)
        assert not any(each.is_set() for each in done)
        go_on.set()
        assert all(each.wait(BOUND_S) for each in done)
        assert qubesdb.opened == before + 2


async def test_who_asks_hears_of_a_read_that_fails(qubesdb: FakeQubesDB) -> None:
    with opened(qubesdb) as source:
        before, done = source.stamp(), threading.Event()
        qubesdb.end()
        source.refresh(done.set)
        qubesdb.begin()
        assert done.wait(BOUND_S)
        assert source.stamp() == before


async def test_while_qubesdb_is_gone_nobody_waits_for_it(qubesdb: FakeQubesDB) -> None:
    with opened(qubesdb) as source:
        qubesdb.end()
        await until(lambda: source.problem is not None)
        done = threading.Event()
        source.refresh(done.set)
        assert done.is_set()


async def test_an_entry_that_goes_while_it_is_read_is_no_error(qubesdb: FakeQubesDB) -> None:
    qubesdb.set(SSH, LINE)

    def remove(path: str) -> None:
        qubesdb.before_read = lambda path: None
        qubesdb.remove(SSH)

    qubesdb.before_read = remove
    with opened(qubesdb) as source:
        await until(lambda: names(source) == {"web"})
        assert not source.read().errors


async def test_many_changes_at_once_are_read_together(qubesdb: FakeQubesDB) -> None:
    go_on = threading.Event()
    with opened(qubesdb) as source:
        before = qubesdb.opened
        qubesdb.before_list = lambda: assert_set(go_on)
        qubesdb.set("fwd.work.r0", LINE)
        await until(lambda: qubesdb.opened > before)
        for number in range(1, 200):
            qubesdb.set(f"fwd.work.r{number}", LINE)
        go_on.set()
        await until(lambda: len(names(source)) == 201)
        assert qubesdb.opened <= before + 2


def assert_set(event: threading.Event) -> None:
    assert event.wait(BOUND_S)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("fwd.work.bad", b"version=1 nonsense", "an option is written name=value"),
        ("fwd.work.bad", b"\xff\xfe", "'\\xff\\xfe' at column 1"),
        ("fwd.work.bad", b"", "option 'version' is missing"),
        ("fwd.work.bad", LINE.replace(b"version=1", b"version=2"), "written for another version"),
        ("fwd.work", LINE, "entry 'fwd.work'"),
        ("fwd.a/b.web", LINE, "entry 'fwd.a/b.web'"),
    ],
)
async def test_a_bad_entry_is_an_error_of_its_own(
    qubesdb: FakeQubesDB, key: str, value: bytes, words: str
) -> None:
    with opened(qubesdb) as source:
        qubesdb.set(key, value)
        await until(lambda: source.read().errors)
        assert list(source.read().errors) == [key]
        assert words in str(source.read().errors[key])
        assert names(source) == {"web"}


async def test_what_is_more_than_qubesdb_can_hold_is_refused(
    qubesdb: FakeQubesDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    qubesdb.entries[f"/vm-config/{SSH}"] = b"x" * 3072
    monkeypatch.setattr(qubesdbsource, "ENTRIES_MAX", 2)
    with opened(qubesdb) as source:
        assert "longer than the 3071 bytes" in str(source.read().errors[SSH])
        before = source.stamp()
        qubesdb.set("fwd.work.third", LINE)
        await until(lambda: source.stamp() != before)
        with pytest.raises(ConfigError, match="3 entries; at most 2 are read"):
            source.read()


async def test_the_end_of_the_daemon_leaves_the_configuration_and_a_new_one_is_watched(
    qubesdb: FakeQubesDB, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with nothing_left(qubesdb), opened(qubesdb) as source:
        for turn in range(3):
            tries = qubesdb.opened
            before = source.stamp()
            qubesdb.end()
            await until(lambda tries=tries: qubesdb.opened > tries + 2)
            assert source.problem == "QubesDB cannot be reached: Connection refused"
            assert "web" in names(source)
            assert source.stamp() == before
            qubesdb.entries[f"/vm-config/fwd.work.new{turn}"] = LINE  # while nobody could watch
            qubesdb.begin()
            await until(lambda turn=turn: f"new{turn}" in names(source))
            qubesdb.set(f"fwd.work.then{turn}", LINE)
            await until(lambda turn=turn: f"then{turn}" in names(source))
            assert source.problem is None
    lost = [m for m in caplog.messages if "what was configured stays" in m]
    assert len(lost) == 3
    assert caplog.messages.count("QubesDB is back") == 3


@pytest.mark.parametrize("error", [Error(5, "Input/output error"), DisconnectedError("QubesDB disconnected")])
async def test_a_read_that_fails_is_tried_again(qubesdb: FakeQubesDB, error: Error) -> None:
    with nothing_left(qubesdb), opened(qubesdb) as source:

        def fail(path: str) -> None:
            qubesdb.before_read = lambda path: None
            raise error

        qubesdb.before_read = fail
        qubesdb.set(SSH, LINE)
        await until(lambda: names(source) == {"web", "ssh"})


def end_of_thread() -> None:
    """Wait until no thread of a source is left."""
    for thread in threading.enumerate():
        if thread.name == "qubesdb":
            thread.join(BOUND_S)


async def test_the_pauses_between_tries_grow_and_begin_anew(qubesdb: FakeQubesDB) -> None:
    pauses: list[float] = []
    has_failed = threading.Event()

    class Ending(threading.Event):
        """Time passes at once, from when the start has failed: it must not find QubesDB back by then."""

        def is_set(self) -> bool:
            return len(pauses) == 8

        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            assert has_failed.wait(BOUND_S)
            pauses.append(timeout)
            if len(pauses) == 6:
                qubesdb.begin()
            return self.is_set()

    qubesdb.end()
    source = QubesDBSource(qubesdb, (0.5, 3.0), Ending())
    with pytest.raises(ConfigError):
        source.start()
    has_failed.set()
    await until(lambda: source.problem is None)
    qubesdb.end()
    end_of_thread()
    assert pauses == [0.5, 1.0, 2.0, 3.0, 3.0, 3.0, 0.5, 1.0]


def test_without_a_daemon_it_does_not_start(qubesdb: FakeQubesDB) -> None:
    qubesdb.is_up = False
    with (
        nothing_left(qubesdb),
        pytest.raises(ConfigError, match="QubesDB cannot be reached: Connection refused"),
        opened(qubesdb),
    ):
        pass


def test_a_daemon_that_does_not_answer_is_given_up_on_in_time(qubesdb: FakeQubesDB) -> None:
    go_on = threading.Event()
    qubesdb.before_list = lambda: assert_set(go_on)
    with (
        pytest.raises(ConfigError, match=r"no answer within 0\.01 s"),
        open_qubesdb(qubesdb, start_s=0.01, backoff_s=AT_ONCE),
    ):
        pass
    go_on.set()
    end_of_thread()
    assert qubesdb.handles == []


async def test_a_daemon_that_hangs_keeps_nobody_waiting(
    qubesdb: FakeQubesDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qubesdbsource, "_JOIN_S", 0.0)
    go_on = threading.Event()
    with opened(qubesdb) as source:
        before = qubesdb.opened
        qubesdb.before_list = lambda: assert_set(go_on)
        qubesdb.set(SSH, LINE)
        await until(lambda: qubesdb.opened > before)
        assert names(source) == {"web"}
    go_on.set()
    end_of_thread()
    assert qubesdb.handles == []


async def test_an_unreadable_list_is_not_an_empty_one(qubesdb: FakeQubesDB) -> None:
    with opened(qubesdb) as source:
        before = source.stamp()
        qubesdb.can_list = False
        qubesdb.set(SSH, LINE)
        await until(lambda: source.stamp() != before)
        with pytest.raises(ConfigError, match="list of entries cannot be read"):
            source.read()


def test_without_the_package_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "qubesdb", None)
    with pytest.raises(ConfigError, match="install python3-qubesdb, or name a directory"), open_qubesdb():
        pass


def test_the_installed_package_is_used(qubesdb: FakeQubesDB, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "qubesdb", qubesdb)  # type: ignore[arg-type]
    with open_qubesdb() as source:
        assert names(source) == {"web"}
        assert str(source) == "QubesDB"


def test_before_the_start_nothing_can_be_read(qubesdb: FakeQubesDB) -> None:
    with pytest.raises(ConfigError, match="has not been read"):
        QubesDBSource(qubesdb).read()
