"""The operator's part: orders, pins, purges, warming, tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from shared.adapters.state_redis.eviction import RedisEviction
from shared.adapters.state_redis.requests import milliseconds
from shared.domain.errors import InvalidInput, StateStoreUnavailable
from shared.domain.objects import ObjectId
from shared.domain.orders import (
    OperatorState,
    OperatorStateSnapshot,
    decode_operator_state,
    encode_operator_state,
)
from shared.domain.warming import Warming, WarmingScope, decode_warming, encode_warming
from shared.ports.order_book import PurgeRequest
from shared.ports.state_store import Term


class RedisOrders(RedisEviction):
    """See the port for each verb."""

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

    async def change_pins(self, pin: Sequence[ObjectId] = (), unpin: Sequence[ObjectId] = ()) -> int:
        first = encode_operator_state(OperatorState())
        return int(await self._connection.run("change_pins", "", first, len(pin), *pin, *unpin))

    async def request_purges(self, object_ids: Sequence[ObjectId]) -> None:
        await self._connection.run("want_purges", "", *object_ids)

    async def pending_purges(self, at_most: int) -> Sequence[PurgeRequest]:
        keys = self._connection.keys
        # Unlike HSCAN it says how many at most; requests that cannot be fulfilled now do not stand in the others' way.
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
        key = self._connection.keys.token_id(token_id)
        return bool(await self._connection.command("SET", key, 1, "NX", "PX", milliseconds(seconds)))


def _read_warming(text: bytes, serial: int) -> Warming:
    try:
        return decode_warming(text, serial)
    except InvalidInput as error:
        raise StateStoreUnavailable(str(error)) from error
