# SPDX-License-Identifier: GPL-2.0-or-later
"""The dialogs: what is asked before something is changed, and the form of Add and Edit."""
