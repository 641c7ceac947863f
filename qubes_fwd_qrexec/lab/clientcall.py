# SPDX-License-Identifier: GPL-2.0-or-later
"""A call of the stand-in for ``qrexec-client-vm``: its command line, and what it says to the broker.

Like `client`, it imports the C modules beneath ``socket`` and ``os`` alone. Facts: qubes-core-qrexec
agent/qrexec-client-vm.c.
"""

import _socket
import errno
import posix
import sys

from . import wire

# sockaddr_un.sun_path has 108 bytes, with the NUL.
_SOCKET_PATH_MAX = 107
# struct trigger_service_params4: 32 bytes for the target, with the NUL.
_TARGET_MAX = 31
_BUFFER_SIZE_MAX = 2**31 - 1

_USAGE = """\
usage: {program} [options] target_vmname program_ident [local_program [local program arguments]]
Options:
  -h, --help - print this message
  --buffer-size=BUFFER_SIZE - minimum vchan buffer size (default: 64k)
  -t, --filter-escape-chars-stdout - filter non-ASCII and control characters on stdout
  -T, --filter-escape-chars-stderr - filter non-ASCII and control characters on stderr
  --no-filter-escape-chars-stdout - opposite to --filter-escape-chars-stdout
  --no-filter-escape-chars-stderr - opposite to --filter-escape-chars-stderr
  --agent-socket=PATH - socket of this qube's agent (default: $QUBES_LAB_AGENT_SOCKET)
  -p DATA, --prefix-data=DATA - send the given data before the provided stdin (can only be used once)
  --use-stdin-socket - use fd 0 (which must be socket) for both stdin and stdout
  -s QUBE, --source-qube=QUBE - the source of a relayed call
"""

# Each long option: the short one, and whether it has a value.
_OPTIONS = {
    "buffer-size": ("b", True),
    "filter-escape-chars-stdout": ("t", False),
    "filter-escape-chars-stderr": ("T", False),
    "no-filter-escape-chars-stdout": ("t-", False),
    "no-filter-escape-chars-stderr": ("T-", False),
    "agent-socket": ("a", True),
    "prefix-data": ("p", True),
    "use-stdin-socket": ("u", False),
    "source-qube": ("s", True),
    "help": ("h", False),
}
# Those that have a short form at all.
_SHORT = "tTa:p:s:h"


class ExitError(Exception):
    """The client ends with a status and, on stderr, a message."""

    def __init__(self, status: int, message: str = "") -> None:
        super().__init__(status, message)
        self.status = status
        self.message = message


class Options:
    """The command line, parsed as getopt_long does; raises `ExitError`."""

    def __init__(self, argv: list[str]) -> None:
        self.usage = _USAGE.format(program=argv[0])
        self.agent_socket = b""
        self.prefix: str | None = None
        self.source: str | None = None
        self.filters: dict[str, bool] = {}
        self.is_single_socket = False
        self.buffer_size = wire.BUFFER_SIZE
        rest = argv[1:]
        while rest and rest[0].startswith("-") and rest[0] != "-":
            word = rest.pop(0)
            if word == "--":
                break
            if word.startswith("--"):
                self._long(word[2:], rest)
            else:
                self._short(word[1:], rest)
        if len(rest) < 2:
            raise ExitError(2, self.usage)
        if len(rest) > 2 and self.is_single_socket:
            raise ExitError(2, f"cannot spawn a local process with --use-stdin-socket\n{self.usage}")
        # The older keywords began with a dollar sign.
        self.target = rest[0].replace("$", "@")[:_TARGET_MAX]
        self.service = rest[1]
        self.program = rest[2:]

    def _long(self, word: str, rest: list[str]) -> None:
        name, equals, value = word.partition("=")
        matches = [name] if name in _OPTIONS else [known for known in _OPTIONS if known.startswith(name)]
        if len(matches) != 1:
            raise ExitError(2, f"unrecognized option '--{name}'\n{self.usage}")
        letter, has_value = _OPTIONS[matches[0]]
        if has_value and not equals:
            if not rest:
                raise ExitError(2, f"option '--{name}' requires an argument\n{self.usage}")
            value = rest.pop(0)
        elif equals and not has_value:
            raise ExitError(2, f"option '--{name}' doesn't allow an argument\n{self.usage}")
        self._set(letter, value)

    def _short(self, letters: str, rest: list[str]) -> None:
        while letters:
            letter, letters = letters[0], letters[1:]
            index = _SHORT.find(letter) if letter != ":" else -1
            if index < 0:
                raise ExitError(2, f"invalid option -- '{letter}'\n{self.usage}")
            value = ""
            if _SHORT[index + 1 : index + 2] == ":":
                if not letters and not rest:
                    raise ExitError(2, f"option requires an argument -- '{letter}'\n{self.usage}")
                value, letters = letters or rest.pop(0), ""
            self._set(letter, value)

    def _set(self, letter: str, value: str) -> None:
        match letter:
            case "b":
                self.buffer_size = _buffer_size(value)
            case "t" | "T" | "t-" | "T-":
                self.filters[letter[0]] = len(letter) == 1
            case "a":
                self.agent_socket = _bytes(value)
            case "p" | "s" if getattr(self, "prefix" if letter == "p" else "source") is not None:
                raise ExitError(2, self.usage)
            case "p":
                self.prefix = value
            case "s":
                self.source = value
            case "u":
                if self.is_single_socket:
                    raise ExitError(2, "--use-stdin-socket passed twice\n")
                if not is_stream_socket(0):
                    raise ExitError(2, "--use-stdin-socket passed, but stdin not a stream socket\n")
                self.is_single_socket = True
            case "h":
                raise ExitError(0, self.usage)


