# SPDX-License-Identifier: GPL-2.0-or-later
"""How long a test waits for what must come: it only keeps a hanging test from waiting for ever.

A busy machine takes seconds to start a program, and a virtual machine may stand still for a minute. So it is
far more than that: who waits for so long is about to fail.
"""

BOUND_S = 180.0
