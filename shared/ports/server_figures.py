"""How the state store's own server is doing: for those who watch the node, not for the node."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServerStats:
    """`memory` in use and its limit in bytes (0: no limit); `clients`: connections; `commands`: processed since it
    started; `saving`: what it last wrote to its disk was written; `eviction`: what it does when its memory is full, as
    it calls it: anything but `noeviction` drops keys of ours behind our back."""

    memory: int
    memory_limit: int
    clients: int
    commands: int
    saving: bool
    eviction: str
