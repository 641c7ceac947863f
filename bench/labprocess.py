# SPDX-License-Identifier: GPL-2.0-or-later
"""The lab in a process of its own: its broker stands in for Qubes' qrexec, equally for every peer.

``python -m bench.labprocess DIRECTORY PORTS KNOBS`` allows sys-net to reach ports of work, by the stock
service, by ours, and by one that is for UDP what the stock one is for TCP. It says in one line how to call
and runs until its stdin ends. KNOBS is a JSON object.
"""

import json
import sys

import trio

from qubes_fwd_qrexec.lab.directory import write_text
from qubes_fwd_qrexec.lab.running import open_lab
from qubes_fwd_qrexec.system.descriptors import raise_descriptor_limit

SOURCE = "sys-net"
TARGET = "work"
CONNECT_UDP = "bench.ConnectUDP"
_CONNECT_UDP = '#!/bin/sh\nexec socat STDIO "UDP:127.0.0.1:$1"\n'


def policy(port: int) -> str:
    """What dom0 would be told to allow."""
    services = (
        f"qubes.ConnectTCP +{port}",
        f"{CONNECT_UDP} +{port}",
        f"qubes.ForwardTCP +{port}",
        f"qubes.ForwardTCP +{port}+mux",
        f"qubes.ForwardUDP +{port}+mux",
    )
    return "".join(f"{service} {SOURCE} {TARGET} allow\n" for service in services)


async def _run(directory: str, ports: list[int], knobs: dict[str, int]) -> None:
    async with open_lab(directory, policy="".join(map(policy, ports))) as lab:
        lab.turn(**knobs)
        place = lab.directory.qube_dir(TARGET)
        write_text(place.service_dirs[-1] / CONNECT_UDP, _CONNECT_UDP, mode=0o755)
        client = lab.client_command(SOURCE)
        ready = {
            "client": client,
            "judge": lab.broker.view.judge_name,
            "calls_per_target": lab.directory.knobs().calls_per_target,
        }
        print(json.dumps(ready), flush=True)
        await trio.lowlevel.wait_readable(sys.stdin)


def main() -> None:
    raise_descriptor_limit()
    trio.run(_run, sys.argv[1], [int(port) for port in sys.argv[2].split(",")], json.loads(sys.argv[3]))


if __name__ == "__main__":
    main()
