# SPDX-License-Identifier: GPL-2.0-or-later
"""Two rules and one port: every way by which the second one could come in names the first."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from worlds import ADD, Command, content, rule

from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.lab.directory import LabDirectory

OTHER = ("add", "vault", "--from", "any", "--name", "x")
TAKEN = "Rule work web already has port 80 of sys-net"

ADDED = [
    ("80", "--via", "sys-net"),
    ("70-90", "--via", "sys-net"),
    ("80", "--via", "sys-net", "--listen", "10.137.0.5"),
    ("80", "--via", "sys-net", "--listen", "0.0.0.0"),
]


@pytest.mark.parametrize("more", ADDED)
def test_add_names_the_rule_that_has_the_port(
    forward: Command, lab: LabDirectory, more: tuple[str, ...]
) -> None:
    forward(*ADD)
    before = content(lab)
    result = forward(*OTHER[:2], *more, *OTHER[2:])
    assert (result.status, result.out) == (1, "")
    assert f"vault x was not added. {TAKEN}; choose another port or listen address" in result.err
    assert content(lab) == before


FREE = [
    ("80", "--via", "sys-net", "--listen", "::"),
    ("80", "--via", "sys-net", "--listen", "fd09:24ef:4179::a89:5"),
    ("80", "--via", "sys-firewall"),
    ("81", "--via", "sys-net"),
]


@pytest.mark.parametrize("more", FREE)
def test_other_families_qubes_and_ports_are_free(forward: Command, more: tuple[str, ...]) -> None:
    """The listener opens IPv6 sockets for IPv6 alone: the wildcards of both families stand side by side."""
    forward(*ADD)
    assert forward(*OTHER[:2], *more, *OTHER[2:]).status == 0


LISTENS = [
    ("::", "::", True),
    ("::", "fd00::1", True),
    ("fd00::1", "::", True),
    ("fd00::1", "fd00::1", True),
    ("fd00::1", "fd00::2", False),
    ("0.0.0.0", "10.0.0.1", True),
    ("10.0.0.1", "10.0.0.1", True),
    ("10.0.0.1", "10.0.0.2", False),
    ("0.0.0.0", "::", False),
]


@pytest.mark.parametrize(("one", "other", "is_taken"), LISTENS)
def test_a_wildcard_has_all_addresses_of_its_family(
    forward: Command, one: str, other: str, is_taken: bool
) -> None:
    assert forward("add", "work", "80", "--from", "any", "--listen", one, "--name", "web").status == 0
    result = forward(*OTHER[:2], "80", "--via", "sys-net", "--listen", other, *OTHER[2:])
    assert (result.status, TAKEN in result.err) == ((1, True) if is_taken else (0, False))


def _disabled(forward: Command, lab: LabDirectory) -> None:
    assert forward(*OTHER[:2], "80", "--via", "sys-net", "--disabled", *OTHER[2:]).status == 0


def _elsewhere(forward: Command, lab: LabDirectory) -> None:
    assert forward(*OTHER[:2], "80", "--via", "sys-firewall", *OTHER[2:]).status == 0


def _other_port(forward: Command, lab: LabDirectory) -> None:
    assert forward(*OTHER[:2], "81", "--via", "sys-net", *OTHER[2:]).status == 0


def _other_address(forward: Command, lab: LabDirectory) -> None:
    forward("set", "work", "web", "listen=10.137.0.5")
    result = forward(*OTHER[:2], "80", "--via", "sys-net", "--listen", "10.137.0.4", *OTHER[2:])
    assert result.status == 0


def _expired(forward: Command, lab: LabDirectory) -> None:
    line = str(rule("via=sys-net path= expire=1", target="vault").rule)
    lab.set_feature("vault", "forward.x", line)


def _cloned(forward: Command, lab: LabDirectory) -> None:
    lab.set_feature("vault", "forward.x", str(rule("via=sys-net owner=work").rule))


WAYS: list[tuple[Callable[[Command, LabDirectory], None], tuple[str, ...], str]] = [
    (_disabled, ("enable", "vault", "x"), "enabled"),
    (_disabled, ("set", "vault", "x", "enabled=yes"), "changed"),
    (_elsewhere, ("set", "vault", "x", "via=sys-net"), "changed"),
    (_other_port, ("set", "vault", "x", "srcports=80", "dstports=80"), "changed"),
    (_other_port, ("set", "vault", "x", "srcports=75-85", "dstports=75-85"), "changed"),
    (_other_address, ("set", "vault", "x", "listen="), "changed"),
    (_other_address, ("set", "vault", "x", "listen=10.137.0.5"), "changed"),
    (_expired, ("set", "vault", "x", "expire=+8h"), "changed"),
    (_expired, ("set", "vault", "x", "expire=never"), "changed"),
    (_cloned, ("confirm", "vault", "x"), "confirmed"),
]


@pytest.mark.parametrize(("prepare", "argv", "done"), WAYS)
def test_no_change_takes_a_port(
    forward: Command,
    lab: LabDirectory,
    prepare: Callable[[Command, LabDirectory], None],
    argv: tuple[str, ...],
    done: str,
) -> None:
    forward(*ADD)
    prepare(forward, lab)
    before = content(lab)
    result = forward(*argv)
    assert (result.status, result.out) == (1, "")
    assert f"vault x was not {done}. {TAKEN}" in result.err
    assert content(lab) == before


def test_a_confirmed_path_takes_no_port(forward: Command, lab: LabDirectory) -> None:
    forward("add", "personal", "80", "--from", "any", "--internal", "--name", "x")
    forward("add", "vault", "80", "--from", "any", "--via", "sys-net", "--name", "web")
    lab.write_qube(replace(lab.qube("personal"), netvm=QubeName("sys-net")))
    before = content(lab)
    result = forward("confirm", "personal", "x")
    assert "personal x was not confirmed. Rule vault web already has port 80 of sys-net" in result.err
    assert content(lab) == before


def test_two_that_are_enabled_at_once_do_not_take_each_others_port(
    forward: Command, lab: LabDirectory
) -> None:
    for name in ("a", "b"):
        forward("add", "work", "80", "--from", "any", "--name", name, "--disabled")
    before = content(lab)
    assert (
        "work b was not enabled. Rule work a already has port 80" in forward("enable", "work", "a", "b").err
    )
    assert content(lab) == before


@pytest.mark.parametrize("name", ["a", "z"])
@pytest.mark.parametrize("target", ["personal", "work"])
@pytest.mark.parametrize("head", ["", "version 2\n"])
def test_an_import_takes_no_port_whatever_its_place_in_the_order(
    forward: Command, lab: LabDirectory, name: str, target: str, head: str
) -> None:
    """Of two rules in a plan the first by name has the port: an import must not become the first."""
    forward(*ADD)
    before = content(lab)
    text = f"{head}{target} {name} action=forward srcports=80 srchosts=any via=sys-net owner={target}\n"
    result = forward("import", stdin=text)
    assert (result.status, result.out) == (1, "")
    assert " was not imported, nor was anything else. Rule " in result.err
    assert "work web" in result.err
    assert content(lab) == before


def test_an_import_may_replace_the_rule_that_has_the_port(forward: Command) -> None:
    forward(*ADD)
    text = "work web action=forward srcports=80 srchosts=any\n"
    assert forward("import", "--replace", stdin=text).status == 0
    assert forward(
        "import", "--replace", stdin=f"{text}work b action=forward srcports=80 srchosts=any\n"
    ).status


@pytest.mark.parametrize("head", ["", "version 2\n"])
def test_two_rules_of_one_import_claim_no_port_together(
    forward: Command, lab: LabDirectory, head: str
) -> None:
    text = "work a action=forward srcports=80 srchosts=any\nwork b action=forward srcports=80 srchosts=any\n"
    before = content(lab)
    result = forward("import", stdin=f"{head}{text}")
    assert "work b was not imported, nor was anything else. Rule work a already has port 80" in result.err
    assert content(lab) == before


def test_what_was_in_conflict_already_hinders_no_import(forward: Command, lab: LabDirectory) -> None:
    forward(*ADD)
    lab.set_feature("work", "forward.x", str(rule().rule))
    result = forward("import", stdin="vault a action=forward srcports=81 srchosts=any via=sys-net\n")
    assert result.out.startswith("Imported 1 forward.\nvault a: active.")


def test_agreement_about_autostart_is_asked_for_at_add(forward: Command) -> None:
    forward(*ADD)
    result = forward("add", "work", "81:8080", "--from", "any", "--autostart")
    assert result.status == 1
    assert "Rule work web reaches the same port of work from sys-net with a different autostart" in result.err
