# SPDX-License-Identifier: GPL-2.0-or-later
"""qubesadmin/exc.py: the names and which is which; the last two are no QubesException there."""


class QubesException(Exception):  # noqa: N818
    pass


class QubesVMNotFoundError(QubesException, KeyError):
    __str__ = Exception.__str__


class QubesFeatureNotFoundError(QubesException, KeyError):
    __str__ = Exception.__str__


class QubesVMNotRunningError(QubesException):
    pass


class QubesDaemonCommunicationError(QubesException):
    pass


class QubesDaemonAccessError(QubesDaemonCommunicationError):
    pass


class QubesPropertyAccessError(QubesDaemonAccessError, AttributeError):
    def __init__(self, name: str) -> None:
        super().__init__(f"Failed to access '{name}' property")


class QubesNoSuchPropertyError(QubesException, AttributeError):
    pass


class ProtocolError(AssertionError):
    pass


class PermissionDenied(Exception):  # noqa: N818
    pass
