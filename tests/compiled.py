"""Marks tests that cannot run against compiled modules (`make test-compiled`): they call each other directly."""

from __future__ import annotations

import pytest

from distributor_node.services.api.fast_path import handler

needs_source = pytest.mark.skipif(
    handler.__file__.endswith(".so"), reason="replaces a function inside a module that is compiled"
)
