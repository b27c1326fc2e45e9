"""The other nodes of the fleet: which of them are alive, and how they are asked for objects."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import structlog

from distributor_node.shared.adapters.sources.client import SourceClient, SourceObservation
from distributor_node.shared.adapters.sources.connections import SourceLimits
from distributor_node.shared.domain.errors import ConfigurationError, SourceError, TooManyOpenFiles
from distributor_node.shared.domain.objects import ObjectId, source_name
from distributor_node.shared.domain.peers import (
    HOP_AUTH_HEADER,
    HOP_HEADER,
    FleetRules,
    HopKind,
    HotObjects,
    PeerLiveness,
    PeerUse,
    Ring,
    peer_requests,
    sign_hop,
    verify_hop,
)
from distributor_node.shared.observability.metrics import (
    PEER_BYTES,
    PEER_LATENCY,
    PEER_REQUESTS,
    PEERS_ALIVE,
    PEERS_NOT_ALIVE,
)
from distributor_node.shared.waiting import cancel_and_wait

_ASSETS = "/api/v1/assets/"
_MIN_PROBE_TIMEOUT = 1.0
_RESOLVE_TIMEOUT = 5.0  # seconds; the start waits for it
_PROBES_AT_ONCE = 32
_MIN_SECRET = 16  # bytes

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
            self._secret = await asyncio.to_thread(_read_secret, self._secret_file)
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
        if object_id.is_digest and object_id.path == object_id:
            return ()  # read back from a record or a job: a peer cannot tell which path the digest stands for
        ranked = self._ranked(object_id)
        path = f"{_ASSETS}{object_id.path}"
        hops = []
        for request in peer_requests(self.own, ranked, self._former_home(object_id, ranked), use):
            url = f"{request.base}{path}"
            if self._is_penalised(url):
                continue
            headers = {HOP_HEADER: "1"}
            if request.only_if_cached:
                headers["Cache-Control"] = "only-if-cached"
            if self._secret is not None:
                headers[HOP_AUTH_HEADER] = sign_hop(self._secret, path, time.time())
            hops.append(Hop(url, headers, request.only_if_cached))
        return hops

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

    def kind_of(self, object_id: ObjectId, auth: str | None) -> HopKind:
        """Return who sent a request with a HOP_HEADER for this object. `auth`: its HOP_AUTH_HEADER."""
        return verify_hop(self._secret, f"{_ASSETS}{object_id.path}", auth, time.time())

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


def _read_secret(file: Path) -> bytes:
    """Blocking. Raises ConfigurationError."""
    try:
        secret = file.read_bytes().strip()
    except OSError as error:
        raise ConfigurationError(f"peers.secret_file: {file}: {error.strerror}") from error
    if len(secret) < _MIN_SECRET:
        raise ConfigurationError(
            f"peers.secret_file: expected at least {_MIN_SECRET} bytes in {file}, got {len(secret)}"
        )
    return secret


def _count_observation(observation: SourceObservation) -> None:
    """Count one request to a peer in the metrics."""
    if observation.first_byte is not None:
        PEER_LATENCY.observe(observation.first_byte)
    if observation.received:
        PEER_BYTES.inc(observation.received)


def count_hop(result: str) -> None:
    """Count one hop by its result: hit, fetched, absent or failed."""
    PEER_REQUESTS.labels(result=result).inc()
