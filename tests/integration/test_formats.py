"""What the node keeps is read by the version before and after: literal bytes of releases without a format number."""

from __future__ import annotations

import asyncio
import json
import os
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from distributor_node.services.evictor.assignment import read_checked_assignment, write_checked_assignment
from distributor_node.shared.adapters.state_common import StateTimeouts
from distributor_node.shared.adapters.state_redis import RedisStateStore
from distributor_node.shared.adapters.volume import Volume
from distributor_node.shared.adapters.volume.layout import object_path
from distributor_node.shared.adapters.volume.operator_state_file import (
    read_operator_state,
    write_operator_state,
)
from distributor_node.shared.adapters.volume.records import encode_record
from distributor_node.shared.domain.errors import StateStoreUnavailable, VolumeError
from distributor_node.shared.domain.eviction import Gdsf, PriorityBasis
from distributor_node.shared.domain.formats import FORMAT
from distributor_node.shared.domain.objects import Assignment, ContentHash, ObjectId, StoredRecord
from distributor_node.shared.domain.operator_state import OperatorState, OperatorStateSnapshot
from distributor_node.shared.ports.state_store import Access, FetchPhase, Granted, IndexEntry, PolicyState
from tests.integration.evictor_harness import evictor_harness
from tests.waiting import eventually

LIMIT = 10_000_000_000
ENTRY = IndexEntry(
    ObjectId("42"),
    size=5_000_000_123,
    frequency=7,
    last_access=1_760_000_000.5,
    priority=2.5,
    evicting=False,
    generation=1_764_000_000_123,
)
PACKED_ENTRY = bytes.fromhex("0e0000007bf2052a010000800078e76800000000000004407be897b69a01")
# cmsgpack of phase, reserved, size, token, ends (in the year 2100), since, worker, source, lasts
PACKED_FETCH = (
    b"\x99\xa8fetching\xc3\x05\xcd\x10\x00\xcf\x00\x00\x03\xbb\x2c\xc3\xd8\x00\xcf\x00\x00\x01\x9a\xb6\x97\xe8\x7b"
    b"\xa8worker-1\xa8source-1\xcf\x00\x00\x03\xbb\x2c\xc3\xd8\x00"
)
OPERATOR_FILE = (
    '{\n "version": 5,\n "orders": {"stopped": true, "draining": false, "worker_ordered": false, "worker_id": null,'
    ' "buckets_ordered": false, "buckets": null, "shutdowns": 2},\n "pinned": [\n  "42"\n ]\n}\n'
)
RECORD_FILES = {
    "objects/88/42": b"",
    "records/88/42": b'{"version":1,"object_id":"42","size":5000000123,"etag":"\\"gVwfgAcvNjFe1YPYJrkQ6ocqJkt983ic4uoS'
    b'L4pL9cQDZg\\"","hash":"gVwfgAcvNjFe1YPYJrkQ6ocqJkt983ic4uoSL4pL9cQDZg","media_type":"video/mp4","stored_at":1760000000}',
    "objects/6a/b.txt": b"hello",
    "records/6a/b.txt": b'{"version":1,"object_id":"b.txt","size":5,"etag":"\\"94754a336e5ed2c02af6589c09806dc8\\"",'
    b'"hash":null,"media_type":"text/plain","stored_at":1760000000}',
}
"""Two objects, the first without its bytes: it is a file with a hole."""
RECORDS = (
    StoredRecord(
        ObjectId("42"),
        5_000_000_123,
        '"gVwfgAcvNjFe1YPYJrkQ6ocqJkt983ic4uoSL4pL9cQDZg"',
        ContentHash("blake3", bytes(range(32))),
        "video/mp4",
        1_760_000_000,
    ),
    StoredRecord(ObjectId("b.txt"), 5, None, None, "text/plain", 1_760_000_000),
)
PACKED_ACCESSES = b'[["42", 3, 1760000000.5], ["7", 1, 1760000001.0]]'
ASSIGNMENT_FILE = '{"buckets": ["0:1"], "workerId": 7}\n'


@pytest.fixture
async def server(redis_url: str) -> AsyncIterator[Redis]:
    client = Redis.from_url(redis_url)
    yield client
    await client.aclose()


