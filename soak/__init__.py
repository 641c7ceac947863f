# SPDX-License-Identifier: GPL-2.0-or-later
"""Random connections through the mux call for a long time, beside the same connections made directly.

``python -m soak`` runs a lab, a listener and its mux calls, and takes turns: in calm every connection must
be exactly what it is without us; in a storm, while the transport is killed, it may be cut, but then by
RST, and never with a wrong byte or a clean end before its time. In the end nothing may be left over.
"""
