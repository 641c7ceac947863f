# SPDX-License-Identifier: GPL-2.0-or-later
"""A lab whose qubes say that they forward by nft what they are told, or something else."""

import json
from collections.abc import Callable
from dataclasses import replace

from memory import NO_FORWARDS
from worlds import NOW

from qubes_fwd_qrexec.admin import policy
from qubes_fwd_qrexec.admin.answers import AnswerError
from qubes_fwd_qrexec.common.nftconfig import NftConfig, is_nft_key
from qubes_fwd_qrexec.common.nftreport import NftReport, PathReport, Why
from qubes_fwd_qrexec.common.report import Answer, QubeReport, Trial
from qubes_fwd_qrexec.common.services import NFT_SERVICE, STATUS_SERVICE
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.store import LabStore

PATH = ("sys-net", "sys-firewall", "work")
FEATURE = "vm-config.nft.work.web"


def counted(config: NftConfig) -> PathReport:
    if config.expire is not None and config.expire <= NOW:
        return PathReport(key=config.key, why=Why.OVER)
    return PathReport(key=config.key, digest=config.digest, connections=3, packets=40, sent=2048, received=5)


class NftLab(LabStore):
    """A lab whose qubes have in force what they are told, but those that lie; each change is logged."""

    def __init__(self, lab: LabDirectory) -> None:
        super().__init__(lab)
        self.lab = lab
        self.log: list[str] = []
        # Protocol and port of the target's server, and what keeps others from it.
        self.listens = "tcp.8080"
        self.says: dict[str, Callable[[NftReport], NftReport | AnswerError]] = {}

    def set_feature(self, qube: QubeName, key: str, value: str) -> None:
        self.log.append(f"set {qube} {key}")
        super().set_feature(qube, key, value)

    def remove_feature(self, qube: QubeName, key: str) -> None:
        self.log.append(f"remove {qube} {key}")
        super().remove_feature(qube, key)

    def replace_policy(self, text: str, token: str) -> None:
        self.log.append(f"policy {len(policy.allowing(text))}")
        super().replace_policy(text, token)

    def ask(
        self, qube: QubeName, service: str, max_bytes: int, timeout_s: float | None = None, given: str = ""
    ) -> bytes:
        if service == f"{STATUS_SERVICE}+{self.listens.partition(' ')[0]}":
            trial = Trial(Answer.REFUSED, self.listens.partition(" ")[2], "the server")
            if trial.reason == "failed":
                trial = Trial(Answer.FAILED, "", "the server")
            elif not trial.reason:
                trial = Trial(Answer.THROUGH, "", "the server listens at 0.0.0.0")
            report = QubeReport(program="0.1", trial=trial)
            return json.dumps(report.as_json()).encode()
        if service != NFT_SERVICE:
            return super().ask(qube, service, max_bytes, timeout_s, given)
        features = ((key.removeprefix("vm-config."), v) for key, v in self.lab.features(qube).items())
        configs = [NftConfig.parse(key, value) for key, value in features if is_nft_key(key)]
        report: NftReport | AnswerError = replace(NO_FORWARDS, forwards=tuple(map(counted, configs)))
        if qube in self.says and isinstance(report, NftReport):
            report = self.says[qube](report)
        if isinstance(report, AnswerError):
            raise report
        return json.dumps(report.as_json()).encode()


def hangs(_: NftReport) -> AnswerError:
    return AnswerError("it hangs")


def forgets(report: NftReport) -> NftReport:
    return replace(report, forwards=())


def drains(report: NftReport) -> NftReport:
    return replace(report, forwards=(PathReport(key="nft.work.web", why=Why.OVER, draining=True),))


def strange(report: NftReport) -> NftReport:
    """It has another entry in force."""
    return replace(report, forwards=(PathReport(key="nft.work.web", digest="0" * 16),))
