# SPDX-License-Identifier: GPL-2.0-or-later
"""A stand-in for qrexec-client-vm."""

import sys
from pathlib import Path

# MODE from the command line; then what the real program gets: ``[OPTION...] -- TARGET SERVICE+ARGUMENT``.
_CLIENT = """
import contextlib, os, signal, socket, sys, threading
mode, calls, *options, dashes, target, service = sys.argv[1:]
assert dashes == "--", sys.argv
with open(calls, "a") as log:
    log.write(f"{target} {service}\\n")
with open(calls + ".options", "a") as log:
    log.write(" ".join(options) + "\\n")
argument = service.partition("+")[2]
os.environ["QREXEC_AGENT_PID"] = str(os.getpid())
udp = ["--udp"] if service.startswith("qubes.ForwardUDP+") else []
if mode == "serve" or (mode.startswith("flows") and not udp):
    os.execv(sys.executable, [sys.executable, "-m", "qubes_fwd_qrexec.service", *udp, argument])
elif mode == "leased":  # our service, whose lease is over while a file says so
    from qubes_fwd_qrexec import service
    from qubes_fwd_qrexec.target import callservice
    callservice.Lease.left_s = property(lambda _: -1.0 if os.path.exists(calls + ".over") else 0.02)
    sys.exit(service.main([*udp, argument]))
elif mode.startswith("mux"):  # our service, with constants of its own
    from qubes_fwd_qrexec import service
    from qubes_fwd_qrexec.target import callservice, muxservice
    for setting in mode.split()[1:]:
        name, equals, value = setting.partition("=")
        (module,) = [module for module in (callservice, muxservice) if hasattr(module, name)]
        setattr(module, name, int(value))
    sys.exit(service.main([*udp, argument]))
elif mode.startswith("rude"):  # a target that speaks the protocol, and gives up what it is asked for
    from qubes_fwd_qrexec.mux import Connection, GoawayCode, Hello, OpenReceived, ResetCode
    first, dash, last = argument.removesuffix("+mux").partition("-")
    ports = range(int(first), int(last or first) + 1)
    connection = Connection(Hello(65536, bytes(16), max_streams=100, lease_s=300), ports)
    if mode == "rude drain":
        connection.drain(GoawayCode.SHUTDOWN)
    if mode == "rude close":
        connection.close()
    with contextlib.suppress(OSError):
        while True:
            for chunk in connection.data_to_send():
                os.write(1, chunk)
            if connection.is_over or not (received := os.read(0, 65536)):
                break
            for event in connection.receive_data(received):
                if isinstance(event, OpenReceived):
                    if mode == "rude die":
                        os.kill(os.getpid(), signal.SIGKILL)
                    connection.reset_stream(event.stream_id, ResetCode.LEASE_OVER)
elif mode.startswith("flows"):  # a target of datagrams that is its own server: it says back what it hears
    from qubes_fwd_qrexec.mux import DatagramsReceived, FlowCode, FlowConnection, FlowRequested, Hello
    first, dash, last = argument.removesuffix("+mux").partition("-")
    ports = range(int(first), int(last or first) + 1)
    connection = FlowConnection(Hello(0, bytes(16), max_streams=100, lease_s=300), ports)
    os.set_blocking(0, True)
    with contextlib.suppress(OSError):
        while True:
            for chunk in connection.data_to_send():
                os.write(1, chunk)
            if connection.is_over or not (received := os.read(0, 65536)):
                break
            for event in connection.receive_data(received):
                if isinstance(event, DatagramsReceived):
                    connection.send_datagrams(event.flow_id, bytes(event.data), event.segment)
                elif isinstance(event, FlowRequested) and mode != "flows":
                    code = mode.split()[1]
                    if code == "die":
                        os.kill(os.getpid(), signal.SIGKILL)
                    connection.end_flow(event.flow_id, FlowCode[code])
elif mode.startswith("exit"):
    sys.exit(int(mode[4:]))
elif mode.startswith("taken"):  # the call is through, and the service ends at once
    os.set_blocking(0, False)
    sys.exit(int(mode[5:]))
elif mode == "hang":
    signal.pause()
elif mode == "mute":  # the call is through, and the service says nothing
    os.set_blocking(0, False)
    signal.pause()
elif mode == "chatty":
    while True:
        os.write(2, b"x" * 65536)
elif mode == "die":
    os.write(1, b"half of it")
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGKILL)
elif mode == "babble":  # what is wrong with it is said in other words at each call
    os.write(1, bytes([0x40 + len(open(calls).readlines())]) * 8)
    os.read(0, 1)
elif mode == "forge":
    os.write(1, b"x")
    sys.exit(126)
elif mode == "late":  # an end of file long before the exit status
    os.write(1, b"x")
    os.close(1)
    os.read(0, 1)
    sys.exit(74)
elif mode == "later":  # the same, by half a second
    os.write(1, b"x")
    os.close(1)
    threading.Event().wait(0.5)
    sys.exit(74)
elif mode == "stock":  # qubes.ConnectTCP: /dev/tcp with exit-on-service-eof
    try:
        server = socket.create_connection(("127.0.0.1", int(argument)))
    except OSError:
        sys.exit(125)
    def upload():
        while data := os.read(0, 65536):
            server.sendall(data)
        server.shutdown(socket.SHUT_WR)
    threading.Thread(target=upload, daemon=True).start()
    while data := server.recv(65536):
        os.write(1, data)
    os._exit(0)
else:
    raise AssertionError(mode)
"""


class FakeClient:
    """A stand-in for qrexec-client-vm; ``command`` starts it, ``calls`` says which calls it was asked for.

    In the mode ``leased`` the lease of each call is over while there is the file ``over``.
    """

    def __init__(self, directory: Path, mode: str) -> None:
        self._calls = directory / "calls"
        self.over = directory / "calls.over"
        script = directory / "qrexec-client-vm"
        script.write_text(_CLIENT)
        self.command = (sys.executable, str(script), mode, str(self._calls))

    @property
    def calls(self) -> list[str]:
        return self._calls.read_text().splitlines() if self._calls.exists() else []

    @property
    def options(self) -> list[str]:
        """The options of each call."""
        return Path(f"{self._calls}.options").read_text().splitlines()
