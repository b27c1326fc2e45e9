"""The evictor applies purges and pins, and backs up the operator state on the volume."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from distributor_node.services.evictor import operator_state
from distributor_node.services.evictor.index import EvictionIndex
from distributor_node.services.evictor.operator_state import OperatorStateBackup
from distributor_node.services.evictor.removal import ObjectRemover, RemovalOutcome
from distributor_node.shared.adapters.state_memory import MemoryStateStore
from distributor_node.shared.adapters.volume import OpenObject, intake
from distributor_node.shared.adapters.volume.operator_state_file import (
    operator_state_lock,
    read_operator_state,
    write_operator_state,
)
from distributor_node.shared.domain.eviction import Lru
from distributor_node.shared.domain.objects import Assignment, ObjectId
from distributor_node.shared.domain.operator_state import OperatorState, OperatorStateSnapshot
from distributor_node.shared.ports.state_store import IndexEntry
from distributor_node.shared.runtime.operator_state import OperatorStateWatcher
from tests.integration.evictor_harness import SIZE, EvictorHarness, body_of, evictor_harness, media_object
from tests.waiting import eventually

ONE, TWO, THREE = (ObjectId(name) for name in ("one", "two", "three"))


async def no_purges_left(harness: EvictorHarness) -> bool:
    return not await harness.state.pending_purges(10)


async def test_purged_objects_go_pinned_or_not(harness: EvictorHarness) -> None:
    async with harness.evictor():
        await eventually(harness.reconciled)
        await harness.store("one", "two", "three")
        await harness.state.change_pins(pin=[TWO])
        await harness.state.request_purges([ONE, TWO, ObjectId("unknown")])
        await eventually(lambda: no_purges_left(harness))
        assert not harness.has("one")
        assert not harness.has("two")
        assert set(await harness.entries()) == {"three"}
        assert await harness.matches_volume()


async def test_a_purged_object_in_transfer_is_sent_completely(harness: EvictorHarness) -> None:
    async with harness.evictor():
        await eventually(harness.reconciled)
        await harness.store("one")
        reader = harness.volume.open_object(ONE)
        assert reader is not None
        assert reader.lock_shared()
        await harness.state.request_purges([ONE])
        await eventually(lambda: no_purges_left(harness))
        assert harness.volume.open_object(ONE) is None
        assert reader.read(0, SIZE) == body_of("one")
        assert await harness.used() > 0
        reader.close()

        async def freed() -> bool:
            return await harness.used() == 0

        await eventually(freed)


async def test_a_purge_hides_the_object_also_while_the_file_of_an_earlier_purge_remains(
    harness: EvictorHarness,
) -> None:
    term = await harness.term()
    await harness.state.set_reconciled(term)
    index = EvictionIndex(harness.state, harness.volume, Lru)
    remover, readers = ObjectRemover(harness.state, harness.volume, index), list[OpenObject]()
    for _ in range(2):
        await harness.store("one")
        reader = harness.volume.open_object(ONE)
        assert reader is not None
        assert reader.lock_shared()
        for former in readers:
            former.close()  # its file is still in `leaving/`
        assert await remover.purge(term, ONE, "purged") is RemovalOutcome.DEFERRED
        assert harness.volume.open_object(ONE) is None
        assert reader.read(0, SIZE) == body_of("one")
        readers.append(reader)
    assert await harness.matches_volume()
    readers[-1].close()
    await remover.settle_trash(term)
    assert await harness.used() == 0


async def test_a_purge_waits_for_the_fetch_under_way(harness: EvictorHarness) -> None:
    async with harness.evictor(partial_keep=60):
        await eventually(harness.reconciled)
        lease = await harness.begin_fetch("one")
        await harness.state.request_purges([ONE])
        assert await harness.state.renew(lease)
        harness.put_file("one")
        assert not await no_purges_left(harness)
        assert await harness.state.commit(lease, 1.0)
        await eventually(lambda: no_purges_left(harness))
        assert not harness.has("one")
        assert await harness.used() == 0


async def test_a_purge_finishes_a_half_done_removal(harness: EvictorHarness) -> None:
    async with harness.evictor(partial_keep=3600):
        await eventually(harness.reconciled)
        lease = await harness.begin_fetch("one")
        harness.leave_partial("one", 1000)
        await harness.state.park(lease)
        await harness.state.request_purges([ONE])
        await eventually(lambda: no_purges_left(harness))
        assert await harness.fetch_of("one") is None
        assert harness.volume.open_partial(ONE) is None


async def test_pinned_objects_stay_when_room_is_made(harness: EvictorHarness) -> None:
    names = [f"object-{number}" for number in range(10)]
    async with harness.evictor():
        await eventually(harness.reconciled)
        await harness.state.change_pins(pin=[ObjectId(names[0]), ObjectId(names[1])])
        await harness.store(*names, age=3600)

        async def below() -> bool:
            return len(await harness.entries()) <= 5

        await eventually(below)
        assert harness.has(names[0])
        assert harness.has(names[1])


async def test_the_backup_on_the_volume_follows_the_operator_state(harness: EvictorHarness) -> None:
    async with harness.evictor():
        await eventually(harness.reconciled)
        assert read_operator_state(harness.root) is None
        written = await harness.state.change_operator_state(0, OperatorState(stopped=True))
        assert written is not None
        await eventually(lambda: read_operator_state(harness.root) == OperatorStateSnapshot(written))
        await harness.state.change_pins(pin=[ONE])

        def pinned() -> bool:
            snapshot = read_operator_state(harness.root)
            return snapshot is not None and snapshot.pinned == {ONE} and snapshot.state.stopped

        await eventually(pinned)


async def test_a_leader_whose_term_is_over_does_not_write_the_backup(harness: EvictorHarness) -> None:
    watcher = OperatorStateWatcher(harness.state, harness.root, Assignment())
    old, new = (OperatorStateBackup(harness.state, harness.root, watcher) for _ in range(2))
    term = await harness.term()
    first = await harness.state.change_operator_state(0, OperatorState(stopped=True))
    assert first is not None
    await old.save(term)
    await harness.state.resign(term)
    second = await harness.state.change_operator_state(first.version, OperatorState(draining=True))
    assert second is not None
    await old.save(term)
    assert read_operator_state(harness.root) == OperatorStateSnapshot(first)
    new_term = await harness.term()
    with operator_state_lock(harness.root) as stopped_in_the_middle:
        assert stopped_in_the_middle
        await new.save(new_term)
        assert read_operator_state(harness.root) == OperatorStateSnapshot(first)
    await new.save(new_term)
    assert read_operator_state(harness.root) == OperatorStateSnapshot(second)


def test_drafts_of_one_file_are_not_shared(tmp_path: Path) -> None:
    snapshots = [OperatorStateSnapshot(OperatorState(version=n), frozenset({ONE})) for n in range(1, 9)]

    def write(snapshot: OperatorStateSnapshot) -> None:
        for _ in range(50):
            write_operator_state(tmp_path, snapshot)

    with ThreadPoolExecutor(8) as pool:
        writing = [pool.submit(write, snapshot) for snapshot in snapshots]
        seen = [read_operator_state(tmp_path) for _ in range(200)]
    for future in writing:
        future.result()
    assert [found for found in seen if found is not None and found not in snapshots] == []
    assert read_operator_state(tmp_path) in snapshots
    assert [path.name for path in tmp_path.iterdir()] == ["operator.json"]


async def test_pins_are_back_before_anything_is_evicted(tmp_path: Path) -> None:
    async with evictor_harness(tmp_path) as harness:
        write_operator_state(harness.root, OperatorStateSnapshot(OperatorState(version=4), frozenset({ONE})))
        for name in ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"):
            harness.put_file(name)
        assert isinstance(harness.state, MemoryStateStore)
        async with harness.evictor():
            await eventually(harness.reconciled)

            async def below() -> bool:
                return len(await harness.entries()) <= 5

            await eventually(below)
            assert harness.has("one")
            assert await harness.state.pinned() == {ONE}


async def test_the_operators_assignment_is_the_one_that_is_checked(harness: EvictorHarness) -> None:
    async with harness.evictor() as evictor:
        await eventually(harness.reconciled)
        await harness.state.change_operator_state(
            0, OperatorState(buckets_ordered=True, buckets=frozenset({"5:5"}))
        )

        def changed() -> bool:
            return evictor._parts.assignment._assignment.bucket_ids == frozenset({"5:5"})

        await eventually(changed)


async def test_a_purge_does_not_wait_for_a_clock_that_was_put_back(harness: EvictorHarness) -> None:
    """Or for that of an API on another host, which is ahead of the store's."""
    harness.put_file("one")
    term = await harness.term()
    assert await harness.state.adopt(term, IndexEntry(ONE, SIZE, 1, time.time() + 3600))
    await harness.state.resign(term)
    async with harness.evictor():
        await eventually(harness.reconciled)
        await harness.state.request_purges([ONE])
        await eventually(lambda: no_purges_left(harness))
        assert not harness.has("one")
        assert await harness.used() == 0


