# SPDX-License-Identifier: GPL-2.0-or-later
"""The bench starts, measures, says what is missing, and leaves nothing behind."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bench import load, record, road
from bench.lines import Line, p99
from bench.memory import descendants, pss_kib
from bench.peers import PEERS, USUAL
from bench.table import number, ratio, render
from bench.udpways import usable
from bench.ways import WAYS

LIMIT_S = 300


def run_bench(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ({} if path is None else {"PATH": path})
    return subprocess.run(
        [sys.executable, "-m", "bench", *arguments],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env=environment,
        check=False,
    )


def line(*, is_less_better: bool = True, **values: float) -> Line:
    return Line("key", "title", "ms", is_less_better, values=values)


def test_every_peer_echoes_and_nothing_is_left_running(tmp_path: Path) -> None:
    before = set(descendants([os.getpid()]))
    found = run_bench("--quick", "--rows", "round-trip", "--json", str(tmp_path / "numbers.json"))
    assert found.returncode == 0, found.stderr
    row = json.loads((tmp_path / "numbers.json").read_text(encoding="utf-8"))["rows"]["round-trip"]
    expected = {peer.name for peer in PEERS if peer.missing() is None}
    assert row["notes"] == []
    assert all(set(found_line["values"]) == expected for found_line in row["lines"])
    assert set(descendants([os.getpid()])) <= before


def test_without_socat_it_names_the_package_and_measures_the_rest(tmp_path: Path) -> None:
    found = run_bench("--quick", "--rows", "round-trip", "--peers", "direct,socat", path=str(tmp_path))
    assert found.returncode == 0, found.stderr
    assert "apt-get install socat" in found.stderr
    assert "direct TCP" in found.stdout


def test_an_unknown_row_is_refused_with_the_names_there_are() -> None:
    found = run_bench("--rows", "speed")
    assert found.returncode == 2
    assert "round-trip" in found.stderr


def test_a_ratio_above_one_is_better_whatever_the_unit() -> None:
    assert ratio(line(socat=10, call=5), "call") == 2
    assert ratio(line(is_less_better=False, socat=10, call=20), "call") == 2
    assert ratio(line(socat=0, call=0), "call") == 1
    assert ratio(line(socat=0, call=3), "call") == 0
    assert ratio(line(socat=3, call=0), "call") is None
    assert ratio(line(call=3), "call") is None


def test_a_table_has_a_column_for_each_peer_and_a_dash_for_what_was_not_measured() -> None:
    header, rule, row = render([line(socat=10, call=4, mux=1)], USUAL).splitlines()
    assert len(header) == len(rule) == len(row)
    assert row.replace(" ", "") == "|title|-|10ms|4ms|1ms|2.50x|10.00x|4.00x|"


@pytest.mark.parametrize(("value", "text"), [(0.0821, "0.082"), (1.234, "1.23"), (1234.5, "1234"), (0, "0")])
def test_numbers_have_three_digits_that_count(value: float, text: str) -> None:
    assert number(value) == text


def test_p99_is_exceeded_by_one_sample_in_a_hundred() -> None:
    assert p99(range(1, 101)) == 99
    assert p99([7]) == 7


def test_this_process_has_memory_and_one_that_has_ended_has_none() -> None:
    with subprocess.Popen([shutil.which("true") or "/bin/true"]) as ended:
        pass
    assert pss_kib(os.getpid()) > 0
    assert pss_kib(ended.pid) == 0


def test_a_crowd_is_measured_beside_and_compared_with_alone(tmp_path: Path) -> None:
    found = run_bench(
        "--quick", "--rows", "crowd", "--peers", "direct", "--json", str(tmp_path / "numbers.json")
    )
    assert found.returncode == 0, found.stderr
    row = json.loads((tmp_path / "numbers.json").read_text(encoding="utf-8"))["rows"]["crowd"]
    assert row["notes"] == []
    assert [found_line["unit"] for found_line in row["lines"]] == ["MiB/s", "%"] * 2
    assert all(found_line["values"]["direct"] > 0 for found_line in row["lines"])


def test_connections_that_wait_are_held_over_several_calls_and_alive_in_the_end(tmp_path: Path) -> None:
    before = set(descendants([os.getpid()]))
    found = run_bench("held", "--count", "30", "--idle", "0.1", "--json", str(tmp_path / "held.json"))
    assert found.returncode == 0, found.stderr
    document = json.loads((tmp_path / "held.json").read_text(encoding="utf-8"))
    assert document["reason"] is None
    assert [(step["held"], step["alive"], step["calls"]) for step in document["steps"]] == [
        (10, 10, 2),
        (30, 30, 2),
    ]
    assert document["steps"][-1]["listener_kib"] > 0
    assert set(descendants([os.getpid()])) <= before


def test_a_bench_that_may_not_open_so_many_files_says_so_and_holds_what_it_may(tmp_path: Path) -> None:
    few = "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (1000, 1000))"
    script = f"{few}; from bench.held import room; print(*room(1 << 30), sep='|')"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    most, _, reason = found.stdout.strip().partition("|")
    assert (most, reason.split(":")[0]) == ("750", "750 and not 1073741824")
    assert "a process may have 1000 open files" in reason


def test_payloads_streams_and_fairness_are_measured_with_and_without_us(tmp_path: Path) -> None:
    before = set(descendants([os.getpid()]))
    file = tmp_path / "numbers.json"
    found = run_bench(
        "--quick", "--rows", "payload,streams,fair", "--peers", "direct,mux", "--json", str(file)
    )
    assert found.returncode == 0, found.stderr
    for result in record.read(file).results.values():
        assert result.notes == []
        assert all(set(line.values) == {"direct", "mux"} for line in result.lines)
        assert all(line.values["mux"] > 0 for line in result.lines)
    assert set(descendants([os.getpid()])) <= before


@pytest.mark.parametrize("payload", [1, 3_000_000])
def test_the_server_echoes_also_what_its_socket_does_not_take_at_once(payload: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "bench.server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as server:
        assert server.stdout
        address = ("127.0.0.1", int(json.loads(server.stdout.readline())["port"]))
        with load.connect(address) as sock, ThreadPoolExecutor(1) as pool:
            sending = pool.submit(sock.sendall, load.ECHO * payload)
            received = 0
            while received < payload:
                data = sock.recv(1 << 16)
                assert data
                received += len(data)
            sending.result(LIMIT_S)
        server.communicate(timeout=LIMIT_S)


@pytest.mark.skipif(road.why_unavailable() is not None, reason=str(road.why_unavailable()))
def test_forwards_by_nft_are_measured_beside_the_other_ways(tmp_path: Path) -> None:
    before = set(descendants([os.getpid()]))
    found = run_bench(
        "nft", "--quick", "--rows", "round-trip,datagrams", "--json", str(tmp_path / "nft.json")
    )
    assert found.returncode == 0, found.stderr
    lines = json.loads((tmp_path / "nft.json").read_text(encoding="utf-8"))["lines"]
    values = {line["key"]: set(line) - {"key", "title", "unit"} for line in lines}
    every = {way.name for way in WAYS}
    assert values["round-trip-median"] == every
    assert values["datagrams"] == every - {"mux"}
    assert set(descendants([os.getpid()])) <= before


@pytest.mark.skipif(road.why_unavailable() is not None, reason=str(road.why_unavailable()))
def test_udp_over_qrexec_is_measured_beside_the_other_ways(tmp_path: Path) -> None:
    before = set(descendants([os.getpid()]))
    found = run_bench(
        "udp",
        *("--quick", "--rows", "round-trip,small-back,held", "--ways", "socat,udp"),
        *("--json", str(tmp_path / "udp.json")),
    )
    assert found.returncode == 0, found.stderr
    lines = json.loads((tmp_path / "udp.json").read_text(encoding="utf-8"))["lines"]
    values = {line["key"]: line for line in lines}
    for way in {way.name for way in usable()} & {"socat", "udp"}:
        assert values["round-trip"][way] > 0
        assert values["64-1-back-2000-sent"][way] > 0
        assert values["64-1-back-2000-bytes"][way] > 0
        assert values["held"][way] == 20
        assert values["held-memory"][way] >= 0
    assert set(descendants([os.getpid()])) <= before
