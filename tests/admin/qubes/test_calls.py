# SPDX-License-Identifier: GPL-2.0-or-later
"""What each command asks of qubesd and of the policy API: the calls that docs/architecture.md says, in a
system of any size.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from fake_admin import FakeQubes
from fake_policy import FakePolicyClient
from nftlab import PATH
from systems import QUBES
from worlds import ADD, BY_NFT, NOW, Command

from qubes_fwd_qrexec.admin import hold
from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.inventory import feature_matters
from qubes_fwd_qrexec.admin.snapshot import look
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.qube import Qube

pytestmark = pytest.mark.parametrize("kind", [QUBES], indirect=True)

SIZES = (1, 4)
"""How many more qubes, and how many rules each of these has, and the qube work."""


@dataclass(frozen=True)
class Cost:
    """``readings`` of the system, ``with_config`` of them with what qubes are told; ``changes`` of features
    in a system of some size; calls of the policy API.
    """

    readings: int = 1
    with_config: int = 0
    changes: Callable[[int], int] = lambda size: 0
    gets: int = 1
    replaces: int = 0


LOOK = Cost()
COMPARISON = Cost(with_config=1)
COSTS: dict[tuple[str, ...], Cost] = {
    ("list",): LOOK,
    ("show", "work", "web"): LOOK,
    ("plan",): LOOK,
    ("policy",): LOOK,
    ("export",): LOOK,
    ("tunnel", "list"): LOOK,
    ("cut", "work", "web"): LOOK,
    ("status",): COMPARISON,
    ("diagnose", "work", "web"): COMPARISON,
    ("apply", "--dry-run"): COMPARISON,
    ("apply",): COMPARISON,
    ("resume", "--dry-run"): COMPARISON,
    ("add", "work", "79", "--from", "any"): Cost(1, 1, lambda size: 2, gets=4, replaces=1),
    ("add", "work", "79", "--from", "any", "--no-apply"): Cost(changes=lambda size: 1),
    ("set", "work", "web", "comment=x"): Cost(1, 1, lambda size: 1, gets=2),
    ("set", "work", "web", "--from", "any"): Cost(1, 1, lambda size: 2, gets=2),
    ("set", "work", "web", "dstports=9"): Cost(1, 1, lambda size: 2, gets=5, replaces=2),
    ("confirm", "work", "--all"): Cost(1, 1, gets=2),
    ("disable", "work", "--all"): Cost(1, 1, lambda size: 2 * size, gets=3, replaces=1),
    ("remove", "work", "--all"): Cost(1, 1, lambda size: 2 * size, gets=3, replaces=1),
    ("tunnel", "mark", "sys-vpn"): Cost(1, 1, lambda size: 1, gets=2),
    ("panic",): Cost(2, 1, lambda size: size * (size + 1), gets=3, replaces=1),
}


@dataclass
class System:
    """A Qubes system with the calls that were made since the last look at them."""

    lab: LabDirectory
    qubesd: FakeQubes
    policy: list[str]
    command: Command

    def forget(self) -> None:
        """Count anew."""
        self.qubesd.calls.clear()
        self.qubesd.services.clear()
        self.policy.clear()

    def run(self, *argv: str, stdin: str = "", status: int | None = 0) -> str:
        """What a command prints, whose calls alone are counted."""
        self.forget()
        result = self.command(*argv, stdin=stdin)
        assert status in (None, result.status), result.err
        return result.out

    @property
    def counted(self) -> Counter[str]:
        return Counter(call.method for call in self.qubesd.calls) + Counter(self.policy)

    def expected(self, cost: Cost, size: int) -> Counter[str]:
        """By the formula of docs/architecture.md, for the system as it is before the command."""
        qubes = [name for name in self.lab.qube_names() if name != "dom0"]
        values = [
            sum(feature_matters(key, with_config) for name in qubes for key in self.lab.features(name))
            for with_config in (False, True)
        ]
        each = cost.readings * len(qubes)
        return Counter(
            {
                "admin.vm.List": cost.readings,
                "admin.vm.feature.List": each,
                "admin.vm.tag.List": each,
                "admin.vm.property.GetAll": each,
                "admin.vm.feature.Get": (cost.readings - cost.with_config) * values[0]
                + cost.with_config * values[1],
                "admin.vm.feature.Set/Remove": cost.changes(size),
                "policy.Get": cost.gets,
                "policy.Replace": cost.replaces,
            }
        )

    def check(self, expected: Counter[str]) -> None:
        found = self.counted
        changes = found.pop("admin.vm.feature.Set", 0) + found.pop("admin.vm.feature.Remove", 0)
        # qubesadmin looks whether a qube runs before each call of a service in it.
        assert found.pop("admin.vm.CurrentState", 0) == len(self.qubesd.services)
        assert found + Counter({"admin.vm.feature.Set/Remove": changes}) == +expected


@pytest.fixture(params=SIZES)
def size(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def system(
    forward: Command, lab: LabDirectory, qubesd: FakeQubes, policy_client: FakePolicyClient, size: int
) -> System:
    made = System(lab, qubesd, [], forward)
    policy_client.fails = made.policy.append
    rules = [f"work {'web' if not n else f'r{n}'} {_rule(80 + n)}" for n in range(size)]
    for number in range(size):
        name = QubeName(f"more-{number}")
        lab.write_qube(Qube(name=name, netvm=QubeName("sys-firewall"), template=QubeName("fedora-42")))
        rules += [f"{name} r{n} {_rule(1000 + 100 * number + n)}" for n in range(size)]
    made.run("import", stdin="".join(f"{line}\n" for line in rules))
    return made


def _rule(port: int) -> str:
    return f"action=forward mode=qrexec srcports={port} srchosts=10.0.0.0/8"


@pytest.mark.parametrize("argv", COSTS, ids=" ".join)
def test_a_command_makes_the_calls_that_are_said_and_no_others(
    system: System, size: int, argv: tuple[str, ...]
) -> None:
    expected = system.expected(COSTS[argv], size)
    system.run(*argv, status=None)
    system.check(expected)


def test_set_that_says_what_the_rule_was_reads_the_system_once(system: System, size: int) -> None:
    was = system.lab.features("work")["forward.web"]
    expected = system.expected(Cost(1, 1, lambda size: 1, gets=2), size)
    system.run("set", "work", "web", "comment=x", "--was", was)
    system.check(expected)


def test_an_import_reads_the_system_once_and_stores_each_rule_once(system: System, size: int) -> None:
    text = system.run("export")
    expected = system.expected(Cost(1, 1, gets=2), size)
    system.run("import", stdin=text)
    system.check(expected)
    for name in ("work", *(f"more-{number}" for number in range(size))):
        system.run("remove", name, "--all")
    expected = system.expected(Cost(1, 1, lambda size: 2 * size * (size + 1), gets=4, replaces=1), size)
    system.run("import", stdin=text)
    system.check(expected)


def test_resume_reads_the_system_once(system: System, size: int) -> None:
    system.run("panic", status=None)
    expected = system.expected(Cost(1, 1, lambda size: size * (size + 1), gets=5, replaces=1), size)
    system.run("resume")
    system.check(expected)


def test_resume_of_what_was_shown_opens_by_the_reading_that_was_compared_with_it(
    system: System, store: Backend, size: int
) -> None:
    system.run("panic", status=None)
    shown = look(store).plan(NOW, is_held=False)
    expected = system.expected(Cost(1, 1, lambda size: size * (size + 1), gets=4, replaces=1), size)
    system.forget()
    hold.resume(store, NOW, shown)
    system.check(expected)


def test_apply_writes_each_configuration_once(system: System, size: int) -> None:
    system.run("remove", "work", "--all", "--no-apply")
    expected = system.expected(Cost(1, 1, lambda size: size, gets=2, replaces=1), size)
    system.run("apply")
    system.check(expected)


def test_what_lets_packets_in_is_followed_by_one_more_reading(system: System, size: int) -> None:
    for qube in PATH:
        for key, value in BY_NFT.items():
            system.lab.set_feature(qube, key, value)
    cost = Cost(2, 2, lambda size: 1 + len(PATH), gets=5)
    expected = system.expected(cost, size)
    # The second reading is one of the rule and its configurations too.
    expected["admin.vm.feature.Get"] += 1 + len(PATH)
    system.run("add", "work", "79", "--from", "10.0.0.0/8", "--mode", "nft", status=None)
    system.check(expected)


def test_whoever_keeps_changing_policy_makes_a_command_read_three_times_at_most(
    system: System, policy_client: FakePolicyClient, lab: LabDirectory
) -> None:
    path = lab.policy_dir / "30-forward.policy"

    def fails(method: str) -> None:
        system.policy.append(method)
        if method == "policy.Replace":
            path.write_text(f"{path.read_text()}# again\n")

    policy_client.fails = fails
    system.run(*ADD[:2], "79", *ADD[3:5], status=1)
    assert system.counted["admin.vm.List"] == 3
    assert system.counted["policy.Replace"] == 3
