# SPDX-License-Identifier: GPL-2.0-or-later
"""What qubesd's answers are taken for, read through qubesadmin's objects; and what is said without one."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from fake_admin import Called, FakeQubes, empty_answer, install, refused
from fake_exc import (
    PermissionDenied,
    ProtocolError,
    QubesDaemonCommunicationError,
    QubesException,
    QubesFeatureNotFoundError,
    QubesVMNotFoundError,
)
from fake_policy import FakePolicyClient

from qubes_fwd_qrexec.admin.inventory import Qube
from qubes_fwd_qrexec.admin.qubes.store import QubesStore
from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.policytext import PolicyRule

WORK = QubeName("work")
GOOD = {"netvm": "vm ", "template": "vm fedora-42", "ip": "str 10.137.0.10"}


@pytest.fixture
def store(dom0: FakeQubes) -> QubesStore:
    return QubesStore()


@pytest.fixture
def remote(lab: LabDirectory, policy_client: FakePolicyClient, monkeypatch: pytest.MonkeyPatch) -> FakeQubes:
    """This machine is taken for a management qube."""
    app = FakeQubes(lab, connection="qrexec", name="mgmt")
    install(monkeypatch, app, policy_client)
    return app


def failing(error: BaseException, **where: str) -> Callable[[Called], None]:
    """Fail calls that fit, for `FakeQubes.fails`."""

    def fails(called: Called) -> None:
        if all(getattr(called, name) == value for name, value in where.items()):
            raise error

    return fails


def answering(qubesd: FakeQubes, text: str, method: str) -> None:
    """Have this answer about work, or for the list of all."""

    def fails(called: Called) -> bytes | None:
        fits = called.method == f"admin.vm.{method}" and called.dest in ("work", "dom0")
        return text.encode() if fits else None

    qubesd.fails = fails


def read_work(store: QubesStore) -> Qube:
    return store.inventory().qubes[WORK]


def with_properties(qubesd: FakeQubes, properties: dict[str, str]) -> None:
    lines = [f"{name} default=True type={value}\n" for name, value in properties.items()]
    answering(qubesd, "".join(lines), "property.GetAll")


@pytest.mark.parametrize("more", ["", " uuid=00000000-0000-0000-0000-000000000000", " later=than"])
def test_a_list_is_read_with_and_without_what_newer_versions_say(
    store: QubesStore, dom0: FakeQubes, more: str
) -> None:
    """The UUID came with 4.3."""
    answering(dom0, f"work class=AppVM state=Running{more}\n", "List")
    assert (read_work(store).klass, read_work(store).is_running) == ("AppVM", True)


@pytest.mark.parametrize("state", ["Running", "Transient", "Paused", "Suspended", "Halting", "unheard-of"])
def test_what_may_still_act_counts_as_running(store: QubesStore, dom0: FakeQubes, state: str) -> None:
    answering(dom0, f"work class=AppVM state={state}\n", "List")
    assert read_work(store).is_running


@pytest.mark.parametrize("state", ["Halted", "NA", "Dying", "Crashed"])
def test_what_is_over_does_not_count_as_running(store: QubesStore, dom0: FakeQubes, state: str) -> None:
    answering(dom0, f"work class=AppVM state={state}\n", "List")
    assert not read_work(store).is_running


@pytest.mark.parametrize(
    "line", ["work", "work state=Halted", "1 class=AppVM state=Halted", " class=A state=B", "work class"]
)
def test_a_list_that_cannot_be_read_is_refused(store: QubesStore, dom0: FakeQubes, line: str) -> None:
    answering(dom0, f"personal class=AppVM state=Halted\n{line}\n", "List")
    with pytest.raises(StoreError, match=r"^admin\.vm\.List at dom0: "):
        store.inventory()


@pytest.mark.parametrize(
    ("properties", "words"),
    [
        ({"netvm": "vm a b"}, "'a b' is not a qube's name"),
        ({"netvm": "str sys-net"}, "'str' object has no attribute 'name'"),
        ({"template": "vm \x1b"}, r"'\\x1b' is not a qube's name"),
        ({"ip": "str 10.0.0"}, "'10.0.0' is not an IPv4 or IPv6 address"),
        ({"ip6": "str 1"}, "'1' is not an IPv4 or IPv6 address"),
    ],
)
def test_a_property_that_is_not_what_it_should_be_makes_its_qube_unreadable(
    store: QubesStore, dom0: FakeQubes, properties: dict[str, str], words: str
) -> None:
    with_properties(dom0, GOOD | properties)
    problem = read_work(store).problem or ""
    assert re.search(rf"^admin\.vm\.property\.GetAll at work: .*{words}", problem), problem


@pytest.mark.parametrize(
    ("klass", "missing"),
    [(klass, "netvm") for klass in ("AppVM", "DispVM", "StandaloneVM", "TemplateVM")]
    + [("AppVM", "template"), ("DispVM", "template")],
)
def test_a_qube_without_the_way_of_its_traffic_is_unreadable(
    store: QubesStore, dom0: FakeQubes, klass: str, missing: str
) -> None:
    lines = [f"{name} default=True type={value}\n" for name, value in GOOD.items() if name != missing]

    def fails(called: Called) -> bytes | None:
        if called.method == "admin.vm.List":
            return f"work class={klass} state=Running\n".encode()
        return "".join(lines).encode() if called.method == "admin.vm.property.GetAll" else None

    dom0.fails = fails
    assert f"at work: it has no {missing}, so nothing is known" in (read_work(store).problem or "")


def test_what_a_qube_looks_like_is_read_and_is_nothing_that_must_be_known(
    store: QubesStore, dom0: FakeQubes
) -> None:
    assert (read_work(store).label, read_work(store).icon) == ("blue", "appvm-blue")
    with_properties(dom0, {**GOOD, "label": "label "})
    found = read_work(store)
    assert (found.problem, found.label, found.icon) == (None, "", "")


def test_a_class_that_has_no_netvm_has_none(store: QubesStore, dom0: FakeQubes) -> None:
    def fails(called: Called) -> bytes | None:
        if called.method == "admin.vm.List":
            return b"work class=RemoteVM state=Running\n"
        return b"name default=True type=str work\n" if called.method == "admin.vm.property.GetAll" else None

    dom0.fails = fails
    found = read_work(store)
    assert found.problem is None
    assert (found.netvm, found.template, found.ip, found.provides_network) == (None, None, None, False)


def test_a_qube_is_read_with_few_calls_and_dom0_with_none(
    store: QubesStore, dom0: FakeQubes, lab: LabDirectory
) -> None:
    for number in range(50):
        lab.set_feature("work", f"supported-rpc.test.{number}", "1")
    lab.set_feature("work", "forward.web", "x")
    found = store.inventory().qubes[QubeName("dom0")]
    asked = [(call.dest, call.method.removeprefix("admin.vm."), call.arg) for call in dom0.calls]
    assert [call for call in asked if call[0] in ("work", "dom0")] == [
        ("dom0", "List", None),
        ("work", "feature.List", None),
        ("work", "feature.Get", "forward.web"),
        ("work", "tag.List", None),
        ("work", "property.GetAll", None),
    ]
    assert (found.klass, found.features) == ("AdminVM", {})


def test_each_inventory_is_read_anew(store: QubesStore, lab: LabDirectory) -> None:
    assert store.inventory() == store.inventory()
    lab.write_qube(replace(lab.qube("work"), netvm=QubeName("sys-vpn")))
    assert read_work(store).netvm == "sys-vpn"


@pytest.mark.parametrize("method", ["property.GetAll", "tag.List", "feature.List"])
def test_a_qube_that_vanishes_while_it_is_read_is_left_out(
    dom0: FakeQubes, store: QubesStore, lab: LabDirectory, method: str
) -> None:
    before = store.inventory().qubes.keys()

    def fails(called: Called) -> None:
        if (called.dest, called.method) == ("work", f"admin.vm.{method}"):
            (lab.qube_dir("work").root).rename(lab.root / "removed")
            raise QubesVMNotFoundError("gone")

    dom0.fails = fails
    assert before - store.inventory().qubes.keys() == {"work"}


def test_a_qube_that_vanishes_from_a_management_qubes_sight_is_left_out(
    remote: FakeQubes, lab: LabDirectory
) -> None:
    """dom0's policy refuses a call to a qube that is gone, as it does what is forbidden."""
    all_of_them = remote.qubesd_call("dom0", "admin.vm.List")
    without = re.sub(rb"(?m)^work .*\n", b"", all_of_them)
    lists = iter((all_of_them, without))

    def vanishing(called: Called) -> bytes | None:
        if called.dest == "work":
            raise refused()
        return next(lists) if called.method == "admin.vm.List" else None

    remote.fails = vanishing
    assert lab.qubes().keys() - QubesStore().inventory().qubes.keys() == {"work"}


