"""Redis stopped, frozen, killed, emptied or full: calls end in time, and the store recovers by itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from redis.asyncio import Redis

from distributor_node.shared.adapters.state_common import StateTimeouts
from distributor_node.shared.adapters.state_redis import RedisStateStore
from distributor_node.shared.adapters.state_redis.connection import MAX_CONNECTIONS
from distributor_node.shared.domain.errors import ConfigurationError, StateStoreUnavailable
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.operator_state import OperatorState, OperatorStateSnapshot, WarmingScope
from distributor_node.shared.ports.state_store import (
    Access,
    AlreadyStored,
    Announcement,
    Granted,
    HeldElsewhere,
    IndexEntry,
    Lease,
    NotReconciled,
    PolicyState,
    PurgeRequest,
    Term,
    Topic,
)
from tests.counters import counted
from tests.servers.redis_server import RedisServer
from tests.servers.tcp_relay import TcpRelay
from tests.waiting import eventually

LIMIT = 1_000_000
TIMES = StateTimeouts(operation_timeout=1.0)
ONE, TWO = ObjectId("1"), ObjectId("2")
_LEASE = Lease(ONE, 1, 100, "worker-1")
_TERM = Term("evictor-1", 1)

VERBS: dict[str, Callable[[RedisStateStore], Awaitable[Any]]] = {
    "ping": lambda store: store.ping(),
    "problems": lambda store: store.problems(),
    "find": lambda store: store.find(ONE),
    "claim": lambda store: store.claim(ONE, "api-1"),
    "mark_queued": lambda store: store.mark_queued(ONE, "api-1"),
    "release_claim": lambda store: store.release_claim(ONE, "api-1"),
    "usage": lambda store: store.usage(),
    "record_accesses": lambda store: store.record_accesses([Access(ONE, 1, 1.0)]),
    "begin": lambda store: store.begin(ONE, 100, "worker-1"),
    "renew": lambda store: store.renew(_LEASE),
    "commit": lambda store: store.commit(_LEASE, 1.0),
    "park": lambda store: store.park(_LEASE),
    "release": lambda store: store.release(_LEASE),
    "record_failure": lambda store: store.record_failure(ONE, "refused", 1),
    "request_space": lambda store: store.request_space(ONE, 100, 1),
    "forget": lambda store: store.forget(ONE, 1),
    "lead": lambda store: store.lead("evictor-1", 1),
    "resign": lambda store: store.resign(_TERM),
    "space_requests": lambda store: store.space_requests(),
    "begin_eviction": lambda store: store.begin_eviction(_TERM, ONE, 0),
    "finish_eviction": lambda store: store.finish_eviction(_TERM, ONE),
    "cancel_eviction": lambda store: store.cancel_eviction(_TERM, ONE),
    "adopt": lambda store: store.adopt(_TERM, IndexEntry(ONE, 1, 1, 1.0)),
    "adopt_partial": lambda store: store.adopt_partial(_TERM, ONE, 1),
    "steal_lease": lambda store: store.steal_lease(_TERM, ONE),
    "set_reconciled": lambda store: store.set_reconciled(_TERM),
    "entries": lambda store: anext(aiter(store.entries())),
    "fetches": lambda store: store.fetches(),
    "read_accesses": lambda store: store.read_accesses("", 1),
    "load_policy_state": lambda store: store.load_policy_state(),
    "save_policy": lambda store: store.save_policy(_TERM, [], PolicyState()),
    "operator_state": lambda store: store.operator_state(),
    "change_operator_state": lambda store: store.change_operator_state(0, OperatorState()),
    "restore_operator_state": lambda store: store.restore_operator_state(
        OperatorStateSnapshot(OperatorState())
    ),
    "pinned": lambda store: store.pinned(),
    "change_pins": lambda store: store.change_pins(pin=[ONE]),
    "request_purges": lambda store: store.request_purges([ONE]),
    "pending_purges": lambda store: store.pending_purges(1),
    "complete_purge": lambda store: store.complete_purge(_TERM, PurgeRequest(ONE, 1)),
    "start_warming": lambda store: store.start_warming(WarmingScope()),
    "warming": lambda store: store.warming(),
    "lease_warming": lambda store: store.lease_warming("api-1", 1),
    "consume_token_id": lambda store: store.consume_token_id("once", 0.0, 1),
}


@pytest.fixture
async def store(own_redis: RedisServer, redis_prefix: str) -> AsyncIterator[RedisStateStore]:
    made = RedisStateStore(own_redis.url, redis_prefix, LIMIT, TIMES)
    await made.open()
    yield made
    await made.close()


async def until_it_answers(store: RedisStateStore) -> None:
    async def answers() -> bool:
        try:
            await store.ping()
        except StateStoreUnavailable:
            return False
        return True

    await eventually(answers)


async def reconciled(store: RedisStateStore) -> Term:
    term = await store.lead("evictor-1", 600)
    assert term is not None
    await store.set_reconciled(term)
    return term


async def fail(*verbs: Awaitable[Any]) -> float:
    """All of them report the store as unavailable. Returns the seconds that took."""
    started = time.monotonic()
    results = await asyncio.gather(*verbs, return_exceptions=True)
    took = time.monotonic() - started
    for result in results:
        assert isinstance(result, StateStoreUnavailable)
        assert result.__cause__ is not None
    return took


async def test_every_call_reports_a_stopped_server_as_unavailable(
    store: RedisStateStore, own_redis: RedisServer
) -> None:
    await store.ping()
    own_redis.stop()
    await fail(*(verb(store) for verb in VERBS.values()))
    await store.announce(Announcement(Topic.SPACE_FREED))


def failed_calls(operation: str) -> float:
    return counted("distributor_state_store_errors_total", operation=operation)


async def test_failed_calls_are_counted_for_every_caller(
    store: RedisStateStore, own_redis: RedisServer
) -> None:
    await store.ping()
    own_redis.stop()
    before = {
        name: failed_calls(name) for name in ("find", "begin", "renew", "commit", "record_accesses", "ping")
    }
    verbs = (
        store.find(ONE),
        store.begin(ONE, 1, "worker-1"),
        store.renew(_LEASE),
        store.commit(_LEASE, 1),
        store.record_accesses([Access(ONE, 1, 1.0)]),
        store.ping(),
    )
    await fail(*verbs)
    assert {name: failed_calls(name) - count for name, count in before.items()} == dict.fromkeys(before, 1.0)


async def test_a_thousand_calls_on_a_frozen_server_fail_in_time_and_the_next_immediately(
    store: RedisStateStore, own_redis: RedisServer
) -> None:
    await store.ping()
    own_redis.freeze()
    waited = await fail(*(store.find(ObjectId(str(number))) for number in range(1000)))
    assert waited >= TIMES.operation_timeout
    calls = (store.find(ObjectId(str(number))) for number in range(100))
    errors = [str(error) for error in await asyncio.gather(*calls, return_exceptions=True)]
    refused = errors.count("state store was unreachable a moment ago")
    # On a busy machine the circuit breaker's time may be over: then one call is a probe, and it alone waits.
    assert refused >= 99, "without a wait"
    own_redis.thaw()
    await until_it_answers(store)
    assert (await store.find(ONE)).fetch is None


async def test_opening_needs_no_server(own_redis: RedisServer, redis_prefix: str) -> None:
    own_redis.stop()
    store = RedisStateStore(own_redis.url, redis_prefix, LIMIT, TIMES)
    await store.open()
    await fail(store.ping())
    own_redis.start()
    await until_it_answers(store)
    await store.close()


def test_a_url_that_can_never_work_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError):
        RedisStateStore("http://127.0.0.1", "", LIMIT, TIMES)


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_after_a_restart_nothing_is_granted_before_reconciliation(
    store: RedisStateStore, own_redis: RedisServer, how: str
) -> None:
    await reconciled(store)
    granted = await store.begin(ONE, 100, "worker-1")
    assert isinstance(granted, Granted)
    assert await store.commit(granted.lease, time.time())
    await asyncio.sleep(1.1 if how == "kill" else 0)  # appendfsync everysec
    getattr(own_redis, how)()
    own_redis.start()
    await until_it_answers(store)
    usage = await store.usage()
    assert (usage.reconciled, usage.objects) == (False, 1)
    assert await store.begin(TWO, 100, "worker-1") == NotReconciled()
    assert isinstance(await store.begin(ONE, 100, "worker-1"), AlreadyStored)
    await reconciled(store)
    assert isinstance(await store.begin(TWO, 100, "worker-1"), Granted)


async def test_an_emptied_store_grants_nothing_and_old_tokens_are_invalid(
    store: RedisStateStore, own_redis: RedisServer
) -> None:
    old_term = await reconciled(store)
    granted = await store.begin(ONE, 100, "worker-1")
    assert isinstance(granted, Granted)
    assert await own_redis.command("FLUSHALL") == "+OK"
    assert await store.begin(ONE, 100, "worker-1") == NotReconciled()
    assert not await store.commit(granted.lease, time.time())
    new_term = await reconciled(store)
    assert new_term.token > old_term.token
    again = await store.begin(ONE, 100, "worker-1")
    assert isinstance(again, Granted)
    assert again.lease.token > granted.lease.token
    assert not await store.renew(granted.lease)


@pytest.mark.parametrize("emptied", [True, False])
async def test_a_used_token_stays_used_when_redis_loses_its_keys(
    store: RedisStateStore, own_redis: RedisServer, emptied: bool
) -> None:
    await store.lead("evictor-1", 60)
    assert await store.consume_token_id("once", issued := time.time() + 1, 300)
    await asyncio.sleep(2.1)  # a second is what the time of issue is told in
    if emptied:
        assert await own_redis.command("FLUSHALL") == "+OK"
    else:
        await asyncio.to_thread(own_redis.kill)  # without its last second
        await asyncio.to_thread(own_redis.start)
        await until_it_answers(store)
    await store.lead("evictor-1", 60)
    assert not await store.consume_token_id("once", issued, 300)
    assert not await store.consume_token_id("before", issued, 300)
    assert await store.consume_token_id("after", time.time() + 1, 300)


@pytest.mark.parametrize(
    ("trouble", "cure"),
    [
        ("CONFIG SET maxmemory 1", "CONFIG SET maxmemory 0"),
        ("REPLICAOF 127.0.0.1 1", "REPLICAOF NO ONE"),
        ("CONFIG SET min-replicas-to-write 1", "CONFIG SET min-replicas-to-write 0"),
    ],
)
async def test_a_server_that_refuses_writes_is_unavailable_for_them(
    store: RedisStateStore, own_redis: RedisServer, trouble: str, cure: str
) -> None:
    await reconciled(store)
    assert await own_redis.command(*trouble.split()) == "+OK"
    await fail(
        store.claim(ONE, "api-1"),
        store.begin(ONE, 100, "worker-1"),
        store.record_accesses([Access(ONE, 1, 1.0)]),
    )
    assert any("writes are refused" in problem for problem in await store.problems())
    assert await own_redis.command(*cure.split()) == "+OK"
    usage = await store.usage()
    assert (usage.used, usage.reserved, usage.fetches) == (0, 0, 0)
    assert (await store.claim(ONE, "api-1")).won


async def test_a_cancelled_call_leaves_no_reply_to_the_next(
    own_redis: RedisServer, redis_prefix: str
) -> None:
    store = RedisStateStore(own_redis.url, redis_prefix, LIMIT, StateTimeouts(operation_timeout=20.0))
    await store.open()
    names = [ObjectId(f"object-{number}") for number in range(40)]
    for name in names:
        await store.record_failure(name, f"reason of {name}", 60)

    async def right_answer(name: ObjectId) -> bool:
        failure = (await store.find(name)).failure
        return failure is not None and failure.reason == f"reason of {name}"

    for _ in range(5):
        own_redis.freeze()
        asked = [asyncio.create_task(store.find(name)) for name in names[:20]]
        await asyncio.sleep(0.02)  # until the commands are on their way
        for task in asked:
            task.cancel()
        await asyncio.wait(asked)
        assert all(task.cancelled() for task in asked)
        own_redis.thaw()
        assert all(await asyncio.gather(*(right_answer(name) for name in reversed(names))))
    await store.close()


async def test_a_connection_that_the_server_has_closed_costs_no_call(
    own_redis: RedisServer, redis_prefix: str
) -> None:
    store = RedisStateStore(own_redis.url, redis_prefix, LIMIT, TIMES)
    await store.open()
    async with Redis.from_url(own_redis.url) as other:
        for _ in range(5):
            await store.find(ONE)
            await other.client_kill_filter(_type="normal", skipme=True)
            await asyncio.sleep(0.05)  # until the end of the stream has been read
        assert (await store.claim(ONE, "api-1")).won
    await store.close()


async def test_calls_in_turn_share_a_connection_and_calls_at_once_do_not_exceed_the_limit(
    own_redis: RedisServer, redis_prefix: str
) -> None:
    async with TcpRelay(own_redis.port).running() as relay:
        store = RedisStateStore(f"redis://127.0.0.1:{relay.port}", redis_prefix, LIMIT, TIMES)
        await store.open()
        for _ in range(20):
            await store.find(ONE)
        assert relay.connections == 1
        await asyncio.gather(*(store.find(ONE) for _ in range(3 * MAX_CONNECTIONS)))
        assert relay.connections <= MAX_CONNECTIONS
        await store.close()


async def test_connections_that_died_silently_cost_one_time_limit_not_one_each(
    own_redis: RedisServer, redis_prefix: str
) -> None:
    async with TcpRelay(own_redis.port).running() as relay:
        store = RedisStateStore(f"redis://127.0.0.1:{relay.port}", redis_prefix, LIMIT, TIMES)
        await store.open()
        names = [ObjectId(str(number)) for number in range(20)]
        await asyncio.gather(*map(store.find, names))
        assert relay.connections > 10
        relay.swallow()
        one_each = relay.connections * TIMES.operation_timeout
        assert await fail(store.find(ONE)) < one_each / 2
        await until_it_answers(store)
        await asyncio.gather(*map(store.find, names))
        await store.close()


async def test_a_listener_reconnects_and_announces_it(store: RedisStateStore, own_redis: RedisServer) -> None:
    async with asyncio.timeout(40), store.listen() as heard:
        assert await anext(heard) == Announcement(Topic.SETTINGS_CHANGED)
        own_redis.restart()
        assert await anext(heard) == Announcement(Topic.SETTINGS_CHANGED)
        await until_it_answers(store)
        await store.announce(Announcement(Topic.FETCH_CHANGED, "1"))
        assert await anext(heard) == Announcement(Topic.FETCH_CHANGED, "1")


async def test_a_listener_started_without_a_server_connects_when_it_comes_up(
    store: RedisStateStore, own_redis: RedisServer
) -> None:
    own_redis.stop()
    async with asyncio.timeout(40), store.listen() as heard:
        own_redis.start()
        assert await anext(heard) == Announcement(Topic.SETTINGS_CHANGED)


async def test_a_listener_notices_a_half_open_connection(
    store: RedisStateStore, own_redis: RedisServer
) -> None:
    async with asyncio.timeout(40), store.listen() as heard:
        await anext(heard)
        own_redis.freeze()
        await asyncio.sleep(7)  # two unanswered pings
        own_redis.thaw()
        assert await anext(heard) == Announcement(Topic.SETTINGS_CHANGED)


async def test_a_silent_but_healthy_listener_stays_connected(store: RedisStateStore) -> None:
    async with asyncio.timeout(40), store.listen() as heard:
        await anext(heard)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5.0):
                await anext(heard)


@pytest.mark.parametrize("verb", ["begin", "commit", "lead"])
async def test_calls_of_every_service_that_fail_are_counted(
    store: RedisStateStore, own_redis: RedisServer, verb: str
) -> None:
    before = failed_calls(verb)
    own_redis.kill()
    for attempt in (1, 2):  # the second is refused without asking
        with pytest.raises(StateStoreUnavailable):
            await VERBS[verb](store)
        assert failed_calls(verb) == before + attempt


PUT_BACK = """
local all = redis.call('HGETALL', KEYS[1])
for index = 1, #all, 2 do
  local row = cmsgpack.unpack(all[index + 1])
  row[5], row[6] = row[5] + ARGV[1], row[6] + ARGV[1]
  redis.call('HSET', KEYS[1], all[index], cmsgpack.pack(row))
