# SPDX-License-Identifier: GPL-2.0-or-later
"""The ways of a datagram from a client on the LAN to a server in work, on the paths of `ways`."""

import shutil

from qubes_fwd_qrexec.common.config import Service
from qubes_fwd_qrexec.common.rules import Transport

from .labprocess import CONNECT_UDP, TARGET
from .peers import ListenerPeer, Peer
from .ways import ByMux, ByNft, Routed, Way

_ENDS = ("udpend", "udpend")


class _Socat(Peer):
    """What `qvm-connect-tcp` does, for UDP: one call for each client, which has socat at both its ends.

    A call is a stream, and nothing in it says where a datagram ends.
    """

    name = "socat"
    title = "socat"

    def command(self, port: int) -> list[str]:
        client = " ".join(self.setting.client)
        return [
            "socat",
            f"UDP-LISTEN:{port},bind={self.setting.listen},reuseaddr,fork",
            f"EXEC:{client} \\'{TARGET}\\' {CONNECT_UDP}+{self.setting.server_port}",
        ]


class _UdpCall(ListenerPeer):
    name = "udp"
    title = "qrexec"
    service = Service.FORWARD_UDP
    transport = Transport.MUX


class RoutedUdp(Routed):
    """As `Routed`."""

    name = "direct"
    title = "direct UDP"
    ends = _ENDS


class NftUdp(ByNft):
    """As `ByNft`."""

    title = "nft"
    ends = _ENDS


class SocatUdp(ByMux):
    """socat over the lab's broker."""

    name = _Socat.name
    title = _Socat.title
    ends = _ENDS
    peer = _Socat


class Udp(ByMux):
    """Ours: UDP over qrexec."""

    name = _UdpCall.name
    title = _UdpCall.title
    ends = _ENDS
    peer = _UdpCall


class MuxTcp(ByMux):
    """TCP over qrexec, for its round trip."""

    name = "tcp"
    title = "TCP mux"


def usable() -> tuple[type[Way], ...]:
    """All ways that this machine has the programs for."""
    return tuple(way for way in WAYS if way is not SocatUdp or shutil.which("socat") is not None)


# The order of the table's columns.
WAYS: tuple[type[Way], ...] = (RoutedUdp, NftUdp, SocatUdp, Udp, MuxTcp)
COMPARED = ((Udp, SocatUdp), (Udp, NftUdp), (Udp, MuxTcp))
