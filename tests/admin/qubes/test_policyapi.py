# SPDX-License-Identifier: GPL-2.0-or-later
"""dom0's policy file through the policy API, as its clients tell errors before and since April 2026."""

import logging
import os
import re
import sys
from collections.abc import Callable
from subprocess import CalledProcessError
from threading import Event, Thread

import pytest
from fake_admin import FakeQubes
from fake_policy import FakePolicyClient, PolicyAdminException
from helpers import BOUND_S

from qubes_fwd_qrexec.admin.backend import NEW, Backend, PolicyCall, PolicyFile
from qubes_fwd_qrexec.admin.qubes.store import QubesStore
from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.policytext import PolicyRule


@pytest.fixture(params=["new client", "old client"])
def api(
    request: pytest.FixtureRequest,
    dom0: FakeQubes,
    policy_client: FakePolicyClient,
    monkeypatch: pytest.MonkeyPatch,
) -> Backend:
    policy_client.is_old = request.param == "old client"
    if policy_client.is_old:  # it has no exceptions of its own
        module = sys.modules["qrexec.policy.admin_client"]
        for name in [name for name in vars(module) if name.startswith("PolicyAdmin")]:
            monkeypatch.delattr(module, name)
    return QubesStore()


def failing(error: Exception, method: str) -> Callable[[str], None]:
    def fails(called: str) -> None:
        if called == method:
            raise error

    return fails


def asking(api: Backend, method: str) -> None:
    """Do what makes this call."""
    if method == "policy.Replace":
        api.replace_policy("# one\n", NEW)
    else:
        api.read_policy()


def test_a_missing_file_is_new_and_one_that_is_there_has_its_token(api: Backend) -> None:
    assert api.read_policy() == PolicyFile(None, NEW)
    api.replace_policy("# one\n", NEW)
    found = api.read_policy()
    assert found.text == "# one\n"
    assert found.token.startswith("sha256:")


def test_a_change_by_somebody_else_is_not_overwritten(api: Backend, lab: LabDirectory) -> None:
    api.replace_policy("# one\n", NEW)
    token = api.read_policy().token
    path = lab.policy_dir / "30-forward.policy"
    for meanwhile in ("# other\n", None):
        path.unlink()
        if meanwhile is not None:
            path.write_text(meanwhile)
        with pytest.raises(
            StoreError, match=r"30-forward\.policy: somebody else has just changed it; try again"
        ):
            api.replace_policy("# two\n", token)
        assert api.read_policy().text == meanwhile


def test_what_qubes_cannot_read_is_not_written(api: Backend) -> None:
    why = "validation failed: .*:1: 1 fields.*: not written, as dom0's policy could not be read with it"
    with pytest.raises(StoreError, match=why):
        api.replace_policy("nonsense\n", NEW)
    assert api.read_policy().text is None


def test_another_file_that_qubes_cannot_read_is_named(api: Backend, lab: LabDirectory) -> None:
    (lab.policy_dir / "20-mine.policy").write_text("nonsense\n")
    with pytest.raises(StoreError, match=r"20-mine\.policy:1.*If the error is in another file, fix that one"):
        api.replace_policy("# fine\n", NEW)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            CalledProcessError(2, "x", stderr=b"Internal \x1b\xfferror"),
            r"status 2: Internal \\u001b\\xfferror\. .*log",
        ),
        (CalledProcessError(126, "x", stderr=None), "status 126.*root or as a member of the group qubes"),
        (NotImplementedError("qrexec not available"), "qrexec not available$"),
        (PermissionError("no"), "no$"),
    ],
)
@pytest.mark.parametrize("method", ["policy.List", "policy.Replace"])
def test_an_error_names_the_file_and_the_call(
    api: Backend, policy_client: FakePolicyClient, error: Exception, words: str, method: str
) -> None:
    policy_client.fails = failing(error, method)
    with pytest.raises(StoreError, match=rf"^dom0's /etc/qubes/policy.d/30-forward\.policy: .*{words}"):
        asking(api, method)


@pytest.mark.parametrize(
    ("method", "words"), [("policy.List", "odd$"), ("policy.Replace", "odd: not written")]
)
def test_an_error_of_the_new_client_says_what_was_wrong(
    dom0: FakeQubes, policy_client: FakePolicyClient, method: str, words: str
) -> None:
    policy_client.fails = failing(PolicyAdminException("odd"), method)
    with pytest.raises(StoreError, match=rf"30-forward\.policy: {re.escape(method)}: {words}"):
        asking(QubesStore(), method)


def test_a_file_that_is_there_and_cannot_be_read_is_not_taken_for_a_missing_one(
    api: Backend, policy_client: FakePolicyClient
) -> None:
    api.replace_policy("# one\n", NEW)
    policy_client.fails = failing(CalledProcessError(1, "x"), "policy.Get")
    with pytest.raises(StoreError, match=r"policy\.Get ended with exit status 1"):
        api.read_policy()


@pytest.mark.parametrize(
    ("method", "argument"),
    [("policy.Get", "+30-forward"), ("policy.List", ""), ("policy.Replace", "+30-forward")],
)
def test_a_management_qube_that_may_not_is_told_the_line_that_allows_it(
    dom0: FakeQubes, policy_client: FakePolicyClient, method: str, argument: str
) -> None:
    dom0.connection, dom0.name = "qrexec", "mgmt"
    api = QubesStore()
    if method == "policy.Get":
        api.replace_policy("# one\n", NEW)
    policy_client.fails = failing(CalledProcessError(126, "x", stderr=b"Request refused\n"), method)
    with pytest.raises(StoreError, match="Request refused") as caught:
        asking(api, method)
    found = re.search("'(policy.*?)'", str(caught.value))
    assert found is not None
    rule = PolicyRule.parse(found[1], "told")
    assert (rule.service, rule.argument or "", rule.source.text) == (method, argument, "mgmt")
    assert rule.target.text == "@adminvm"


def test_a_call_to_a_qube_that_is_gone_would_be_refused(dom0: FakeQubes) -> None:
    call = PolicyCall("qubes.ForwardTCP", "+80", QubeName("sys-net"), QubeName("gone"))
    (verdict,) = QubesStore().verdicts([call])
    assert verdict == (False, "the policy cannot be evaluated: KeyError: 'gone'")


def test_a_umask_that_several_threads_change_is_in_the_end_what_it_was(
    api: Backend, policy_client: FakePolicyClient
) -> None:
    """The second is within before the first is out, and leaves after it."""
    api.replace_policy("# one\n", NEW)
    is_within, is_out, seen = Event(), Event(), list[int]()

    def fails(_: str) -> None:
        seen.append(os.umask(0o002))
        if len(seen) == 1:
            second.start()
            assert is_within.wait(BOUND_S)
        else:
            is_within.set()
            assert is_out.wait(BOUND_S)

    policy_client.fails = fails
    second = Thread(target=api.read_policy)
    before = os.umask(0o077)
    try:
        api.read_policy()
        is_out.set()
        second.join(BOUND_S)
        assert (os.umask(0o077), seen) == (0o077, [0o002, 0o002])
    finally:
        os.umask(before)


def test_what_qubes_says_of_its_own_policy_files_is_not_on_our_stderr(
    api: Backend, capsys: pytest.CaptureFixture[str]
) -> None:
    logging.getLogger().handlers.clear()  # as in a program, which has none
    api.verdicts([PolicyCall("qubes.ForwardTCP", "+80+mux", QubeName("sys-net"), QubeName("work"))])
    assert capsys.readouterr().err == ""