def test_a_management_qube_sees_what_dom0_sees(remote: FakeQubes, lab: LabDirectory) -> None:
    assert QubesStore().inventory().qubes.keys() == lab.qubes().keys()


def test_a_feature_that_vanishes_is_left_out(store: QubesStore, dom0: FakeQubes, lab: LabDirectory) -> None:
    for key in ("forward.a", "forward.b"):
        lab.set_feature("work", key, "x")
    dom0.fails = failing(QubesFeatureNotFoundError("gone"), arg="forward.a")
    assert read_work(store).features == {"forward.b": "x"}
    assert read_work(store).problem is None


def test_a_value_that_is_no_text_makes_its_qube_unreadable(
    store: QubesStore, dom0: FakeQubes, lab: LabDirectory
) -> None:
    for key in ("forward.a", "forward.b"):
        lab.set_feature("work", key, "x")
    dom0.fails = lambda called: b"\xff\n" if called.arg == "forward.b" else None
    found = read_work(store)
    assert found.features == {"forward.a": "x"}
    assert "admin.vm.feature.Get+forward.b at work: 'utf-8' codec" in (found.problem or "")


ERRORS = [
    (empty_answer(), "Got empty response from qubesd.*'journalctl -u qubesd' says why"),
    (QubesDaemonCommunicationError("no socket"), "no socket.*group qubes.*systemctl status qubesd"),
    (QubesException("it \x1b[31m is\nso"), r"it \\u001b\[31m is so$"),
    (ProtocolError("no such method"), "no such method$"),
    (PermissionDenied("no"), "no$"),
    (PermissionDenied(), "PermissionDenied$"),
    (ConnectionResetError("lost"), "lost$"),
]