async def test_the_copy_is_locked_in_a_worker_thread(
    harness: EvictorHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A volume that answers slowly stops neither renewals nor probes."""
    threads = list[threading.Thread]()

    @contextmanager
    def lock(root: Path) -> Iterator[bool]:
        threads.append(threading.current_thread())
        with operator_state_lock(root) as locked:
            yield locked

    monkeypatch.setattr(operator_state, "operator_state_lock", lock)
    assert await harness.state.change_operator_state(0, OperatorState(draining=True)) is not None
    watcher = OperatorStateWatcher(harness.state, harness.root, Assignment())
    await OperatorStateBackup(harness.state, harness.root, watcher).save(await harness.term())
    assert threads
    assert threading.main_thread() not in threads
    assert read_operator_state(harness.root) is not None


async def test_a_purged_object_is_not_imported_at_the_next_term(
    harness: EvictorHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names in the directory of the other node stay, as on a read-only mount."""
    monkeypatch.setattr(intake, "_READ_ONLY_ERRORS", (errno.EROFS,))
    assets, unlink = tmp_path / "assets", Path.unlink
    assets.mkdir()

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.parent == assets:
            raise OSError(errno.EROFS, "read-only")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    for name in ("1", "2"):
        (assets / name).write_bytes(body_of(name))
        harness.catalog.objects[ObjectId(name)] = media_object(name, body_of(name))
    settings = harness.settings()
    storage = settings.storage.model_copy(update={"import_assets": assets})
    settings = settings.model_copy(update={"storage": storage})

    async def holds_record_of(name: str) -> bool:
        return harness.volume.complete_record(ObjectId(name)) is not None

    async with harness.evictor_of(settings):
        await eventually(lambda: holds_record_of("1"))
        await eventually(lambda: holds_record_of("2"))
        await harness.state.request_purges([ObjectId("1")])
        await eventually(lambda: no_purges_left(harness))
        assert not harness.has("1")
    async with harness.evictor_of(settings):  # reconciles, after the import, before it takes the next purge
        await harness.state.request_purges([ObjectId("unknown")])
        await eventually(lambda: no_purges_left(harness))
        assert not harness.has("1")
        assert harness.has("2")
    assert sorted(path.name for path in assets.iterdir()) == ["1", "2"]
    assert await harness.matches_volume()
