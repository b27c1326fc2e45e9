"""The other nodes of the fleet: which of them are alive, and how they are asked for objects."""

from __future__ import annotations

import asyncio
import math
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import structlog

from distributor_node.shared.adapters.sources.client import SourceClient, SourceObservation
from distributor_node.shared.adapters.sources.connections import SourceLimits
from distributor_node.shared.domain.errors import (
    ConfigurationError,
    InvalidInput,
    SourceError,
    TooManyOpenFiles,
    VolumeError,
)
from distributor_node.shared.domain.objects import ObjectId, StoredRecord, source_name
from distributor_node.shared.domain.peers import (
    HOP,
    HOP_AUTH_HEADER,
    HOP_COPY,
    HOP_HEADER,
    FleetRules,
    HopKind,
    HotObjects,
    PeerLiveness,
    PeerRequest,
    PeerUse,
    Ring,
    peer_requests,
    sign_hop,
    verify_hop,
)
from distributor_node.shared.observability.metrics import (
    PEER_BYTES,
    PEER_COPIES,
    PEER_LATENCY,
    PEER_REQUESTS,
    PEERS_ALIVE,
    PEERS_NOT_ALIVE,
    source_label,
)
from distributor_node.shared.waiting import cancel_and_wait

_ASSETS = "/api/v1/assets/"
_MIN_PROBE_TIMEOUT = 1.0
_RESOLVE_TIMEOUT = 5.0  # seconds; the start waits for it
_PROBES_AT_ONCE = 32
_MIN_SECRET = 16  # bytes

_MAX_WAITING = 10_000  # objects to be offered to second homes
_MAX_REMEMBERED = 20_000
_OFFER_AGAIN = 600.0
"""Seconds until the second home is asked again whether it still has its copy."""

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Hop:
    """One request to a peer."""

    url: str
    headers: Mapping[str, str]
    only_if_cached: bool