end
redis.call('PEXPIRE', KEYS[2], redis.call('PTTL', KEYS[2]) + ARGV[1])
"""
"""Shifts all times as a clock that is set back by ARGV[1] milliseconds does: they are that much further away."""


async def test_a_clock_set_back_extends_no_lease_and_no_term(
    own_redis: RedisServer, redis_prefix: str
) -> None:
    times = StateTimeouts(lease_seconds=1.0, claim_seconds=1.0, operation_timeout=20.0)
    store = RedisStateStore(own_redis.url, redis_prefix, LIMIT, times)
    await store.open()
    await reconciled(store)
    assert isinstance(await store.begin(ONE, 100, "a worker that dies"), Granted)
    assert (await store.claim(ObjectId("2"), "an api that dies")).won
    async with Redis.from_url(own_redis.url) as client:
        await client.eval(PUT_BACK, 2, f"{redis_prefix}fetches", f"{redis_prefix}leader", 3_600_000)
    held = await store.begin(ONE, 100, "worker-2")
    assert isinstance(held, HeldElsewhere)
    assert held.seconds_left <= 1.0
    assert not (await store.claim(ObjectId("2"), "api-2")).won
    assert await store.lead("a standby", 1.0) is None
    await asyncio.sleep(1.1)
    assert isinstance(await store.begin(ONE, 100, "worker-2"), Granted)
    assert (await store.claim(ObjectId("2"), "api-2")).won
    assert await store.lead("a standby", 1.0) is not None
    await store.close()


async def test_waiting_for_a_connection_is_no_sign_of_an_unreachable_server(
    own_redis: RedisServer, redis_prefix: str
) -> None:
    """1. 200 calls share 32 connections. 2. The server takes its time. 3. Those without one end."""
    names = [ObjectId(str(number)) for number in range(200)]
    async with TcpRelay(own_redis.port).running() as relay:
        url = f"redis://127.0.0.1:{relay.port}"
        store = RedisStateStore(url, redis_prefix, LIMIT, StateTimeouts(operation_timeout=3.0))
        await store.open()
        await asyncio.gather(*map(store.find, names))  # all connections are made
        relay.delay = 1.0
        results = await asyncio.gather(*map(store.find, names), return_exceptions=True)
        failed = [str(result) for result in results if isinstance(result, BaseException)]
        assert len(failed) > 100
        assert all("was free" in reason for reason in failed)
        relay.delay = 0.0
        await store.find(ONE)
        await store.close()
