# SPDX-License-Identifier: GPL-2.0-or-later
"""The names of our qrexec services in a target."""

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
