"""How received bytes reach the partial file: in which pieces, and when the disk is told to take them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from distributor_node.services.fetcher.admission import LeaseRenewer, LeaseTimes
from distributor_node.services.fetcher.download import PartialWriter
from distributor_node.shared.adapters.state_common import StateTimeouts
from distributor_node.shared.adapters.state_memory import MemoryStateStore
from distributor_node.shared.adapters.volume import PartialFile, Volume, partial
from distributor_node.shared.adapters.volume.records import atomic_write
from distributor_node.shared.domain.errors import VolumeFull
from distributor_node.shared.domain.extents import Extents
from distributor_node.shared.domain.objects import ContentHash, ObjectId, StoredRecord
from distributor_node.shared.ports.state_store import Granted
from distributor_node.shared.runtime.threads import BlockingPool
from distributor_node.shared.waiting import boot_time
from tests.waiting import eventually

KIB, MIB = 1024, 1024 * 1024
OBJECT_ID = ObjectId("1")


class ObservedFile(PartialFile):
    """Notes what is written, and what the disk is told to take. `slow_disk`: the disk takes nothing until it is set."""

    def observe(self) -> None:
        self.writes: list[tuple[int, int]] = []
        self.writers: set[threading.Thread] = set()
        self.wakers: list[threading.Thread] = []
        self.full = False
        self.handed_over: list[tuple[int, int]] = []
        self.slow_disk = threading.Event()
        self.slow_disk.set()

    async def has_writes(self) -> bool:
        return bool(self.writes)

    async def is_full(self) -> bool:
        return self.size == self.record.size

    def wake_followers(self) -> None:
        self.wakers.append(threading.current_thread())
        super().wake_followers()

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        if self.full:
            raise VolumeFull("no space left")
        super().write(offset, data)
        self.writers.add(threading.current_thread())
        self.writes.append((offset, offset + len(data)))

    def start_writeback(self, first: int, end: int) -> None:
        self.slow_disk.wait(30)
        super().start_writeback(first, end)
        self.handed_over.append((first, end))


class Bench:
    def __init__(self, volume: Volume, renewer: LeaseRenewer, disk: BlockingPool) -> None:
        self.volume, self.renewer, self.disk = volume, renewer, disk

    def open(self, size: int) -> ObservedFile:
        record = StoredRecord(
            OBJECT_ID, size, '"tag"', ContentHash("sha256", bytes(32)), "video/mp4", 1_700_000_000
        )
        file = ObservedFile(self.volume._directories, record)
        file.observe()
        file.open(write_sidecar=True)
        return file

    def writer(self, file: PartialFile) -> PartialWriter:
        return PartialWriter(file, None, self.renewer, self.disk)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    volume = Volume(tmp_path)
    volume.prepare()
    state = MemoryStateStore(1 << 40, StateTimeouts(), lambda: 0.0)
    term = await state.lead("evictor", 3600)
    assert term is not None
    await state.set_reconciled(term)
    granted = await state.begin(OBJECT_ID, 64 * MIB, "worker")
    assert isinstance(granted, Granted)
    disk = BlockingPool(4)
    yield Bench(volume, LeaseRenewer(state, granted.lease, LeaseTimes(60, 20), boot_time()), disk)
    await disk.close()
    volume.close()


async def test_a_small_object_is_written_once_however_it_arrives(bench: Bench) -> None:
    file = bench.open(64 * KIB)
    writer = bench.writer(file)
    async with writer.writing(0):
        for _ in range(4):
            await writer.put(bytes(16 * KIB))
            for _ in range(20):
                await asyncio.sleep(0)  # the writer has its turns
    assert file.writes == [(0, 64 * KIB)]
    file.close()


async def test_a_small_object_that_comes_as_a_whole_is_on_disk_when_put_returns(bench: Bench) -> None:
    """No task of the writer has to have its turn first, and none is left."""
    file = bench.open(64 * KIB)
    writer = bench.writer(file)
    async with writer.writing(0):
        await writer.put(bytes(64 * KIB))
        assert file.writes == [(0, 64 * KIB)]
        assert not [task for task in asyncio.all_tasks() if task.get_name() == "partial-writer"]
    file.close()


async def test_the_first_piece_is_on_disk_when_put_returns_and_its_followers_are_woken(bench: Bench) -> None:
    """Before the announcement, which goes through the state store, and without a task of the writer."""
    file, told = bench.open(2 * MIB), asyncio.Event()
    watch = bench.volume.watch_partials()
    assert watch is not None

    async def announce() -> None:
        told.set()

    writer = PartialWriter(file, None, bench.renewer, bench.disk, announce)
    async with writer.writing(0):
        await writer.put(bytes(256 * KIB))
        assert file.writes == [(0, 256 * KIB)]
        assert watch.read_partials() == {OBJECT_ID}
        assert not told.is_set()
        assert not [task for task in asyncio.all_tasks() if task.get_name() == "partial-writer"]
        await writer.put(bytes(256 * KIB))
    assert told.is_set()
    assert watch.read_partials() == set()
    assert file.size == 512 * KIB
    assert not file.is_verified
    watch.close()
    file.close()


async def test_the_first_piece_needs_no_thread_where_the_disk_is_quick(bench: Bench) -> None:
    file = bench.open(2 * MIB)
    bench.disk.keep_short_calls_in_loop()
    async with (writer := bench.writer(file)).writing(0):
        await writer.put(bytes(64 * KIB))
        assert file.writers == {threading.current_thread()}
        await writer.put(bytes(64 * KIB))
    assert threading.current_thread() in file.writers
    assert len(file.writers) == 2
    file.close()


async def test_the_loop_waits_for_no_thread_that_names_extents(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main stream of a sparse file begins again behind each extent. Naming syncs the sidecar."""
    file = bench.open(8 * MIB)
    bench.disk.keep_short_calls_in_loop()
    file.write(0, bytes(MIB))
    file.make_sparse(MIB)
    began, may_end = threading.Event(), threading.Event()

    def sync_slowly(*arguments: Any) -> None:
        began.set()
        assert may_end.wait(30)
        atomic_write(*arguments)

    monkeypatch.setattr(partial, "atomic_write", sync_slowly)
    extents = Extents.of((0, MIB), (4 * MIB, 5 * MIB))
    naming = asyncio.create_task(bench.disk.run(file.name_extents, extents))
    await asyncio.to_thread(began.wait, 30)

    async def announce() -> None:
        pass

    file.writers.clear()
    async with (writer := PartialWriter(file, None, bench.renewer, bench.disk, announce)).writing(MIB):
        await writer.put(bytes(64 * KIB))
    assert not naming.done()
    assert threading.current_thread() not in file.writers
    may_end.set()
    await naming
    file.close()


