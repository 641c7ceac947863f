# SPDX-License-Identifier: GPL-2.0-or-later
"""The steps of diagnose for a forward by nft: qube by qube from the clients to the server."""

from collections.abc import Iterator

from qubes_fwd_qrexec.admin import confirming
from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.confirming import Lack
from qubes_fwd_qrexec.admin.inventory import CONFIG_PREFIX, Inventory
from qubes_fwd_qrexec.admin.states import Forward, Verdict
from qubes_fwd_qrexec.common.config import Side
from qubes_fwd_qrexec.common.nftconfig import NftConfig, Role
from qubes_fwd_qrexec.common.nftreport import NftReport
from qubes_fwd_qrexec.common.values import QubeName

from . import confirmed
from .tables import Check, counted

_UNIT = "qubes-forward-nft"
_NOT_APPLIED = "not-applied"
_APPLY = (("qvm-forward", "apply"),)
_HELPS: dict[str, str] = {
    Lack.NO_SERVICE: "install or update qubes-fwd-qrexec in the template of {qube}, and restart both",
    Lack.NO_FAMILY: "restart {qube} if IPv6 was switched on for it since it started",
}
_OTHERWISE = (
    f"'systemctl status {_UNIT}' in {{qube}} says more; restart {{qube}} if the service {_UNIT} was switched "
    "on since it started"
)


def hops(forward: Forward, inventory: Inventory, backend: Backend) -> Iterator[Check]:
    """Whether each running qube of the path has the forward in force, and lets packets through. The last of
    them stops if one does not.
    """
    for qube, config in reversed(forward.nft_configs):
        check = _hop(qube, config, inventory, backend)
        yield check
        if check.verdict is Verdict.STOPS:
            return
    if forward.side is Side.VIFS:
        text = (
            f"the client's own rules ('qvm-firewall CLIENT') must allow {forward.named.target} and "
            f"{forward.named.rule.target_ports.worded()}; they are not looked at"
        )
        yield Check("client", "unknown", text)


def _hop(qube: QubeName, config: NftConfig, inventory: Inventory, backend: Backend) -> Check:
    step = "target" if config.role is Role.TARGET else "hop"
    told = inventory.qubes[qube].features.get(f"{CONFIG_PREFIX}{config.key}")
    if told != str(config):
        text = f"{qube} has {'no' if told is None else 'another'} configuration for it"
        return Check(step, Verdict.STOPS, text, _NOT_APPLIED, "'qvm-forward apply'", _APPLY)
    answer = confirming.ask(qube, backend)
    doubt = confirming.judged(qube, config.key, config, answer)
    if doubt is not None:
        helps = _HELPS.get(doubt.lack, _OTHERWISE).format(qube=qube)
        return Check(step, Verdict.STOPS, confirmed.words(doubt), doubt.lack, helps)
    report = answer.find(config.key) if isinstance(answer, NftReport) else None
    if report is None:
        return Check(step, "unknown", f"{qube} is halted")
    what = "lets it in" if config.role is Role.TARGET else "sends it on to the next qube"
    through = counted(report.connections, "connection") if config.role is Role.HOP else ""
    number = through or counted(report.packets, "packet")
    text = f"{qube} {what}: {number} until now"
    if not report.packets and not report.connections:
        text = f"{qube} {what}, but has seen nothing of it yet"
    return Check(step, Verdict.OK, text)
