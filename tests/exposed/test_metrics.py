# SPDX-License-Identifier: GPL-2.0-or-later
import dataclasses

from test_report import FORWARD

from qubes_fwd_qrexec.common.report import ListenerReport, Problem, Way
from qubes_fwd_qrexec.common.values import Proto
from qubes_fwd_qrexec.exposed import metrics

REPORT = ListenerReport(since=1000, forwards=(FORWARD,), problems=(Problem("fwd.a.b", "x"),), bugs=3)


def test_every_figure_has_its_sample() -> None:
    lines = metrics.text(REPORT).splitlines()
    of = '{target="work",name="web",proto="tcp"'
    assert [line for line in lines if not line.startswith("#") and "_way{" not in line] == [
        "qubes_forward_start_time_seconds 1000",
        f"qubes_forward_connections{of}}} 2",
        f"qubes_forward_connections_total{of}}} 3",
        f'qubes_forward_refused_total{of},reason="source"}} 4',
        f'qubes_forward_bytes_total{of},direction="from_client"}} 5',
        f'qubes_forward_bytes_total{of},direction="to_client"}} 6',
        f"qubes_forward_mux_calls{of}}} 1",
        "qubes_forward_problems 1",
        "qubes_forward_bugs_total 3",
    ]
    ways = {line.split('state="')[1].split('"')[0]: line[-1] for line in lines if "_way{" in line}
    assert ways == {way: str(int(way is Way.OPEN)) for way in Way}


def test_a_forward_of_udp_has_its_datagrams_too() -> None:
    udp = dataclasses.replace(
        FORWARD, proto=Proto.UDP, datagrams_sent=7, datagrams_received=8, dropped={"full": 9, "old": 10}
    )
    lines = metrics.text(dataclasses.replace(REPORT, forwards=(FORWARD, udp))).splitlines()
    of = '{target="work",name="web",proto="udp"'
    assert [line for line in lines if "datagrams_total{" in line or "dropped_total{" in line] == [
        f'qubes_forward_datagrams_total{of},direction="from_client"}} 7',
        f'qubes_forward_datagrams_total{of},direction="to_client"}} 8',
        f'qubes_forward_dropped_total{of},reason="full"}} 9',
        f'qubes_forward_dropped_total{of},reason="old"}} 10',
    ]
    assert f"qubes_forward_connections{of}}} 2" in lines


def test_each_family_is_introduced_once_before_its_samples() -> None:
    seen = []
    for line in metrics.text(REPORT).splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name not in seen
            assert (kind == "counter") == name.endswith("_total")
            seen.append(name)
        elif not line.startswith("#"):
            assert line.split("{")[0].split(" ")[0] == seen[-1]


def test_a_get_is_answered_and_nothing_else() -> None:
    head, _, body = metrics.answer(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", REPORT).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 200 OK\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    assert body.decode() == metrics.text(REPORT)
    assert metrics.answer(b"POST / HTTP/1.1\r\n\r\n", REPORT).startswith(b"HTTP/1.0 405 ")
