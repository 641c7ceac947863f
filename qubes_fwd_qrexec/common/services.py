# SPDX-License-Identifier: GPL-2.0-or-later
"""The names of our qrexec services in a qube."""

FORWARD_SERVICE = "qubes.ForwardTCP"
"""Carries connections of TCP; an exposed qube calls it where dom0's policy says so."""
UDP_SERVICE = "qubes.ForwardUDP"
"""Carries flows of UDP in the same way. Policy names it apart: no line for TCP allows UDP."""
REVOKE_SERVICE = "qubes.ForwardRevoke"
"""Ends calls that dom0 no longer allows; dom0 alone may call it."""
STATUS_SERVICE = "qubes.ForwardStatus"
"""Reports the status of a qube's forwards; dom0 alone may call it."""
NFT_SERVICE = "qubes.ForwardNft"
"""Reports which forwards are in force in a qube's firewall; dom0 alone may call it."""
CUT_SERVICE = "qubes.ForwardCut"
"""Cuts connections to a forward, at once; dom0 alone may call it, as root."""

SERVERS_FILE = "/usr/local/etc/qubes-forward/servers.conf"
"""Where a target's owner names servers that are not at 127.0.0.1 or ::1; see `target.servers`."""
