# SPDX-License-Identifier: GPL-2.0-or-later
"""What the window knows, shows and does: values, and the threads that make them. Nothing here imports GTK."""
