# SPDX-License-Identifier: GPL-2.0-or-later
"""Which system a command is for: a lab that was named, or the Qubes system that it runs on."""

import os
from collections.abc import Mapping

from qubes_fwd_qrexec.errors import RefusedError

from .backend import Backend

LAB_VARIABLE = "QVM_FORWARD_LAB"
_QUBES_SIGNS = ("/etc/qubes-release", "/usr/share/qubes")


def open_backend(lab: str | None, environ: Mapping[str, str]) -> Backend:
    """The backend for ``--lab`` or the environment. Raises `RefusedError` or `StoreError`."""
    path = lab or environ.get(LAB_VARIABLE)
    if path:
        from qubes_fwd_qrexec.lab.directory import LabDirectory

        from .labstore import LabStore

        return LabStore(LabDirectory.open(path))
    if any(os.path.exists(sign) for sign in _QUBES_SIGNS):
        raise RefusedError(
            "this version of qvm-forward works on labs only and leaves this Qubes system alone; "
            f"make a lab with 'qvm-forward-lab init DIR', then name it with --lab DIR or {LAB_VARIABLE}=DIR"
        )
    raise RefusedError(
        "this is no Qubes system, and no lab was named; make one with 'qvm-forward-lab init DIR', "
        f"then name it with --lab DIR or {LAB_VARIABLE}=DIR"
    )
