# SPDX-License-Identifier: GPL-2.0-or-later
"""The program of the exposed qube: it listens where its configuration says.

It keeps the open forwards equal to the configuration (`exposed.listener`), and logs every change. It decides
nothing about who may reach which target: dom0 judges every call.
"""

import logging
import os
import signal
import sys
from contextlib import ExitStack

import trio

from .common.errors import ForwardError, leaves
from .exposed import listeneroptions, qrexec
from .exposed.call import CallTimeouts
from .exposed.limits import process_max
from .exposed.listener import Listener
from .exposed.statussockets import RUNTIME_VARIABLE, runtime_directory
from .exposed.supervisor import Supervisor, supervise
from .system.cleanstart import start_clean
from .system.configsource import FileSource
from .system.descriptors import raise_descriptor_limit
from .system.logs import start_logging
from .system.qubesdbsource import open_qubesdb

_logger = logging.getLogger(__name__)


async def _obey_signals(listener: Listener, *, task_status: "trio.TaskStatus[None]") -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        task_status.started()
        async for number in signals:
            if number == signal.SIGHUP:
                listener.reload()
            else:
                listener.stop()


async def _main(listener: Listener) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(_obey_signals, listener)
        nursery.start_soon(listener.follow_supervisor)
        await listener.run()
        nursery.cancel_scope.cancel()


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    args = listeneroptions.parse(given)
    if args.leave_drain:
        return supervise([word for word in given if word != "--leave-drain"])
    start_clean()  # the supervisor has blocked signals for itself
    start_logging(is_verbose=args.verbose, name=listeneroptions.PROGRAM)
    connections_max = process_max(raise_descriptor_limit())
    status = 0
    try:
        with ExitStack() as stack:
            listener = Listener(
                FileSource(args.config) if args.config else stack.enter_context(open_qubesdb()),
                qrexec.parse_client(args.qrexec_client),
                calls_max=args.calls,
                timeouts=CallTimeouts(call_s=args.call_timeout, idle_s=args.idle_timeout),
                linger_s=args.linger,
                connections_max=min(connections_max, args.connections or connections_max),
                # dom0 delivers each rule by itself, and a bad one must not stop the others.
                is_whole=args.config is not None,
                supervisor=None if args.supervisor_fd is None else Supervisor(args.supervisor_fd),
                status_dir=args.status_dir or runtime_directory(os.environ.get(RUNTIME_VARIABLE)),
            )
            trio.run(_main, listener, strict_exception_groups=True)
    except* ForwardError as errors:
        for error in leaves(errors):
            _logger.error("%s", error)
        status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