class Peers:
    """The fleet as this process sees it. Call `open` before use and `close` at the end.

    Each process probes by itself: a split network then leaves every part with the members that it can reach.
    """

    def __init__(
        self,
        rules: FleetRules,
        limits: SourceLimits,
        is_penalised: Callable[[str], bool],
        secret_file: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`limits`: of requests to peers. `is_penalised`: whether a peer, by its URL, failed lately. `clock`: monotonic
        seconds."""
        self.own = rules.own
        self._rules = rules
        self._secret_file = secret_file
        self._is_penalised = is_penalised
        self._clock = clock
        self._secret: bytes | None = None
        self.client = SourceClient(limits, _count_observation)
        # A slow answer to a probe is an answer: only a peer that is gone moves its objects.
        timeout = max(_MIN_PROBE_TIMEOUT, rules.first_byte_wait)
        self._prober = SourceClient(
            SourceLimits(
                connect_timeout=timeout,
                first_byte_timeout=timeout,
                max_connections=_PROBES_AT_ONCE,
                follow_to_other_hosts=False,
            )
        )
        self._liveness: dict[str, PeerLiveness] = {}
        self._ring = Ring({self.own: self._weight(self.own)})
        self._former: Ring | None = None
        self._changed_at = clock()
        self._hot = HotObjects(rules.hot_views, rules.hot_half_life)
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self) -> None:
        """Read the secret, resolve the name, and begin to probe. Raises ConfigurationError for an unusable secret."""
        if self._secret_file is not None:
            try:
                self._secret = await asyncio.to_thread(read_secret, self._secret_file)
            except OSError as error:
                raise ConfigurationError(
                    f"peers.secret_file: {self._secret_file}: {error.strerror}"
                ) from error
            except InvalidInput as error:
                raise ConfigurationError(f"peers.secret_file: {error}") from error
        await self.client.open()
        await self._prober.open()
        if self._rules.dns is None:
            self._set_members(self._rules.urls)
        else:
            await self._resolve(self._rules.dns)
            self._tasks.append(asyncio.create_task(self._keep_resolving(self._rules.dns), name="peers-dns"))
        self._changed_at = self._clock()
        self._former = None
        self._tasks.append(asyncio.create_task(self._keep_probing(), name="peers-probe"))

    async def close(self) -> None:
        await cancel_and_wait(*self._tasks)
        await self.client.close()
        await self._prober.close()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # Who has what

    @property
    def known(self) -> frozenset[str]:
        """The base URLs of all other nodes, alive or not."""
        return frozenset(self._liveness)

    @property
    def alive(self) -> frozenset[str]:
        """The base URLs of the other nodes that are alive."""
        return self._ring.members - {self.own}

    @property
    def shares(self) -> Mapping[str, float]:
        """The share of all objects that each node alive is the home of, this one included, by base URL."""
        total = sum(map(self._weight, self._ring.members))
        return {name: self._weight(name) / total for name in sorted(self._ring.members)}

    def weight_of(self, name: str) -> float:
        """Return the weight of a node, as the settings have it."""
        return self._weight(name)

    def is_home(self, object_id: ObjectId) -> bool:
        """Whether this node is the object's home, or acts as one while that fails."""
        return self._ranked(object_id)[0] == self.own

    def _ranked(self, object_id: ObjectId) -> Sequence[str]:
        """Return the live nodes in their order for the object, from the first one that has not failed lately.

        So until the probes tell that a home is gone, the next in rank fetches its objects once for the fleet.
        """
        ranked = self._ring.ranked(object_id)
        for rank, name in enumerate(ranked):
            if name == self.own or not self._is_penalised(name):
                return ranked[rank:]
        return ranked

    def has(self, url: str) -> bool:
        """Whether this is the URL of an object at another node."""
        return url.rpartition(_ASSETS)[0] in self._liveness

    def is_second_home(self, object_id: ObjectId, size: int) -> bool:
        """Whether this node keeps a second copy of an object of `size` bytes, if its home offers it."""
        second = self._ranked(object_id)[1 : self._rules.copies]
        return size > self._rules.keep_below and self.own in second

    def second_home(self, object_id: ObjectId) -> str | None:
        """Return the node that keeps a second copy of an object whose home is this node. None: none does."""
        ranked = self._ranked(object_id)
        if self._rules.copies < 2 or ranked[0] != self.own or _is_nameless(object_id):
            return None
        return next((name for name in ranked[1:2] if not self._is_penalised(name)), None)

    async def offer(self, peer: str, object_id: ObjectId) -> bool:
        """Have the peer copy an object from this node. Returns whether it has it already. Raises SourceError."""
        hop = self._hop(PeerRequest(peer, only_if_cached=True), object_id, HOP_COPY)
        answer = await self.client.ask(hop.url, {**hop.headers, "Range": "bytes=0-0"})
        return answer.status < 300

    def keeps_cold(self, object_id: ObjectId, size: int | None) -> bool:
        """Whether this node keeps the object however rarely it is asked for. `size`: in bytes; None: unknown."""
        return (size is not None and size <= self._rules.keep_below) or self.is_home(object_id)

    def keeps(self, object_id: ObjectId, size: int | None, views: float) -> bool:
        """Whether this node keeps the object, if it is missing here. Counts the request.

        `size`: in bytes; None: unknown. `views`: the share of the object that is asked for, at most 1.
        """
        if size is not None and size <= self._rules.keep_below:
            return True
        ranked = self._ranked(object_id)
        if ranked[0] == self.own:
            return True
        rank = ranked.index(self.own)
        return self._hot.count(object_id, size or 0, views, rank, len(ranked), self._clock())

    def hops(self, object_id: ObjectId, use: PeerUse) -> Sequence[Hop]:
        """Return the requests to peers that come before the sources. None to peers that failed lately."""
        if _is_nameless(object_id):
            return ()
        ranked = self._ranked(object_id)
        requests = peer_requests(self.own, ranked, self._former_home(object_id, ranked), use)
        return [
            self._hop(request, object_id, HOP)
            for request in requests
            if not self._is_penalised(f"{request.base}/")
        ]

    def _hop(self, request: PeerRequest, object_id: ObjectId, hop: str) -> Hop:
        path = f"{_ASSETS}{object_id.path}"
        headers = {HOP_HEADER: hop}
        if request.only_if_cached:
            headers["Cache-Control"] = "only-if-cached"
        if self._secret is not None:
            headers[HOP_AUTH_HEADER] = sign_hop(self._secret, request.base, path, hop, time.time())
        return Hop(f"{request.base}{path}", headers, request.only_if_cached)

    def _former_home(self, object_id: ObjectId, ranked: Sequence[str]) -> str | None:
        """Return another live node that is likely to have the object from before the last change of the members.

        A node that was just started does not know that change. Had it been away, the second in rank was the home.
        """
        if self._clock() - self._changed_at > self._rules.handover:
            return None
        former = None if self._former is None else self._former.home(object_id)
        if former in (None, self.own, ranked[0]) or former not in self._ring.members:
            former = next((name for name in ranked[1:2] if name != self.own), None)
        return former

    def kind_of(self, object_id: ObjectId, hop: str, auth: str | None, *, at_peer_port: bool) -> HopKind:
        """Return who sent a request with a HOP_HEADER for this object.

        `hop`, `auth`: the values of HOP_HEADER and HOP_AUTH_HEADER. `at_peer_port`: it came to the port for peers.
        """
        if self._rules.has_port and not at_peer_port:
            return "stranger"
        path = f"{_ASSETS}{object_id.path}"
        return verify_hop(self._secret, self.own, path, hop, auth, time.time())

    # Members

    def _weight(self, name: str) -> float:
        return self._rules.weights.get(name, 1.0)

    def _set_members(self, names: Sequence[str]) -> None:
        """Take over the list of all nodes. Those that are new count as alive until probes fail."""
        others = [name for name in dict.fromkeys(names) if name != self.own]
        self._liveness = {name: self._liveness.get(name) or PeerLiveness() for name in others}
        self._rebuild()

    def _rebuild(self) -> None:
        members = {self.own, *(name for name, peer in self._liveness.items() if peer.live)}
        PEERS_ALIVE.set(len(members) - 1)
        PEERS_NOT_ALIVE.set(len(self._liveness) - len(members) + 1)
        if members == self._ring.members:
            return
        joined, left = members - self._ring.members, self._ring.members - members
        logger.info("peers_changed", alive=len(members) - 1, joined=sorted(joined), left=sorted(left))
        self._former = self._ring
        self._ring = Ring({name: self._weight(name) for name in members})
        self._changed_at = self._clock()

    async def _keep_resolving(self, dns: str) -> None:
        while True:
            await asyncio.sleep(self._rules.refresh_interval)
            await self._resolve(dns)

    async def _resolve(self, dns: str) -> None:
        """Take over the addresses of the name. If it cannot be resolved, the members stay as they are."""
        host, _, port = dns.rpartition(":")
        try:
            async with asyncio.timeout(_RESOLVE_TIMEOUT):
                found = await asyncio.get_running_loop().getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
        except (OSError, OverflowError, UnicodeError) as error:
            logger.warning("peers_not_resolved", name=host, reason=str(error) or "no answer in time")
            return
        addresses = sorted({str(entry[4][0]) for entry in found})
        names = [
            f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
            for address in addresses
        ]
        if self.own not in names:
            logger.warning("peers_without_this_node", name=host, own_url=self.own, found=names[:10])
        self._set_members(names)

    # Probes

    async def _keep_probing(self) -> None:
        while True:
            await asyncio.sleep(self._rules.probe_interval)
            await self.probe()

    async def probe(self) -> None:
        """Probe each peer once, at the address that objects are read from, and take in the results."""
        slots = asyncio.Semaphore(_PROBES_AT_ONCE)
        names = list(self._liveness)
        answered = await asyncio.gather(*(self._probe(name, slots) for name in names))
        now, changed = self._clock(), False
        for name, success in zip(names, answered, strict=True):
            peer = self._liveness.get(name)
            if peer is not None and success is not None:
                changed = peer.record_probe(success, now) or changed
        if changed:
            self._rebuild()

    async def _probe(self, name: str, slots: asyncio.Semaphore) -> bool | None:
        """Return whether the peer answered; None if that could not be found out."""
        async with slots:
            try:
                answer = await self._prober.ask(f"{name}/api/v1/status", {HOP_HEADER: "1"})
            except TooManyOpenFiles:
                return None
            except SourceError as error:
                logger.debug("peer_probe_failed", peer=source_name(name), reason=error.reason)
                return False
            return answer.status < 500


def _is_nameless(object_id: ObjectId) -> bool:
    """Whether the id was read back from a record or a job: a peer cannot tell which path the digest stands for."""
    return object_id.is_digest and object_id.path == object_id


class CopyOffers:
    """Has the second homes of objects keep copies of them. One per API process; `run` sends the offers.

    1. A request for an object on this node's volume is noted, in batches after the fact: a hit does nothing more.
    2. If this node is its home, and this is not the view that it was fetched for, it waits to be offered. The number of
       waiting objects is bounded.
    3. The second home is asked for one byte of it. If it does not have it, it fetches it from here, and from nowhere
       else.
    4. The next offer waits for as long as the copy takes at the rate that is allowed.
    """

    def __init__(
        self,
        peers: Peers,
        rules: FleetRules,
        record_of: Callable[[ObjectId], StoredRecord | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`record_of`: of an object on the volume; blocking. `clock`: monotonic seconds."""
        self._peers, self._rules, self._record_of, self._clock = peers, rules, record_of, clock
        self._fetched: OrderedDict[ObjectId, float] = OrderedDict()  # when
        self._settled: OrderedDict[ObjectId, float] = OrderedDict()  # offered, or nothing to offer; when
        self._alive: frozenset[str] = frozenset()  # the peers for which that holds
        self._waiting: OrderedDict[ObjectId, None] = OrderedDict()
        self._noted = asyncio.Event()

    def note_fetch(self, object_id: ObjectId) -> None:
        """Note that this node begins to fetch the object for a request."""
        _remember(self._fetched, object_id, self._clock())

    def note_views(self, object_ids: Iterable[ObjectId]) -> None:
        """Note that these objects were asked for."""
        if self._alive != self._peers.alive:
            self._alive = self._peers.alive
            self._settled.clear()
        now = self._clock()
        for object_id in object_ids:
            if len(self._waiting) >= _MAX_WAITING:
                return
            if (
                now - self._settled.get(object_id, -math.inf) >= _OFFER_AGAIN
                and now - self._fetched.get(object_id, -math.inf) >= self._rules.copy_after
            ):
                self._waiting[object_id] = None
                self._noted.set()

    async def run(self) -> None:
        """Offer what is noted, until cancelled."""
        while True:
            await self._noted.wait()
            self._noted.clear()
            await self.send()

    async def send(self) -> None:
        """Offer all that waits."""
        while self._waiting:
            object_id, _ = self._waiting.popitem(last=False)
            copied = await self._offer(object_id)
            await asyncio.sleep(copied / self._rules.copy_rate)

    async def _offer(self, object_id: ObjectId) -> int:
        """Offer the object, if there is a node to offer it to. Returns the bytes that are copied for it."""
        second, record = self._peers.second_home(object_id), None
        try:
            if second is not None:
                record = await asyncio.to_thread(self._record_of, object_id)
                if record is None:
                    return 0  # it is being fetched
            _remember(self._settled, object_id, self._clock())
            # Without a content hash nothing proves that the copy is of the version that is here.
            if second is None or record is None or record.content_hash is None:
                return 0
            if record.size <= self._rules.keep_below:
                return 0
            there = await self._peers.offer(second, object_id)
        except (SourceError, VolumeError) as error:
            logger.debug("copy_offer_failed", object_id=object_id, reason=str(error))
            self._settled.pop(object_id, None)
            return 0
        PEER_COPIES.labels(result="there" if there else "offered").inc()
        return 0 if there else record.size


def _remember(times: OrderedDict[ObjectId, float], object_id: ObjectId, now: float) -> None:
    times[object_id] = now
    times.move_to_end(object_id)
    if len(times) > _MAX_REMEMBERED:
        times.popitem(last=False)


def read_secret(file: Path) -> bytes:
    """Return the secret of a fleet. Blocking. Raises OSError if it cannot be read, InvalidInput if it is too short."""
    secret = file.read_bytes().strip()
    if len(secret) < _MIN_SECRET:
        raise InvalidInput(f"expected at least {_MIN_SECRET} bytes in {file}, got {len(secret)}")
    return secret


def _count_observation(observation: SourceObservation) -> None:
    """Count one request to a peer in the metrics."""
    if observation.first_byte is not None:
        PEER_LATENCY.observe(observation.first_byte)
    if observation.received:
        PEER_BYTES.labels(peer=source_label(f"//{observation.source}")).inc(observation.received)


def count_hop(result: str) -> None:
    """Count one hop by its result: hit, fetched, absent or failed."""
    PEER_REQUESTS.labels(result=result).inc()
