# SPDX-License-Identifier: GPL-2.0-or-later
"""qubesd's events through a dispatcher that is shaped as qubesadmin's, over a socket that the test feeds.

What is not to be news is followed by the end of the connection: a wait that passed over it ends by that.
"""

import asyncio
import fnmatch
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from bounds import BOUND_S

from qubes_fwd_qrexec.admin.qubes.events import QubesChanges
from qubes_fwd_qrexec.admin.qubes.store import QubesStore
from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.system.inotify import Inotify

ESTABLISHED = ("", "connection-established")
Handler = Callable[..., None]


def wire(subject: str, event: str, **values: str) -> bytes:
    """One event as qubesd sends it: qubes-core-admin qubes/api/__init__.py, send_event()."""
    pairs = "".join(f"{key}\0{value}\0" for key, value in values.items())
    return f"1\0{subject}\0{event}\0{pairs}\0".encode()


class FakeDispatcher:
    """As `qubesadmin.events.EventsDispatcher` behaves, seen from here; refuses what must not be asked."""

    def __init__(self, sock: socket.socket | None) -> None:
        self.sock = sock
        self.handlers: dict[str, Handler] = {}
        self.is_listening = False

    def add_handler(self, event: str, handler: Handler) -> None:
        # For an event that has a handler the real one looks up the devices among its parameters. Those are
        # calls that a management qube may not make, and their error ends the listening.
        is_for_devices = fnmatch.fnmatch("device-attach:block", event)
        assert not is_for_devices, 'devices would be looked up; take "domain-*" and "property-*" instead'
        assert event not in self.handlers
        self.handlers[event] = handler

    async def listen_for_events(self, vm: object = None, reconnect: bool = True) -> None:
        assert vm is None
        assert not reconnect
        assert not self.is_listening
        self.is_listening = True
        try:
            await self._listen()
        except (OSError, asyncio.CancelledError):
            return  # the real one swallows both

    async def _listen(self) -> None:
        if self.sock is None:
            raise FileNotFoundError("/var/run/qubesd.sock")
        reader, writer = await asyncio.open_unix_connection(sock=self.sock)

        async def word() -> str:
            return (await reader.readuntil(b"\0"))[:-1].decode()

        try:
            while not reader.at_eof():
                try:
                    header = await word()
                except asyncio.IncompleteReadError as error:
                    if error.partial:
                        raise
                    return
                assert header == "1"
                subject, event = await word(), await word()
                values = {}
                while key := await word():
                    values[key] = await word()
                for pattern, handler in self.handlers.items():
                    if fnmatch.fnmatch(event, pattern):
                        handler(subject or None, event, **values)
        finally:
            writer.close()


class Qubesd:
    """The far end of the connection, and news from it."""

    def __init__(self, policy_dir: Path) -> None:
        near, self.sock = socket.socketpair()
        self.dispatcher = FakeDispatcher(near)
        self.wakers = os.pipe()
        self.changes = QubesChanges(self.dispatcher, [policy_dir, policy_dir.parent / "run"], self.wakers[:1])

    def send(self, *events: tuple[str, str]) -> None:
        self.sock.sendall(b"".join(wire(*event) for event in events))

    def __enter__(self) -> "Qubesd":
        self.changes.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.changes.__exit__(None, None, None)
        for fd in self.wakers:
            os.close(fd)
        self.sock.close()
        if not self.dispatcher.is_listening and self.dispatcher.sock is not None:
            self.dispatcher.sock.close()


@pytest.fixture
def policy_dir(tmp_path: Path) -> Path:
    (tmp_path / "policy.d" / "include").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    return tmp_path / "policy.d"


@pytest.fixture
def idle(policy_dir: Path) -> Iterator[Qubesd]:
    """Nobody has waited yet."""
    with Qubesd(policy_dir) as made:
        yield made


@pytest.fixture
def qubesd(idle: Qubesd) -> Qubesd:
    idle.send(ESTABLISHED)
    assert idle.changes.wait(BOUND_S)
    return idle


