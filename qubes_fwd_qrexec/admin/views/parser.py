# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line of qvm-forward: one table of its commands, their arguments and their help.

Values stay text here. Whoever uses them parses them, so that --help needs to import none of it.
"""

import argparse
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

from qubes_fwd_qrexec import __version__
from qubes_fwd_qrexec.common.nearest import did_you_mean

from .locate import LAB_VARIABLE

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


_FORMATS = ("line", "xml", "json", "yaml")


Argument = tuple[tuple[str, ...], dict[str, Any]]
"""What `argparse.ArgumentParser.add_argument` is given: names and settings."""


class Command(NamedTuple):
    """``runs`` is the module in this folder and the function there that runs it."""

    runs: str
    help: str
    arguments: tuple[Argument, ...] = ()


def _argument(*names: str, **settings: Any) -> Argument:
    return names, settings


def _flag(name: str, text: str) -> Argument:
    return _argument(name, action="store_true", help=text)


def _option(name: str, metavar: str, text: str, **settings: Any) -> Argument:
    """An option of a rule. What is typed again is kept, so that it can be refused."""
    return _argument(name, action="append", metavar=metavar, help=text, **settings)


def _says(name: str, option: str, value: str, text: str) -> Argument:
    """A flag that gives an option of a rule a value."""
    return _argument(name, action="append_const", dest=option, const=value, help=text)


_GENERAL = (
    _argument("--lab", metavar="DIR", help=f"work on the lab in this directory (default: ${LAB_VARIABLE})"),
    _flag("--json", "print JSON, for programs"),
    _argument("-q", "--quiet", action="store_true", help="of a change, print only warnings"),
    _argument("-v", "--verbose", action="store_true", help="print what is asked of qubes and of dom0"),
)
_QUBE = _argument("qube", metavar="QUBE")
_QUBES = _argument("qube", nargs="*", metavar="QUBE")
_NO_APPLY = _flag("--no-apply", "store it, and change nothing else until 'apply'")
_DRY_RUN = _flag("--dry-run", "show what would change, and change nothing")
_NAMES = _argument("names", nargs="*", default=(), metavar="NAME", help="or a pattern such as 'web-*'")
_ALL = _flag("--all", "all forwards of the qube")
_RULE = (
    _QUBE,
    _argument("name", nargs="?", metavar="NAME", help="not needed if the qube has only one forward"),
)
_RULES = (_QUBE, _NAMES, _ALL, _NO_APPLY)
_ALL_RULES = (
    _argument("qube", nargs="?", metavar="QUBE", help="not needed with --all"),
    _NAMES,
    _flag("--all", "all forwards of the qube, or of all qubes"),
    _NO_APPLY,
)

# What becomes an option of the rule has that option's name, or its ``dest``.
_OPTIONS = (
    _option(
        "--from",
        "NET[,NET]",
        "the networks that may connect, with --internal also qubes; or any. Required by add",
        dest="srchosts",
    ),
    _says("--internal", "forwardtype", "internal", "let in other qubes, at the target's netvm"),
    _option("--via", "QUBE", "expose it at this qube"),
    _option("--listen", "ADDR", "listen at this address only"),
    _option("--mode", "auto|nft|qrexec", "packets along the netvms (faster), or bytes over qrexec"),
    _option("--proto", "tcp|udp|both", "what to forward (default: tcp)"),
    _option("--transport", "auto|mux|call", "many connections in one qrexec call, or one call each"),
    _option("--proxy", "off|v1|v2", "tell the server the client's address; it must expect this header"),
    _says("--autostart", "autostart", "yes", "let connections start a halted target"),
    _option("--expire", "TIME", "8h, 1h30m, 18:00, tomorrow 8:00, a date and time, or never"),
    _option("--on-expire", "cut|drain", "what happens to open connections at the end"),
    _option("--limits", "LIMITS", "such as connections:1000,per-source:100,rate:50, any of them"),
    _says("--follow-netvm", "follow_netvm", "yes", "stay open when the netvm changes"),
    _says("--bypass-tunnel", "bypass_tunnel", "yes", "accept that the target's tunnel is bypassed"),
    _option("--comment", "TEXT", "a remark for yourself"),
    _says("--disabled", "enabled", "no", "store the rule and leave it closed"),
)
_ADD = (
    _argument("qube", metavar="QUBE", help="the qube that runs the server"),
    _argument("ports", metavar="PORT[:PORT]", help="the exposed port or range, then the server's"),
    _argument("--name", metavar="NAME", help="the rule's name (default: such as tcp-80)"),
    *_OPTIONS,
    _NO_APPLY,
)
_SET = (
    *_RULE,
    _argument(
        "options",
        nargs="*",
        default=(),
        metavar="OPTION=VALUE",
        help="an empty value restores the default; srchosts+=NET and srchosts-=NET change the list",
    ),
    *_OPTIONS,
    _option("--extend", "TIME", "extend it by this much, such as 1h30m", dest="expire+"),
    _argument("--was", metavar="LINE", help="refuse if the stored rule is no longer this line"),
    _NO_APPLY,
)
_TUNNEL = (
    _argument("action", choices=("mark", "unmark", "list"), metavar="mark|unmark|list"),
    _argument("qube", nargs="?", metavar="QUBE", help="not with list"),
)
_EXPORT = (_QUBES, _argument("--format", choices=_FORMATS, help="line is the default, json with --json"))
_IMPORT = (
    _argument("file", nargs="?", default="-", metavar="FILE", help="standard input if - or missing"),
    _argument("--format", choices=_FORMATS, help="detected by default, yaml by a name such as x.yaml"),
    _argument("--qube", metavar="QUBE", help="the target, if the file names none"),
    _flag("--replace", "replace rules of the same name"),
    _flag("--prune", "remove rules that the file does not have, of the qubes that it names"),
    _flag("--prune-all", "remove rules that the file does not have, of all qubes"),
    _DRY_RUN,
    _NO_APPLY,
)
_STATUS = (
    _QUBES,
    _flag("--clients", "also show who is connected"),
    _flag("--watch", "show it again every 2 s, until Ctrl-C"),
)
_CUT = (
    _QUBE,
    _argument("name", nargs="?", metavar="NAME", help="not needed if only one forward is open"),
    _argument("--client", metavar="ADDR[:PORT]", help="only those of this address, or this one"),
)

COMMANDS = {
    "add": Command("changes.add", "Make a forward: check it, store it, and open it.", _ADD),
    "set": Command("changes.set_options", "Change options of a forward.", _SET),
    "remove": Command("changes.remove", "Close forwards and delete their rules.", _RULES),
    "enable": Command("changes.switch", "Open forwards that were disabled.", _ALL_RULES),
    "disable": Command("changes.switch", "Close forwards and keep their rules.", _ALL_RULES),
    "confirm": Command("changes.switch", "Approve forwards that are suspended.", _RULES),
    "list": Command("showing.list_rules", "Show all forwards, or those that involve a qube.", (_QUBES,)),
    "show": Command("showing.show", "Show everything about one forward, and why.", _RULE),
    "status": Command("status.status", "Show what is open now, with figures from the qubes.", _STATUS),
    "cut": Command("cut.cut", "End connections to a forward, of all clients or of one.", _CUT),
    "diagnose": Command("diagnose.diagnose", "Find out why a forward does not work, and what helps.", _RULE),
    "plan": Command("showing.explain", "Explain what becomes of each forward, and why.", (_QUBES,)),
    "apply": Command("applying.apply", "Bring policy and qubes in line with the rules.", (_DRY_RUN,)),
    "watch": Command(
        "applying.watch", "Keep policy and qubes in line: apply after each change and when a rule ends."
    ),
    "policy": Command("showing.print_policy", "Print the qrexec policy that the rules ask for."),
    "tunnel": Command(
        "tunnels.tunnel", "Say which qubes are tunnels, such as VPNs, that no forward may bypass.", _TUNNEL
    ),
    "panic": Command("panic.panic", "Close everything at once, and hold it closed until resume."),
    "resume": Command("panic.resume", "Open again what panic closed.", (_DRY_RUN,)),
    "export": Command("exchange.export_rules", "Print rules for import elsewhere.", _EXPORT),
    "import": Command(
        "exchange.import_rules", "Store the rules of an export, or of a firewall.xml.", _IMPORT
    ),
}


def build(words: Collection[str] | None = None) -> Parser:
    """The parser of the whole command line, or quicker of one with these words: others get no arguments."""
    parser = Parser(
        prog="qvm-forward",
        description="Make a server in one qube reachable from the LAN or from other qubes.",
        epilog="qvm-forward COMMAND --help has examples; qvm-forward(1) explains each command.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    _add(parser, _GENERAL)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, text, arguments) in COMMANDS.items():
        aliases = [ALIASES[name]] if name in ALIASES else []
        command = commands.add_parser(name, aliases=aliases, help=text, description=text, epilog=epilog(name))
        # What stood before the command is not forgotten, and of two names the full one is known.
        command.set_defaults(command=name)
        if words is not None and {name, *aliases}.isdisjoint(words):
            continue
        _add(command, _GENERAL, default=argparse.SUPPRESS)
        _add(command, arguments)
    return parser


def _add(parser: argparse.ArgumentParser, arguments: Iterable[Argument], **more: Any) -> None:
    for names, settings in arguments:
        parser.add_argument(*names, **settings, **more)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """What a command line asks for. Raises `SystemExit`; a word too many has the usage of its command."""
    parser = build(argv)
    args, rest = parser.parse_known_args(argv)
    if rest:
        command = subcommands(parser)[args.command]
        # argparse takes the words of a list up to the first option, and leaves those behind it.
        last = [action for action in command._actions if not action.option_strings][-1:]
        if any(word.startswith("-") for word in rest) or not last or last[0].nargs != "*":
            command.unknown(rest)
        setattr(args, last[0].dest, [*getattr(args, last[0].dest), *rest])
    return args
