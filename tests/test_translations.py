# SPDX-License-Identifier: GPL-2.0-or-later
"""Every text of the window is one that gettext finds, and each catalogue of po/ has all of them."""

import ast
import gettext
import re
import shutil
import string
import subprocess
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
WINDOW = ROOT / "qubes_fwd_qrexec" / "window"
CATALOGUES = sorted((ROOT / "po").glob("*.po"))
ARGUMENTS = {"_": 1, "ngettext": 2}
"""How many texts a call begins with."""
_WINDOW = {"alerts", "bars", "filters", "mainwindow"}
_QUESTION = {"question"}
WINDOWS = {
    "the window with a rule": _WINDOW | {"buttons", "clientlist", "detail"},
    "the window with a group": _WINDOW | {"grouppane"},
    "the window with nothing": _WINDOW | {"placeholder"},
    "Add and Edit": {"editor", "fields", "form", "judgement", "calendar", "sections"},
    "Close everything": {"closing"},
    "Confirm": {"confirmation"} | _QUESTION,
    "Cut": {"cutting"} | _QUESTION,
    "Remove": {"removal"} | _QUESTION,
    "Open to anybody": {"opening"} | _QUESTION,
    "Resume": {"resuming"} | _QUESTION,
    "Diagnose": {"diagnosis"},
    "the menu of a row": {"rowmenu"},
    "the menu of the indicator": {"indicator"},
}
"""Whose controls show together."""
IN_TURN = (
    {"_Cancel", "_Close"},
    {"_Open", "_Open to anybody", "_Save", "_Save: open to anybody"},
    {"_Remove…", "_Remove all…"},
    {"Ena_ble", "Ena_ble…"},
    {"C_onfirm", "_Open to anybody"},
    {"_Resume", "_Resume: open to anybody"},
)
"""What takes the place of each other, so that it may have the same key."""
_MNEMONIC = re.compile(r"(?<!_)_(\w)")


class Text(NamedTuple):
    """What is to be translated: one form or, by a number, two; and the module that says it."""

    forms: tuple[str, ...]
    module: str


def calls(tree: ast.AST, is_found: bool = False) -> Iterator[tuple[ast.Call, bool]]:
    """Each call for a translation, and whether xgettext finds it, and a run says it late enough: in a
    function's body, and not within another text.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ARGUMENTS:
            yield node, is_found
        is_body = is_found or isinstance(node, ast.FunctionDef | ast.Lambda)
        yield from calls(node, is_body and not isinstance(node, ast.JoinedStr))


def texts_in(source: str, module: str) -> tuple[list[Text], list[str]]:
    """The texts of a module, and where it asks for a translation in vain: of what xgettext does not find in
    the source, or while it is imported, before the language is known.
    """
    found, wrong = [], []
    for call, is_found in calls(ast.parse(source)):
        assert isinstance(call.func, ast.Name)
        forms = call.args[: ARGUMENTS[call.func.id]]
        values = [form.value for form in forms if isinstance(form, ast.Constant)]
        if is_found and len(values) == len(forms) and all(isinstance(value, str) for value in values):
            found.append(Text(tuple(map(str, values)), module))
        else:
            wrong.append(ast.unparse(call))
    return found, wrong


MODULES = {path.stem: texts_in(path.read_text(), path.stem) for path in sorted(WINDOW.rglob("*.py"))}
# words.py has the functions themselves.
TEXTS = [text for name, (found, _) in MODULES.items() if name != "words" for text in found]


class Missing(gettext.NullTranslations):
    """What a catalogue asks when it does not know a text."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def gettext(self, message: str) -> str:
        self.texts.append(message)
        return message

    def ngettext(self, msgid1: str, msgid2: str, n: int) -> str:
        self.texts.append(msgid1)
        return msgid1


