# SPDX-License-Identifier: GPL-2.0-or-later
"""A whole system out and into an empty one of the same qubes: the same plan and policy, byte for byte."""

import io
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rule_strategies import rule_names, rules
from worlds import NOW

from qubes_fwd_qrexec.admin.views.cli import run
from qubes_fwd_qrexec.admin.views.tables import Style
from qubes_fwd_qrexec.common.rules import ForwardRule
from qubes_fwd_qrexec.common.values import ListenPorts, QubeName, TargetPorts
from qubes_fwd_qrexec.lab.blueprint import create_lab
from qubes_fwd_qrexec.lab.directory import LabDirectory

_PORTS_EACH = 1000
QUBES = ["work", "personal", "untrusted", "vault", "sys-net", "sys-firewall", "sys-vpn", "dom0", "fedora-42"]
PATHS = [(), ("sys-firewall", "sys-net"), ("sys-vpn", "sys-firewall", "sys-net"), ("sys-net",)]


@st.composite
def stored(draw: st.DrawFn) -> tuple[str, str, ForwardRule]:
    """A rule at one of the lab's qubes, as a command stores it: with owner and path."""
    target = draw(st.sampled_from(QUBES))
    path = draw(st.sampled_from(PATHS))
    rule = replace(
        draw(rules()),
        via=draw(st.sampled_from([None, None, "sys-net", "sys-vpn", "personal", "gone"])),
        owner=draw(st.sampled_from([target, target, "other"])),
        path=tuple(map(QubeName, path)),
    )
    return target, draw(rule_names.filter(lambda name: name != "tunnel")), rule


def apart(number: int, rule: ForwardRule) -> ForwardRule:
    """With ports of its own: no import takes a port that another rule has."""
    first = 1 + _PORTS_EACH * number
    last = first + min(len(rule.listen_ports), _PORTS_EACH) - 1
    return replace(rule, listen_ports=ListenPorts(first, last), target_ports=TargetPorts(first, last))


marks = st.dictionaries(st.sampled_from([*QUBES, "debian-12"]), st.sampled_from(["1", "yes", ""]), max_size=3)
systems = st.tuples(st.lists(stored(), max_size=8, unique_by=lambda entry: entry[:2]), marks)


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_lab(tmp_path_factory.mktemp("whole") / "lab").root


def forward(lab: LabDirectory, *argv: str, stdin: str = "") -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    environ = {"QVM_FORWARD_LAB": str(lab.root)}
    status = run(argv, environ=environ, now=NOW, stdin=io.StringIO(stdin), out=out, err=err, style=Style())
    return status, out.getvalue(), err.getvalue()


def policy(lab: LabDirectory) -> str:
    return (lab.policy_dir / "30-forward.policy").read_text()


@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.too_slow])
@given(systems, st.sampled_from(["line", "xml", "json"]))
def test_an_export_of_a_whole_system_makes_it_anew(
    empty: Path, system: tuple[list[tuple[str, str, ForwardRule]], dict[str, str]], form: str
) -> None:
    entries, tunnels = system
    with tempfile.TemporaryDirectory() as place:
        old, new = (
            LabDirectory.open(shutil.copytree(empty, Path(place, name), symlinks=True)) for name in ("a", "b")
        )
        for number, (target, name, rule) in enumerate(entries):
            old.set_feature(target, f"forward.{name}", str(apart(number, rule)))
        for qube, value in tunnels.items():
            old.set_feature(qube, "forward.tunnel", value)
        forward(old, "apply")
        status, exported, err = forward(old, "export", "--format", form)
        assert (status, err) == (0, "")
        status, _, err = forward(new, "import", stdin=exported)
        assert (status, err) == (0, "")
        assert forward(new, "list", "--json") == forward(old, "list", "--json")
        assert policy(new) == policy(old)
        assert forward(new, "export", "--format", form)[1] == exported
        assert [new.vm_config(qube) for qube in QUBES] == [old.vm_config(qube) for qube in QUBES]