def read(store: QubesStore) -> None:
    """Raises `StoreError`, be it the problem of this one qube or of qubesd."""
    raise StoreError(read_work(store).problem or "")


@pytest.mark.parametrize(("error", "words"), ERRORS)
def test_an_error_says_what_was_asked_of_whom(
    store: QubesStore, dom0: FakeQubes, error: Exception, words: str
) -> None:
    dom0.fails = failing(error, dest="work")
    for call in (
        lambda: read(store),
        lambda: store.set_feature(WORK, "forward.a", "x"),
        lambda: store.remove_feature(WORK, "forward.a"),
    ):
        with pytest.raises(StoreError, match=rf"^admin\.vm\.[a-zA-Z.]+(\+forward\.a)? at work: {words}"):
            call()


@pytest.mark.parametrize("get", [refused(), QubesVMNotFoundError("gone")])
def test_properties_that_cannot_be_read_are_not_taken_for_missing_ones(
    store: QubesStore, dom0: FakeQubes, get: Exception
) -> None:
    """Where GetAll is refused qubesadmin asks for each by itself, and raises an AttributeError."""

    def fails(called: Called) -> None:
        if called.dest == "work" and called.method == "admin.vm.property.GetAll":
            raise refused()
        if called.dest == "work" and called.method == "admin.vm.property.Get":
            raise get

    dom0.fails = fails
    found = read_work(store)
    assert "admin.vm.property.GetAll at work: Failed to access 'netvm' property" in (found.problem or "")


@pytest.mark.parametrize(
    ("dest", "method", "target"),
    [
        ("work", "admin.vm.property.GetAll", "@anyvm"),
        ("work", "admin.vm.tag.List", "@anyvm"),
        ("work", "admin.vm.feature.List", "@anyvm"),
        ("work", "admin.vm.feature.Get", "@anyvm"),
        ("dom0", "admin.vm.List", "@adminvm"),
    ],
)
def test_a_management_qube_that_may_not_is_told_the_line_that_allows_it(
    remote: FakeQubes, lab: LabDirectory, dest: str, method: str, target: str
) -> None:
    lab.set_feature("work", "forward.web", "x")

    def fails(called: Called) -> None:
        # What policy does not allow by itself, qubesadmin's own second try does not get either.
        if called.dest == dest and called.method in (method, "admin.vm.property.Get"):
            raise refused()

    remote.fails = fails
    with pytest.raises(StoreError, match=rf"{re.escape(method)}(\+forward.web)? at {dest}: ") as caught:
        QubesStore().inventory()
    found = re.search("'(admin.*?)'", str(caught.value))
    assert found is not None
    rule = PolicyRule.parse(found[1], "told")
    assert (rule.service, rule.argument, rule.source.text) == (method, None, "mgmt")
    assert (rule.target.text, str(rule.verb)) == (target, "allow")