NEWS = [
    ("work", "property-set:netvm"),
    ("work", "property-set:ip"),
    ("work", "property-reset:ip6"),
    ("sys-net", "domain-feature-set:ipv6"),
    ("sys-net", "domain-feature-set:service.qubes-forward-nft"),
    ("work", "property-reset:netvm"),
    ("work", "property-del:netvm"),
    ("", "property-reset:default_netvm"),
    ("work", "property-set:template"),
    ("default-dvm", "property-set:template_for_dispvms"),
    ("sys-net", "property-set:provides_network"),
    ("work", "domain-start"),
    ("work", "domain-start-failed"),
    ("work", "domain-shutdown"),
    ("", "domain-add"),
    ("", "domain-delete"),
    ("work", "domain-feature-set:forward.web"),
    ("work", "domain-feature-delete:forward.web"),
    ("sys-net", "domain-feature-set:vm-config.fwd.work.web"),
    ("sys-net", "domain-feature-delete:vm-config.fwd.work.web"),
    ("fedora-42", "domain-feature-set:supported-rpc.qubes.ForwardTCP"),
    ("sys-vpn", "domain-feature-set:service.vpn-handler-openvpn"),
    ("sys-whonix", "domain-feature-set:whonix-gw"),
    ("anon", "domain-feature-delete:whonix-ws"),
    ("anon", "domain-tag-add:anon-vm"),
    ("anon", "domain-tag-delete:anon-vm"),
    ("sys-whonix", "domain-tag-add:anon-gateway"),
    ("sys-whonix", "domain-tag-delete:anon-gateway"),
    ("personal", "domain-tag-add:games"),
    ("personal", "domain-tag-delete:games"),
    ("personal", "property-set:ip"),
    ("work", "property-set:label"),
    ("personal", "property-reset:ip6"),
    ("sys-net", "domain-feature-set:ipv6"),
    ("sys-net", "domain-feature-delete:ipv6"),
]
NO_NEWS = [
    ("work", "property-pre-set:netvm"),
    ("work", "property-set:label2"),
    ("work", "property-set:netvm2"),
    ("work", "domain-started"),
    ("work", "domain-tag-pre-add:anon-vm"),
    ("work", "domain-pre-start"),
    ("work", "domain-spawn"),
    ("work", "domain-feature-pre-set:forward.web"),
    ("work", "domain-feature-set:gui"),
    ("work", "domain-feature-delete:service.cups"),
    ("work", "domain-feature-set:vm-config.other"),
    ("work", "property-set:ip7"),
    ("work", "domain-feature-set:ipv6-address"),
    ("work", "device-attach:block"),
    ("", "property-set:clockvm"),
]


@pytest.mark.parametrize("event", NEWS)
def test_news(qubesd: Qubesd, event: tuple[str, str]) -> None:
    qubesd.send(event)
    qubesd.sock.close()  # what is passed over ends by this
    assert qubesd.changes.wait(BOUND_S)


@pytest.mark.parametrize("event", NO_NEWS)
def test_no_news(qubesd: Qubesd, event: tuple[str, str]) -> None:
    qubesd.send(event)
    qubesd.sock.close()
    with pytest.raises(StoreError, match="qubesd sends no events; is it running"):
        qubesd.changes.wait(BOUND_S)


def test_all_that_is_there_counts_as_one(qubesd: Qubesd) -> None:
    qubesd.send(*NEWS, *NEWS)
    assert qubesd.changes.wait(BOUND_S)
    qubesd.sock.close()
    with pytest.raises(StoreError):
        qubesd.changes.wait(BOUND_S)


def test_what_comes_with_parameters_is_news_too(qubesd: Qubesd) -> None:
    qubesd.sock.sendall(wire("work", "property-set:netvm", name="netvm", newvalue="sys-net", oldvalue="x"))
    assert qubesd.changes.wait(BOUND_S)


def test_an_event_in_pieces_is_one(qubesd: Qubesd) -> None:
    whole = wire("work", "property-set:netvm", name="netvm", newvalue="None")
    qubesd.sock.sendall(whole[:20])
    assert not qubesd.changes.wait(0.01)
    qubesd.sock.sendall(whole[20:])
    assert qubesd.changes.wait(BOUND_S)


def test_news_just_before_the_end_is_not_lost(qubesd: Qubesd) -> None:
    qubesd.send(NEWS[0])
    qubesd.sock.close()
    assert qubesd.changes.wait(BOUND_S)
    for _ in range(2):
        with pytest.raises(StoreError, match="qubesd sends no events"):
            qubesd.changes.wait(BOUND_S)


def test_a_connection_that_breaks_within_an_event_is_lost(qubesd: Qubesd) -> None:
    qubesd.sock.sendall(wire("work", "property-set:netvm")[:9])
    qubesd.sock.close()
    with pytest.raises(StoreError, match=r"no events \(IncompleteReadError"):
        qubesd.changes.wait(BOUND_S)


def test_what_the_dispatcher_cannot_read_is_an_error_like_others(qubesd: Qubesd) -> None:
    qubesd.sock.sendall(b"2\0what\0")
    with pytest.raises(StoreError, match=r"no events \(AssertionError"):
        qubesd.changes.wait(BOUND_S)


