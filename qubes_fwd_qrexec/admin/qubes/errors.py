# SPDX-License-Identifier: GPL-2.0-or-later
"""Turns what Qubes' packages raise into our errors, which say who was asked for what, why it failed, and what
helps.

``here`` is the management qube that this runs in, None in dom0, which no policy binds.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from qubes_fwd_qrexec.admin.answers import NotRunningError
from qubes_fwd_qrexec.common.errors import StoreError, TextError

WHO_MAY = "run qvm-forward as root or as a member of the group qubes"
# What qubesadmin raises for an answer that it cannot parse; its ProtocolError is an AssertionError.
_UNPARSABLE = (AssertionError, AttributeError, LookupError, TypeError, ValueError)


class UnansweredError(StoreError):
    """qubesd refused one call, failed within, knows no such qube, or gave an answer that cannot be read."""


@contextmanager
def asking_qubesd(method: str, dest: str, here: str | None) -> Iterator[None]:
    """Raises `UnansweredError`, `NotRunningError` if the qube is halted, and `StoreError` without qubesd."""
    from qubesadmin import exc

    what = f"{method} at {dest}"
    try:
        yield
    except exc.QubesVMNotRunningError as error:
        raise NotRunningError(f"{what}: {plain(error)}") from error
    except exc.QubesDaemonAccessError as error:
        target = "@adminvm" if dest == "dom0" else "@anyvm"
        line = f"{method.partition('+')[0]}  *  {here}  {target}  allow  target=dom0"
        way_out = how_to_allow(line) if here else "'journalctl -u qubesd' says why"
        raise UnansweredError(f"{what}: {plain(error)}. {way_out}") from error
    except exc.QubesDaemonCommunicationError as error:
        way_out = f"{WHO_MAY}, and make sure that qubesd is running: 'systemctl status qubesd'"
        raise StoreError(f"{what}: {plain(error)}. {way_out}") from error
    except OSError as error:
        raise StoreError(f"{what}: {plain(error)}") from error
    except (exc.QubesException, exc.PermissionDenied, TextError, *_UNPARSABLE) as error:
        raise UnansweredError(f"{what}: {plain(error)}") from error


def how_to_allow(line: str) -> str:
    """The sentence that gives a management qube the line of policy that it lacks."""
    return (
        "If dom0's policy refuses it, this line allows it, in a file in /etc/qubes/policy.d that sorts "
        f"before 30-forward.policy: '{line}'. qvm-forward(1) lists what a management qube needs"
    )


def plain(text: object) -> str:
    """An error's text on one line, with what a terminal could take for more than text escaped."""
    words = " ".join(str(text).split()).rstrip(".")
    return "".join(c if " " <= c <= "~" else f"\\u{ord(c):04x}" for c in words) or type(text).__name__
