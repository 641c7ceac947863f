# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether qubes say that forwards by nft are in force as they were told, or closed.

dom0 closes a call by its own policy, but packets are stopped by the qubes of the path alone. So each is asked
after a change, and a rule that changes from nft to qrexec opens anew only after all have said that it is
closed. Until then they keep its configuration with a time that is over, by which the next look knows of it.
What a qube says is untrusted: if it lies, the other qubes of the path still close.
"""

from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from enum import StrEnum
from itertools import groupby, islice
from typing import NamedTuple

from qubes_fwd_qrexec.common.errors import ConfigError, StoreError
from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.common.nftconfig import Loss, NftConfig, is_nft_key, parse_nft_key
from qubes_fwd_qrexec.common.nftreport import NftReport, PathReport
from qubes_fwd_qrexec.common.report import REPORT_MAX_BYTES
from qubes_fwd_qrexec.common.rules import Mode, OnExpire
from qubes_fwd_qrexec.common.services import NFT_SERVICE
from qubes_fwd_qrexec.common.values import QubeName

from .answers import AnswerError, NotRunningError, at_once, reading
from .backend import Backend, put
from .inventory import CONFIG_PREFIX, NFT_FEATURE, Inventory
from .states import Key, Plan

# The qube makes sure of its rules before it answers, which takes some tenths of a second.
_TIMEOUT_S = 5.0
# Of one qube, which may name as many as it likes.
_DRAINS_MAX = 100
Place = tuple[QubeName, str]
"""A qube, and the key of what it is told of a forward."""


class Lack(StrEnum):
    """What is not as it should be, where the answer itself does not say why (`common.nftreport.Why`)."""

    STILL_IN_FORCE = "still-in-force"
    NOT_IN_FORCE = "not-in-force"
    OTHER_IN_FORCE = "other-in-force"
    NO_WORD = "no-word"
    DRAINS = "drains"
    NO_FAMILY = "no-family"
    NO_SERVICE = "no-service"
    NO_ANSWER = "no-answer"


class Unconfirmed(NamedTuple):
    """A qube that does not confirm a forward: that it is in force, or, if not ``is_opening``, that it is
    closed. ``said`` is what the qube or the call says of it, and ``digest`` that of the entry which it has in
    force instead.
    """

    qube: QubeName
    key: str
    lack: str
    is_opening: bool
    said: str = ""
    digest: str | None = None

    @property
    def may_have_other(self) -> bool:
        """Whether the qube may have an earlier entry in force."""
        return self.lack in (Lack.OTHER_IN_FORCE, Lack.NO_WORD, Lack.NO_ANSWER, Lack.STILL_IN_FORCE)


Answer = NftReport | AnswerError
"""What a qube says of its firewall, or why there is no answer."""


def ask_all(
    backend: Backend, qubes: Collection[QubeName], timeout_s: float | None = None
) -> dict[QubeName, Answer]:
    """What each of these qubes says of the forwards by nft that it has; all are asked at once."""
    return at_once(lambda qube: _ask(backend, qube, timeout_s), qubes)


def _ask(backend: Backend, qube: QubeName, timeout_s: float | None) -> Answer:
    try:
        with reading(qube):
            return NftReport.parse(backend.ask(qube, NFT_SERVICE, REPORT_MAX_BYTES, timeout_s))
    except AnswerError as error:
        if error.status != ExitStatus.TROUBLE:
            return error
        # So our service ends if the firewall's program is not there to be asked.
        what = f"qubes-forward-nft is not running there, or the call failed (exit status {error.status})"
        return AnswerError(what, error.status, way_out=error.way_out)


def unconfirmed(told: Mapping[Place, str | None], backend: Backend) -> tuple[Unconfirmed, ...]:
    """Ask all qubes of these places at once. ``told`` are the values there, or None where it was removed."""
    places = {place: value for place, value in told.items() if is_nft_key(place[1])}
    qubes = sorted({qube for qube, _ in places})
    answers = ask_all(backend, qubes, _TIMEOUT_S)
    found = (judged(qube, key, wanted(key, value), answers[qube]) for (qube, key), value in places.items())
    return tuple(each for each in found if each is not None)


def not_closed(qubes: Iterable[QubeName], backend: Backend) -> tuple[Unconfirmed, ...]:
    """Ask qubes for all that is in force there though nothing should be; also those that do not say."""
    found: list[Unconfirmed] = []
    for qube, answer in ask_all(backend, sorted(qubes), _TIMEOUT_S).items():
        keys = [forward.key for forward in answer.forwards] if isinstance(answer, NftReport) else []
        # Of what it does not name, too: nft may have failed, or its list may not be the whole.
        if not keys or (isinstance(answer, NftReport) and answer.left_out):
            keys.append("")
        found += (doubt for key in keys if (doubt := judged(qube, key, None, answer)) is not None)
    return tuple(found)


def end_drains(doubts: Iterable[Unconfirmed], backend: Backend) -> tuple[Unconfirmed, ...]:
    """Cut the connections that were let finish after their time, and return the doubts that are left. It
    takes the lock. Raises `StoreError` if it is held or a qube could not be told, when all others have been.

    dom0 has taken away what their qubes knew of them, so these are told of a forward of that name again, one
    that is over and cuts, and asked once more. ``doubts`` are in the order of their qubes.
    """
    doubts, problems = tuple(doubts), list[StoreError]()
    drains = (doubt for doubt in doubts if doubt.lack == Lack.DRAINS)
    of_each = groupby(drains, lambda doubt: doubt.qube)
    draining = [doubt for _, some in of_each for doubt in islice(some, _DRAINS_MAX)]
    told = {(doubt.qube, doubt.key): _nothing(doubt.key) for doubt in draining}

    def put_all(values: Mapping[Place, str | None]) -> None:
        for (qube, key), value in values.items():
            try:
                put(backend, qube, f"{CONFIG_PREFIX}{key}", value)
            except StoreError as error:
                problems.append(error)

    with backend.locked():
        put_all(told)
        left = unconfirmed(told, backend)
        put_all(dict.fromkeys(told))
    if problems:
        raise problems[0]
    return (*(doubt for doubt in doubts if doubt not in draining), *left)


def _nothing(key: str) -> str:
    """What a qube is told of a forward of which dom0 knows the name alone, to have nothing of it in force."""
    value = "version=1 role=target side=uplink proto=tcp srcports=1-1 dstports=1-1 srchosts=any expire=1"
    return str(NftConfig.parse(key, value))


def forwarding(inventory: Inventory) -> set[QubeName]:
    """The running qubes whose firewall may have something of forwards by nft, or of which that is unknown."""
    return {
        qube.name
        for qube in inventory.qubes.values()
        if qube.is_running
        and (
            qube.features.get(NFT_FEATURE)
            or any(is_nft_key(key.removeprefix(CONFIG_PREFIX)) for key in qube.configured)
            or qube.problem is not None
        )
    }


def wanted(key: str, value: str | None) -> NftConfig | None:
    """What a qube is to have in force that was told this; None if that is nothing."""
    config = None if value is None else NftConfig.parse(key, value)
    # What `switched` writes is over since 1970.
    return None if config is None or config.expire == 1 else config


def judged(qube: QubeName, key: str, config: NftConfig | None, answer: Answer) -> Unconfirmed | None:
    """What an answer leaves open about a forward that is to be as ``config`` says, or closed."""
    is_opening = config is not None
    if isinstance(answer, NotRunningError):
        return None
    if isinstance(answer, AnswerError):
        if answer.status == ExitStatus.NO_SERVICE:
            # Without our program, nothing of ours is in its firewall.
            return Unconfirmed(qube, key, Lack.NO_SERVICE, is_opening, str(answer)) if is_opening else None
        return Unconfirmed(qube, key, Lack.NO_ANSWER, is_opening, str(answer))
    report, said = answer.find(key), answer.problem or ""
    if report is None and answer.left_out and not said:
        said = f"its answer leaves out {answer.left_out} forwards"
    if config is None:
        if report is not None and (report.digest is not None or report.draining):
            lack = Lack.DRAINS if report.draining else Lack.STILL_IN_FORCE
            return Unconfirmed(qube, key, lack, is_opening, said)
        return Unconfirmed(qube, key, Lack.STILL_IN_FORCE, is_opening, said) if said else None
    if report is None or report.digest != config.digest:
        return _not_in_force(Unconfirmed(qube, key, Lack.NOT_IN_FORCE, is_opening, said), report, answer)
    if lacking := config.versions - answer.versions:
        families = " and ".join(f"IPv{version}" for version in sorted(lacking))
        return Unconfirmed(qube, key, Lack.NO_FAMILY, is_opening, families)
    return None


def _not_in_force(doubt: Unconfirmed, report: PathReport | None, answer: NftReport) -> Unconfirmed:
    """Why a forward is not in force as it is to be, and what is there instead."""
    if report is not None and report.digest is not None:
        doubt = doubt._replace(lack=Lack.OTHER_IN_FORCE, digest=report.digest)
    elif report is not None:
        doubt = doubt._replace(lack=report.why or Lack.NOT_IN_FORCE)
    elif doubt.said:
        # nft has failed, or the forward may be among those that are left out.
        doubt = doubt._replace(lack=Lack.NO_WORD)
    refused = next((problem.text for problem in answer.refused if problem.key == doubt.key), doubt.said)
    return doubt._replace(said=refused)


def lost(key: str, was: str | None, value: str | None) -> frozenset[Loss]:
    """In what a qube that was told the one and then the other may let through less than before."""
    new = wanted(key, value)
    if was is None or new is None:
        return frozenset(Loss) if new is None else frozenset()
    try:
        return new.lost(NftConfig.parse(key, was))
    except ConfigError:
        return frozenset(Loss)


def widens(key: str, was: str, value: str) -> bool:
    """Whether a qube may let a packet through by what it is told that it did not before, or for longer."""
    new = NftConfig.parse(key, value)
    try:
        old = NftConfig.parse(key, was)
    except ConfigError:
        return True
    return bool(old.lost(new))


def switched(planned: Plan, inventory: Inventory, closed: Iterable[Key] = ()) -> dict[Place, str]:
    """What the qubes of forwards are told that went by nft and are to go over qrexec now, but those that are
    known to be ``closed``: that their time is over. What cannot be read is removed, and never asked for.
    """
    waiting = {forward.named.key for forward in planned.live if forward.mode is Mode.QREXEC} - {*closed}
    found: dict[Place, str] = {}
    for qube, key, value in inventory.configurations():
        with suppress(ConfigError):
            if is_nft_key(key) and parse_nft_key(key) in waiting:
                over = replace(NftConfig.parse(key, value), expire=1, on_expire=OnExpire.CUT)
                found[qube, key] = str(over)
    return found
