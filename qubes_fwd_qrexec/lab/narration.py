# SPDX-License-Identifier: GPL-2.0-or-later
"""How a demonstration tells what it does: sentences, commands, and what they print."""

import shlex
import textwrap

from .session import LabSession, SessionError, output_of


class Narrator:
    """Tells of what is done in one lab. A command that fails raises `SessionError`."""

    def __init__(self, session: LabSession) -> None:
        self._session = session

    def say(self, text: str) -> None:
        print(f"\n{textwrap.fill(text, 100)}", flush=True)

    def show(self, text: str) -> None:
        print(textwrap.indent(text.rstrip("\n"), "    "), flush=True)

    def show_in_qube(self, qube: str, *words: str) -> None:
        """What a program in a qube prints."""
        self.show(output_of(self._session.in_qube(qube, *words)))

    def forward(self, *words: str) -> str:
        """Run ``qvm-forward``, with its command line, and return what it prints."""
        print(f"    $ qvm-forward {shlex.join(words)}")
        output = self._session.forward(*words)
        self.show(output)
        return output

    def lab(self, *words: str) -> None:
        """The same with ``qvm-forward-lab``."""
        print(f"    $ qvm-forward-lab {shlex.join(words)}")
        if output := self._session.lab_command(*words):
            self.show(output)


def check(is_so: bool, otherwise: str) -> None:
    """Raises `SessionError`."""
    if not is_so:
        raise SessionError(otherwise)
