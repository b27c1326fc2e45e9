"""Which sources to read from again after the bytes of some turned out to be wrong. Pure."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

SourceGroups = tuple[tuple[str, ...], ...]
"""Groups of source URLs; each group is one attempt at the whole object, in which its sources may follow each other."""


def groups_after_corruption(
    groups: SourceGroups, contributors: AbstractSet[str], *, resumed: bool
) -> SourceGroups:
    """What is left to try after the first of `groups` ended in wrong bytes that came from `contributors`.

    Bytes that lay on the volume before (`resumed`) may have been the wrong ones: then all get another chance. A single
    contributor is out. Of several nobody knows who lied: first the others together, then each of them alone.
    """
    tried, *later = groups
    if resumed:
        return groups
    others = tuple(url for url in tried if url not in contributors)
    first = (others,) if others else ()
    suspects = tuple((url,) for url in tried if url in contributors) if len(contributors) > 1 else ()
    return (*first, *later, *suspects)
