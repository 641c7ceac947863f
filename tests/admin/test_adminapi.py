# SPDX-License-Identifier: GPL-2.0-or-later
"""Calls of qubesd and what its answers are taken for; and what is said when there is none."""

import re
from collections.abc import Callable

import pytest
from fake_admin import (
    Called,
    FakeQubes,
    PermissionDenied,
    ProtocolError,
    QubesDaemonCommunicationError,
    QubesException,
    QubesFeatureNotFoundError,
    QubesVMNotFoundError,
    empty_answer,
    install,
    refused,
)
from fake_policy import FakePolicyClient

from qubes_fwd_qrexec.admin.adminapi import AdminApi, Listed, parse_list, parse_properties, to_qube
from qubes_fwd_qrexec.admin.qubesstore import QubesStore
from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.policytext import PolicyRule

WORK = QubeName("work")
LISTED = Listed(WORK, "AppVM", True)


@pytest.fixture
def api(dom0: FakeQubes) -> AdminApi:
    return AdminApi(dom0)


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


@pytest.mark.parametrize("more", ["", " uuid=00000000-0000-0000-0000-000000000000", " later=than this"])
def test_a_list_is_read_with_and_without_what_newer_versions_say(more: str) -> None:
    """The UUID came with 4.3."""
    assert parse_list(f"work class=AppVM state=Running{more}\n") == [LISTED]


@pytest.mark.parametrize("state", ["Running", "Transient", "Paused", "Suspended", "Halting", "unheard-of"])
def test_what_may_still_act_counts_as_running(state: str) -> None:
    assert parse_list(f"work class=AppVM state={state}\n")[0].is_running


@pytest.mark.parametrize("state", ["Halted", "NA", "Dying", "Crashed"])
def test_what_is_over_does_not_count_as_running(state: str) -> None:
    assert not parse_list(f"work class=AppVM state={state}\n")[0].is_running


@pytest.mark.parametrize(
    "line",
    ["work", "work class=AppVM", "work state=Halted", "1 class=AppVM state=Halted", " class=A state=B"],
)
def test_a_list_that_cannot_be_read_is_refused_with_its_line(line: str) -> None:
    with pytest.raises(StoreError, match=rf"admin\.vm\.List: '{line}' cannot be read"):
        parse_list(f"personal class=AppVM state=Halted\n{line}\n")


@pytest.mark.parametrize(
    "line", ["netvm", "netvm default=True type=vm", "netvm type=vm default=True x", "a b c d"]
)
def test_a_property_that_cannot_be_read_is_refused_with_its_qube(line: str) -> None:
    with pytest.raises(StoreError, match=f"work: the property '{line}' cannot be read"):
        parse_properties(WORK, f"{line}\n")


def test_a_value_may_have_blanks_and_every_other_line_end() -> None:
    text = "kernelopts default=True type=str  a  b\x0c\u2028c\\nd \ndns default=True type=str \n"
    assert parse_properties(WORK, text) == {
        "kernelopts": ("str", " a  b\x0c\u2028c\\nd "),
        "dns": ("str", ""),
    }


GOOD = {"netvm": ("vm", ""), "template": ("vm", "fedora-42"), "ip": ("str", "10.137.0.10")}


@pytest.mark.parametrize(
    ("properties", "words"),
    [
        ({"netvm": ("vm", "a b")}, "'a b' is not a qube's name"),
        ({"netvm": ("str", "sys-net")}, "netvm should be of type vm and is 'str'"),
        ({"template": ("vm", "\x1b")}, r"'\\x1b' is not a qube's name"),
        ({"ip": ("str", "10.0.0")}, "'10.0.0' is not an IPv4 or IPv6 address"),
        ({"ip6": ("int", "1")}, "ip6 should be of type str and is 'int'"),
        ({"provides_network": ("bool", "yes")}, "'yes' is not True or False"),
        ({"template_for_dispvms": ("str", "True")}, "should be of type bool"),
    ],
)
def test_a_property_that_is_not_what_it_should_be_is_refused_with_its_qube(
    properties: dict[str, tuple[str, str]], words: str
) -> None:
    with pytest.raises(StoreError, match=f"work: .*{words}"):
        to_qube(LISTED, GOOD | properties, frozenset(), {})


@pytest.mark.parametrize(
    ("klass", "missing"),
    [(klass, "netvm") for klass in ("AppVM", "DispVM", "StandaloneVM", "TemplateVM")]
    + [("AppVM", "template"), ("DispVM", "template")],
)
def test_a_qube_without_the_way_of_its_traffic_is_refused(klass: str, missing: str) -> None:
    properties = {name: value for name, value in GOOD.items() if name != missing}
    with pytest.raises(StoreError, match=f"work: qubesd says nothing about its {missing}"):
        to_qube(LISTED._replace(klass=klass), properties, frozenset(), {})


def test_a_class_that_has_no_netvm_has_none() -> None:
    found = to_qube(Listed(WORK, "RemoteVM", True), {}, frozenset(), {})
    assert (found.netvm, found.template, found.ip, found.provides_network) == (None, None, None, False)


