"""The format of what the node keeps: the index in Redis, the volume, and the small files in the volume's root.

Formats change in minor versions only, and each version reads the one before. What has no format number was written
before there were any, in the layout of format 1.
"""

from __future__ import annotations

from collections.abc import Mapping

from distributor_node.shared.domain.errors import InvalidInput

FORMAT = 1
"""What this version writes."""


def check_format(document: object, name: str) -> None:
    """Raise InvalidInput if a document is in a format that this version does not read. `name`: of the document."""
    found = document.get("format", FORMAT) if isinstance(document, Mapping) else None
    if type(found) is not int or found != FORMAT:
        raise InvalidInput(f"{name}: expected format {FORMAT}, got {found!r}: another version has written it")
