# SPDX-License-Identifier: GPL-2.0-or-later
"""A stand-in for qrexec-client-vm that does what a test says, one step after the other."""

import socket
import sys
from pathlib import Path

import trio
from helpers import BOUND_S, accept_socket, listening_socket, port_of

# Words of a step: what to do, and with what. Each is answered when it is done.
_SCRIPT = """
import fcntl, os, socket, subprocess, sys, termios, time
control = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
os.environ["QREXEC_AGENT_PID"] = str(os.getpid())
os.set_blocking(0, False)
for line in control.makefile():
    word, _, text = line.rstrip("\\n").partition(" ")
    if word == "out":
        os.write(1, text.encode())
    elif word == "err":
        os.write(2, text.encode() + b"\\n")
    elif word == "flood":
        for _ in range(int(text)):
            os.write(2, b"x" * 1000)
    elif word == "end":
        os.close(1)
    elif word == "read":  # wait until the listener has read what was written to stderr
        while int.from_bytes(fcntl.ioctl(2, termios.TIOCOUTQ, bytes(4)), sys.byteorder):
            time.sleep(0.005)
    elif word == "serve":
        os.set_blocking(0, True)
        service = subprocess.Popen([sys.executable, "-m", "qubes_fwd_qrexec.service", text])
        os.close(0)
        os.close(1)
    elif word == "kill":
        service.kill()
        service.wait()
    elif word == "exit":
        os._exit(int(text))
    control.sendall(b".")
"""


class Puppet:
    """``command`` starts it; then `begin`."""

    def __init__(self, directory: Path) -> None:
        script = directory / "puppet"
        script.write_text(_SCRIPT)
        self._door = listening_socket()
        self.command = (sys.executable, str(script), str(port_of(self._door)))
        self._control: socket.socket | None = None

    async def begin(self) -> None:
        """Wait until it is started."""
        self._control = await accept_socket(self._door)

    def tell(self, step: str) -> None:
        """A step that may never be done."""
        assert self._control is not None
        self._control.send(f"{step}\n".encode())

    async def do(self, *steps: str) -> None:
        for step in steps:
            self.tell(step)
            assert self._control is not None
            with trio.fail_after(BOUND_S):
                await trio.lowlevel.wait_readable(self._control)
            assert self._control.recv(1) == b"."

    def close(self) -> None:
        self._door.close()
        if self._control is not None:
            self._control.close()
