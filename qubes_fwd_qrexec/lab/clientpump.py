# SPDX-License-Identifier: GPL-2.0-or-later
"""The client stand-in's slow paths: descriptors that are not sockets, filters, and a local program.

The broker joins only sockets; so pipes, files and terminals are copied to and from socket pairs here, with
one thread for each direction.
"""

import _socket
import _thread
import posix
import signal
import sys
from contextlib import suppress

from .clientcall import (
    ExitError,
    Options,
    complain,
    hand_over,
    replace_characters,
    wait_for_connection,
    wait_for_exit,
    write_all,
)

_CHUNK = 65536


def run_copying(agent: _socket.socket, options: Options, is_filtered: bool, is_stderr_filtered: bool) -> int:
    """A call whose stdin and stdout this process copies; ends when all output is written."""
    input_end, call_input = _socket.socketpair()
    output_end, call_output = _socket.socketpair()
    hand_over(agent, options, [call_input.detach(), call_output.detach()])
    written = _thread.allocate_lock()
    written.acquire()
    _thread.start_new_thread(_copy_in, (input_end,))
    _thread.start_new_thread(_copy_out, (output_end, is_filtered, written))
    try:
        wait_for_connection(agent)
        return wait_for_exit(agent, is_filtered=is_stderr_filtered)
    finally:
        # The broker has closed its end by now: what it passed on is still to be written.
        written.acquire()


def _copy_in(input_end: _socket.socket) -> None:
    try:
        posix.set_blocking(0, True)
        while data := posix.read(0, _CHUNK):
            input_end.sendall(data)
    except OSError:
        pass  # an unreadable stdin is at its end; a call that takes no more is told of by its exit status
    input_end.close()


def _copy_out(output_end: _socket.socket, is_filtered: bool, written: _thread.LockType) -> None:
    try:
        posix.set_blocking(1, True)
        while data := output_end.recv(_CHUNK):
            write_all(1, replace_characters(data) if is_filtered else data)
    except OSError:
        pass  # nobody reads our stdout: the broker learns it from the closed socket, as the agent would
    output_end.close()
    with suppress(OSError):  # it may have been closed from the start
        posix.close(1)
    written.release()


def run_program(agent: _socket.socket, options: Options, is_stderr_filtered: bool) -> int:
    """A call joined to a local program; the remote status counts, and the program's if that is 0."""
    call_sink, program_stdin = _socket.socketpair()
    call_source, program_stdout = _socket.socketpair()
    hand_over(agent, options, [call_source.detach(), call_sink.detach()])
    wait_for_connection(agent)
    pid = posix.fork()
    if pid == 0:
        _become_program(options.program, program_stdin.fileno(), program_stdout.fileno())
    # The program signals SIGUSR1 to ask for one socket both ways, which the lab does not do.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    program_stdin.close()
    program_stdout.close()
    try:
        remote_status = wait_for_exit(agent, is_filtered=is_stderr_filtered)
    except ExitError as lost:
        complain(lost)
        remote_status = lost.status
    _, wait_status = posix.waitpid(pid, 0)
    if remote_status:
        return remote_status
    if posix.WIFSIGNALED(wait_status):
        return 128 + posix.WTERMSIG(wait_status)
    return posix.WEXITSTATUS(wait_status)


def _become_program(program: list[str], stdin_fd: int, stdout_fd: int) -> None:
    environment = dict(posix.environ)
    environment[b"QREXEC_AGENT_PID"] = b"%d" % posix.getppid()
    for fd in (0, 1):
        saved_fd = posix.dup(fd)
        posix.set_inheritable(saved_fd, True)
        environment[b"SAVED_FD_%d" % fd] = b"%d" % saved_fd
    posix.dup2(stdin_fd, 0)
    posix.dup2(stdout_fd, 1)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        posix.execve(program[0], [program[0].rpartition("/")[2], *program[1:]], environment)
    except OSError as error:
        sys.stderr.write(f"execv: {program[0]}: {error.strerror}\n")
        sys.stderr.flush()
    posix._exit(255)
