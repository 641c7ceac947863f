# SPDX-License-Identifier: GPL-2.0-or-later
"""One run of qvm-forward: the system and the time that it works with, and where it prints."""

from collections.abc import Mapping
from typing import Any, NamedTuple, TextIO

from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.snapshot import Snapshot, look

from .tables import Style, escaped

VERSION = 1
"""Of what is printed as JSON, which docs/qvm-forward.schema.json describes. It changes where a field goes or
changes its meaning. Documents of export have a version of their own."""


class Session(NamedTuple):
    """One run of qvm-forward; ``now`` is in UNIX seconds."""

    backend: Backend
    now: float
    environ: Mapping[str, str]
    stdin: TextIO
    out: TextIO
    err: TextIO
    style: Style
    is_json: bool
    warned: set[str]
    is_quiet: bool = False

    def say_done(self, text: str) -> None:
        """Say what a change did, which `is_quiet` leaves out."""
        if not self.is_quiet:
            self.say(text)

    def say(self, text: str) -> None:
        self.out.write(text)

    def say_json(self, data: Mapping[str, Any], *, is_line: bool = False) -> None:
        """Print an object with its version, on one line where more of them follow."""
        import json

        data = {"version": VERSION, **data}
        self.out.write(f"{json.dumps(data, indent=None if is_line else 2)}\n")

    def warn(self, text: str) -> None:
        """Print a line on stderr. What others stored or said has been escaped by then."""
        self.err.write(f"qvm-forward: {text}\n")

    def look(self, *, with_config: bool = False) -> Snapshot:
        """`snapshot.look`; what could not be read is warned of."""
        snapshot = look(self.backend, with_config=with_config)
        self.warn_unread(snapshot)
        return snapshot

    def warn_unread(self, snapshot: Snapshot) -> None:
        """Warn of what could not be read, once in a run."""
        for problem in snapshot.problems:
            if problem not in self.warned:
                self.warn(escaped(problem))
                self.warned.add(problem)
