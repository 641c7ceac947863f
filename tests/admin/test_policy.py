# SPDX-License-Identifier: GPL-2.0-or-later
"""The policy that dom0 gets, judged: what is planned is allowed, and nothing beside it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from worlds import NOW, rule, world

from qubes_fwd_qrexec.admin import policy, revoking
from qubes_fwd_qrexec.admin.inventory import Inventory
from qubes_fwd_qrexec.admin.plan import plan
from qubes_fwd_qrexec.admin.states import Plan, State
from qubes_fwd_qrexec.common.config import Service
from qubes_fwd_qrexec.common.rules import NamedRule, Transport
from qubes_fwd_qrexec.common.services import CUT_SERVICE, NFT_SERVICE, REVOKE_SERVICE, STATUS_SERVICE
from qubes_fwd_qrexec.lab.evaluator import Allow, Domain, Request, System
from qubes_fwd_qrexec.lab.verdicts import Judge, OwnJudge, QubesJudge
from qubes_fwd_qrexec.target import callservice

OURS_ALONE = (CUT_SERVICE, NFT_SERVICE, REVOKE_SERVICE, STATUS_SERVICE)
INSTALLED = Path(__file__).parents[2] / "policy" / f"{policy.NAME}.policy"


@pytest.fixture(params=["own", "qubes"])
def judge(request: pytest.FixtureRequest) -> Iterator[Judge]:
    if request.param == "qubes":
        pytest.importorskip("qrexec.policy.parser", reason="Qubes' own parser is not installed")
        yield QubesJudge()
    else:
        yield OwnJudge()


def system(inventory: Inventory) -> System:
    domains = {
        name: Domain(
            name=name,
            klass=qube.klass,
            uuid=f"00000000-0000-0000-0000-{number:012}",
            is_running=qube.is_running,
        )
        for number, (name, qube) in enumerate(inventory.qubes.items())
    }
    return System(domains)


def flows(planned: Plan) -> set[tuple[str, str, str, str]]:
    """Service, argument, source and target of all that a plan allows, told by its configurations alone."""
    found = set()
    for forward in planned.live:
        assert forward.exposed is not None
        for told in forward.listener_configs:
            if told.transport is Transport.MUX:
                arguments = [f"+{told.target_ports.brief()}+mux"]
            else:
                arguments = [f"+{port}" for port in told.target_ports]
            found |= {(str(told.service), a, forward.exposed, told.target) for a in arguments}
    return found


def neighbours(flow: tuple[str, str, str, str], inventory: Inventory) -> set[tuple[str, str, str, str]]:
    service, argument, source, target = flow
    number = int(argument.removeprefix("+").split("-")[0].split("+")[0])
    tails = ["", "+mux", f"-{number + 1}+mux"]
    ports = [n for n in (number - 1, number, number + 1, number * 10) if n >= 0]
    arguments = [f"+{port}{tail}" for port in ports for tail in tails] + ["+", f"+0{number}", f"{argument}x"]
    return (
        {(service, other, source, target) for other in arguments}
        | {(service, argument, other, target) for other in inventory.qubes}
        | {(service, argument, source, other) for other in (*inventory.qubes, "@default", "nobody")}
        | {(other, argument, source, target) for other in (*Service, *OURS_ALONE, "qubes.VMShell")}
    )


texts = st.builds(
    lambda first, length, dst, kind, carried, src: (
        f"srcports={first}-{first + length} dstports={dst}-{dst + length} forwardtype={kind} "
        f"{carried} srchosts={src}"
    ),
    st.integers(1, 40),
    st.integers(0, 3),
    st.integers(8080, 8090),
    st.sampled_from(["external", "internal"]),
    st.sampled_from(["", "transport=call", "proto=udp", "proto=both", "proto=both transport=call"]),
    st.sampled_from(["any", "10.0.0.0/8", "fd00::/8"]),
)
targets = st.sampled_from(["work", "personal", "hidden", "vault", "sys-firewall"])
rule_sets = st.dictionaries(st.tuples(targets, st.sampled_from("abc")), texts, max_size=6)


@given(chosen=rule_sets)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)
def test_planned_flows_are_allowed_and_all_their_neighbours_denied(
    judge: Judge, tmp_path: Path, chosen: dict[tuple[str, str], str]
) -> None:
    inventory = world()
    rules = [rule(text, target, name) for (target, name), text in chosen.items()]
    planned = plan(rules, inventory, NOW)
    (tmp_path / f"{policy.NAME}.policy").write_text(policy.text(planned))
    loaded, qubes, allowed = judge.load(tmp_path), system(inventory), flows(planned)
    asked = set(allowed).union(*(neighbours(flow, inventory) for flow in allowed))
    for service, argument, source, target in asked:
        request = Request(service=service, argument=argument, source=source, target=target)
        verdict = loaded.judge(qubes, request)
        assert isinstance(verdict, Allow) == ((service, argument, source, target) in allowed), request


@pytest.mark.parametrize("autostart", ["yes", "no"])
def test_only_autostart_lets_a_call_start_its_target(judge: Judge, tmp_path: Path, autostart: str) -> None:
    inventory = world(world().qubes[rule().target]._replace(is_running=False))
    planned = plan([rule(f"autostart={autostart}")], inventory, NOW)
    (tmp_path / f"{policy.NAME}.policy").write_text(policy.text(planned))
    request = Request(service="qubes.ForwardTCP", argument="+80+mux", source="sys-net", target="work")
    verdict = judge.load(tmp_path).judge(system(inventory), request)
    assert isinstance(verdict, Allow) == (autostart == "yes")


def test_a_file_has_header_exact_lines_and_the_closing_denies() -> None:
    rules = [rule("srcports=80-81 dstports=8080-8081 transport=call"), rule("srcports=82-90", name="x")]
    planned = plan(rules, world(), NOW)
    assert policy.text(planned) == (
        "# This file is written by qvm-forward, and edits in it are lost.\n"
        "# Change the rules instead: see 'qvm-forward list' and qvm-forward(1).\n"
        "\n"
        "# work web: ports 80-81 of sys-net to ports 8080-8081\n"
        "qubes.ForwardTCP  +8080  sys-net  work  allow  autostart=no  notify=no\n"
        "qubes.ForwardTCP  +8081  sys-net  work  allow  autostart=no  notify=no\n"
        "\n"
        "# work x: ports 82-90 of sys-net to ports 82-90\n"
        "qubes.ForwardTCP  +82-90+mux  sys-net  work  allow  autostart=no  notify=no\n"
        "\n"
        "# Whatever no line above allows is denied.\n"
        "qubes.ForwardCut  *  @anyvm  @anyvm  deny  notify=no\n"
        "qubes.ForwardNft  *  @anyvm  @anyvm  deny  notify=no\n"
        "qubes.ForwardRevoke  *  @anyvm  @anyvm  deny  notify=no\n"
        "qubes.ForwardStatus  *  @anyvm  @anyvm  deny  notify=no\n"
        "qubes.ForwardTCP  *  @anyvm  @anyvm  deny  notify=no\n"
        "qubes.ForwardUDP  *  @anyvm  @anyvm  deny  notify=no\n"
    )


def test_udp_has_lines_of_its_own() -> None:
    (both,) = plan([rule("proto=both srcports=53-54 autostart=yes transport=call")], world(), NOW)
    assert policy.lines(both) == (
        "qubes.ForwardTCP  +53  sys-net  work  allow  autostart=yes  notify=no",
        "qubes.ForwardTCP  +54  sys-net  work  allow  autostart=yes  notify=no",
        "qubes.ForwardUDP  +53-54+mux  sys-net  work  allow  autostart=yes  notify=no",
    )
    (udp,) = plan([rule("proto=udp srcports=53")], world(), NOW)
    assert policy.lines(udp) == ("qubes.ForwardUDP  +53+mux  sys-net  work  allow  autostart=no  notify=no",)


@pytest.mark.parametrize(("proto", "allowed"), [("tcp", {"TCP"}), ("udp", {"UDP"}), ("both", {"TCP", "UDP"})])
def test_what_allows_one_protocol_does_not_allow_the_other(
    judge: Judge, tmp_path: Path, proto: str, allowed: set[str]
) -> None:
    inventory = world()
    planned = plan([rule(f"proto={proto}")], inventory, NOW)
    (tmp_path / f"{policy.NAME}.policy").write_text(policy.text(planned))
    loaded = judge.load(tmp_path)
    found = {
        name
        for name in ("TCP", "UDP")
        for argument in ("+80+mux",)
        if isinstance(
            loaded.judge(
                system(inventory),
                Request(service=f"qubes.Forward{name}", argument=argument, source="sys-net", target="work"),
            ),
            Allow,
        )
    }
    assert found == allowed


def test_a_mux_call_to_a_range_is_one_line() -> None:
    (forward,) = plan([rule("srcports=80-81 dstports=8080-8081")], world(), NOW)
    assert policy.lines(forward) == (
        "qubes.ForwardTCP  +8080-8081+mux  sys-net  work  allow  autostart=no  notify=no",
    )


@pytest.mark.parametrize(
    ("line", "calls"),
    [
        (
            "qubes.ForwardTCP  +80+mux  sys-net  work  allow  autostart=no  notify=no",
            "work: 80-80 sys-net",
        ),
        ("qubes.ForwardTCP +80-90+mux sys-net work allow", "work: 80-90 sys-net"),
        ("qubes.ForwardTCP +80 sys-net work allow autostart=no", "work: 80-80 sys-net"),
        ("qubes.ForwardUDP +53+mux sys-net work allow", "work: udp 53-53 sys-net"),
        ("qubes.ForwardUDP +53-55+mux sys-net work allow autostart=no", "work: udp 53-55 sys-net"),
        ("qubes.ForwardUDP +53 sys-net work allow", None),
        ("qubes.ForwardUDP * sys-net work allow", None),
        ("qubes.ForwardUDP +53+mux sys-net work deny", None),
        ("qubes.ForwardTCP +80+later sys-net work allow", None),
        ("qubes.ConnectTCP +80+mux sys-net work allow", None),
        ("qubes.ForwardTCP +80+mux sys-net work deny", None),
        ("qubes.ForwardTCP +80+mux sys-net work", None),
        ("qubes.ForwardTCP +80+mux sys-net @anyvm allow", None),
        ("qubes.ForwardTCP +80+mux @anyvm work allow", None),
        ("qubes.ForwardTCP +x+mux sys-net work allow", None),
        ("qubes.ForwardTCP * sys-net work allow", None),
        ("!include other", None),
        ("junk", None),
    ],
)
def test_the_calls_of_a_line_are_what_the_target_is_told(line: str, calls: str | None) -> None:
    found = policy.calls_of(line)
    assert (None if found is None else f"{found[0]}: {found[1]}") == calls


def test_dom0_and_the_qubes_agree_on_the_lease() -> None:
    assert revoking.LEASE_S == callservice.LEASE_S


@pytest.mark.parametrize("source", ["sys-net", "work", "personal"])
def test_no_qube_may_end_mux_calls_not_even_its_own(judge: Judge, tmp_path: Path, source: str) -> None:
    inventory = world()
    (tmp_path / f"{policy.NAME}.policy").write_text(policy.text(plan([rule()], inventory, NOW)))
    request = Request(service=REVOKE_SERVICE, argument="+80-80+sys-net", source=source, target="work")
    assert not isinstance(judge.load(tmp_path).judge(system(inventory), request), Allow)


def test_what_is_installed_is_the_file_without_any_forward() -> None:
    spdx = "# SPDX-License-Identifier: GPL-2.0-or-later\n"
    assert INSTALLED.read_text() == spdx + policy.text(Plan(()))


def test_nothing_but_forwards_over_it_is_said_about_the_stock_service() -> None:
    text = policy.text(plan([rule()], world(), NOW))
    assert Service.CONNECT_TCP not in text
    text = policy.text(plan([rule(target="personal")], world(), NOW))
    said = [line for line in text.splitlines() if Service.CONNECT_TCP in line]
    assert said == ["qubes.ConnectTCP  +80  sys-net  personal  allow  autostart=no  notify=no"]


def test_forwards_that_share_a_line_have_it_once() -> None:
    rules: list[NamedRule] = [rule("dstports=22", name="a"), rule("srcports=81 dstports=22", name="b")]
    text = policy.text(plan(rules, world(), NOW))
    assert text.count("+22") == 1


def test_rules_that_are_not_live_have_no_lines() -> None:
    (forward,) = plan([rule("enabled=no")], world(), NOW)
    assert forward.state is State.DISABLED
    assert policy.lines(forward) == ()


def test_the_same_plan_is_the_same_file() -> None:
    assert policy.text(plan([rule()], world(), NOW)) == policy.text(plan([rule()], world(), NOW + 5))


def test_allowing_lines_are_read_in_one_spelling() -> None:
    text = "# no\n\n  a   b\tc \n" + "\n".join(policy.CLOSING) + "\n"
    assert policy.allowing(text) == {"a  b  c"}
    assert policy.allowing(None) == frozenset()


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n"])
def test_a_line_ends_where_qubes_parser_ends_it(judge: Judge, tmp_path: Path, end: str) -> None:
    """It reads with universal newlines: a carriage return in a comment begins a line that is in force."""
    hidden = "qubes.ForwardTCP +22 sys-net work allow"
    text = policy.text(Plan(())).replace("# This file", f"# x{end}{hidden}{end}# This file", 1)
    assert policy.allowing(text) == {"  ".join(hidden.split())}
    (tmp_path / f"{policy.NAME}.policy").write_text(text, newline="")
    request = Request(service=Service.FORWARD_TCP, argument="+22", source="sys-net", target="work")
    assert isinstance(judge.load(tmp_path).judge(system(world()), request), Allow)


@pytest.mark.parametrize("end", ["\x0b", "\x0c", "\x1c", "\x85", "\u2028"])
def test_what_is_no_end_of_a_line_there_is_none_here(end: str) -> None:
    assert policy.allowing(f"# x{end}qubes.ForwardTCP +22 sys-net work allow\n") == frozenset()