@pytest.fixture
async def store(redis_url: str, redis_prefix: str) -> AsyncIterator[RedisStateStore]:
    made = RedisStateStore(redis_url, redis_prefix, LIMIT, StateTimeouts())
    await made.open()
    yield made
    await made.close()


async def entries(store: RedisStateStore) -> list[IndexEntry]:
    return [entry async for batch in store.entries() for entry in batch]


@pytest.mark.servers
async def test_an_index_without_a_format_number_is_read(
    store: RedisStateStore, server: Redis, redis_prefix: str
) -> None:
    await server.hset(f"{redis_prefix}objects", "42", PACKED_ENTRY)
    await server.hset(f"{redis_prefix}fetches", "7", PACKED_FETCH)
    await server.hset(f"{redis_prefix}usage", mapping={"used": 5_000_001_147, "reserved": 1029, "serial": 9})
    assert await store.lead("evictor", 60) is not None
    assert await server.hget(f"{redis_prefix}usage", "format") == str(FORMAT).encode()
    assert await entries(store) == [ENTRY] == [await store.entry(ENTRY.object_id)]
    [fetch] = await store.fetches()
    assert (fetch.object_id, fetch.phase, fetch.size) == ("7", FetchPhase.FETCHING, 5)
    assert (fetch.worker, fetch.source) == ("worker-1", "source-1")
    assert (await store.usage()).used == 5_000_001_147


@pytest.mark.servers
async def test_an_index_is_written_as_releases_without_a_format_number_read_it(
    store: RedisStateStore, server: Redis, redis_prefix: str
) -> None:
    term = await store.lead("evictor", 60)
    assert term is not None
    await store.set_reconciled(term)
    assert await store.adopt(term, ENTRY)
    packed: Any = await server.hget(f"{redis_prefix}objects", "42")
    assert packed[:24] == PACKED_ENTRY[:24]  # the generation is the server's
    assert len(packed) == len(PACKED_ENTRY)
    begun = await store.begin(ObjectId("7"), 5, "worker-1")
    assert isinstance(begun, Granted)
    assert await store.renew(begun.lease, "source-1")
    fetch: Any = await server.hget(f"{redis_prefix}fetches", "7")
    assert fetch[1:12] == PACKED_FETCH[1:12]  # later versions append fields, which earlier ones ignore
    assert b"\xa8worker-1\xa8source-1" in fetch


@pytest.mark.servers
async def test_an_index_of_a_newer_version_is_refused_in_words(
    store: RedisStateStore, server: Redis, redis_prefix: str
) -> None:
    await server.hset(f"{redis_prefix}usage", "format", "2")
    await server.hset(f"{redis_prefix}objects", "42", b"in another layout")
    for refused in (store.lead("evictor", 60), store.usage(), store.begin(ObjectId("42"), 5, "worker")):
        with pytest.raises(StateStoreUnavailable, match="expected format 1 of the state store, got 2"):
            await refused
    assert await server.hget(f"{redis_prefix}objects", "42") == b"in another layout"


@pytest.mark.servers
@pytest.mark.parametrize("bad", [b"", b"short", PACKED_ENTRY + b"x", PACKED_ENTRY[:-1]])
async def test_a_record_of_another_length_is_dropped_and_recounted(
    store: RedisStateStore, server: Redis, redis_prefix: str, bad: bytes
) -> None:
    term = await store.lead("evictor", 60)
    assert term is not None
    assert await store.adopt(term, ENTRY)
    await store.set_reconciled(term)
    await server.hset(f"{redis_prefix}objects", mapping={"bad": bad, b"\xff": PACKED_ENTRY})
    assert await store.entry(ObjectId("bad")) is None
    with capture_logs() as logs:
        assert [entry.object_id for entry in await entries(store)] == ["42"]
    assert [line["event"] for line in logs] == ["index_records_dropped"]
    assert await server.hget(f"{redis_prefix}objects", "bad") is None
    assert not (await store.usage()).reconciled  # so that it is recounted before anything is reserved


