# SPDX-License-Identifier: GPL-2.0-or-later
"""Access to the firewall: the program ``nft``, and the kernel's notifications of changes.

It decides nothing. Both need CAP_NET_ADMIN in the network namespace of this process.
"""

import json
import os
import socket
import subprocess
from typing import Any, Self

from .rule import Family, NftError
from .tables import OWN, TABLE, Seen, SeenTable, seen

# Ours take milliseconds, and seconds with a thousand forwards; this only keeps us from hanging for ever.
# The unit gives the last one 45 s.
TIMEOUT_S = 30.0
_MESSAGE_MAX = 400
# linux/netlink.h and linux/netfilter/nfnetlink.h: the messages that `nft monitor` prints.
_NETLINK_NETFILTER = 12
_NFNLGRP_NFTABLES = 7
_READ_MAX = 1 << 16


class _NoJSONError(NftError):
    """What nft has written cannot be read."""


class Nft:
    """The program ``nft``, found along PATH and in the sbin directories."""

    def __init__(self, program: str = "nft", timeout_s: float = TIMEOUT_S) -> None:
        self._program = program
        self._timeout_s = timeout_s
        path = os.environ.get("PATH", os.defpath)
        self._environment = {"LC_ALL": "C", "PATH": f"{path}:/usr/sbin:/sbin"}

    def look(self) -> dict[Family, Seen]:
        """What there is in each family. Raises `NftError`."""
        chains = self._list("chains")
        there = {(entry["chain"]["family"], entry["chain"]["table"]) for entry in chains if "chain" in entry}
        found = {}
        for family in Family:
            qubes, own = SeenTable(), None
            if (family, TABLE) in there:
                qubes = seen(self._list("table", family, TABLE))
            if (family, OWN) in there:
                own = self._own(family)
            found[family] = Seen(qubes, own)
        return found

    def _own(self, family: Family) -> SeenTable:
        """Our own table; one that nobody can read counts as empty, and is made anew.

        Somebody may have put it to sleep, and what nft writes of that is no JSON then: docs/facts.md, F16.
        """
        try:
            return seen(self._list("table", family, OWN))
        except _NoJSONError:
            return SeenTable()

    def counters(self) -> dict[str, tuple[int, int]]:
        """The packets and bytes of our counters by name, both families together. Raises `NftError`."""
        found: dict[str, tuple[int, int]] = {}
        for entry in self._list("counters", stateless=False):
            counter = entry.get("counter", {})
            if counter.get("table") == OWN and counter.get("family") in set(Family):
                packets, size = found.get(counter["name"], (0, 0))
                found[counter["name"]] = packets + counter["packets"], size + counter["bytes"]
        return found

    def carry_out(self, transaction: str) -> None:
        """Apply all of it or nothing. Raises `NftError`."""
        self._run("-f", "-", text=transaction)

    def _list(self, *what: str, stateless: bool = True) -> list[dict[str, Any]]:
        # Without counters and the elements of sets, which may be many.
        output = self._run("-j", *(("-s",) if stateless else ()), "-t", "list", *what)
        try:
            listing = json.loads(output)["nftables"]
        except (ValueError, KeyError, TypeError):
            words = " ".join(what)
            raise _NoJSONError(f"nft list {words}: the output is not the JSON it should be") from None
        return [entry for entry in listing if isinstance(entry, dict)]

    def _run(self, *arguments: str, text: str = "") -> str:
        try:
            done = subprocess.run(
                [self._program, *arguments],
                input=text,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self._timeout_s,
                env=self._environment,
                check=False,
            )
        except FileNotFoundError:
            raise NftError(f"the program {self._program!r} is missing; the package nftables has it") from None
        except OSError as error:
            raise NftError(f"{self._program}: {error.strerror}") from error
        except subprocess.TimeoutExpired as error:
            raise NftError(f"nft {' '.join(arguments)}: not finished within {self._timeout_s:g} s") from error
        if done.returncode != 0:
            why = " ".join(done.stderr.split())[:_MESSAGE_MAX]
            raise NftError(f"nft {' '.join(arguments)}: exit status {done.returncode}: {why}")
        return done.stdout


class Changes:
    """Readable when anybody has changed nftables, including ourselves. Raises `NftError`.

    It uses the kernel's messages instead of polling or ``nft monitor``: polling often enough would start
    programs all day long, and a second program would have to be kept alive. The content of the messages does
    not matter, nor that some may be lost: we look at the firewall ourselves.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, _NETLINK_NETFILTER
        )
        try:
            self._socket.bind((0, 1 << (_NFNLGRP_NFTABLES - 1)))
        except OSError as error:
            self._socket.close()
            raise NftError(f"changes of the firewall cannot be watched: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def has_any(self) -> bool:
        """Whether there was a change since the last call."""
        found = False
        while True:
            try:
                self._socket.recv(_READ_MAX)
            except BlockingIOError:
                return found
            except OSError:  # ENOBUFS: there were more than the kernel keeps for us
                pass
            found = True
