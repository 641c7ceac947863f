# SPDX-License-Identifier: GPL-2.0-or-later
"""Hypothesis strategies for whole rules: every option, and only what is consistent."""

from operator import add
from string import ascii_letters, ascii_lowercase, digits
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from qubes_fwd_qrexec.common.clients import Clients
from qubes_fwd_qrexec.common.errors import RuleError
from qubes_fwd_qrexec.common.rules import (
    ForwardRule,
    ForwardType,
    Limits,
    Mode,
    NamedRule,
    OnExpire,
    Proxy,
    Transport,
)
from qubes_fwd_qrexec.common.values import (
    ListenPorts,
    Proto,
    QubeName,
    RuleName,
    Sources,
    TargetPorts,
    parse_address,
)


def words(first: str, others: str, max_size: int) -> st.SearchStrategy[str]:
    """One character of ``first``, then some of ``others``: `st.from_regex` takes four times as long."""
    return st.builds(add, st.sampled_from(first), st.text(others, max_size=max_size - 1))


qube_names = words(ascii_letters, f"{ascii_letters}{digits}_.-", 31).map(QubeName)
rule_names = words(ascii_lowercase, f"{ascii_lowercase}{digits}-", 16).map(RuleName)
comments = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=40)
_NETWORKS = ["10.0.0.0/8", "192.0.2.1", "fd00::/8", "10.0.0.0/8,fd00::/8,0.0.0.0/1", "2000::/4"]
_tags = st.text(f"{ascii_letters}{digits}_-", min_size=1, max_size=12).map("@tag:{}".format)
_names = qube_names.filter(lambda name: name != "any") | _tags
sources = st.sampled_from(["any", *_NETWORKS]).map(Sources.parse)
clients = (
    st.just("any")
    | st.lists(st.sampled_from(_NETWORKS) | _names, min_size=1, max_size=5, unique=True).map(",".join)
    | st.sampled_from(_NETWORKS)
).map(Clients.parse)
addresses = st.sampled_from(["10.0.0.1", "0.0.0.0", "::", "fd00::1"]).map(parse_address)
counts = st.none() | st.integers(1, 10**6)


@st.composite
def rules(draw: st.DrawFn) -> ForwardRule:
    first, other, length = (
        draw(st.integers(1, 60000)),
        draw(st.integers(1, 60000)),
        draw(st.integers(0, 5000)),
    )
    given: dict[str, Any] = draw(
        st.fixed_dictionaries(
            {"sources": clients},
            optional={
                "mode": st.sampled_from(Mode),
                "forward_type": st.sampled_from(ForwardType),
                "via": qube_names,
                "proto": st.sampled_from(Proto),
                "listen": addresses,
                "transport": st.sampled_from(Transport),
                "proxy": st.sampled_from(Proxy),
                "autostart": st.booleans(),
                "on_expire": st.sampled_from(OnExpire),
                "enabled": st.booleans(),
                "has_ended": st.booleans(),
                "owner": qube_names,
                "path": st.lists(qube_names, max_size=4).map(tuple),
                "follow_netvm": st.booleans(),
                "bypass_tunnel": st.booleans(),
                "limits": st.builds(Limits, counts, counts, counts),
                "expire": st.integers(0, 10**10),
                "comment": comments,
            },
        )
    )
    if given["sources"].has_names:
        given["forward_type"] = ForwardType.INTERNAL
    ports = ListenPorts(first, first + length), TargetPorts(other, other + length)
    try:
        return ForwardRule(listen_ports=ports[0], target_ports=ports[1], **given)
    except RuleError:
        assume(False)
        raise


named_rules = st.builds(NamedRule, qube_names, rule_names, rules())