async def test_followers_are_woken_in_a_thread_where_the_loop_has_clients(bench: Bench) -> None:
    file = bench.open(2 * MIB)

    async def announce() -> None:
        pass

    async with (writer := PartialWriter(file, None, bench.renewer, bench.disk, announce)).writing(0):
        await writer.put(bytes(64 * KIB))
    assert len(file.wakers) == 1
    assert threading.current_thread() not in file.wakers
    file.close()


async def test_a_first_piece_that_is_long_has_a_thread(bench: Bench) -> None:
    file = bench.open(2 * MIB)
    bench.disk.keep_short_calls_in_loop()
    async with (writer := bench.writer(file)).writing(0):
        await writer.put(bytes(MIB))
        assert file.writes == [(0, MIB)]
    assert threading.current_thread() not in file.writers
    file.close()


async def test_a_disk_that_refuses_the_first_piece_is_told_by_put(bench: Bench) -> None:
    file = bench.open(2 * MIB)
    file.full = True
    told = asyncio.Event()

    async def announce() -> None:
        told.set()

    with pytest.raises(VolumeFull):
        async with (writer := PartialWriter(file, None, bench.renewer, bench.disk, announce)).writing(0):
            await writer.put(bytes(64 * KIB))
    assert not told.is_set()
    file.close()


async def test_what_has_arrived_of_a_small_object_is_written_when_no_more_comes(bench: Bench) -> None:
    file = bench.open(64 * KIB)
    writer = bench.writer(file)
    async with writer.writing(0):
        await writer.put(bytes(16 * KIB))
        await eventually(file.has_writes)
        await writer.put(bytes(48 * KIB))
    assert file.writes == [(0, 16 * KIB), (16 * KIB, 64 * KIB)]
    file.close()


async def test_the_disk_takes_the_bytes_while_more_arrive(bench: Bench) -> None:
    file = bench.open(96 * MIB)
    writer = bench.writer(file)
    async with writer.writing(0):
        for _ in range(96):
            await writer.put(bytes(MIB))
    assert file.handed_over[0][0] == 0
    assert file.handed_over[0][1] > 64 * MIB
    assert all(
        end == first for (_, end), (first, _) in zip(file.handed_over, file.handed_over[1:], strict=False)
    )
    assert all(end - first >= 16 * MIB for first, end in file.handed_over)
    file.close()


async def test_the_disk_is_told_nothing_of_what_is_synced_in_a_moment(bench: Bench) -> None:
    file = bench.open(64 * MIB)
    async with (writer := bench.writer(file)).writing(0):
        for _ in range(64):
            await writer.put(bytes(MIB))
    assert not file.handed_over
    file.close()


async def test_the_disk_takes_the_bytes_of_a_huge_object_from_the_beginning(bench: Bench) -> None:
    file = bench.open(256 * MIB)
    with suppress(asyncio.CancelledError):
        async with (writer := bench.writer(file)).writing(0):
            for _ in range(40):
                await writer.put(bytes(MIB))
            raise asyncio.CancelledError  # the rest would make no difference
    assert file.handed_over[0][0] == 0
    assert file.handed_over[0][1] < 20 * MIB
    file.close()


async def test_a_slow_disk_delays_no_byte_and_no_file_is_closed_under_it(bench: Bench) -> None:
    file = bench.open(96 * MIB)
    file.slow_disk.clear()
    writer = bench.writer(file)

    async def fill() -> None:
        async with writer.writing(0):
            for _ in range(96):
                await writer.put(bytes(MIB))

    filling = asyncio.create_task(fill())
    await eventually(file.is_full)
    for _ in range(20):
        await asyncio.sleep(0)
    assert not filling.done()
    filling.cancel()
    await asyncio.sleep(0.05)
    assert not filling.done()
    file.slow_disk.set()
    with pytest.raises(asyncio.CancelledError):
        await filling
    assert len(file.handed_over) == 1
    file.close()
