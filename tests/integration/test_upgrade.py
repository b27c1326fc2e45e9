"""What a version before writes is read by this one, and the other way round: volume, index, jobs and catalog answers.

The version before is a commit, taken from the repository's history. Its records have no state of their file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FORMER = "e9c85721d9d0122a99f2e41ddadada98aa75b5df"
"""The last commit before the state of files was added to records."""

PROGRAM = """
import asyncio, json, sys, time
from dataclasses import asdict
from pathlib import Path
from distributor_node.services.evictor.assignment import read_checked_assignment, write_checked_assignment
from distributor_node.shared.adapters.state_common import StateTimeouts, read_description, write_description
from distributor_node.shared.adapters.state_redis import RedisStateStore
from distributor_node.shared.adapters.volume import Volume
from distributor_node.shared.adapters.volume import operator_state_file
from distributor_node.shared.domain.jobs import FetchJob, decode_job, encode_job
from distributor_node.shared.domain.objects import (
    Assignment, ContentHash, DistributionBucket, MediaObject, ObjectId, StoredRecord
)
from distributor_node.shared.domain.operator_state import OperatorState, OperatorStateSnapshot
try:
    from distributor_node.shared.domain.conditionals import Validators
except ImportError:  # where the former version has it
    from distributor_node.shared.domain.version import Validators
from distributor_node.shared.ports.state_store import Granted, IndexEntry

mode, url, prefix, folder = sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4])
DATA = bytes(range(256)) * 100
hasher = ContentHash("blake3", bytes(32)).hasher()
hasher.update(DATA)
HASH = ContentHash("blake3", hasher.digest())
VALIDATORS = Validators('"v1"', 784111777)
OBJECTS = [
    MediaObject(ObjectId("hashed"), len(DATA), HASH, "image/png", (DistributionBucket("0:1", frozenset({3})),),
                sources=("http://one.example/hashed",)),
    MediaObject(ObjectId("tagged"), len(DATA), None, "image/png", sources=("http://one.example/tagged",),
                validators=VALIDATORS),
]

def record(one):
    bare = StoredRecord(one.object_id, len(DATA), None, one.content_hash, "image/png", 1_700_000_000)
    return bare.with_validators(one.validators)

async def write(volume, store):
    volume.prepare()
    for one in OBJECTS:
        partial = volume.open_partial_for_writing(record(one))
        partial.write(0, DATA)
        partial.mark_verified()
        partial.publish(record(one))
        partial.close()
        (folder / f"{one.object_id}.job").write_bytes(encode_job(FetchJob(one, "r", 1.5, claim=7)))
        (folder / f"{one.object_id}.answer").write_bytes(write_description(one))
    half = StoredRecord(ObjectId("half"), len(DATA), None, HASH, "image/png", 1_700_000_000)
    partial = volume.open_partial_for_writing(half)
    partial.write(0, DATA[:1000])
    partial.close()
    state = OperatorState(5, draining=True, buckets_ordered=True, buckets=frozenset({"0:1"}))
    operator_state_file.write_operator_state(
        volume.root, OperatorStateSnapshot(state, frozenset({ObjectId("hashed")}))
    )
    write_checked_assignment(volume.root, Assignment(frozenset({"0:1"}), 7))
    term = await store.lead("evictor", 60)
    await store.set_reconciled(term)
    for number, one in enumerate(OBJECTS):
        assert await store.adopt(term, IndexEntry(one.object_id, len(DATA), 3 + number, 1_700_000_000.0, 2.5))
    begun = await store.begin(ObjectId("half"), len(DATA), "worker-1")
    assert isinstance(begun, Granted), begun
    await store.park(begun.lease)
    await store.resign(term)

async def read(volume, store):
    volume.prepare()
    found = {}
    for one in OBJECTS:
        opened = volume.open_object(one.object_id)
        assert opened is not None, one
        assert opened.read(0, len(DATA) + 1) == DATA
        opened.close()
        assert opened.record == record(one), opened.record
        job = decode_job((folder / f"{one.object_id}.job").read_bytes(), attempt=1, request_id="r")
        answer = read_description((folder / f"{one.object_id}.answer").read_bytes())
        assert answer == one
        both = {field: str(getattr(job, field)) for field in ("media_object", "request_id", "published_at", "claim")}
        found[str(one.object_id)] = [str(opened.record), both, str(answer)]
    found["half"] = [str(volume.partial_record(ObjectId("half"))), volume.open_partial(ObjectId("half")).state().size]
    snapshot = operator_state_file.read_operator_state(volume.root)
    found["operator"] = [snapshot.state.draining, sorted(snapshot.state.buckets), sorted(snapshot.pinned)]
    assigned = read_checked_assignment(volume.root)
    found["assignment"] = [sorted(assigned.bucket_ids), assigned.worker_id]
    usage = await store.usage()
    found["usage"] = [usage.used, usage.reserved, usage.objects, usage.reconciled]
    entries = [entry async for batch in store.entries() for entry in batch]
    found["entries"] = sorted([str(e.object_id), e.size, e.frequency, e.last_access, e.priority] for e in entries)
    found["fetches"] = sorted([str(f.object_id), f.phase.value, f.size] for f in await store.fetches())
    term = await store.lead("evictor", 60)
    found["recounted"] = await store.recount(term)
    await store.resign(term)
    print(json.dumps(found, sort_keys=True))

async def main():
    volume = Volume(folder / "volume")
    store = RedisStateStore(url, prefix, 10_000_000, StateTimeouts())
    await store.open()
    await (write if mode == "write" else read)(volume, store)
    await store.close()
    volume.close()

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree of the version before."""
    known = subprocess.run(
        ["git", "cat-file", "-e", f"{FORMER}^{{commit}}"], cwd=ROOT, check=False, capture_output=True
    )
    if known.returncode:
        pytest.skip(
            "the history is shallow, or this is no repository: the version before cannot be taken from it"
        )
    folder = tmp_path_factory.mktemp("former")
    archive = subprocess.run(["git", "archive", FORMER], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "--extract", "--directory", str(folder)], input=archive, check=True)
    return folder


def run(tree: Path, *arguments: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM, *arguments],
        env={**os.environ, "PYTHONPATH": str(tree)},
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) if done.stdout else None


@pytest.mark.servers
@pytest.mark.parametrize("upgrade", [True, False], ids=["upgrade", "rollback"])
def test_each_version_reads_what_the_other_writes(
    former: Path, tmp_path: Path, redis_url: str, redis_prefix: str, upgrade: bool
) -> None:
    writer, reader = (former, ROOT) if upgrade else (ROOT, former)
    place = (redis_url, redis_prefix, str(tmp_path))
    run(writer, "write", *place)
    found = run(reader, "read", *place)
    assert found["usage"][2:] == [2, True]
    assert found["half"][1] == 1000
    assert found["recounted"] == 0
    assert [entry[0] for entry in found["entries"]] == ["hashed", "tagged"]
    assert found == run(writer, "read", *place), "the writer reads the same"
