"""The volume: the directory that the services share, and the truth about what is cached.

    objects/<shard>/<id>     a complete, verified object; it got here by one rename, after fsync
    records/<shard>/<id>     its record (JSON, at most RECORD_BYTES): size, hash, entity tag, media type
    incoming/<id>.part     a partial download; its size is its progress
    incoming/<id>.json     what the partial download will be: size, hash
    leaving/<id>           an object that was removed while somebody was sending it

Three facts live in the file system itself, so that they hold across processes and die with them:
  - whoever writes a partial file holds an exclusive flock on it, which becomes a shared one with verification; whoever
    sends an object for longer than a moment holds a shared one; whoever removes a file needs the exclusive one first.
    Locks of a killed process are gone.
  - a partial file that has passed verification is readable by others (mode bit o+r); followers look for it.
  - a file with no name left (st_nlink 0) is on its way out: nobody begins to send it.

All calls block (briefly, but for fsync, scans and hashing): in an event loop, run those in a thread.
"""

from distributor_node.shared.adapters.volume.objects import FileIdentity, OpenObject, Removal, RemovalState
from distributor_node.shared.adapters.volume.partial import (
    PartialFile,
    PartialHeld,
    PartialReader,
    PartialState,
)
from distributor_node.shared.adapters.volume.scan import FoundObject, FoundPartial, UnknownFile
from distributor_node.shared.adapters.volume.volume import Volume

__all__ = [
    "FileIdentity",
    "FoundObject",
    "FoundPartial",
    "OpenObject",
    "PartialFile",
    "PartialHeld",
    "PartialReader",
    "PartialState",
    "Removal",
    "RemovalState",
    "UnknownFile",
    "Volume",
]
