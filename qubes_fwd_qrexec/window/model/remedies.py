# SPDX-License-Identifier: GPL-2.0-or-later
"""Remedies: where the command line prints commands as ways out, the window has buttons."""

from enum import Enum, auto
from typing import NamedTuple

from qubes_fwd_qrexec.admin.states import Key
from qubes_fwd_qrexec.admin.views.reasons import Command
from qubes_fwd_qrexec.common.options import Option
from qubes_fwd_qrexec.common.values import QubeName

from .mends import filling_label, is_blank, setting_label
from .words import _


class Act(Enum):
    """What a button does. SET opens the dialog for changes, with options filled in or one to be filled in;
    COPY gives a command that the window does not run to the clipboard.
    """

    CONFIRM = auto()
    ENABLE = auto()
    DISABLE = auto()
    SET = auto()
    REMOVE = auto()
    APPLY = auto()
    RESUME = auto()
    MARK = auto()
    COPY = auto()


class Remedy(NamedTuple):
    """A way out: the words for its button, and what that does, with the rule ``key``, ``options`` to SET, or
    the ``qube`` to MARK. ``command`` is the way out as it was given.
    """

    label: str
    act: Act
    key: Key | None
    options: tuple[Option, ...]
    command: str
    qube: str = ""


def remedy(command: Command) -> Remedy:
    """What the window does about a way out. What it does not do itself can be copied."""
    text = " ".join(command)
    program, verb, *rest = (*command, "")
    words = rest[:-1]
    if program == "qvm-forward":
        if (verb, words) in (("apply", []), ("resume", [])):
            is_apply = verb == "apply"
            label = _("Apply") if is_apply else _("Resume…")
            return Remedy(label, Act.APPLY if is_apply else Act.RESUME, None, (), text)
        if verb == "tunnel" and len(words) == 2 and words[0] == "mark":
            label = _("Mark {qube} as a tunnel").format(qube=words[1])
            return Remedy(label, Act.MARK, None, (), text, words[1])
        if len(words) == 2 and verb in _ACTS:
            return Remedy(_label(verb, words), _ACTS[verb], (QubeName(words[0]), words[1]), (), text)
        if len(words) == 3 and verb == "set":
            return _setting((QubeName(words[0]), words[1]), words[2], text)
    return Remedy(_("Copy “{command}”").format(command=text), Act.COPY, None, (), text)


_ACTS = {"confirm": Act.CONFIRM, "enable": Act.ENABLE, "disable": Act.DISABLE, "remove": Act.REMOVE}


def _label(verb: str, rule: list[str]) -> str:
    if verb == "disable":
        # It is another rule that is in the way.
        return _("Disable {rule}").format(rule=" ".join(rule))
    return {"confirm": _("Confirm…"), "enable": _("Enable"), "remove": _("Remove…")}[verb]


def _setting(key: Key, option: str, text: str) -> Remedy:
    name, _equals, value = option.partition("=")
    if is_blank(value):
        return Remedy(filling_label(name), Act.SET, key, (), text)
    return Remedy(f"{setting_label(name, value)}…", Act.SET, key, (Option(name, value, name),), text)
