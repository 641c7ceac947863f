# SPDX-License-Identifier: GPL-2.0-or-later
"""Walks along netvms, features with their templates, and the marks of tunnels."""

import pytest
from worlds import qube, world

from qubes_fwd_qrexec.admin.inventory import Inventory, TunnelMark, feature_matters
from qubes_fwd_qrexec.common.config import Side
from qubes_fwd_qrexec.common.rules import ForwardType
from qubes_fwd_qrexec.common.values import QubeName

WORK = QubeName("work")


def test_a_chain_is_nearest_first() -> None:
    assert world().chain(QubeName("hidden")).qubes == ("sys-vpn", "sys-firewall", "sys-net")
    assert world().chain(QubeName("vault")) == ((), None)


def test_a_chain_that_bites_its_tail_ends_with_a_problem() -> None:
    chain = world(qube("a", "b"), qube("b", "a")).chain(QubeName("a"))
    assert chain.qubes == ("b",)
    assert chain.problem == "The netvms of a form a loop at a; change its netvm"


def test_a_feature_is_looked_up_in_the_template_unless_the_qube_has_its_own() -> None:
    key = "supported-rpc.qubes.ForwardTCP"
    assert world().feature(WORK, key) == "1"
    own = world(qube("work", template=QubeName("fedora-42"), features={key: ""}))
    assert own.feature(WORK, key) == ""
    assert world(qube("work", template=QubeName("gone"))).feature(WORK, key) is None


def test_a_feature_of_a_templates_template_counts_and_a_circle_of_templates_ends() -> None:
    """A disposable is made from a qube that has a template itself."""
    disposable = qube("disp1", template=WORK)
    assert world(disposable).feature(disposable.name, "supported-rpc.qubes.ForwardTCP") == "1"
    holder = world(disposable).holder(disposable.name, "supported-rpc.qubes.ForwardTCP")
    assert holder is not None
    assert holder.name == "fedora-42"
    circle = world(qube("a", template=QubeName("b")), qube("b", template=QubeName("a")))
    assert circle.feature(QubeName("a"), "x") is None


def test_a_disposable_has_the_features_of_its_templates_template() -> None:
    key = "supported-rpc.qubes.ForwardTCP"
    dvm = qube("dvm", template=QubeName("fedora-42"))
    disposable = qube("disp1", klass="DispVM", template=dvm.name)
    assert world(dvm, disposable).feature(disposable.name, key) == "1"
    assert world(dvm._replace(features={key: ""}), disposable).feature(disposable.name, key) == ""


def test_templates_that_lead_in_a_circle_end() -> None:
    inventory = world(qube("a", template=QubeName("b")), qube("b", template=QubeName("a")))
    assert inventory.feature(QubeName("a"), "x") is None


@pytest.mark.parametrize(
    ("key", "matters"),
    [
        ("forward.web", True),
        ("forward.tunnel", True),
        ("vm-config.fwd.work.web", True),
        ("supported-rpc.qubes.ForwardTCP", True),
        ("supported-rpc.qubes.ConnectTCP", True),
        ("whonix-gw", True),
        ("whonix-ws", True),
        ("service.vpn-handler", True),
        ("service.vpn-handler-openvpn", True),
        ("forward", False),
        ("vm-config.other", False),
        ("supported-rpc.qubes.Filecopy", False),
        ("service.crond", False),
        ("os", True),
        ("qrexec", True),
        ("service.qubes-tunnel-openvpn", True),
        ("os-version", False),
    ],
)
def test_what_matters_is_what_something_depends_on(key: str, matters: bool) -> None:
    assert feature_matters(key) is matters


@pytest.mark.parametrize(
    ("features", "tags", "mark"),
    [
        ({}, {"anon-gateway"}, "tag anon-gateway"),
        ({"whonix-gw": "1"}, (), "feature whonix-gw"),
        ({"forward.tunnel": "1"}, (), "feature forward.tunnel"),
        ({"service.vpn-handler-openvpn": "1"}, (), "feature service.vpn-handler-openvpn"),
        ({"service.vpn-handler": "1"}, (), "feature service.vpn-handler"),
        ({"service.vpn-handler": "", "forward.tunnel": "", "whonix-gw": ""}, {"anon-vm"}, None),
        ({"service.crond": "1"}, (), None),
    ],
)
def test_marks_of_a_tunnel(features: dict[str, str], tags: set[str], mark: str | None) -> None:
    inventory = Inventory({QubeName("gate"): qube("gate", features=features, tags=frozenset(tags))})
    found = inventory.tunnel_mark(QubeName("gate"))
    assert (found and found.mark) == mark


