# SPDX-License-Identifier: GPL-2.0-or-later
"""What diagnose says of a server by what its target tells: where it is, and which header it expects."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from test_diagnose_udp import LISTENER, TCP, Asked
from worlds import Command

from qubes_fwd_qrexec.admin.answers import AnswerError
from qubes_fwd_qrexec.common.report import Answer, Trial
from qubes_fwd_qrexec.common.values import QubeName, RuleName
from qubes_fwd_qrexec.lab.directory import LabDirectory

Walk = Callable[..., list[dict[str, Any]]]
FILE = "/usr/local/etc/qubes-forward/servers.conf"


class Older(Asked):
    """A lab whose target does not know the question."""

    def ask(
        self, qube: QubeName, service: str, max_bytes: int, timeout_s: float | None = None, given: str = ""
    ) -> bytes:
        if "+proxy." in service:
            raise AnswerError("it does not know that", 2)
        return super().ask(qube, service, max_bytes, timeout_s, given)


@pytest.fixture
def qubes(lab: LabDirectory) -> Asked:
    return Asked(lab)


@pytest.fixture
def walked(forward: Command, over: Callable[..., Any]) -> Walk:
    """The steps of a forward of TCP that was added with these options."""

    def steps(qubes: Asked, *options: str) -> list[dict[str, Any]]:
        words = ("vault", "80", "--via", "sys-net", "--from", "any", "--name", "web")
        assert forward("add", *words, *options).status == 0
        qubes.listener = replace(LISTENER, forwards=(replace(TCP, name=RuleName("web")),))
        found: list[dict[str, Any]] = over(qubes, "diagnose", "vault", "web", "--json").json["steps"]
        return found

    return steps


def test_a_server_that_is_where_its_owner_says_is_well_and_the_place_is_said(
    qubes: Asked, walked: Walk
) -> None:
    qubes.trials["80"] = Trial(Answer.THROUGH, "elsewhere", "a server takes connections; calls get to eth0")
    (server,) = [step for step in walked(qubes) if step["step"] == "server"]
    assert (server["verdict"], server["text"]) == (
        *("ok", "in vault, a server takes connections; calls get to eth0"),
    )


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        (
            "not-at-loopback",
            f"write 'tcp 80 ADDRESS' in {FILE} in vault, with that address, or eth0 for the qube's own; "
            "or have the server listen on 127.0.0.1",
        ),
        ("elsewhere", "have the server listen there, or change that line in vault"),
    ],
)
def test_a_server_that_is_not_where_calls_get_to_ends_the_walk_with_what_to_write(
    qubes: Asked, walked: Walk, reason: str, remedy: str
) -> None:
    qubes.trials["80"] = Trial(Answer.REFUSED, reason, "what the target says")
    last = walked(qubes)[-1]
    assert (last["step"], last["verdict"], last["cause"]) == ("server", "stops", reason)
    assert last["text"] == "no server in vault accepts connections where calls arrive: what the target says"
    assert last["remedy"] == remedy


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_server_that_expects_a_header_and_gets_none_is_found(
    qubes: Asked, walked: Walk, version: str
) -> None:
    qubes.trials["proxy.80"] = Trial(Answer.THROUGH, f"expects-{version}", "")
    last = walked(qubes)[-1]
    assert (last["step"], last["verdict"], last["cause"]) == ("header", "stops", "header-expected")
    assert "seems to expect a PROXY header" in last["text"]
    assert last["ways_out"] == [["qvm-forward", "set", "vault", "web", f"proxy={version}"]]
    assert f"'qvm-forward set vault web proxy={version}'" in last["remedy"]


def test_a_server_that_seems_to_expect_no_header_and_gets_one_is_told(qubes: Asked, walked: Walk) -> None:
    qubes.trials["proxy.80"] = Trial(Answer.THROUGH, "expects-none", "")
    last = walked(qubes, "--proxy", "v2")[-1]
    assert (last["step"], last["verdict"]) == ("header", "unknown")
    assert last["text"] == (
        "the server seems to expect no PROXY header, but gets one; 'qvm-forward set vault web proxy=off' "
        "sends none"
    )


@pytest.mark.parametrize(
    ("reason", "options"),
    [("expects-none", ()), ("", ()), ("", ("--proxy", "v2")), ("expects-v2", ("--proxy", "v1"))],
)
def test_a_server_that_gets_what_it_expects_or_does_not_show_it_is_no_step(
    qubes: Asked, walked: Walk, reason: str, options: tuple[str, ...]
) -> None:
    qubes.trials["proxy.80"] = Trial(Answer.THROUGH, reason, "")
    assert walked(qubes, *options)[-1]["step"] == "round trip"


def test_a_target_that_does_not_know_the_question_is_no_fault(lab: LabDirectory, walked: Walk) -> None:
    assert walked(Older(lab))[-1]["step"] == "round trip"
