# SPDX-License-Identifier: GPL-2.0-or-later
"""Random connections and datagrams for a long time: through mux calls, and by nft.

``python -m soak`` runs a lab, a listener and its mux calls, and takes turns: in calm every connection must
be exactly what it is without us; in a storm, while the transport is killed, it may be cut, but then by
RST, and never with a wrong byte or a clean end before its time.

``python -m soak udp`` does it with datagrams: in calm, and in storms that lose nothing by themselves, each
has arrived, or the listener, the target or the kernel has counted it. None may arrive twice, in another flow,
or after the forward was closed.

``python -m soak nft`` opens and closes forwards by nft beside live traffic, and makes firewalls and
interfaces anew: nothing may pass that no rule allows. In the end nothing may be left over, in all
three.
"""
