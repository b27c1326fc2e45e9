"""Which sources to read from again after the bytes of some turned out to be wrong. Pure."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

Rounds = tuple[tuple[str, ...], ...]
"""Groups of source URLs; each group is one attempt at the whole object, in which its sources may follow each other."""


def rounds_after_wrong_bytes(rounds: Rounds, givers: AbstractSet[str], *, resumed: bool) -> Rounds:
    """What is left to try after the first of `rounds` ended in wrong bytes that came from `givers`.

    Bytes that lay on the volume before (`resumed`) may have been the wrong ones: then all get another chance. A single
    giver is out. Of several nobody knows who lied: first the others together, then each of them alone.
    """
    tried, *later = rounds
    if resumed:
        return rounds
    others = tuple(url for url in tried if url not in givers)
    first = (others,) if others else ()
    suspects = tuple((url,) for url in tried if url in givers) if len(givers) > 1 else ()
    return (*first, *later, *suspects)
