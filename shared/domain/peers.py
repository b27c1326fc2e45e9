"""Which node of a fleet keeps an object, and how nodes of a fleet ask each other.

Every object has one home: the live node that comes first by rendezvous hashing (Thaler and Ravishankar, 1998). Nodes
that know the same members agree on it without talking to each other. Pure: no I/O, and the time is an argument.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import lru_cache
from typing import Literal

HOP_HEADER = "X-Distributor-Hop"
"""In a request of a node to another one. A request with it is never forwarded to a third node."""
HOP = "1"
"""The value of HOP_HEADER in a request for an object."""
HOP_COPY = "copy"
"""The value of HOP_HEADER in an offer: the home tells another node to keep a second copy. Such a request is for one
byte and `only-if-cached`, so that a node of a release without copies sends that, or nothing, and fetches nothing."""
HOP_AUTH_HEADER = "X-Distributor-Hop-Auth"
"""The proof that a request comes from a node of the fleet, where the fleet has a secret. See `sign_hop`."""
HOP_TOLERANCE = 60.0
"""Seconds by which the clocks of two nodes may differ, the way of the request included."""

_SCALE = float(2**64)
_ORDERS_KEPT = 1024


@dataclass(frozen=True, slots=True)
class FleetRules:
    """How a node takes part in a fleet. Nodes are named by their base URLs, without a slash at the end."""

    own: str
    urls: tuple[str, ...] = ()  # all nodes
    dns: str | None = None  # NAME:PORT, whose addresses are the nodes
    weights: Mapping[str, float] = field(default_factory=dict)  # 1 for the others
    keep_below: int = 1024**2  # bytes of the largest object that every node keeps
    copies: int = 1  # of a larger object: 2 if the second node in rank keeps one too
    copy_after: float = 300.0  # seconds after its fetch from which a request for an object is a second view
    copy_rate: int = 20 * 1024**2  # bytes a second that one process offers to second homes
    has_port: bool = False  # peers ask at a port of their own
    hot_views: float = 4.0  # from which a larger object is kept at this node too
    hot_half_life: float = 60.0  # seconds after which a view weighs half
    first_byte_wait: float = (
        0.25  # seconds for a peer to accept a connection, and again to send its first byte
    )
    probe_interval: float = 1.0  # seconds
    refresh_interval: float = 5.0  # seconds between two look-ups of `dns`
    handover: float = 24 * 3600.0  # seconds after a change of members in which former homes are asked


class Ring:
    """The nodes that share the objects, with their weights. Names are the base URLs of the nodes."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        """`weights`: a node with twice the weight is the home of twice the objects. All must be above 0."""
        self.members = frozenset(weights)
        self._weights = dict(sorted(weights.items()))
        # One request asks for the order of its object several times, and a large ring has hundreds of scores.
        self._last_orders = lru_cache(_ORDERS_KEPT)(self._order)

    def ranked(self, object_id: str) -> tuple[str, ...]:
        """Return all nodes in the order in which they would be the object's home.

        Without its first node the order of the others stays. So a node that leaves moves only its own objects, each to
        the node that comes next, and a node that joins takes its share evenly from all.
        """
        return self._last_orders(object_id)

    def _order(self, object_id: str) -> tuple[str, ...]:
        return tuple(sorted(self._weights, key=lambda name: self._score(name, object_id), reverse=True))

    def home(self, object_id: str) -> str:
        """Return the first node. Raises ValueError if there is none."""
        return max(self._weights, key=lambda name: self._score(name, object_id))

    def _score(self, name: str, object_id: str) -> float:
        digest = hashlib.blake2b(f"{name}\n{object_id}".encode(), digest_size=8).digest()
        uniform = (int.from_bytes(digest, "big") + 0.5) / _SCALE  # above 0 and below 1
        # Weighted rendezvous hashing (Schindelhauer and Schomaker, 2005). The logarithm of a number that rounds to 1
        # would be 0.
        return self._weights[name] / -math.log(min(uniform, 1.0 - 2.0**-53))


class PeerUse(Enum):
    """What is asked of peers before the sources."""

    FETCH = auto()  # the home may fetch the object for this node
    CACHED = auto()  # they send what they have, and fetch nothing: a peer asked this node
    COPY = auto()  # the home sends what it has, and no source is asked: this node keeps a second copy
    NONE = auto()


@dataclass(frozen=True, slots=True)
class PeerRequest:
    """How one peer is asked for an object."""

    base: str  # the peer's base URL
    only_if_cached: bool  # it sends the object if it has it, and fetches nothing


def peer_requests(
    own: str, ranked: Sequence[str], former_home: str | None, use: PeerUse
) -> tuple[PeerRequest, ...]:
    """Return which peers are asked for an object, in this order, before the sources.

    `own`: this node. `ranked`: the live nodes in their order for the object. `former_home`: its home before the last
    change of the members, if that is recent.

    A second copy comes from the home, and from no other node.

    1. The home fetches for the fleet, unless this node is the home, or asks on behalf of a peer.
    2. After the home the second in rank: as a second home of a hot object, or from a time at which the home was down.
    3. The former home may still have the object.
    """
    requests: list[PeerRequest] = []
    if use is PeerUse.NONE:
        return ()
    if use is PeerUse.COPY:
        return (PeerRequest(ranked[0], only_if_cached=True),) if own in ranked[1:] else ()
    if use is PeerUse.FETCH and ranked and ranked[0] != own:
        requests.append(PeerRequest(ranked[0], only_if_cached=False))
        requests += [PeerRequest(second, only_if_cached=True) for second in ranked[1:2] if second != own]
    asked = {own, *(request.base for request in requests)}
    if former_home is not None and former_home not in asked and former_home in ranked:
        requests.append(PeerRequest(former_home, only_if_cached=True))
    return tuple(requests)


# Whether a peer is alive. Damped, because each change of the members moves objects.

_FAILURES_TO_LEAVE = 3
_PROBES_TO_RETURN = 3
_MAX_PROBES_TO_RETURN = 96
_CALM_SECONDS = 600.0
"""After so many seconds without a change, a peer counts as one that has never flapped."""


@dataclass(slots=True)
class PeerLiveness:
    """The liveness of one peer by its probes.

    It leaves after three failed probes in a row. It returns after three that succeeded, and after twice as many with
    each further change within ten minutes of the last one.
    """

    live: bool = True
    _in_a_row: int = 0  # probes that contradict `live`
    _returns: int = 0  # since it was calm
    _changed_at: float = -math.inf

    def record_probe(self, answered: bool, now: float) -> bool:
        """Take in one probe. `now`: monotonic seconds. Returns whether `live` has changed."""
        if answered is self.live:
            self._in_a_row = 0
            if now - self._changed_at > _CALM_SECONDS:
                self._returns = 0
            return False
        self._in_a_row += 1
        needed = _FAILURES_TO_LEAVE
        if not self.live:
            needed = min(_PROBES_TO_RETURN * 2**self._returns, _MAX_PROBES_TO_RETURN)
        if self._in_a_row < needed:
            return False
        self.live, self._in_a_row, self._changed_at = answered, 0, now
        if answered:
            self._returns = min(self._returns + 1, 16)
        return True


# Which objects a node keeps although it is not their home.

_MAX_COUNTED = 20_000
_FURTHER_FACTOR = 4.0
_HOT_SHARE = 0.1
"""An object is hot only if it causes this share of what one home serves to other nodes, in the mean. It would add that
much to the load of its home."""


class HotObjects:
    """Counts what this node passes on, each view weighing less with time: half after `half_life` seconds."""

    def __init__(self, views: float, half_life: float) -> None:
        """`views`: the least from which an object is hot."""
        self._views = views
        self._half_life = half_life
        self._counted: OrderedDict[str, tuple[float, float]] = OrderedDict()  # views, and when
        self._passed, self._passed_at = 0.0, 0.0  # bytes, and when

    def count(self, object_id: str, size: int, views: float, rank: int, members: int, now: float) -> bool:
        """Count a share of a view (1: the whole object), and return whether the object is hot at this node.

        `size`: of the whole object in bytes. `rank`: of this node for the object, 0 for its home. The second and third
        become homes of a hot object too. The others only if it is several times as hot, so that a large fleet does not
        keep it everywhere. `members`: nodes of the fleet. `now`: in seconds.
        """
        before, at = self._counted.get(object_id, (0.0, now))
        total = before * self._left_after(now - at) + views
        self._counted[object_id] = (total, now)
        self._counted.move_to_end(object_id)
        if len(self._counted) > _MAX_COUNTED:
            self._counted.popitem(last=False)
        self._passed = self._passed * self._left_after(now - self._passed_at) + views * size
        self._passed_at = now
        factor = 1.0 if rank <= 2 else _FURTHER_FACTOR
        large_share = total * size * members >= factor * _HOT_SHARE * self._passed
        return total >= self._views * factor and large_share

    def _left_after(self, seconds: float) -> float:
        """Return the weight of what was counted so many seconds ago."""
        weight: float = 0.5 ** (max(0.0, seconds) / self._half_life)
        return weight


# Proof that a request comes from a node of the fleet.

HopKind = Literal["peer", "stranger"]
_FORM = "2"


def sign_hop(secret: bytes, target: str, path: str, hop: str, now: float) -> str:
    """Return the value of HOP_AUTH_HEADER: `2:SECONDS:HMAC`, the POSIX time and an HMAC-SHA256 in hexadecimal.

    `target`: the base URL of the node that is asked, so that another one does not take the request for its own. `path`:
    of the request, percent-encoded, with its query. `hop`: the value of HOP_HEADER.
    """
    at = str(int(now))
    return f"{_FORM}:{at}:{_mac(secret, _FORM, target, hop, path, at)}"


def verify_hop(secret: bytes | None, own: str, path: str, hop: str, value: str | None, now: float) -> HopKind:
    """Return whether a request with a HOP_HEADER comes from a peer. Without a secret, every one does.

    `own`: the base URL of this node. Accepts the form of the release before too, `SECONDS:HMAC` of path and time, which
    names no node. A request in the present form cannot be turned into one of that form: the HMAC is of another text. So
    only requests of nodes that have not been upgraded can be repeated at another node.
    """
    if secret is None:
        return "peer"
    form, _, rest = (value or "").partition(":")
    at, _, mac = rest.partition(":")
    if form == _FORM:
        expected = _mac(secret, _FORM, own, hop, path, at)
    else:
        at, mac = form, rest
        expected = _mac(secret, path, at)
        if hop != HOP:
            return "stranger"  # the former form does not say what is asked for
    if not (at.isascii() and at.isdigit() and len(at) <= 12) or abs(int(at) - now) > HOP_TOLERANCE:
        return "stranger"
    return "peer" if hmac.compare_digest(expected.encode(), mac.encode("utf-8", "replace")) else "stranger"


def _mac(secret: bytes, *fields: str) -> str:
    """No field has a line break: a request target and a header's value have none."""
    return hmac.new(secret, "\n".join(fields).encode("utf-8", "replace"), hashlib.sha256).hexdigest()