def _buffer_size(text: str) -> int:
    """The buffer size decides how much room the call takes; what the broker buffers stays the same. 0 is
    the default.
    """
    if not text[:1].isdigit():
        raise ExitError(1, "Bad buffer size: does not begin with a number\n")
    try:
        size = int(text, 0)
    except ValueError:
        raise ExitError(1, "Bad buffer size: trailing junk\n") from None
    if size > _BUFFER_SIZE_MAX:
        raise ExitError(1, "Bad buffer size: too large\n")
    return size or wire.BUFFER_SIZE


def is_stream_socket(fd: int) -> bool:
    try:
        sock = _socket.socket(-1, -1, -1, fd)
    except OSError:
        return False
    kind = sock.type
    sock.detach()
    return kind == _socket.SOCK_STREAM


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def connect(path: bytes) -> _socket.socket:
    """A connection to an agent socket, however long its path; raises `ExitError`."""
    if not path:
        raise ExitError(
            1,
            "no agent socket: set QUBES_LAB_AGENT_SOCKET or give --agent-socket=LAB/qubes/NAME/qrexec.sock\n",
        )
    directory_fd = -1
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    try:
        address = path
        if len(path) > _SOCKET_PATH_MAX:
            directory, _, name = path.rpartition(b"/")
            directory_fd = posix.open(directory or b"/", posix.O_PATH | posix.O_CLOEXEC)
            address = b"/proc/self/fd/%d/%s" % (directory_fd, name)
        sock.connect(address)
    except OSError as error:
        sock.close()
        hint = "is it another user's lab?" if error.errno == errno.EACCES else "is the lab up?"
        raise ExitError(1, f"connect: {path!r}: {error.strerror}; {hint}\n") from error
    finally:
        if directory_fd >= 0:
            posix.close(directory_fd)
    return sock


def replace_characters(data: bytes) -> bytes:
    """As libqrexec/replace.c: what is neither printable ASCII nor one of \\a \\b \\n \\r \\t becomes _."""
    return data.translate(_FILTER)


_FILTER = bytes(c if 0x20 <= c <= 0x7E or c in b"\a\b\n\r\t" else 0x5F for c in range(256))


def write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[posix.write(fd, data) :]


def _send_call(agent: _socket.socket, options: Options, fds: list[int]) -> None:
    prefix = _bytes(options.prefix or "")
    call = wire.Call(options.target, options.service, options.source or "", prefix, options.buffer_size)
    packed = b"".join(fd.to_bytes(4, sys.byteorder) for fd in fds)
    agent.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDBUF, wire.CALL_MAX)
    try:
        agent.sendmsg([call.encode()], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, packed)])
    except OSError as error:
        raise ExitError(1, f"write to agent: {error.strerror}\n") from error


def wait_for_connection(agent: _socket.socket) -> None:
    """Raises `ExitError` if the call is refused, or cannot be connected."""
    answer = agent.recv(wire.STDERR_MAX + 1)
    if not answer:
        raise ExitError(wire.EXIT_REFUSED, "Request refused\n")
    if answer.startswith(wire.NO_VCHAN):
        raise ExitError(wire.EXIT_NO_VCHAN, answer[1:].decode())


def wait_for_exit(agent: _socket.socket, *, is_filtered: bool) -> int:
    """Pass stderr on until the broker says how the call ended; raises `ExitError` when it does not.

    Writing to stderr blocks, as in the real client: a stderr that nobody reads stalls the call.
    """
    while packet := agent.recv(wire.STDERR_MAX + 1):
        if packet.startswith(wire.EXIT):
            return wire.decode_exit(packet)
        data = packet[1:]
        try:
            write_all(2, replace_characters(data) if is_filtered else data)
        except OSError:
            continue  # the real client would log it, to the same broken stderr
    raise ExitError(wire.EXIT_LOST, "vchan connection closed early\n")


def hand_over(agent: _socket.socket, options: Options, fds: list[int]) -> None:
    """Make the call and keep none of its descriptors, so that the broker's ends are the only ones."""
    _send_call(agent, options, fds)
    for fd in fds:
        posix.close(fd)


def complain(end: ExitError) -> None:
    try:
        write_all(1 if end.status == 0 else 2, _bytes(end.message))
    except OSError:
        return  # nobody reads it
