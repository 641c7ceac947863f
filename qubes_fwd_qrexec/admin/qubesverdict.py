# SPDX-License-Identifier: GPL-2.0-or-later
"""dom0's policy, judged by Qubes' own parser: the code that judges a real call, over the same files.

Facts: qubes-core-qrexec qrexec/policy/parser.py (`FilePolicy`, `Request`, `AllowResolution`) and
qrexec/utils.py (`get_system_info`, where a qube stands by its name and by its uuid).
"""

from collections.abc import Sequence
from typing import Any

from .backend import PolicyCall, PolicyVerdict


def verdicts(calls: Sequence[PolicyCall]) -> list[PolicyVerdict]:
    """What calls to their targets would meet if these ran; the policy is read once.

    Where the parser fails, a real call is refused.
    """
    from qrexec import exc, utils
    from qrexec.policy import parser

    try:
        system_info: dict[str, Any] = utils.get_system_info()
        policy = parser.FilePolicy()
    except exc.AccessDenied as error:
        return [PolicyVerdict(False, str(error) or "dom0 denies every call")] * len(calls)
    except (OSError, ValueError) as error:
        reason = f"the policy cannot be read, so that dom0 denies every call: {error}"
        return [PolicyVerdict(False, reason)] * len(calls)
    return [_verdict(policy, call, system_info) for call in calls]


def _verdict(policy: Any, call: PolicyCall, system_info: dict[str, Any]) -> PolicyVerdict:
    from qrexec import exc
    from qrexec.policy import parser

    try:
        target = system_info["domains"][call.target]
        state, target["power_state"] = target.get("power_state"), "Running"
        try:
            found = policy.evaluate(
                parser.Request(call.service, call.argument, call.source, call.target, system_info=system_info)
            )
        finally:
            target["power_state"] = state
    except exc.AccessDenied as error:
        return PolicyVerdict(False, str(error) or "dom0 denies the call")
    # What its asserts and lookups raise where a qube that a line names does not exist.
    except (AssertionError, AttributeError, KeyError, OSError, ValueError) as error:
        return PolicyVerdict(False, f"the policy cannot be evaluated: {type(error).__name__}: {error}")
    if isinstance(found, parser.AllowResolution) and str(found.target) in {
        call.target,
        f"uuid:{target.get('uuid')}",
    }:
        return PolicyVerdict(True, "dom0 allows the call")
    return PolicyVerdict(False, "dom0 asks the user first, or sends the call elsewhere")