def test_without_qubesd_the_first_wait_says_so(policy_dir: Path) -> None:
    qubesd = Qubesd(policy_dir)
    assert qubesd.dispatcher.sock is not None
    qubesd.dispatcher.sock.close()
    qubesd.dispatcher.sock = None
    with qubesd, pytest.raises(StoreError, match=r"is it running, and does it allow admin\.Events\?"):
        qubesd.changes.wait(BOUND_S)


def test_a_wait_is_over_after_its_time(qubesd: Qubesd) -> None:
    assert not qubesd.changes.wait(0.01)
    assert not qubesd.changes.wait(0)


def test_a_waker_ends_the_wait_and_is_not_read(qubesd: Qubesd) -> None:
    os.write(qubesd.wakers[1], b"x")
    begun = time.monotonic()
    assert not qubesd.changes.wait(BOUND_S)
    assert not qubesd.changes.wait(BOUND_S)
    assert time.monotonic() - begun < BOUND_S
    assert os.read(qubesd.wakers[0], 9) == b"x"
    qubesd.send(NEWS[0])
    assert qubesd.changes.wait(BOUND_S)


@pytest.mark.parametrize(
    "name", ["30-forward.policy", "20-theirs.policy", "include/admin-local-ro", "../run/30-user.policy"]
)
def test_a_policy_file_that_somebody_edits_is_news(qubesd: Qubesd, policy_dir: Path, name: str) -> None:
    (policy_dir / name).write_text("# mine\n")
    assert qubesd.changes.wait(BOUND_S)


@pytest.mark.parametrize("name", [".30-forward.policy", "30-user.policy.rpmsave", "include/.tmp"])
def test_what_qrexec_does_not_read_is_none(qubesd: Qubesd, policy_dir: Path, name: str) -> None:
    (policy_dir / name).write_text("# half\n")
    qubesd.sock.close()
    with pytest.raises(StoreError):
        qubesd.changes.wait(BOUND_S)


def test_a_management_qube_has_no_policy_to_look_at(policy_dir: Path) -> None:
    shutil.rmtree(policy_dir)
    with Qubesd(policy_dir) as qubesd:
        qubesd.send(ESTABLISHED)
        assert qubesd.changes.wait(BOUND_S)


def test_policy_that_cannot_be_watched_is_an_error(policy_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Inotify, directory: Path) -> int:
        raise OSError(28, "limits", str(directory))

    monkeypatch.setattr(Inotify, "add", refuse)
    with Qubesd(policy_dir) as qubesd, pytest.raises(StoreError, match=r"policy\.d: limits"):
        qubesd.changes.wait(BOUND_S)


def test_nobody_needs_to_wait(idle: Qubesd) -> None:
    """And what was made is closed all the same: a warning would be an error."""


def test_an_end_that_nobody_waits_for_is_not_complained_about(policy_dir: Path) -> None:
    with Qubesd(policy_dir) as qubesd:
        qubesd.sock.sendall(wire(*ESTABLISHED) + b"2\0what\0")
        assert qubesd.changes.wait(BOUND_S)
        listening = qubesd.changes._listening
        assert listening is not None
        qubesd.changes._loop.run_until_complete(
            asyncio.wait([listening], timeout=BOUND_S)  # until the dispatcher has failed
        )
        assert listening._log_traceback  # type: ignore[attr-defined]
    assert not listening._log_traceback  # type: ignore[attr-defined]


def test_nothing_stays_open(policy_dir: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with Qubesd(policy_dir) as qubesd:
        qubesd.send(ESTABLISHED)
        assert qubesd.changes.wait(BOUND_S)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(("connection", "linger_s"), [("socket", 0.0), ("qrexec", 0.1)])
def test_the_real_dispatcher_is_asked_for_without_a_cache(
    monkeypatch: pytest.MonkeyPatch, connection: str, linger_s: float
) -> None:
    made = []
    app = SimpleNamespace(qubesd_connection_type=connection, local_name="mgmt")

    class EventsDispatcher(FakeDispatcher):
        def __init__(self, app: object, api_method: str = "admin.Events", enable_cache: bool = True) -> None:
            super().__init__(None)
            made.append((app, api_method, enable_cache))

    qubesadmin, events = ModuleType("qubesadmin"), ModuleType("qubesadmin.events")
    qubesadmin.Qubes = lambda: app  # type: ignore[attr-defined]
    events.EventsDispatcher = EventsDispatcher  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "qubesadmin", qubesadmin)
    monkeypatch.setitem(sys.modules, "qubesadmin.events", events)
    with QubesStore().changes() as changes:
        assert isinstance(changes, QubesChanges)
        assert changes.linger_s == linger_s
        assert changes.policy_dirs == (Path("/etc/qubes/policy.d"), Path("/run/qubes/policy.d"))
    assert made == [(app, "admin.Events", False)]
