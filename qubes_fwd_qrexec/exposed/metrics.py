# SPDX-License-Identifier: GPL-2.0-or-later
"""A listener's report for Prometheus: the text format 0.0.4, and as much HTTP as it needs."""

from collections.abc import Iterator

from qubes_fwd_qrexec.common.report import ForwardReport, ListenerReport, Way
from qubes_fwd_qrexec.common.values import Proto

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
REQUEST_MAX_BYTES = 8192
_GAUGE, _COUNTER = "gauge", "counter"


def text(report: ListenerReport) -> str:
    """Every figure of every forward. Names of qubes and rules need no escaping within quotes."""
    lines = [*_family("start_time_seconds", _GAUGE, "When the listener began.", [("", report.since)])]
    for name, kind, help_text, of in _FAMILIES:
        samples = [sample for forward in report.forwards for sample in of(forward)]
        lines += _family(name, kind, help_text, samples)
    problems = [("", len(report.problems))]
    lines += _family("problems", _GAUGE, "Entries of the configuration that are not open.", problems)
    bugs = [("", report.bugs)]
    lines += _family("bugs_total", _COUNTER, "Bugs of the listener; its log has them.", bugs)
    return "".join(f"{line}\n" for line in lines)


def answer(untrusted_request: bytes, report: ListenerReport) -> bytes:
    """The response to one HTTP request, for any path."""
    if untrusted_request.split(b" ", 1)[0] != b"GET":
        return b"HTTP/1.0 405 Method Not Allowed\r\nAllow: GET\r\nConnection: close\r\n\r\n"
    body = text(report).encode("ascii")
    head = f"HTTP/1.0 200 OK\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Connection: close\r\n\r\n".encode("ascii") + body


_Samples = list[tuple[str, int]]


def _family(name: str, kind: str, help_text: str, samples: _Samples) -> Iterator[str]:
    name = f"qubes_forward_{name}"
    yield f"# HELP {name} {help_text}"
    yield f"# TYPE {name} {kind}"
    for labels, value in samples:
        yield f"{name}{labels} {value}"


def _labels(forward: ForwardReport, **more: str) -> str:
    named = {"target": forward.target, "name": forward.name, "proto": forward.proto} | more
    return "{" + ",".join(f'{key}="{value}"' for key, value in named.items()) + "}"


def _connections(forward: ForwardReport) -> _Samples:
    return [(_labels(forward), forward.connections)]


def _totals(forward: ForwardReport) -> _Samples:
    return [(_labels(forward), forward.total)]


def _refused(forward: ForwardReport) -> _Samples:
    return [(_labels(forward, reason=reason), count) for reason, count in sorted(forward.refused.items())]


def _bytes(forward: ForwardReport) -> _Samples:
    return [
        (_labels(forward, direction="from_client"), forward.sent),
        (_labels(forward, direction="to_client"), forward.received),
    ]


def _datagrams(forward: ForwardReport) -> _Samples:
    if forward.proto is not Proto.UDP:
        return []
    return [
        (_labels(forward, direction="from_client"), forward.datagrams_sent),
        (_labels(forward, direction="to_client"), forward.datagrams_received),
    ]


def _dropped(forward: ForwardReport) -> _Samples:
    return [(_labels(forward, reason=reason), count) for reason, count in sorted(forward.dropped.items())]


def _ways(forward: ForwardReport) -> _Samples:
    return [(_labels(forward, state=way), int(way is forward.way)) for way in Way]


def _mux_calls(forward: ForwardReport) -> _Samples:
    return [(_labels(forward), forward.mux_calls)]


_FAMILIES = (
    ("connections", _GAUGE, "Connections, or flows of UDP, open now.", _connections),
    ("connections_total", _COUNTER, "Connections, or flows of UDP, let in.", _totals),
    (
        "refused_total",
        _COUNTER,
        "Connections, or datagrams and flows of UDP, not let in, not carried or ended for others, by reason.",
        _refused,
    ),
    ("bytes_total", _COUNTER, "Bytes let in from clients, or sent to them, by direction.", _bytes),
    (
        "datagrams_total",
        _COUNTER,
        "Datagrams let in from clients, or sent to them, by direction.",
        _datagrams,
    ),
    ("dropped_total", _COUNTER, "Datagrams dropped of these or of answers, by reason.", _dropped),
    ("way", _GAUGE, "1 for the state that the way to the target is in.", _ways),
    ("mux_calls", _GAUGE, "Mux calls to the target.", _mux_calls),
)
