"""The volume: the directory that all services share. Its content is the truth about what is cached.

    objects/<shard>/<id>     a complete, verified object; it got here by one rename, after fsync
    records/<shard>/<id>     its record (JSON, at most RECORD_BYTES): size, hash, entity tag, media type
    incoming/<id>.part       a partial download; its size is its progress
    incoming/<id>.json       the sidecar of the partial download: the record it is going to have
    leaving/<id>             an object that was removed while it was being sent; `<id>,<inode>` beside an older one

A shard is made when it is first written to. A missing shard is an empty one.

Four facts are kept by the file system itself, so they hold across processes and end with the process:
  - The writer of a partial file holds an exclusive flock on it, and a shared one after verification. A process that
    sends an object for longer than a moment holds a shared flock. A process that removes a file takes the exclusive
    flock first. The kernel releases the locks of a killed process.
  - A process that follows a partial file holds an open file description lock for reading on it. An eviction takes the
    opposite lock first.
  - A partial file that has passed verification is readable by others (mode bit o+r). Followers check that bit.
  - A file that has no name left (st_nlink 0) is being removed. No process begins to send it.

All calls block, most of them briefly. Run fsync, scans and hashing in a worker thread.
"""

from distributor_node.shared.adapters.volume.objects import (
    ChangeWatch,
    FileIdentity,
    OpenObject,
    Removal,
    RemovalState,
)
from distributor_node.shared.adapters.volume.partial import (
    PartialFile,
    PartialHeld,
    PartialReader,
    PartialState,
)
from distributor_node.shared.adapters.volume.records import FileState
from distributor_node.shared.adapters.volume.scan import (
    FoundObject,
    FoundPartial,
    TrashedFile,
    UnknownFile,
    UnreadableFile,
)
from distributor_node.shared.adapters.volume.volume import Volume

__all__ = [
    "ChangeWatch",
    "FileIdentity",
    "FileState",
    "FoundObject",
    "FoundPartial",
    "OpenObject",
    "PartialFile",
    "PartialHeld",
    "PartialReader",
    "PartialState",
    "Removal",
    "RemovalState",
    "TrashedFile",
    "UnknownFile",
    "UnreadableFile",
    "Volume",
]