@pytest.mark.servers
async def test_one_bad_record_ends_no_verb(store: RedisStateStore, server: Redis, redis_prefix: str) -> None:
    term = await store.lead("evictor", 60)
    assert term is not None
    await store.set_reconciled(term)
    bad = ObjectId("bad")
    for key, value in (
        ("objects", b"short"),
        ("fetches", b"\xc1"),
        ("fetches", b"\x05"),
        ("wishes", b"short"),
    ):
        await server.hset(f"{redis_prefix}{key}", bad, value)
        assert (await store.find(bad)).fetch is None
        await server.hset(f"{redis_prefix}{key}", bad, value)
        assert await store.fetches() == []
        await server.hset(f"{redis_prefix}{key}", bad, value)
        assert sum(await store.space_requests()) == 0
        assert (await store.usage()).fetches == 0
        assert await store.begin_evictions(term, [bad], 0) == [False]
        await server.hset(f"{redis_prefix}{key}", bad, value)
        await store.recount(term)
        await store.set_reconciled(term)
        await server.hset(f"{redis_prefix}{key}", bad, value)
        assert await store.begin(bad, 5, "worker") is not None
        assert await store.adopt_many(term, [ENTRY]) in ([True], [False])
        await server.delete(f"{redis_prefix}fetches", f"{redis_prefix}objects")
        await store.recount(term)
        await store.set_reconciled(term)
        assert (await store.usage()).reserved == 0


@pytest.mark.servers
async def test_accesses_and_policy_that_cannot_be_read_cost_recency_alone(
    store: RedisStateStore, server: Redis, redis_prefix: str
) -> None:
    for batch in (b"\xff", b"[[1]]", b'{"a": 1}', b'[["42", "many", 5]]'):
        await server.xadd(f"{redis_prefix}accesses", {"batch": batch})
    await store.record_accesses([Access(ObjectId("42"), 1, 5.0)])
    _, accesses = await store.read_accesses("", 100)
    assert accesses == [Access(ObjectId("42"), 1, 5.0)]
    await server.hset(f"{redis_prefix}policy", mapping={"inflation": "much", "position": "5-0"})
    assert (await store.load_policy_state()).position == ""


@pytest.mark.servers
async def test_accesses_of_releases_without_a_format_number_are_read_and_written_alike(
    store: RedisStateStore, server: Redis, redis_prefix: str
) -> None:
    await server.xadd(f"{redis_prefix}accesses", {"batch": PACKED_ACCESSES})
    wanted = [Access(ObjectId("42"), 3, 1_760_000_000.5), Access(ObjectId("7"), 1, 1_760_000_001.0)]
    assert (await store.read_accesses("", 100))[1] == wanted
    await store.record_accesses(wanted)
    stream: Any = await server.xrange(f"{redis_prefix}accesses")
    assert [json.loads(fields[b"batch"]) for _, fields in stream] == [json.loads(PACKED_ACCESSES)] * 2


def test_objects_of_releases_without_a_format_number_are_read(tmp_path: Path) -> None:
    """Their tag without a hash was made up from id and size, so it is none today."""
    for name, content in RECORD_FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    os.truncate(tmp_path / "objects" / "88" / "42", RECORDS[0].size)
    volume = Volume(tmp_path)
    volume.prepare()
    try:
        for record in RECORDS:
            opened = volume.open_object(record.object_id)
            assert opened is not None
            assert opened.record == record
            opened.close()
    finally:
        volume.close()


def test_records_are_written_as_releases_without_a_format_number_read_them() -> None:
    for record in RECORDS:
        before = json.loads(RECORD_FILES[f"records/{object_path(record.object_id)}"])
        written = json.loads(encode_record(record))
        assert written.keys() >= before.keys()  # later versions append fields, which earlier ones ignore
        assert {name: type(written[name]) for name in before} == {name: type(before[name]) for name in before}
        if record.content_hash is not None:
            assert {name: written[name] for name in before} == before


