# SPDX-License-Identifier: GPL-2.0-or-later
"""The stand-in for ``qrexec-client-vm``: the same options, messages and exit statuses.

Its work is to hand its descriptors to the broker and wait for the exit status; where they are sockets no
byte passes through it. It imports the C modules beneath ``socket`` and ``os`` alone, because its start-up
time is part of every call.
"""

import posix
import sys

from .clientcall import (
    ExitError,
    Options,
    complain,
    connect,
    hand_over,
    is_stream_socket,
    wait_for_connection,
    wait_for_exit,
)

AGENT_SOCKET_VARIABLE = b"QUBES_LAB_AGENT_SOCKET"


def run(argv: list[str]) -> int:
    """One call, from command line to exit status; raises `ExitError`."""
    options = Options(argv)
    is_stdout_filtered = options.filters.get("t", not options.program and posix.isatty(1))
    is_stderr_filtered = options.filters.get("T", posix.isatty(2))
    agent = connect(options.agent_socket or posix.environ.get(AGENT_SOCKET_VARIABLE, b""))
    fds = [0] if options.is_single_socket else [0, 1]
    if not options.program and not is_stdout_filtered and all(map(is_stream_socket, fds)):
        hand_over(agent, options, fds)
        wait_for_connection(agent)
        return wait_for_exit(agent, is_filtered=is_stderr_filtered)
    # Most calls need nothing of it.
    from . import clientpump

    if options.program:
        return clientpump.run_program(agent, options, is_stderr_filtered)
    return clientpump.run_copying(agent, options, is_stdout_filtered, is_stderr_filtered)


def main(argv: list[str]) -> None:
    """Make the call and exit at once, without Python's clean-up, as there is nothing to clean up."""
    try:
        status = run(argv)
    except ExitError as end:
        if end.message:
            complain(end)
        status = end.status
    except KeyboardInterrupt:
        status = 130  # 128 + SIGINT
    posix._exit(status)


if __name__ == "__main__":
    main(sys.argv)
