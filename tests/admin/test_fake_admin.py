# SPDX-License-Identifier: GPL-2.0-or-later
"""The fakes answer as the real ones were recorded to, so that what passes over them can be relied on."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from fake_admin import FakePolicyClient, FakeQubes

from qubes_fwd_qrexec.lab.directory import LabDirectory

VECTORS = Path(__file__).parent / "vectors"


def recorded(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((VECTORS / name).read_text())["exchange"]
    return found


def test_qubesd_answers_as_recorded(qubesd: FakeQubes, lab: LabDirectory) -> None:
    for name in ("sys-net", "sys-firewall", "sys-vpn"):
        lab.set_feature(name, "servicevm", "1")  # qubesd gives it to what provides network
    for exchange in recorded("admin-api.json"):
        payload = exchange["payload"]
        asked = (exchange["dest"], exchange["method"], exchange["arg"])
        try:
            answer = qubesd.qubesd_call(*asked, None if payload is None else payload.encode()).decode()
        except Exception as error:  # noqa: BLE001  # the class itself is compared
            assert (type(error).__name__, str(error)) == (exchange["error"], exchange["text"]), asked
            continue
        if exchange["method"] == "admin.vm.property.GetAll":
            # The fake knows some of the properties, and those in the same words and order.
            lines = answer.splitlines()
            assert lines == [line for line in exchange["answer"].splitlines() if line in lines], asked
        elif exchange["method"].endswith(".List"):
            # qubesd lists features in the order in which they were set.
            assert sorted(answer.splitlines()) == sorted(exchange["answer"].splitlines()), asked
        else:
            assert answer == exchange["answer"], asked


def test_every_call_that_the_fake_knows_was_recorded_and_no_other(qubesd: FakeQubes) -> None:
    from fake_admin import METHODS

    assert {exchange["method"] for exchange in recorded("admin-api.json")} == METHODS.keys()
    with pytest.raises(pytest.fail.Exception):
        qubesd.qubesd_call("work", "admin.vm.Start")
    with pytest.raises(pytest.fail.Exception):
        qubesd.qubesd_call("work", "admin.vm.feature.Get")
    with pytest.raises(pytest.fail.Exception):
        qubesd.qubesd_call("work", "admin.vm.feature.Get", "a", b"payload")


def test_the_policy_api_answers_as_recorded(policy_client: FakePolicyClient, lab: LabDirectory) -> None:
    for exchange in recorded("policy-api.json"):
        try:
            answer = getattr(policy_client, exchange["method"])(*exchange["args"])
        except Exception as error:  # noqa: BLE001  # the class itself is compared
            text = str(error).replace(str(lab.policy_dir), "/etc/qubes/policy.d")
            # What exactly a line lacks, the lab's reader says in its own words.
            told, recorded_text = (re.sub(r"(policy:\d+: ).*", r"\1", t) for t in (text, exchange["text"]))
            assert (type(error).__name__, told) == (exchange["error"], recorded_text), exchange
        else:
            assert (list(answer) if isinstance(answer, tuple) else answer) == exchange["answer"], exchange
