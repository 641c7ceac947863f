# SPDX-License-Identifier: GPL-2.0-or-later
"""What the program says of how it is used: examples and pages in --help, and short errors."""

import argparse
from collections.abc import Mapping
from functools import partial
from typing import Any, NoReturn

from qubes_fwd_qrexec.common.nearest import did_you_mean

# argparse makes one for each option that is added, and would look for the terminal's size each time.
FORMATTER = partial(argparse.RawDescriptionHelpFormatter, width=78)

ALIASES = {"list": "ls", "remove": "rm"}
# The manual page of a command, and examples for its --help.
_PAGES = {
    "qvm-forward-add": ("add",),
    "qvm-forward-set": ("set", "remove", "enable", "disable", "confirm"),
    "qvm-forward-list": ("list", "show", "status", "cut", "diagnose", "plan", "policy"),
    "qvm-forward-apply": ("apply", "watch"),
    "qvm-forward-tunnel": ("tunnel",),
    "qvm-forward-panic": ("panic", "resume"),
    "qvm-forward-export": ("export", "import"),
}
_EXAMPLES = {
    "add": (
        "qvm-forward add work 80:8080 --from 192.168.0.0/16 --expire 8h",
        "qvm-forward add vault 53 --proto both --via sys-net --from 10.0.0.0/8",
        "qvm-forward add work 5432 --internal --from personal",
    ),
    "set": ("qvm-forward set work web --extend 1h", "qvm-forward set work web srchosts+=10.0.0.0/8 comment="),
    "remove": ("qvm-forward remove work web", "qvm-forward remove work --all"),
    "enable": ("qvm-forward enable work web",),
    "disable": ("qvm-forward disable work 'web-*'", "qvm-forward disable --all"),
    "confirm": ("qvm-forward confirm work web",),
    "list": ("qvm-forward list", "qvm-forward list sys-net"),
    "show": ("qvm-forward show work web",),
    "status": ("qvm-forward status --watch", "qvm-forward status work --clients"),
    "cut": ("qvm-forward cut work web", "qvm-forward cut work web --client 192.168.0.5"),
    "diagnose": ("qvm-forward diagnose work web",),
    "plan": ("qvm-forward plan work",),
    "apply": ("qvm-forward apply --dry-run",),
    "tunnel": ("qvm-forward tunnel mark sys-vpn", "qvm-forward tunnel list"),
    "resume": ("qvm-forward resume --dry-run",),
    "export": ("qvm-forward export >forwards", "qvm-forward export work --json"),
    "import": (
        "qvm-forward import forwards",
        "qvm-forward import forwards.yaml --replace --prune-all --dry-run",
        "qvm-forward import --qube work firewall.xml",
    ),
}


def subcommands(parser: argparse.ArgumentParser) -> Mapping[str, Any]:
    """The parsers of its commands, each of its own class, by all of their names; empty if it has none."""
    actions = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return next((action.choices for action in actions), {})


def epilog(command: str) -> str:
    """What stands below the options of a command in its --help."""
    examples = "".join(f"  {line}\n" for line in _EXAMPLES.get(command, ()))
    page = next(page for page, commands in _PAGES.items() if command in commands)
    return f"examples:\n{examples}\n{page}(1) says more." if examples else f"{page}(1) says more."


class Parser(argparse.ArgumentParser):
    """A parser whose errors are short: what is to be given, what is wrong, and where to read on."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=FORMATTER, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        given = [action for action in self._actions if not action.option_strings]
        usage = self._get_formatter()
        usage.add_usage(None, given, [])
        self.exit(2, f"{usage.format_help()}{self.prog}: error: {message}\nsee {self.prog} --help\n")

    def unknown(self, words: list[str]) -> NoReturn:
        """End with an error about words that nothing takes."""
        named = [name for name in self._option_string_actions if name.startswith("--")]
        near = did_you_mean(words[0].partition("=")[0], named) if words[0].startswith("-") else ""
        self.error(f"unrecognized arguments: {' '.join(words)}{near}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [*action.choices]
            if isinstance(action, argparse._SubParsersAction):
                known = [name for name in known if name not in ALIASES.values()]
            text = f"{value!a} is none of {', '.join(known)}{did_you_mean(value, known)}"
            raise argparse.ArgumentError(action, text)
