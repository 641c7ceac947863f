# SPDX-License-Identifier: GPL-2.0-or-later
"""The policy that the documentation gives a management qube: it allows what is asked, and no other qube."""

from pathlib import Path

import pytest
from fake_admin import METHODS

from qubes_fwd_qrexec.common.services import CUT_SERVICE, NFT_SERVICE, REVOKE_SERVICE, STATUS_SERVICE
from qubes_fwd_qrexec.lab.evaluator import Allow, Deny, Domain, Request, System, Verdict, evaluate
from qubes_fwd_qrexec.lab.policytext import PolicyRule, parse_policy

ROOT = Path(__file__).parents[3]
DOCUMENT = (ROOT / "docs" / "management-qube.md").read_text()
MANUAL = (ROOT / "docs" / "qvm-forward.rst").read_text()
GIVEN = "".join(f"{line.strip()}\n" for line in DOCUMENT.splitlines() if line.startswith("    "))
INSTALLED = (ROOT / "policy" / "30-forward.policy").read_text()
RULES = parse_policy(GIVEN, "29") + parse_policy(INSTALLED, "30")
NAMES = {"dom0": "AdminVM", "mgmt": "AppVM", "work": "AppVM", "other": "AppVM"}
SYSTEM = System({name: Domain(name=name, klass=klass, uuid=name) for name, klass in NAMES.items()})


def verdict(rules: list[PolicyRule], service: str, argument: str, source: str, target: str) -> Verdict:
    return evaluate(rules, SYSTEM, Request(service=service, argument=argument, source=source, target=target))


# qubesadmin asks Get only where GetAll was refused.
METHODS_OF_QUBES = sorted(METHODS.keys() - {"admin.vm.property.Get"})
CALLS = [
    *((method, "+", "dom0" if method == "admin.vm.List" else "work") for method in METHODS_OF_QUBES),
    ("admin.vm.List", "+", "work"),
    ("admin.Events", "+", "dom0"),
    # What qubesd itself asks for each event (qubes-core-admin qubes/ext/admin.py), and hides the others.
    ("admin.Events", "+domain-start", "work"),
    ("admin.Events", "+property-set_netvm", "work"),
    ("admin.Events", "+domain-feature-set_forward.web", "work"),
    ("policy.List", "+", "dom0"),
    ("policy.Get", "+30-forward", "dom0"),
    ("policy.Replace", "+30-forward", "dom0"),
    (CUT_SERVICE, "+fwd.work.web", "work"),
    (NFT_SERVICE, "+", "work"),
    (REVOKE_SERVICE, "+80-80+sys-net", "work"),
    (STATUS_SERVICE, "+", "work"),
    (STATUS_SERVICE, "+fwd.work.web", "work"),
]


@pytest.mark.parametrize(("service", "argument", "target"), CALLS)
def test_what_a_management_qube_asks_is_allowed_to_it_alone(service: str, argument: str, target: str) -> None:
    found = verdict(RULES, service, argument, "mgmt", target)
    assert isinstance(found, Allow)
    assert found.target == ("work" if service.startswith("qubes.") else "dom0")
    assert isinstance(verdict(RULES, service, argument, "other", target), Deny)


@pytest.mark.parametrize("argument", ["+30-user", "+", "+30-forward.x"])
@pytest.mark.parametrize("service", ["policy.Get", "policy.Replace", "policy.Remove"])
def test_no_other_policy_file_is_opened(service: str, argument: str) -> None:
    assert isinstance(verdict(RULES, service, argument, "mgmt", "dom0"), Deny)


def test_the_manual_gives_the_same_lines() -> None:
    found = [line.strip() for line in MANUAL.splitlines() if " mgmt  @" in line]
    assert found == [line for line in GIVEN.splitlines() if line and not line.startswith("#")]


def test_the_last_lines_must_come_before_the_installed_policy() -> None:
    late = parse_policy(INSTALLED, "30") + parse_policy(GIVEN, "31")
    assert isinstance(verdict(late, CUT_SERVICE, "+fwd.work.web", "mgmt", "work"), Deny)
    assert isinstance(verdict(late, NFT_SERVICE, "+", "mgmt", "work"), Deny)
    assert isinstance(verdict(late, REVOKE_SERVICE, "+80-80+sys-net", "mgmt", "work"), Deny)
    assert isinstance(verdict(late, STATUS_SERVICE, "+", "mgmt", "work"), Deny)