@pytest.mark.servers
async def test_the_policys_state_of_the_version_before_is_read_and_what_it_wrote_since_is_believed(
    store: RedisStateStore, server: Redis, redis_prefix: str
) -> None:
    policy = f"{redis_prefix}policy"
    await server.hset(policy, mapping={"inflation": "17.25", "position": "5-0"})
    assert await store.load_policy_state() == PolicyState(PriorityBasis(17.25), "5-0")
    term = await store.lead("test", 60)
    assert term is not None
    written = PolicyState(PriorityBasis(18.1, Gdsf.mark, 20_000.5, 3.0, 3000.1, 0.75, 0.3, 7.5), "6-0")
    await store.save_policy(term, [], written)
    assert await store.load_policy_state() == written
    assert (await server.hmget(policy, "inflation", "position")) == [b"18.1", b"6-0"], (
        "the version before reads these"
    )
    await server.hset(policy, mapping={"inflation": "18.1", "position": "7-0"})
    assert await store.load_policy_state() == PolicyState(
        PriorityBasis(18.1, "", 0.0, 3.0, 3000.1, 0.75, 0.3, 7.5), "7-0"
    )
    without_weights = (
        '{"policy": "gdsf", "miss_cost": 2.5, "views": 3, "viewed_bytes": 9, "written_with": [18.1, "7-0"]}'
    )
    await server.hset(policy, "basis", without_weights)
    assert await store.load_policy_state() == PolicyState(
        PriorityBasis(18.1, "gdsf", 2.5, 3.0, 9.0, exponent=1.0, first_weight=0.5), "7-0"
    )
    for damaged in ("{", "[]", '{"policy": "gdsf"}', '{"written_with": [18.1, "7-0"], "miss_cost": -1}'):
        await server.hset(policy, "basis", damaged)
        assert await store.load_policy_state() == PolicyState(PriorityBasis(18.1), "7-0")


FORMER_COST, FORMER_L = 64 * 2**20, 80_000.0
"""c0 in bytes, and L, of the version whose gdsf had a fixed c0 and w(views) = views."""
KEPT, KEPT_SIZE, KEPT_SINCE = 30, 4000, 1_760_000_000


def former_record(name: str) -> bytes:
    return (
        f'{{"version":1,"object_id":"{name}","size":{KEPT_SIZE},"etag":"\\"{name}\\"","hash":null,'
        f'"media_type":"image/png","stored_at":{KEPT_SINCE}}}'
    ).encode()


def former_entry(views: int, at: int, level: float) -> bytes:
    """As in PACKED_ENTRY: views × 2, size, last access in 2^-16 seconds, priority, generation."""
    priority = level + views * (FORMER_COST + KEPT_SIZE) / KEPT_SIZE
    integers = ((views * 2, 4), (KEPT_SIZE, 6), (at * 65_536, 6))
    packed = b"".join(number.to_bytes(length, "little") for number, length in integers)
    return packed + struct.pack("<d", priority) + (1_764_000_000_123).to_bytes(6, "little")


@pytest.mark.servers
async def test_a_directory_and_a_redis_of_the_version_before_are_taken_over_without_loss(
    tmp_path: Path, server: Redis, redis_url: str, redis_prefix: str
) -> None:
    """A third of the objects was viewed twice before L rose, a third once at half of it, a third once lately."""
    stored = {
        f"o{number:02}": (
            1 if number % 3 else 2, KEPT_SINCE + 100 * (number % 3) + number, FORMER_L * (number % 3) / 2
        )
        for number in range(KEPT)
    }  # fmt: skip
    for name in stored:
        for folder, content in (("objects", name[:1].encode() * KEPT_SIZE), ("records", former_record(name))):
            path = tmp_path / "volume" / folder / object_path(ObjectId(name))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    packed: Any = {name: former_entry(*fields) for name, fields in stored.items()}
    await server.hset(f"{redis_prefix}objects", mapping=packed)
    await server.hset(f"{redis_prefix}usage", mapping={"used": KEPT * (KEPT_SIZE + 1024), "serial": 9})
    await server.hset(f"{redis_prefix}policy", mapping={"inflation": str(FORMER_L), "position": ""})
    former_order = sorted(stored, key=lambda name: (stored[name][1:], name))
    accessed = f'[["{former_order[0]}", 1, {KEPT_SINCE + 9000}.0]]'
    await server.xadd(f"{redis_prefix}accesses", {"batch": accessed})

    async with evictor_harness(tmp_path, (redis_url, redis_prefix)) as harness:

        async def saved() -> bool:
            return (await harness.state.load_policy_state()).basis.policy == Gdsf.mark

        with capture_logs() as logs:
            async with harness.evictor():
                await eventually(harness.reconciled)
                await eventually(saved, seconds=30)
        assert [line["former_policy"] for line in logs if line["event"] == "order_recomputed"] == [None]
        taken_over = await harness.entries()
        assert {
            name: (entry.size, entry.frequency, entry.last_access) for name, entry in taken_over.items()
        } == {
            name: (
                KEPT_SIZE,
                views + (name == former_order[0]),
                KEPT_SINCE + 9000 if name == former_order[0] else at,
            )
            for name, (views, at, _) in stored.items()
        }
        assert all(harness.path_of(name).read_bytes() == name[:1].encode() * KEPT_SIZE for name in stored)
        order = sorted(taken_over, key=lambda name: (taken_over[name].priority, taken_over[name].last_access))
        assert order[: KEPT - 1] == former_order[1:], "and the one that was viewed since goes last"
        basis = (await harness.state.load_policy_state()).basis
        assert basis.miss_cost == pytest.approx(28 * KEPT_SIZE)
        assert basis.inflation == pytest.approx(FORMER_L * 2**20 / FORMER_COST)
        with capture_logs() as logs:
            async with harness.evictor():
                await eventually(harness.reconciled)
                await asyncio.sleep(0.3)
        assert not [line for line in logs if line["event"] == "order_recomputed"], "once is enough"
        assert await harness.entries() == taken_over