def test_a_qube_is_read_with_few_calls_and_dom0_with_none(
    api: AdminApi, dom0: FakeQubes, lab: LabDirectory
) -> None:
    for number in range(50):
        lab.set_feature("work", f"supported-rpc.test.{number}", "1")
    lab.set_feature("work", "forward.web", "x")
    api.qube(LISTED)
    assert [(called.method.removeprefix("admin.vm."), called.arg) for called in dom0.calls] == [
        ("property.GetAll", None),
        ("tag.List", None),
        ("feature.List", None),
        ("feature.Get", "forward.web"),
    ]
    dom0.calls.clear()
    found = api.qube(Listed(QubeName("dom0"), "AdminVM", True))
    assert found is not None
    assert (dom0.calls, found.klass, found.features) == ([], "AdminVM", {})


@pytest.mark.parametrize("method", ["property.GetAll", "tag.List", "feature.List", "feature.Get"])
def test_a_qube_that_vanishes_while_it_is_read_is_left_out(
    dom0: FakeQubes, lab: LabDirectory, method: str
) -> None:
    lab.set_feature("work", "forward.web", "x")
    dom0.fails = failing(QubesVMNotFoundError("gone"), dest="work", method=f"admin.vm.{method}")
    assert lab.qubes().keys() - QubesStore().inventory().qubes.keys() == {"work"}


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


def test_a_feature_that_vanishes_is_left_out(api: AdminApi, dom0: FakeQubes, lab: LabDirectory) -> None:
    for key in ("forward.a", "forward.b"):
        lab.set_feature("work", key, "x")
    dom0.fails = failing(QubesFeatureNotFoundError("gone"), arg="forward.a")
    found = api.qube(LISTED)
    assert found is not None
    assert found.features == {"forward.b": "x"}


def test_values_that_are_no_text_stay_visible_and_are_no_rule(
    api: AdminApi, dom0: FakeQubes, lab: LabDirectory
) -> None:
    lab.set_feature("work", "forward.a", "x")
    dom0.fails = lambda called: b"\xff\n" if called.arg == "forward.a" else None
    found = api.qube(LISTED)
    assert found is not None
    assert found.features == {"forward.a": "\\xff\n"}


def test_a_feature_whose_name_cannot_be_asked_for_is_a_problem_of_its_qube(
    api: AdminApi, dom0: FakeQubes
) -> None:
    dom0.fails = lambda called: b"forward.a b\n" if called.method == "admin.vm.feature.List" else None
    qube = api.qube(LISTED)
    assert qube is not None
    assert (qube.features, qube.problem) == (
        {},
        "work: 'forward.a b' is no feature's name, which has only [a-zA-Z0-9_.-]",
    )


ERRORS = [
    (empty_answer(), "Got empty response from qubesd.*'journalctl -u qubesd' says why"),
    (QubesDaemonCommunicationError("no socket"), "no socket.*group qubes.*systemctl status qubesd"),
    (QubesException("it \x1b[31m is\nso"), r"it \\u001b\[31m is so$"),
    (ProtocolError("no such method"), "no such method$"),
    (PermissionDenied("no"), "no$"),
    (PermissionDenied(), "PermissionDenied$"),
    (ConnectionResetError("lost"), "lost$"),
]


def read(api: AdminApi) -> None:
    """Raises `StoreError`, be it the problem of this one qube or of qubesd."""
    qube = api.qube(LISTED)
    assert qube is not None
    raise StoreError(qube.problem or "")


@pytest.mark.parametrize(("error", "words"), ERRORS)
def test_an_error_says_what_was_asked_of_whom(
    api: AdminApi, dom0: FakeQubes, error: Exception, words: str
) -> None:
    dom0.fails = failing(error, dest="work")
    for call in (
        lambda: read(api),
        lambda: api.set_feature(WORK, "forward.a", "x"),
        lambda: api.remove_feature(WORK, "forward.a"),
    ):
        with pytest.raises(StoreError, match=rf"^admin\.vm\.[a-zA-Z.]+(\+forward\.a)? at work: {words}"):
            call()


def test_a_management_qube_that_may_not_is_told_the_line_that_allows_it(remote: FakeQubes) -> None:
    api = AdminApi(remote)
    told = []
    for dest, act in (("work", lambda: api.qube(LISTED)), ("dom0", api.qubes)):
        remote.fails = failing(refused(), dest=dest)
        with pytest.raises(StoreError, match="Request refused") as caught:
            act()
        found = re.search("'(admin.*?)'", str(caught.value))
        assert found is not None
        rule = PolicyRule.parse(found[1], "told")
        told.append((rule.service, rule.argument, rule.source.text, rule.target.text, str(rule.verb)))
    assert told == [
        ("admin.vm.property.GetAll", None, "mgmt", "@anyvm", "allow"),
        ("admin.vm.List", None, "mgmt", "@adminvm", "allow"),
    ]
