"""The state store port on Redis. Every method is one command or one Lua script, so each is atomic."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import replace
from typing import Any

import structlog

from distributor_node.shared.adapters.state_common import (
    MAX_ACCESS_BATCHES,
    MAX_ACCESS_LOG_BYTES,
    StateTimeouts,
)
from distributor_node.shared.adapters.state_redis.connection import RedisConnection, listen
from distributor_node.shared.adapters.state_redis.records import (
    pack_accesses,
    pack_announcement,
    pack_basis,
    pack_failure,
    pack_followed,
    pack_worker,
    read_accesses,
    read_entry,
    read_fetch,
    read_followers,
    read_object_status,
    read_policy_state,
    read_server_stats,
    read_worker,
)
from distributor_node.shared.domain.errors import InvalidInput, StateStoreUnavailable
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.operator_state import (
    OperatorState,
    OperatorStateSnapshot,
    Warming,
    WarmingScope,
    decode_operator_state,
    decode_warming,
    encode_operator_state,
    encode_warming,
)
from distributor_node.shared.domain.space import (
    MAX_FIRST_VIEWS,
    VIEW_WINDOW,
    AdmissionQuestion,
    Followed,
    Followers,
    Usage,
)
from distributor_node.shared.ports.state_store import (
    FOLLOWER_MEMORY,
    MAX_VIEWED,
    MAX_WANTED,
    VIEWER_MEMORY,
    WANTED_MEMORY,
    Access,
    AlreadyStored,
    Announcement,
    BeginResult,
    Claim,
    FailureCause,
    Fetch,
    Granted,
    HeldElsewhere,
    IndexEntry,
    Lease,
    NeverFits,
    NoSpace,
    NotReconciled,
    ObjectStatus,
    PolicyState,
    ProcessReport,
    PurgeRequest,
    ServerStats,
    Superseded,
    Term,
    WorkerReport,
)
from distributor_node.shared.waiting import cancel_and_wait

logger = structlog.get_logger()


NEARLY_FULL = 0.9
"""Share of maxmemory, as in records.lua, from which the server drops what only saves time."""

_ENTRIES_BATCH = 1000
_WANTED_BATCH = 8  # objects: fewer keys than the scripts have that compare formats, see records.lua


def milliseconds(seconds: float) -> int:
    """At least 1, because Redis rejects an expiry of 0."""
    return max(1, round(seconds * 1000))


def pack_admission(question: AdmissionQuestion) -> tuple[int, ...]:
    """The last arguments of the claim script."""
    return (
        question.size,
        -1 if question.above is None else question.above,
        question.low_watermark,
        milliseconds(question.window),
        milliseconds(question.view_window),
        MAX_FIRST_VIEWS,
    )


class RedisStateStore:
    """See the port for each method."""

    def __init__(self, url: str, prefix: str, limit: int, timeouts: StateTimeouts) -> None:
        """`url`: redis://, rediss:// or unix://. `prefix`: of all keys. `limit`: of the volume, in bytes."""
        self._connection = RedisConnection(url, prefix, timeouts.operation_timeout)
        self._limit = limit
        self._timeouts = timeouts

    async def open(self) -> None:
        self._connection.open()

    async def close(self) -> None:
        await self._connection.close()

    async def ping(self) -> None:
        await self._connection.command("PING")

    async def server_stats(self) -> ServerStats:
        return read_server_stats(await self._connection.command("INFO"))

    async def problems(self) -> Sequence[str]:
        found = []
        stats = await self.server_stats()
        if stats.memory_limit and stats.memory >= NEARLY_FULL * stats.memory_limit:
            found.append(f"{100 * stats.memory // stats.memory_limit} % of its maxmemory are in use")
        try:
            await self._connection.command("SET", self._connection.keys.write_probe, 1, "PX", 1000)
        except StateStoreUnavailable as error:
            found.append(f"writes are refused: {error}")
        return found

    # Requests

    async def find(self, object_id: ObjectId) -> ObjectStatus:
        return read_object_status(object_id, await self._connection.run("find", object_id))

    async def claim(
        self,
        object_id: ObjectId,
        claimant: str,
        admission: AdmissionQuestion | None = None,
        trace: str = "",
    ) -> Claim:
        times, keys = self._timeouts, self._connection.keys
        seconds = (times.claim_seconds, times.queued_seconds, times.lost_job_seconds)
        given = () if admission is None else pack_admission(admission)
        reply = await self._connection.run_on(
            "claim",
            (*keys.all_for(object_id), keys.first_views),
            object_id,
            claimant,
            *map(milliseconds, seconds),
            trace,
            *given,
        )
        if reply == b"not_admitted":
            return Claim(won=False, status=ObjectStatus(fetch=None, failure=None), admitted=False)
        if isinstance(reply, int):
            return Claim(won=True, status=ObjectStatus(fetch=None, failure=None), serial=reply)
        return Claim(won=False, status=read_object_status(object_id, reply))

    async def mark_queued(self, object_id: ObjectId, claimant: str, serial: int = 0) -> None:
        duration = milliseconds(self._timeouts.queued_seconds)
        await self._connection.run("mark_queued", object_id, claimant, duration, serial)

    async def release_claim(self, object_id: ObjectId, claimant: str | None, serial: int = 0) -> None:
        await self._connection.run("withdraw", object_id, claimant or "", serial)

    async def usage(self) -> Usage:
        reply = await self._connection.run("usage", "")
        used, reserved, objects, fetches, reconciled, churn, leaving, *others = reply
        taken = used + leaving
        return Usage(
            self._limit, taken, reserved, objects, fetches, bool(reconciled), churn, leaving, *others
        )

    async def record_accesses(self, accesses: Sequence[Access]) -> None:
        if accesses:
            bounds = (MAX_ACCESS_BATCHES, MAX_ACCESS_LOG_BYTES)
            await self._connection.run("record_accesses", "", pack_accesses(accesses), *bounds)

    # Fetching

    async def begin(
        self, object_id: ObjectId, size: int, worker: str, claim: int = 0, trace: str = ""
    ) -> BeginResult:
        lease = milliseconds(self._timeouts.lease_seconds)
        answer, *values = await self._connection.run(
            "begin", object_id, size, worker, lease, self._limit, claim, trace
        )
        match answer:
            case b"granted":
                token, resumed, surplus = values
                return Granted(Lease(object_id, token, size, worker, surplus), resumed=bool(resumed))
            case b"stored":
                return AlreadyStored(generation=values[0])
            case b"superseded":
                return Superseded()
            case b"held":
                return HeldElsewhere(seconds_left=values[0] / 1000)
            case b"no_space":
                return NoSpace(missing=values[0])
            case b"never_fits":
                return NeverFits()
            case _:
                return NotReconciled()

    async def renew(self, lease: Lease, source: str | None = None) -> bool:
        duration = milliseconds(self._timeouts.lease_seconds)
        return bool(await self._run_leased("renew", lease, duration, source or ""))

    async def resize(self, lease: Lease, size: int) -> bool:
        return bool(await self._run_leased("resize", lease, size, self._limit))

    async def return_surplus(self, lease: Lease) -> None:
        await self._run_leased("return_surplus", lease)

    async def commit(self, lease: Lease, stored_at: float) -> bool:
        return bool(await self._run_leased("commit", lease, stored_at))

    async def park(self, lease: Lease, held: int | None = None) -> None:
        await self._run_leased("park", lease, "" if held is None else held)

    async def release(self, lease: Lease) -> None:
        await self._run_leased("release", lease)

    async def record_failure(
        self,
        object_id: ObjectId,
        reason: str,
        seconds: float,
        cause: FailureCause = FailureCause.OTHER,
    ) -> None:
        packed = pack_failure(reason, cause)
        await self._connection.run("record_failure", object_id, packed, milliseconds(seconds))

    async def refute_failure(self, object_id: ObjectId, cause: FailureCause) -> bool:
        return bool(await self._connection.run("refute_failure", object_id, pack_failure("", cause)))

    async def request_space(self, object_id: ObjectId, size: int, seconds: float) -> None:
        await self._connection.run("want_space", object_id, size, milliseconds(seconds))

    async def forget(self, object_id: ObjectId, generation: int) -> bool:
        return bool(await self._connection.run("forget", object_id, generation))

    async def _run_leased(self, script: str, lease: Lease, *arguments: str | int | float) -> object:
        reply: object = await self._connection.run(
            script, lease.object_id, lease.token, lease.worker, *arguments
        )
        return reply

    # Workers and viewers

    async def report_worker(self, report: WorkerReport, seconds: float) -> None:
        keys = (self._connection.keys.workers,)
        arguments = (milliseconds(seconds), pack_worker(report))
        await self._connection.run_on("report_worker", keys, report.worker, *arguments)

    async def withdraw_worker(self, worker: str) -> None:
        await self._connection.command("HDEL", self._connection.keys.workers, worker)

    async def workers(self) -> Sequence[WorkerReport]:
        found = await self._connection.run_on("workers", (self._connection.keys.workers,), "")
        return [read_worker(worker, age, packed) for worker, age, packed in sorted(found)]

    async def record_viewers(self, object_ids: Sequence[ObjectId]) -> None:
        if object_ids:
            keys, memory = (self._connection.keys.viewed,), milliseconds(VIEWER_MEMORY)
            await self._connection.run_on("record_viewers", keys, "", memory, MAX_VIEWED, *object_ids)

    async def last_viewed(self, object_ids: Sequence[ObjectId]) -> Sequence[float | None]:
        if not object_ids:
            return ()
        keys, oldest = (self._connection.keys.viewed,), milliseconds(VIEWER_MEMORY)
        ages = await self._connection.run_on("last_viewed", keys, "", oldest, *object_ids)
        return [None if age < 0 else age / 1000 for age in ages]

    async def record_wanted(self, object_id: ObjectId, positions: Sequence[int]) -> None:
        if positions:
            keys, memory = (self._connection.keys.wanted(object_id),), milliseconds(WANTED_MEMORY)
            newest = positions[-MAX_WANTED:]
            await self._connection.run_on("record_wanted", keys, object_id, memory, MAX_WANTED, *newest)

    async def wanted_positions(self, object_ids: Sequence[ObjectId]) -> Sequence[Sequence[int]]:
        found: list[Sequence[int]] = []
        for start in range(0, len(object_ids), _WANTED_BATCH):
            keys = tuple(map(self._connection.keys.wanted, object_ids[start : start + _WANTED_BATCH]))
            memory = milliseconds(WANTED_MEMORY)
            found += [
                sorted(map(int, positions))
                for positions in await self._connection.run_on("wanted_positions", keys, "", memory)
            ]
        return found

    async def record_followers(self, process: str, followed: Sequence[Followed]) -> None:
        if followed:
            keys = self._connection.keys
            limits = (milliseconds(FOLLOWER_MEMORY), milliseconds(VIEW_WINDOW), MAX_VIEWED)
            await self._connection.run_on(
                "record_followers",
                (*keys.all_for(""), keys.viewed),
                "",
                process,
                *limits,
                *(value for one in followed for value in pack_followed(one)),
            )

    async def followers(self, object_id: ObjectId) -> Followers:
        keys, memory = self._connection.keys, milliseconds(FOLLOWER_MEMORY)
        given = (*keys.all_for(object_id), keys.viewed)
        return read_followers(await self._connection.run_on("followers", given, object_id, memory))

    async def order_whole(self, object_id: ObjectId) -> None:
        await self._connection.run("order_whole", object_id)

    # Reports of processes

    async def report_process(self, process: str, content: str, seconds: float) -> bool:
        keys = (self._connection.keys.reports, self._connection.keys.reports_watched)
        arguments = (process, milliseconds(seconds), content)
        return bool(await self._connection.run_on("report_process", keys, *arguments))

    async def withdraw_process(self, process: str) -> None:
        await self._connection.command("HDEL", self._connection.keys.reports, process)

    async def process_reports(self) -> Sequence[ProcessReport]:
        found = await self._connection.run_on("workers", (self._connection.keys.reports,), "")
        return [
            ProcessReport(name.decode(), content.decode(), age / 1000) for name, age, content in sorted(found)
        ]

    async def watch_reports(self, seconds: float) -> None:
        await self._connection.command(
            "SET", self._connection.keys.reports_watched, 1, "PX", milliseconds(seconds)
        )

    # Eviction, reconciliation, policy: the leading evictor

    async def lead(self, holder: str, seconds: float) -> Term | None:
        token = await self._connection.run("lead", "", holder, milliseconds(seconds))
        return Term(holder, token) if token else None

    async def resign(self, term: Term) -> None:
        await self._run_as_leader("resign", term)

    async def is_leader(self, term: Term) -> bool:
        leader = await self._connection.command("GET", self._connection.keys.leader)
        return bool(leader == _term_value(term).encode())

    async def space_requests(self) -> Sequence[int]:
        return [int(wanted) for wanted in await self._connection.run("space_wanted", "")]

    async def begin_eviction(
        self, term: Term, object_id: ObjectId, min_idle: float, *, even_pinned: bool = False
    ) -> bool:
        arguments = (min_idle, int(even_pinned), object_id)
        return (await self._query_as_leader("begin_eviction", term, *arguments)) == [1]

    async def finish_eviction(self, term: Term, object_id: ObjectId) -> int:
        [freed] = await self._query_as_leader("finish_eviction", term, object_id)
        return freed

    async def detach_eviction(self, term: Term, object_id: ObjectId) -> bool:
        return (await self._run_as_leader("detach_eviction", term, object_id)) == 1

    async def begin_evictions(
        self, term: Term, object_ids: Sequence[ObjectId], min_idle: float
    ) -> Sequence[bool]:
        begun = await self._query_as_leader("begin_eviction", term, min_idle, 0, *object_ids)
        return [answer == 1 for answer in begun]

    async def finish_evictions(self, term: Term, object_ids: Sequence[ObjectId]) -> Sequence[int]:
        return await self._query_as_leader("finish_eviction", term, *object_ids)

    async def cancel_eviction(self, term: Term, object_id: ObjectId) -> None:
        await self._run_as_leader("cancel_eviction", term, object_id)

    async def adopt(self, term: Term, entry: IndexEntry) -> bool:
        [adopted] = await self.adopt_many(term, [entry])
        return adopted

    async def adopt_many(self, term: Term, entries: Sequence[IndexEntry]) -> Sequence[bool]:
        values: list[str | int | float] = []
        for entry in entries:
            values += (entry.object_id, entry.size, entry.frequency, entry.last_access, entry.priority)
        return [answer == 1 for answer in await self._query_as_leader("adopt", term, *values)]

    async def adopt_partial(self, term: Term, object_id: ObjectId, size: int) -> bool:
        return bool(await self._run_as_leader("adopt_partial", term, object_id, size))

    async def steal_lease(self, term: Term, object_id: ObjectId) -> Lease | None:
        duration = milliseconds(self._timeouts.lease_seconds)
        reply = await self._run_as_leader("seize", term, object_id, term.holder, duration)
        if not isinstance(reply, list):
            return None
        token, size = reply
        return Lease(object_id, token, size, term.holder)

    async def recount(self, term: Term, *, entries: bool = True) -> int:
        return int(str(await self._run_as_leader("recount", term, "", int(entries))))

    async def set_leaving(self, term: Term, count: int) -> None:
        await self._run_as_leader("set_leaving", term, "", count)

    async def set_reconciled(self, term: Term) -> None:
        await self._run_as_leader("set_accounted", term)

    async def entries(self) -> AsyncIterator[Sequence[IndexEntry]]:
        async with aclosing(self._pages()) as pages:
            async for found in pages:
                entries, unreadable = [], []
                for object_id, packed in found.items():
                    entry = read_entry(object_id, packed)
                    if entry is None:
                        unreadable.append(object_id)
                    else:
                        entries.append(entry)
                if unreadable:
                    # Their files are adopted again by the next reconciliation, as those of an emptied store.
                    logger.error("index_records_dropped", records=len(unreadable))
                    await self._connection.run("drop_unreadable", "", *unreadable)
                if entries:
                    yield entries

    async def _pages(self) -> AsyncGenerator[dict[bytes, bytes], None]:
        """The index, page by page. The server makes the next page while this process is busy with one."""

        def ask(cursor: int) -> asyncio.Task[Any]:
            scan = ("HSCAN", self._connection.keys.objects, cursor, "COUNT", _ENTRIES_BATCH)
            return asyncio.create_task(self._connection.command(*scan), name="index-page")

        asked = ask(0)
        try:
            while True:
                cursor, found = await asked
                if cursor == 0:
                    yield found
                    return
                asked = ask(cursor)
                await asyncio.sleep(0)  # it is sent
                yield found
        finally:
            await cancel_and_wait(asked)
            if not asked.cancelled():
                asked.exception()  # retrieved: the reader has left, so no one else does

    async def fetches(self) -> Sequence[Fetch]:
        found = await self._connection.run("fetches", "", milliseconds(self._timeouts.lost_job_seconds))
        return [read_fetch(ObjectId(object_id.decode()), shown) for object_id, shown in found]

    async def read_accesses(self, position: str, at_most: int) -> tuple[str, Sequence[Access]]:
        after = f"({position}" if position else "-"
        log = self._connection.keys.accesses
        batches = await self._connection.command("XRANGE", log, after, "+", "COUNT", at_most)
        accesses: list[Access] = []
        for batch_id, fields in batches:
            accesses.extend(read_accesses(fields[b"batch"]))
            position = batch_id.decode()
        return position, accesses

    async def entry(self, object_id: ObjectId) -> IndexEntry | None:
        packed = await self._connection.command("HGET", self._connection.keys.objects, object_id)
        return None if packed is None else read_entry(object_id.encode(), packed)

    async def load_policy_state(self) -> PolicyState:
        fields = ("inflation", "position", "basis")
        found = await self._connection.command("HMGET", self._connection.keys.policy, *fields)
        try:
            return read_policy_state(*found)
        except ValueError as error:
            logger.error("policy_state_dropped", reason=str(error))
            return PolicyState()

    async def save_policy(self, term: Term, entries: Sequence[IndexEntry], state: PolicyState) -> None:
        values: list[str | int | float] = []
        for entry in entries:
            values += (entry.object_id, entry.frequency, entry.last_access, entry.priority)
        kept = (state.basis.inflation, state.position, pack_basis(state))
        await self._run_as_leader("save_policy", term, "", *kept, *values)

    async def _run_as_leader(
        self, script: str, term: Term, object_id: ObjectId | str = "", *arguments: str | int | float
    ) -> object:
        reply: object = await self._connection.run(script, object_id, _term_value(term), *arguments)
        return reply

    async def _query_as_leader(self, script: str, term: Term, *arguments: str | int | float) -> list[int]:
        """Run a script on many objects, which returns one number for each."""
        reply = await self._run_as_leader(script, term, "", *arguments)
        return reply if isinstance(reply, list) else []

    # Operator: state, pins, purges, warming, token ids

    async def operator_state(self) -> OperatorState | None:
        keys = self._connection.keys
        version, text = await self._connection.command("HMGET", keys.operator_state, "version", "orders")
        if version is None or text is None:
            return None
        try:
            return decode_operator_state(text, int(version))
        except InvalidInput as error:
            raise StateStoreUnavailable(str(error)) from error

    async def change_operator_state(
        self, expected_version: int, state: OperatorState
    ) -> OperatorState | None:
        version = await self._connection.run(
            "change_orders", "", expected_version, encode_operator_state(state)
        )
        return replace(state, version=version) if version else None

    async def restore_operator_state(self, snapshot: OperatorStateSnapshot) -> bool:
        arguments = (encode_operator_state(snapshot.state), *snapshot.pinned)
        return bool(await self._connection.run("restore_orders", "", *arguments))

    async def pinned(self) -> frozenset[ObjectId]:
        found = await self._connection.command("SMEMBERS", self._connection.keys.pins)
        return frozenset(ObjectId(object_id.decode()) for object_id in found)

    async def change_pins(
        self, pin: Sequence[ObjectId] = (), unpin: Sequence[ObjectId] = ()
    ) -> frozenset[ObjectId]:
        first = encode_operator_state(OperatorState())
        changed = await self._connection.run("change_pins", "", first, len(pin), *pin, *unpin)
        return frozenset(ObjectId(object_id.decode()) for object_id in changed)

    async def request_purges(self, object_ids: Sequence[ObjectId]) -> None:
        await self._connection.run("want_purges", "", *object_ids)

    async def pending_purges(self, at_most: int) -> Sequence[PurgeRequest]:
        keys = self._connection.keys
        # HRANDFIELD bounds the reply, unlike HSCAN. It is random, so requests that fail now do not block the others.
        found = await self._connection.command("HRANDFIELD", keys.purges, at_most, "WITHVALUES")
        pairs = zip(found[::2], found[1::2], strict=True)
        return [PurgeRequest(ObjectId(object_id.decode()), int(serial)) for object_id, serial in pairs]

    async def complete_purge(self, term: Term, request: PurgeRequest) -> None:
        await self._run_as_leader("end_purge", term, request.object_id, request.serial)

    async def start_warming(self, scope: WarmingScope) -> Warming | None:
        ordered = Warming(0, scope)
        serial = await self._connection.run("order_warming", "", encode_warming(ordered))
        return replace(ordered, serial=serial) if serial else None

    async def warming(self) -> Warming | None:
        keys = self._connection.keys
        serial, text = await self._connection.command("HMGET", keys.warming, "serial", "warming")
        return None if serial is None else _read_warming(text, int(serial))

    async def lease_warming(
        self, holder: str, seconds: float, progress: Warming | None = None
    ) -> Warming | None:
        reported: tuple[int, str, str] = (0, "", "")
        if progress is not None:
            reported = (progress.serial, progress.state, encode_warming(progress))
        reply = await self._connection.run("tend_warming", "", holder, milliseconds(seconds), *reported)
        return None if reply is None else _read_warming(reply[1], int(reply[0]))

    async def consume_token_id(self, token_id: str, issued: float, seconds: float) -> bool:
        keys = self._connection.keys
        given = (*keys.all_for(""), keys.token_id(token_id))
        return bool(await self._connection.run_on("use_ticket", given, "", issued, milliseconds(seconds)))

    # Announcements

    async def announce(self, announcement: Announcement) -> None:
        channel = self._connection.keys.channel
        try:
            await self._connection.command("PUBLISH", channel, pack_announcement(announcement))
        except StateStoreUnavailable as error:
            logger.debug("announcement_failed", topic=announcement.topic, reason=str(error))

    def listen(self) -> AbstractAsyncContextManager[AsyncIterator[Announcement]]:
        return listen(self._connection.url, self._connection.keys.channel, self._timeouts.operation_timeout)


def _term_value(term: Term) -> str:
    """As lead.lua writes it."""
    return f"{term.token} {term.holder}"


def _read_warming(text: bytes, serial: int) -> Warming:
    try:
        return decode_warming(text, serial)
    except InvalidInput as error:
        raise StateStoreUnavailable(str(error)) from error
