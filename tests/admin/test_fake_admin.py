# SPDX-License-Identifier: GPL-2.0-or-later
"""The fakes answer as the real ones were recorded to, so that what passes over them can be relied on."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_admin import METHODS, FakeQubes
from fake_policy import FakePolicyClient

from qubes_fwd_qrexec.lab.directory import LabDirectory

VECTORS = Path(__file__).parent / "vectors"


def recorded(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((VECTORS / name).read_text())["exchange"]
    return found


def outcome(call: Callable[..., Any], *args: Any) -> dict[str, Any]:
    """The answer, or the class and text of the error, as they are recorded."""
    try:
        answer = call(*args)
    except Exception as error:  # noqa: BLE001  # whatever it raises is what is compared
        return {"error": type(error).__name__, "text": str(error)}
    return {"answer": answer}


def test_qubesd_answers_as_recorded(qubesd: FakeQubes, lab: LabDirectory) -> None:
    for qube in lab.qubes().values():
        lab.write_qube(replace(qube, label="red"))
    for name in ("sys-net", "sys-firewall", "sys-vpn"):
        lab.set_feature(name, "servicevm", "1")  # qubesd gives it to what provides network
    for name in ("fedora-42", "debian-12"):
        # The recorded qubes had no agent to announce it, and were told by hand what their templates offer.
        for key in (
            "qrexec",
            *(f"supported-rpc.qubes.Forward{word}" for word in ("Cut", "Nft", "Revoke", "Status", "UDP")),
        ):
            lab.remove_feature(name, key)
        lab.set_feature(name, "supported-rpc.qubes.ConnectTCP", "1")
    for exchange in recorded("admin-api.json"):
        payload = exchange.pop("payload")
        asked = (exchange.pop("dest"), exchange.pop("method"), exchange.pop("arg"))
        found = outcome(qubesd.qubesd_call, *asked, None if payload is None else payload.encode())
        if "answer" in found:
            found["answer"] = found["answer"].decode()
            if asked[1] == "admin.vm.property.GetAll":
                # The fake knows some of the properties, and those in the same words and order.
                known = found["answer"].splitlines(keepends=True)
                lines = exchange["answer"].splitlines(keepends=True)
                exchange["answer"] = "".join(line for line in lines if line in known)
            elif asked[1].endswith(".List"):
                # qubesd lists features in the order in which they were set.
                found, exchange = (
                    {"answer": sorted(one["answer"].splitlines())} for one in (found, exchange)
                )
        assert found == exchange, asked


def test_every_call_that_the_fake_knows_was_recorded_and_no_other(qubesd: FakeQubes) -> None:
    assert {exchange["method"] for exchange in recorded("admin-api.json")} == METHODS.keys()
    with pytest.raises(pytest.fail.Exception):
        qubesd.qubesd_call("work", "admin.vm.Start")
    with pytest.raises(pytest.fail.Exception):
        qubesd.qubesd_call("work", "admin.vm.feature.Get")
    with pytest.raises(pytest.fail.Exception):
        qubesd.qubesd_call("work", "admin.vm.feature.Get", "a", b"payload")


def test_the_policy_api_answers_as_recorded(policy_client: FakePolicyClient, lab: LabDirectory) -> None:
    for exchange in recorded("policy-api.json"):
        asked = (exchange.pop("method"), exchange.pop("args"))
        found = outcome(getattr(policy_client, asked[0]), *asked[1])
        if isinstance(found.get("answer"), tuple):
            found["answer"] = list(found["answer"])
        for one in (found, exchange):
            if "text" in one:
                told = one["text"].replace(str(lab.policy_dir), "/etc/qubes/policy.d")
                # What exactly a line lacks, the lab's reader says in its own words.
                one["text"] = re.sub(r"(policy:\d+: ).*", r"\1", told)
        assert found == exchange, asked
