# SPDX-License-Identifier: GPL-2.0-or-later
"""Python imports this in each program that has this directory in PYTHONPATH; see `played`."""

import played

played.begin()
