# SPDX-License-Identifier: GPL-2.0-or-later
"""``qvm-forward-lab``: make a lab, bring it up, look at it, turn its knobs, take it down.

Each command calls one other module. Exit status 2 says that the command line is wrong, 1 that something
failed.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from qubes_fwd_qrexec import __version__
from qubes_fwd_qrexec.common.errors import ForwardError, RefusedError, TextError, UsageError, why

from . import directory
from .directory import LabDirectory
from .interrupts import ended_by_signals, ignore_signals
from .knobs import KNOBS

_LAB_VARIABLE = "QVM_FORWARD_LAB"
_EXAMPLES = f"""\
examples:
  qvm-forward-lab demo                                        see it all, in a lab of its own
  qvm-forward-lab init /tmp/lab; export {_LAB_VARIABLE}=/tmp/lab
  qvm-forward-lab up                                          as root: with networks and firewalls
  qvm-forward-lab listen sys-net                              what its units start
  qvm-forward add work 8000:8080 --from any                   in dom0
  qvm-forward-lab run work -- python3 -m http.server 8080     in the qube work
  qvm-forward-lab run lan -- curl http://192.168.77.1:8000/   on the LAN
  qvm-forward-lab prefs work netvm sys-vpn                    qvm-prefs of Qubes; so are service, clone, ...
  qvm-forward-lab shutdown work                               and all that runs in it
  qvm-forward-lab down

The manual page is qvm-forward-lab(1).
"""
_START = "qvm-forward-lab start"
# Subcommands that have a module of their own, with add_arguments(parser) and run(arguments) -> int.
_ELSEWHERE = {
    "demo": ("qubes_fwd_qrexec.lab.demo", "show a forward from end to end in a lab of its own"),
    "window": ("qubes_fwd_qrexec.lab.demo_window", "show the window over a lab of its own"),
    "verdicts": (
        "qubes_fwd_qrexec.lab.verdicts_command",
        "check the policy evaluator against recorded verdicts",
    ),
    "relay": ("qubes_fwd_qrexec.lab.relay_command", "run one forward on loopback until interrupted"),
}
# Those of `qvmtools`.
_TOOLS = {
    "prefs": "show or change a qube's properties",
    "features": "show or change a qube's features",
    "service": "show or switch a qube's services",
    "tags": "show or change a qube's tags",
    "create": "make a qube",
    "clone": "copy a qube",
    "start": "start qubes, and the netvms that they need",
    "shutdown": "halt qubes; all that runs in them ends",
    "remove": "remove halted qubes",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["__complete"]:
        return _complete(words[1:])
    arguments = _parser(_command(words)).parse_args(words)
    try:
        # What `run` becomes has the signals to itself.
        with nullcontext() if arguments.command == "run" else ended_by_signals():
            status: int = arguments.action(arguments)
        sys.stdout.flush()
    except (UsageError, TextError) as error:
        _complain(str(error))
        return 2
    except ForwardError as error:
        _complain(str(error))
        return 1
    except BrokenPipeError:
        _drop_output()
        return 1
    except OSError as error:
        _complain(f"{error.filename or arguments.command}: {why(error)}")
        return 1
    except KeyboardInterrupt:
        _complain(f"{arguments.command}: interrupted")
        _drop_output()
        return 130
    return status


def _drop_output() -> None:
    """Write what can be written. Whoever read the rest is gone, so nothing may be flushed to them at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _complain(text: str) -> None:
    with suppress(OSError):  # the terminal may be closed
        print(f"qvm-forward-lab: {text}", file=sys.stderr, flush=True)


def _complete(words: Sequence[str]) -> int:
    from qubes_fwd_qrexec.admin.views.complete import candidates

    from .fitting import LabFitting

    lab = os.environ.get(_LAB_VARIABLE)
    for word in candidates(_parser(_command(words[:-1])), words, lambda line: LabFitting(line, lab)):
        print(word)
    return 0


def _command(words: Sequence[str]) -> str | None:
    """The subcommand, found before the parser is made, because it decides which modules are imported."""
    rest = iter(words)
    for word in rest:
        if word == "--lab":
            next(rest, None)
        elif not word.startswith("-"):
            return word
    return None


