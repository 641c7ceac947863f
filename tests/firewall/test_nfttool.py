# SPDX-License-Identifier: GPL-2.0-or-later
"""Running the program nft, played by a script. `test_firewall_namespaces` uses the real one."""

import json
from pathlib import Path

import pytest

from qubes_fwd_qrexec.firewall.nfttool import TIMEOUT_S, Nft
from qubes_fwd_qrexec.firewall.rule import Family, NftError
from qubes_fwd_qrexec.firewall.tables import OWN, Seen, SeenTable

CHAINS = (
    '{"nftables": [{"metainfo": {}}, {"chain": {"family": "ip", "table": "qubes", "name": "custom-input"}}]}'
)


def script(directory: Path, text: str, timeout_s: float = TIMEOUT_S) -> Nft:
    file = directory / "nft"
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return Nft(str(file), timeout_s)


def test_only_tables_that_are_there_are_asked_for(tmp_path: Path) -> None:
    nft = script(
        tmp_path,
        f'case "$*" in "-j -s -t list chains") echo \'{CHAINS}\';; '
        '"-j -s -t list table ip qubes") echo \'{"nftables": [{"chain": {"name": "x"}}]}\';; '
        "*) exit 9;; esac",
    )
    assert nft.look() == {Family.IP: Seen(SeenTable({"x": ()}, {"x": None})), Family.IP6: Seen()}


def test_a_table_of_ours_that_cannot_be_read_counts_as_empty_and_one_of_qubes_does_not(
    tmp_path: Path,
) -> None:
    def look(table: str) -> dict[Family, Seen]:
        chains = CHAINS.replace('"qubes"', f'"{table}"')
        return script(
            tmp_path,
            f'case "$*" in "-j -s -t list chains") echo \'{chains}\';; *) echo \'{{"nftables": [{{\';; esac',
        ).look()

    assert look(OWN)[Family.IP].own == SeenTable()
    with pytest.raises(NftError, match="nft list table ip qubes: the output is not the JSON"):
        look("qubes")


def test_counters_are_those_of_our_table_and_of_both_families_together(tmp_path: Path) -> None:
    def counter(family: str, table: str, packets: int) -> str:
        value = {"family": family, "table": table, "name": "nft.a.b/in", "packets": packets, "bytes": 7}
        return json.dumps({"counter": value})

    found = [counter(*at) for at in (("ip", OWN, 1), ("ip6", OWN, 2), ("inet", OWN, 4), ("ip", "other", 8))]
    nft = script(
        tmp_path,
        f'[ "$*" = "-j -t list counters" ] && echo \'{{"nftables": [{", ".join(found)}]}}\'',
    )
    assert nft.counters() == {"nft.a.b/in": (3, 14)}


def test_a_transaction_is_given_on_stdin(tmp_path: Path) -> None:
    script(tmp_path, f'[ "$*" = "-f -" ] && cat > {tmp_path}/given').carry_out("add chain ip qubes x\n")
    assert (tmp_path / "given").read_text() == "add chain ip qubes x\n"


@pytest.mark.parametrize("output", ["", "{}", "[]", '"x"', "\udcff", "{"])
def test_what_is_not_the_json_that_it_should_be_is_an_error(tmp_path: Path, output: str) -> None:
    nft = script(tmp_path, f"printf '%s' '{output.encode('ascii', 'replace').decode()}'")
    with pytest.raises(NftError, match="nft list chains: the output is not the JSON"):
        nft.look()


def test_a_failure_is_reported_on_one_line(tmp_path: Path) -> None:
    nft = script(tmp_path, "echo 'Error: no\n  ^^^' >&2; exit 1")
    with pytest.raises(NftError, match=r"nft -f -: exit status 1: Error: no \^\^\^$"):
        nft.carry_out("x")


def test_a_program_that_is_missing_or_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(NftError, match="missing; the package nftables has it"):
        Nft(str(tmp_path / "nft")).look()
    (tmp_path / "nft").touch()
    with pytest.raises(NftError, match="Permission denied"):
        Nft(str(tmp_path / "nft")).look()


def test_a_program_that_hangs_is_not_waited_for(tmp_path: Path) -> None:
    with pytest.raises(NftError, match=r"not finished within 0\.05 s"):
        script(tmp_path, "exec sleep 60", timeout_s=0.05).look()
