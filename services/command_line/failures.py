"""Failures of connections in plain words."""

from __future__ import annotations

import re


def in_words(error: Exception) -> str:
    """What went wrong, without the number that the operating system has for it."""
    return re.sub(r"^\[Errno -?[0-9]+\] ", "", str(error)) or type(error).__name__