def _parser(command: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qvm-forward-lab",
        description="A stand-in for a Qubes system, in a directory of this machine.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("--lab", metavar="DIR", help=f"the lab's directory (default: ${_LAB_VARIABLE})")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    init = commands.add_parser("init", help="make a lab with a small system of qubes")
    init.add_argument("directory", metavar="DIR", help="a new or an empty directory")
    init.set_defaults(action=_init)

    up = commands.add_parser("up", help="start the broker in the background")
    network = up.add_mutually_exclusive_group()
    network.add_argument("--netns", action="store_true", help="insist on a network namespace for each qube")
    network.add_argument("--no-netns", action="store_true", help="let all qubes share the loopback")
    up.set_defaults(action=_up)

    down = commands.add_parser("down", help="end the broker, its services and namespaces")
    down.set_defaults(action=_down)

    status = commands.add_parser("status", help="say what runs")
    status.add_argument("--json", action="store_true", help="as JSON")
    status.set_defaults(action=_status)

    knob = commands.add_parser(
        "knob",
        help="show or set how calls behave",
        description="Without a value, show all knobs or one. 'drop' is an act and not a knob: it loses that"
        " share of the calls that are open now (1 for all), as if their vchans had died.",
    )
    knob.add_argument("name", nargs="?", help=f"{', '.join(KNOBS)} or drop")
    knob.add_argument("value", nargs="?", help="a number, or a comma-separated list of TARGET[/SERVICE]")
    knob.set_defaults(action=_knob)

    run = commands.add_parser(
        "run", help="run a program in a qube, on the LAN (lan) or behind the VPN (provider)"
    )
    run.add_argument("qube", metavar="QUBE")
    run.add_argument("program", nargs=argparse.REMAINDER, metavar="-- PROGRAM ARGS")
    run.set_defaults(action=_run)

    listen = commands.add_parser(
        "listen", help="start in qubes what their units start, in the background until 'down'"
    )
    listen.add_argument("qubes", metavar="QUBE", nargs="+")
    listen.set_defaults(action=_listen)

    for name, help_text in _TOOLS.items():
        tool = commands.add_parser(name, help=help_text)
        if name == command:
            import_module("qubes_fwd_qrexec.lab.qvmtools").add_arguments(name, tool)
            tool.set_defaults(action=lambda arguments: arguments.tool(_lab(arguments), arguments))

    for name, (module_name, help_text) in _ELSEWHERE.items():
        other = commands.add_parser(name, help=help_text)
        if name == command:
            module = import_module(module_name)
            module.add_arguments(other)
            other.set_defaults(action=module.run)
    return parser


def _lab(arguments: argparse.Namespace) -> LabDirectory:
    if arguments.lab == "":
        raise UsageError("--lab is empty: name the directory of the lab")
    path = arguments.lab or os.environ.get(_LAB_VARIABLE)
    if not path:
        raise UsageError(f"which lab? give --lab DIR or set {_LAB_VARIABLE}; 'init DIR' makes one")
    return LabDirectory.open(path)


def _init(arguments: argparse.Namespace) -> int:
    from .blueprint import create_lab

    if not arguments.directory:
        raise UsageError("init: DIR is empty: name a new or an empty directory")
    lab = create_lab(arguments.directory)
    print(f"{lab.root}: a lab with {', '.join(lab.qube_names())}")
    return 0


def _up(arguments: argparse.Namespace) -> int:
    from . import asking, daemon, units

    lab = _lab(arguments)
    network = daemon.Network.AUTO
    if arguments.netns or arguments.no_netns:
        network = daemon.Network.NAMESPACES if arguments.netns else daemon.Network.LOOPBACK
    pid = daemon.start(lab, network)
    ignore_signals()  # it is up, and says so
    print(f"{lab.root}: up (pid {pid}) until 'qvm-forward-lab down'")
    print(_describe(asking.ask(lab, {"do": "status"})))
    running = [qube for qube in lab.qubes().values() if qube.is_running and not qube.is_admin]
    print(f"running: {', '.join(qube.name for qube in running)}")
    for qube in running:
        for unit in sorted(units.running(lab, qube.name)):
            print(f"{qube.name}: {unit.what} is ready")
    return 0


def _describe(status: dict[str, Any]) -> str:
    why_not = status["why_no_ip"]
    if status["network"] != "namespaces":
        return f"without networks: {why_not}"
    if why_not is None:
        return "each qube has a network of its own, with IP and a firewall as on Qubes"
    return f"each qube has a network of its own, without IP and firewall: {why_not}"


def _down(arguments: argparse.Namespace) -> int:
    from . import daemon

    try:
        lab = _lab(arguments)
    except directory.NoLabError as error:
        # What was left of one whose directory was deleted.
        daemon.stop(error.lab)
        raise
    was_up = daemon.stop(lab)
    print(f"{lab.root}: {'down' if was_up else 'was not up'}")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from . import asking, daemon, units

    lab = _lab(arguments)
    is_up = daemon.broker_pid(lab) is not None
    broker = asking.ask(lab, {"do": "status"}) if is_up else {}
    qubes = {name: str(qube.state) for name, qube in lab.qubes().items()}
    if arguments.json:
        data = {"lab": str(lab.root), "up": is_up, **broker, "qubes": qubes, "knobs": lab.knobs().as_json()}
        print(json.dumps(data, indent=2))
        return 0
    if not is_up:
        print(f"{lab.root}: down; 'qvm-forward-lab up' starts it")
    else:
        print(f"{lab.root}: up (pid {broker['pid']})\n{_describe(broker)}")
        whose = "Qubes' own parser" if broker["judge"] == "qrexec" else "the lab's evaluator"
        print(f"policy judged by {whose}")
        print(f"calls: {', '.join(f'{name} {count}' for name, count in broker['calls'].items()) or 'none'}")
    for name, state in qubes.items():
        runs = ", ".join(sorted(unit.what for unit in units.running(lab, name)))
        print(f"  {name:20} {state}{f': {runs}' if runs else ''}")
    return 0


def _knob(arguments: argparse.Namespace) -> int:
    lab = _lab(arguments)
    if arguments.name is None:
        print(json.dumps(lab.knobs().as_json(), indent=2))
        return 0
    if arguments.name == "drop":
        return _drop(lab, arguments.value)
    if arguments.value is None:
        print(f"{arguments.name} = {json.dumps(lab.knobs().value(arguments.name))}")
        return 0
    with lab.locked():
        knobs = lab.knobs().with_text(arguments.name, arguments.value)
        lab.write_knobs(knobs)
    print(f"{arguments.name} = {json.dumps(knobs.value(arguments.name))}")
    return 0


def _drop(lab: LabDirectory, text: str | None) -> int:
    from . import asking

    if text is None:
        raise UsageError("knob drop: a share of the calls must follow, such as 0.5, or 1 for all")
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise TextError(text, "a share of the calls: a number from 0 to 1")
    print(f"calls dropped: {asking.ask(lab, {'do': 'drop', 'share': share})['dropped']}")
    return 0


def _listen(arguments: argparse.Namespace) -> int:
    from . import asking, units

    lab = _lab(arguments)
    for name in arguments.qubes:
        qube = lab.qube(name)
        if qube.is_admin or not qube.is_running:
            why_not = "has no listener" if qube.is_admin else f"is not running; '{_START} {name}' starts it"
            raise RefusedError(f"{name}: {why_not}")
    why_no_ip = asking.ask(lab, {"do": "status"})["why_no_ip"]
    kinds = [units.Unit.LISTENER, *([units.Unit.FIREWALL] if why_no_ip is None else [])]
    wanted = [(name, unit) for name in arguments.qubes for unit in kinds]
    started = units.start(lab, wanted)
    for name, unit in wanted:
        print(f"{name}: {unit.what} {'is ready' if (name, unit) in started else 'is already running'}")
    if why_no_ip is not None:
        print("no firewall helper, as the qubes of this lab have no firewalls")
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from . import asking, inhabitants, netns

    lab = _lab(arguments)
    program = arguments.program[1:] if arguments.program[:1] == ["--"] else arguments.program
    if not program:
        raise UsageError("run: a program must follow, as in 'run work -- sh'")
    is_outside = arguments.qube in netns.OUTSIDE
    if not is_outside:
        qube = lab.qube(arguments.qube)
        if qube.is_admin:
            raise RefusedError("dom0 is this machine itself: run the program without the lab")
        if not qube.is_running:
            raise RefusedError(f"{qube.name}: is not running; '{_START} {qube.name}' starts it")
    if asking.ask(lab, {"do": "status"})["network"] == "namespaces":
        netns.enter_for_good(lab, arguments.qube)
    os.environ[_LAB_VARIABLE] = str(lab.root)
    os.environ[inhabitants.VARIABLE] = str(lab.root / arguments.qube)
    if not is_outside:
        place = lab.qube_dir(arguments.qube)
        os.environ[inhabitants.VARIABLE] = str(place.root)
        # The client may be a Perl script, and has nothing to say about the locale.
        os.environ["PERL_BADLANG"] = "0"
        os.environ["QUBES_LAB_AGENT_SOCKET"] = str(place.agent_socket)
        # As the service manager would: a listener can be asked how it is.
        place.listener_run.mkdir(parents=True, exist_ok=True)
        os.environ["RUNTIME_DIRECTORY"] = str(place.listener_run)
        search = [
            str(lab.client_program.parent),
            str(Path(sys.executable).parent),
            os.environ.get("PATH", os.defpath),
        ]
        os.environ["PATH"] = os.pathsep.join(search)
    try:
        os.execvp(program[0], program)  # noqa: S606 - the program is the user's own
    except OSError as error:
        raise RefusedError(f"{program[0]}: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main())