def opened(catalogue: Path) -> gettext.GNUTranslations:
    if not shutil.which("msgfmt"):
        pytest.skip("gettext is not installed")
    words = ["msgfmt", "--check", "--output-file=-", str(catalogue)]
    done = subprocess.run(words, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return gettext.GNUTranslations(BytesIO(done.stdout))


def translated(catalogue: gettext.NullTranslations, text: Text) -> list[str]:
    """All forms of a text in a language; 1 and 5 stand for any singular and plural."""
    if len(text.forms) == 1:
        return [catalogue.gettext(text.forms[0])]
    one, many = text.forms
    return [catalogue.ngettext(one, many, count) for count in (1, 5)]


def facts(text: str) -> set[str]:
    """The names of the facts that go into a text."""
    return {str(name) for _, name, _, _ in string.Formatter().parse(text) if name is not None}


def mnemonics(text: str) -> list[str]:
    return [letter.lower() for letter in _MNEMONIC.findall(text)]


@pytest.mark.parametrize("name", [name for name in MODULES if name != "words"])
def test_a_module_asks_for_translations_of_plain_texts_and_when_they_are_shown(name: str) -> None:
    assert MODULES[name][1] == []


@pytest.mark.parametrize("path", CATALOGUES, ids=lambda path: path.stem)
def test_a_catalogue_has_every_text(path: Path) -> None:
    catalogue, missing = opened(path), Missing()
    catalogue.add_fallback(missing)
    for text in TEXTS:
        translated(catalogue, text)
    assert sorted(set(missing.texts)) == [], "make translations, and translate what is new"


@pytest.mark.parametrize("path", CATALOGUES, ids=lambda path: path.stem)
def test_a_translation_has_the_facts_of_its_text(path: Path) -> None:
    catalogue = opened(path)
    wrong = []
    for text in TEXTS:
        for form, given in zip(text.forms, translated(catalogue, text), strict=True):
            # The form for one may go without the number.
            if not facts(text.forms[0]) <= facts(given) <= facts(text.forms[-1]):
                wrong.append((form, given))
    assert wrong == []


@pytest.mark.parametrize("path", CATALOGUES, ids=lambda path: path.stem)
def test_a_translation_can_be_reached_by_a_key_where_its_text_can(path: Path) -> None:
    catalogue = opened(path)
    wrong = [
        (form, given)
        for text in TEXTS
        for form, given in zip(text.forms, translated(catalogue, text), strict=True)
        if len(mnemonics(form)) != len(mnemonics(given)) or len(mnemonics(form)) > 1
    ]
    assert wrong == []


LANGUAGES = pytest.mark.parametrize("path", [None, *CATALOGUES], ids=lambda path: path.stem if path else "en")


@LANGUAGES
@pytest.mark.parametrize("window", WINDOWS)
def test_no_two_controls_that_show_together_have_the_same_key(window: str, path: Path | None) -> None:
    catalogue = opened(path) if path else gettext.NullTranslations()
    users: dict[str, set[str]] = {}
    for text in TEXTS:
        if text.module in WINDOWS[window]:
            for form, given in zip(text.forms, translated(catalogue, text), strict=True):
                for letter in mnemonics(given):
                    users.setdefault(letter, set()).add(form)
    assert {
        letter: forms
        for letter, forms in users.items()
        if len(forms) > 1 and not any(forms <= turn for turn in IN_TURN)
    } == {}


def test_of_each_key_it_is_known_with_which_others_it_shows() -> None:
    with_keys = {text.module for text in TEXTS if any(map(mnemonics, text.forms))}
    assert with_keys <= set().union(*WINDOWS.values())


def test_what_gettext_cannot_read_in_the_source_is_found() -> None:
    source = (
        "def f(what):\n    return _(f'{what}'), _('a'), ngettext('b', many, 2)\n"
        "def g():\n    return f'{_(\"d\")}'\nX = _('c')\n"
    )
    found, wrong = texts_in(source, "m")
    assert found == [Text(("a",), "m")]
    assert wrong == ["_(f'{what}')", "ngettext('b', many, 2)", "_('d')", "_('c')"]