def test_a_mark_of_the_template_counts() -> None:
    whonix = qube("whonix", klass="TemplateVM", features={"whonix-gw": "1"})
    inventory = world(whonix, qube("gate", template=QubeName("whonix")))
    assert str(inventory.tunnel_mark(QubeName("gate"))) == "gate (feature whonix-gw)"


@pytest.mark.parametrize(
    ("exposed", "marked"),
    [
        ("sys-vpn", None),
        ("neighbour", None),
        ("sys-firewall", "sys-vpn"),
        ("sys-net", "sys-vpn"),
        ("personal", "sys-vpn"),
        ("vault", "sys-vpn"),
    ],
)
def test_only_at_the_nearest_tunnel_or_behind_it_nothing_is_bypassed(
    exposed: str, marked: str | None
) -> None:
    found = bypassed(world(qube("neighbour", "sys-vpn")), "hidden", exposed)
    assert (found and found.qube) == marked


def test_of_two_tunnels_the_nearest_decides() -> None:
    outer = qube("sys-firewall", "sys-net", tags=frozenset({"anon-gateway"}))
    found = bypassed(world(outer), "hidden", "sys-firewall")
    assert found is not None
    assert found.qube == "sys-vpn"


def bypassed(inventory: Inventory, target: str, exposed: str, side: Side = Side.OUTER) -> TunnelMark | None:
    tunnel = inventory.nearest_tunnel(QubeName(target))
    return tunnel if tunnel is not None and inventory.is_bypassed(tunnel, QubeName(exposed), side) else None


MARKED = [
    {"features": {"forward.tunnel": "1"}},
    {"features": {"service.vpn-handler-openvpn": "1"}},
    {"features": {"whonix-gw": "1"}},
    {"tags": frozenset({"anon-gateway"})},
    {"tags": frozenset({"anon-gateway", "anon-vm"})},
    {"template": QubeName("whonix")},
]


@pytest.mark.parametrize("more", MARKED)
@pytest.mark.parametrize(
    ("exposed", "is_bypassed"), [("sys-net", True), ("outer", True), ("vault", True), ("inner", False)]
)
def test_a_target_that_is_a_tunnel_itself_is_exposed_behind_itself_alone(
    more: dict[str, object], exposed: str, is_bypassed: bool
) -> None:
    """Also with another tunnel further out, which would be the nearest of its netvms."""
    outer = qube("outer", "sys-net", features={"forward.tunnel": "1"})
    whonix = qube("whonix", klass="TemplateVM", features={"whonix-gw": "1"})
    inventory = world(outer, whonix, qube("gate", "outer", **more), qube("inner", "gate"))
    found = bypassed(inventory, "gate", exposed)
    assert (found and found.qube) == ("gate" if is_bypassed else None)


@pytest.mark.parametrize("more", [{"tags": frozenset({"anon-vm"})}, {"features": {"whonix-ws": "1"}}])
def test_an_anonymous_target_is_exposed_nowhere_but_behind_its_gateway(more: dict[str, object]) -> None:
    gate = qube("gate", "sys-net", tags=frozenset({"anon-gateway"}))
    inventory = world(gate, qube("anon", "gate", **more), qube("lost", "sys-net", **more))
    assert bypassed(inventory, "anon", "gate") is None
    assert bypassed(inventory, "anon", "sys-net") is not None
    assert bypassed(inventory, "lost", "sys-net") is not None


@pytest.mark.parametrize(
    ("exposed", "forward_type", "side"),
    [
        ("sys-net", ForwardType.EXTERNAL, Side.OUTER),
        ("sys-firewall", ForwardType.EXTERNAL, Side.UPLINK),
        ("sys-vpn", ForwardType.EXTERNAL, Side.OUTER),
        ("personal", ForwardType.EXTERNAL, Side.UPLINK),
        ("sys-net", ForwardType.INTERNAL, Side.VIFS),
        ("sys-vpn", ForwardType.INTERNAL, Side.VIFS),
    ],
)
def test_a_forward_is_entered_by_one_side(exposed: str, forward_type: ForwardType, side: Side) -> None:
    """A tunnel qube never by its uplink, though it has a netvm."""
    assert world().side(QubeName(exposed), forward_type) is side


def test_a_tunnel_beside_the_nics_is_bypassed_from_outside_alone() -> None:
    inventory = world(qube("sys-net", features={"forward.tunnel": "1"}))
    assert bypassed(inventory, "work", "sys-net") is not None
    assert bypassed(inventory, "work", "sys-net", Side.VIFS) is None
    assert bypassed(inventory, "work", "sys-firewall", Side.UPLINK) is None
