# SPDX-License-Identifier: GPL-2.0-or-later
"""dom0's policy, judged by Qubes' own parser: the code that judges a real call, over the same files.

Facts: qubes-core-qrexec qrexec/policy/parser.py (`FilePolicy`, `Request`, `AllowResolution`) and
qrexec/utils.py (`get_system_info`, where a qube stands by its name and by its uuid).
"""

from typing import Any

from .backend import PolicyCall, PolicyVerdict


def verdict(call: PolicyCall) -> PolicyVerdict:
    """What a call to the target would meet if that ran. Where the parser fails, a real call is refused."""
    from qrexec import exc, utils
    from qrexec.policy import parser

    try:
        system_info: dict[str, Any] = utils.get_system_info()
        target = system_info["domains"][call.target]
        target["power_state"] = "Running"
        request = parser.Request(
            call.service, call.argument, call.source, call.target, system_info=system_info
        )
        found = parser.FilePolicy().evaluate(request)
    except exc.AccessDenied as error:
        return PolicyVerdict(False, str(error) or "dom0 denies the call")
    # What its asserts and lookups raise where a qube that a line names does not exist.
    except (AssertionError, AttributeError, KeyError, OSError, ValueError) as error:
        return PolicyVerdict(False, f"the policy cannot be evaluated: {type(error).__name__}: {error}")
    names = {call.target, f"uuid:{target.get('uuid')}"}
    if isinstance(found, parser.AllowResolution) and str(found.target) in names:
        return PolicyVerdict(True, "dom0 allows the call")
    return PolicyVerdict(False, "dom0 asks the user first, or sends the call elsewhere")