def test_files_without_a_format_number_are_read(tmp_path: Path) -> None:
    (tmp_path / "operator.json").write_text(OPERATOR_FILE)
    (tmp_path / "duty.json").write_text(ASSIGNMENT_FILE)
    snapshot = read_operator_state(tmp_path)
    assert snapshot is not None
    assert (snapshot.state.version, snapshot.state.stopped, snapshot.state.shutdowns) == (5, True, 2)
    assert snapshot.pinned == {"42"}
    assert read_checked_assignment(tmp_path) == Assignment(frozenset({"0:1"}), 7)


def test_files_are_written_as_releases_without_a_format_number_read_them(tmp_path: Path) -> None:
    write_operator_state(
        tmp_path, OperatorStateSnapshot(OperatorState(5, stopped=True), frozenset({ObjectId("42")}))
    )
    write_checked_assignment(tmp_path, Assignment(frozenset({"0:1"}), 7))
    written, before = json.loads((tmp_path / "operator.json").read_text()), json.loads(OPERATOR_FILE)
    assert written.pop("format") == FORMAT
    assert written.keys() == before.keys()
    assert before["orders"].keys() <= written["orders"].keys()
    assignment = json.loads((tmp_path / "duty.json").read_text())
    assert assignment == {**json.loads(ASSIGNMENT_FILE), "format": FORMAT}


def test_files_of_a_newer_version_are_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "operator.json").write_text(OPERATOR_FILE.replace('"version"', '"format": 2, "version"', 1))
    (tmp_path / "duty.json").write_text(ASSIGNMENT_FILE.replace('"buckets"', '"format": 2, "buckets"'))
    with capture_logs() as logs:
        assert read_operator_state(tmp_path) is None
        assert read_checked_assignment(tmp_path) is None
    assert len(logs) == 2
    assert all("expected format 1, got 2" in line["reason"] for line in logs)


@pytest.mark.parametrize("text", ["[]", "5", '"text"', "{"])
def test_files_that_are_no_documents_are_refused(tmp_path: Path, text: str) -> None:
    for name in ("operator.json", "duty.json"):
        (tmp_path / name).write_text(text)
    with capture_logs():
        assert read_operator_state(tmp_path) is None
        assert read_checked_assignment(tmp_path) is None


def prepare(root: Path) -> None:
    volume = Volume(root)
    try:
        volume.prepare()
    finally:
        volume.close()


def test_a_volume_is_marked_with_its_format(tmp_path: Path) -> None:
    for _ in range(2):
        prepare(tmp_path)
        assert json.loads((tmp_path / ".format").read_text()) == {"format": FORMAT}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"format": 2}', "expected format 1, got 2"),
        ("[]", "expected format 1, got None"),
        ("{", "expected JSON"),
    ],
)
def test_a_volume_of_a_newer_version_is_refused_in_words(tmp_path: Path, text: str, told: str) -> None:
    prepare(tmp_path)
    (tmp_path / ".format").write_text(text)
    with pytest.raises(VolumeError, match=told):
        prepare(tmp_path)
    assert (tmp_path / ".format").read_text() == text
