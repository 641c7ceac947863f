# SPDX-License-Identifier: GPL-2.0-or-later
"""A call that the exposed qube lets wait after dom0 has allowed it, and that it lets go on too late."""

from pathlib import Path

import pytest
from helpers import accept, listening_socket, port_of, until

from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.common.services import REVOKE_SERVICE
from qubes_fwd_qrexec.lab.running import RunningLab

from .lab_calls import bounded_lab, calling

_POLICY = "qubes.ForwardTCP * @anyvm @anyvm allow\n"


async def tell(lab: RunningLab, *lines: str) -> bytes:
    """What dom0 allows towards work, and its answer."""
    async with calling(lab, "work", REVOKE_SERVICE, qube="dom0") as call:
        await call.stdin.send_all("".join(f"{line}\n" for line in ("version=1 drains=keep", *lines)).encode())
        await call.stdin.send_eof()
        return await call.read_all()


@pytest.mark.parametrize("kind", ["", "+mux"])
async def test_it_reaches_no_server_once_dom0_has_taken_its_word_back(tmp_path: Path, kind: str) -> None:
    with listening_socket() as server:
        async with bounded_lab(tmp_path, policy=_POLICY) as lab:
            lab.turn(park=("work/qubes.ForwardTCP",))
            async with calling(lab, "work", f"qubes.ForwardTCP+{port_of(server)}{kind}") as call:
                await until(lambda: len(lab.broker.joined) == 1)
                assert await tell(lab) == b"version=1 ended=0 draining=0\n"
                lab.turn(park=())
                assert await call.read_all() == b""
                assert await call.status() == ExitStatus.REVOKED
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


async def test_it_goes_on_if_dom0_allows_it_still(tmp_path: Path) -> None:
    with listening_socket() as server:
        port = port_of(server)
        async with bounded_lab(tmp_path, policy=_POLICY) as lab:
            lab.turn(park=("work/qubes.ForwardTCP",))
            async with calling(lab, "work", f"qubes.ForwardTCP+{port}") as call:
                await until(lambda: len(lab.broker.joined) == 1)
                await tell(lab, f"keep {port}-{port} sys-net")
                lab.turn(park=())
                async with await accept(server) as far:
                    await far.send_all(b"x")
                    await far.send_eof()
                    assert await call.read_all() == b"x"
