"""The order in which look-ups that wait for the catalog are sent: a fair queue. Nothing here waits or sends.

Objects that were seen before go first, so that requests for made-up ids delay no one else's. Within that, every client
gets one place in turn. Within one client, the newest look-up goes first: under overload the older ones will be given
up anyway, and serving them first would serve no one in time.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from distributor_node.shared.domain.objects import ObjectId


@dataclass(slots=True)
class QueuedLookup:
    """One object that waits for its place in a query."""

    object_id: ObjectId
    seen_before: bool  # this node has known the object
    queued_at: float  # seconds, on the caller's clock
    clients: dict[str, None] = field(default_factory=dict)  # those that wait for it, as an ordered set


_Clients = OrderedDict[str, dict[ObjectId, None]]


class LookupQueue:
    """Each object waits once, in the name of every client that asks for it."""

    def __init__(self) -> None:
        self._waiting: dict[ObjectId, QueuedLookup] = {}  # oldest first
        # Of objects seen before, and of others: the clients in the order of their last look-up, with their objects.
        self._seen: _Clients = OrderedDict()
        self._unseen: _Clients = OrderedDict()

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, object_id: ObjectId) -> bool:
        return object_id in self._waiting

    def oldest_at(self) -> float | None:
        """When the look-up that has waited longest was queued. None: the queue is empty."""
        for lookup in self._waiting.values():
            return lookup.queued_at
        return None

    def add(self, object_id: ObjectId, client: str, now: float, *, seen_before: bool) -> None:
        """Queue a look-up. If the object waits already, it waits for this client too."""
        lookup = self._waiting.get(object_id)
        if lookup is None:
            lookup = self._waiting[object_id] = QueuedLookup(object_id, seen_before, now)
        lookup.clients[client] = None
        clients = self._clients_of(lookup)
        clients.setdefault(client, {})[object_id] = None
        clients.move_to_end(client)

    def remove(self, object_id: ObjectId) -> bool:
        """Take a look-up out. False: it does not wait."""
        lookup = self._waiting.pop(object_id, None)
        if lookup is None:
            return False
        clients = self._clients_of(lookup)
        for client in lookup.clients:
            objects = clients[client]
            del objects[object_id]
            if not objects:
                del clients[client]
        return True

    def take(self, count: int) -> list[QueuedLookup]:
        """Take the next look-ups out, at most `count`."""
        taken: list[QueuedLookup] = []
        for clients in (self._seen, self._unseen):
            while clients and len(taken) < count:
                for client in list(reversed(clients)):
                    # An object that was just taken for another client may have been this client's last one.
                    if client in clients and len(taken) < count:
                        lookup = self._waiting[next(reversed(clients[client]))]
                        self.remove(lookup.object_id)
                        taken.append(lookup)
        return taken

    def drop(self) -> ObjectId | None:
        """Take out the look-up that is refused when there are too many. None: the queue is empty.

        It is the oldest one of the client with the most, and of an object that was not seen before, if there is any.
        """
        clients = self._unseen or self._seen
        if not clients:
            return None
        objects = clients[max(clients, key=lambda client: len(clients[client]))]
        unshared = (object_id for object_id in objects if len(self._waiting[object_id].clients) == 1)
        dropped = next(unshared, None) or next(iter(objects))
        self.remove(dropped)
        return dropped

    def _clients_of(self, lookup: QueuedLookup) -> _Clients:
        return self._seen if lookup.seen_before else self._unseen
