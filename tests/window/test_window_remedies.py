# SPDX-License-Identifier: GPL-2.0-or-later
"""Each way out that dom0's side names becomes a button that does it, or a command to copy."""

from collections import defaultdict
from collections.abc import Iterator

import pytest
from worlds import NOW, rule

from qubes_fwd_qrexec.admin.editing import edited
from qubes_fwd_qrexec.admin.states import Key
from qubes_fwd_qrexec.admin.views import diagnose, nftwalk, reasons, served
from qubes_fwd_qrexec.admin.views.reasons import Command
from qubes_fwd_qrexec.common.options import Option
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.window.model.draft import Draft
from qubes_fwd_qrexec.window.model.remedies import Act, remedy

KEY: Key = (QubeName("work"), "web")
FACTS = defaultdict(
    lambda: "sys-vpn",
    target="work",
    name="web",
    rival="personal other",
    rival_autostart="yes",
    version="v2",
)
TABLES: tuple[dict[str, tuple[str, ...]], ...] = (
    {str(cause): row for cause, row in reasons.ROWS.items()},
    diagnose.REMEDIES,
    nftwalk.REMEDIES,
    nftwalk.SERVER,
    {"": served.SEND_HEADER},
)
OTHERS = {"qvm-start", "qvm-prefs", "qvm-service", "qubes-policy-lint"}
"""What is not ours to do."""


def ways_out() -> Iterator[str]:
    """All of them, with the facts of some rule."""
    for table in TABLES:
        for _, *templates in table.values():
            yield from (template.format_map(FACTS) for template in templates)


ALL = sorted(set(ways_out()))


def test_all_of_them_are_here() -> None:
    assert len(ALL) >= 35
    assert {text.split()[0] for text in ALL} == {"qvm-forward", *OTHERS}
    # Each subcommand that is named anywhere, and what `findings` and a rule that cannot be read add.
    verbs = {text.split()[1] for text in ALL if text.startswith("qvm-forward ")}
    assert verbs == {"apply", "confirm", "disable", "enable", "remove", "resume", "set", "tunnel"}


@pytest.mark.parametrize("text", ALL)
def test_what_is_ours_is_done_and_what_is_not_can_be_copied(text: str) -> None:
    command: Command = tuple(text.split())
    found = remedy(command)
    assert (found.act is Act.COPY) == (command[0] in OTHERS)
    assert found.command == text
    assert found.label
    assert "=" not in found.label
    if found.act in (Act.APPLY, Act.RESUME, Act.MARK, Act.COPY):
        assert found.key is None
    elif found.act is Act.DISABLE:
        assert found.key == ("personal", "other")
    else:
        assert found.key == KEY
    assert not found.options or found.act is Act.SET
    assert (found.act, found.qube) in ((Act.MARK, command[-1]), (found.act, ""))


@pytest.mark.parametrize("text", [text for text in ALL if text.startswith("qvm-forward set ")])
def test_options_of_a_way_out_are_those_that_the_command_would_set(text: str) -> None:
    found, (name, _, value) = remedy(tuple(text.split())), text.split()[-1].partition("=")
    if value.isupper():
        assert found.options == ()  # the user fills it in
        return
    assert found.options == (Option(name, value, name),)
    changed = Draft.of(rule("srchosts=10.0.0.0/8")).with_options(found.options).options(NOW)
    edited(rule("srchosts=10.0.0.0/8").rule, changed, NOW)


@pytest.mark.parametrize(
    ("text", "label", "act"),
    [
        ("qvm-forward confirm work web", "Confirm…", Act.CONFIRM),
        ("qvm-forward enable work web", "Enable", Act.ENABLE),
        ("qvm-forward disable work web", "Disable work web", Act.DISABLE),
        ("qvm-forward remove work web", "Remove…", Act.REMOVE),
        ("qvm-forward remove work Odd.name", "Remove…", Act.REMOVE),
        ("qvm-forward apply", "Apply", Act.APPLY),
        ("qvm-forward resume", "Resume…", Act.RESUME),
        ("qvm-forward tunnel mark sys-vpn", "Mark sys-vpn as a tunnel", Act.MARK),
        ("qvm-forward set work web via=sys-vpn", "Expose it at sys-vpn…", Act.SET),
        ("qvm-forward set work web via=QUBE", "Expose it at another qube…", Act.SET),
        ("qvm-forward set work web mode=qrexec", "Send it over qrexec…", Act.SET),
        ("qvm-start work", "Copy “qvm-start work”", Act.COPY),
        ("qvm-forward diagnose work web", "Copy “qvm-forward diagnose work web”", Act.COPY),
        ("qvm-forward set work web a=1 b=2", "Copy “qvm-forward set work web a=1 b=2”", Act.COPY),
        ("qvm-forward tunnel unmark x", "Copy “qvm-forward tunnel unmark x”", Act.COPY),
        ("qvm-forward apply --dry-run", "Copy “qvm-forward apply --dry-run”", Act.COPY),
        ("qvm-forward", "Copy “qvm-forward”", Act.COPY),
    ],
)
def test_a_button_says_what_it_does_and_an_ellipsis_that_it_asks_first(
    text: str, label: str, act: Act
) -> None:
    found = remedy(tuple(text.split()))
    assert (found.label, found.act) == (label, act)
