"""Sparse partial files: what followers and the next writer believe, and what they do not."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distributor_node.shared.adapters.volume import (
    FoundPartial,
    PartialFile,
    PartialHeld,
    PartialReader,
    PartialState,
    Volume,
)
from distributor_node.shared.adapters.volume.partial import locks_are_apart
from distributor_node.shared.adapters.volume.records import encode_record
from distributor_node.shared.domain.errors import InvalidInput
from distributor_node.shared.domain.extents import BLOCK, MAX_EXTENTS, Extents
from distributor_node.shared.domain.objects import ContentHash, ObjectId, StoredRecord
from distributor_node.shared.domain.space import RECORD_BYTES

SIZE = 100 * BLOCK + 77
DATA = os.urandom(SIZE)
RECORD = StoredRecord(
    ObjectId("1"), SIZE, '"tag"', ContentHash("sha256", bytes(32)), "video/mp4", 1_700_000_000
)


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Volume]:
    made = Volume(tmp_path / "volume")
    made.prepare()
    yield made
    made.close()


def write(partial: PartialFile, first: int, end: int) -> None:
    partial.write(first, DATA[first:end])


def state_of(volume: Volume) -> PartialState:
    reader = follow(volume)
    try:
        return reader.state()
    finally:
        reader.close()


def follow(volume: Volume) -> PartialReader:
    reader = volume.open_partial(RECORD.object_id)
    assert reader is not None
    return reader


def sparse(volume: Volume, prefix: int = 10 * BLOCK) -> PartialFile:
    partial = volume.open_partial_for_writing(RECORD)
    write(partial, 0, prefix)
    partial.make_sparse(prefix)
    return partial


def test_a_file_that_was_not_marked_is_one_prefix(volume: Volume) -> None:
    partial = volume.open_partial_for_writing(RECORD)
    write(partial, 0, 1234)
    state = state_of(volume)
    assert (state.size, state.extents, state.total) == (1234, None, 1234)
    assert (state.end_from(0), state.end_from(1233), state.end_from(5000)) == (1234, 1234, 5000)
    assert (partial.size, partial.extents, partial.is_sparse) == (1234, Extents.of((0, 1234)), False)
    partial.close()
    again = volume.open_partial_for_writing(RECORD)
    assert (again.size, again.is_sparse) == (1234, False)
    again.close()


def test_followers_believe_what_is_named_and_nothing_else(volume: Volume) -> None:
    partial = sparse(volume)
    reader = follow(volume)
    write(partial, 50 * BLOCK, 60 * BLOCK)
    state = reader.state()
    assert (state.size, state.total) == (10 * BLOCK, 10 * BLOCK)
    assert state.end_from(50 * BLOCK) == 50 * BLOCK
    partial.name_extents(Extents.of((0, 10 * BLOCK), (50 * BLOCK, 60 * BLOCK)))
    state = reader.state()
    assert (state.size, state.total) == (10 * BLOCK, 20 * BLOCK)
    assert (state.end_from(50 * BLOCK), state.end_from(59 * BLOCK + 1)) == (60 * BLOCK, 60 * BLOCK)
    assert (state.end_from(10 * BLOCK), state.nearest_end(49 * BLOCK)) == (10 * BLOCK, 10 * BLOCK)
    assert reader.read(50 * BLOCK, 100) == DATA[50 * BLOCK : 50 * BLOCK + 100]
    assert not state.verified
    reader.close()
    partial.close()


def test_the_next_writer_has_what_was_named(volume: Volume) -> None:
    partial = sparse(volume)
    write(partial, 50 * BLOCK, 60 * BLOCK)
    named = Extents.of((0, 10 * BLOCK), (50 * BLOCK, 60 * BLOCK))
    partial.name_extents(named)
    write(partial, 70 * BLOCK, 80 * BLOCK)  # and is killed
    partial.close()
    again = volume.open_partial_for_writing(replace(RECORD, stored_at=RECORD.stored_at + 5))
    assert again.is_sparse
    assert (again.extents, again.size, again.total) == (named, 10 * BLOCK, 20 * BLOCK)
    assert state_of(volume).extents == named
    again.close()


def test_a_file_whose_sidecar_says_nothing_has_nothing(volume: Volume) -> None:
    partial = sparse(volume)
    partial.close()
    sidecar = volume.root / "incoming" / "1.json"
    for body in (
        b"",
        b"{}",
        encode_record(RECORD),
        encode_record(RECORD, extents="12345:0-1"),
        b'{"extents":7}',
    ):
        sidecar.write_bytes(body)
        assert state_of(volume).total == 0
    sidecar.unlink()
    again = volume.open_partial_for_writing(RECORD)
    assert (again.is_sparse, again.size, again.total) == (True, 0, 0)
    again.close()


def test_a_follower_keeps_what_it_knows_when_the_sidecar_goes(volume: Volume) -> None:
    partial = sparse(volume)
    reader = follow(volume)
    assert reader.state().size == 10 * BLOCK
    (volume.root / "incoming" / "1.json").unlink()
    assert reader.state().size == 10 * BLOCK
    reader.close()
    partial.close()


def test_a_file_that_was_begun_again_is_a_prefix_again(volume: Volume) -> None:
    partial = sparse(volume)
    reader = follow(volume)
    partial.restart()
    assert (partial.is_sparse, partial.size, partial.total) == (False, 0, 0)
    assert reader.state().unlinked
    write(partial, 0, 5)
    state = state_of(volume)
    assert (state.size, state.extents) == (5, None)
    partial.make_sparse(5)
    assert state_of(volume).extents == Extents()  # less than a block
    reader.close()
    partial.close()


def test_a_verified_file_has_all_its_bytes(volume: Volume) -> None:
    partial = sparse(volume)
    reader = follow(volume)
    write(partial, 10 * BLOCK, SIZE)
    partial.mark_verified()
    state = reader.state()
    assert (state.verified, state.size, state.extents, state.end_from(5)) == (True, SIZE, None, SIZE)
    partial.make_sparse(0)  # too late
    assert reader.state().verified
    partial.publish(RECORD)
    partial.close()
    found = volume.open_object(RECORD.object_id)
    assert found is not None
    assert found.read(0, SIZE) == DATA
    assert stat.S_IMODE(os.fstat(found.descriptor).st_mode) == 0o644
    assert not list((volume.root / "incoming").iterdir())
    found.close()
    reader.close()


def test_a_sidecar_names_as_many_extents_as_it_has_room_for(volume: Volume) -> None:
    size = 2**40
    long = replace(RECORD, size=size, media_type="video/" + "x" * 60, etag='"' + "y" * 60 + '"')
    partial = volume.open_partial_for_writing(long)
    partial.make_sparse(0)
    far = 2**27  # blocks on, so that each number has seven digits
    wanted = Extents.of(*(((far + 2 * at) * BLOCK, (far + 2 * at + 1) * BLOCK) for at in range(MAX_EXTENTS)))
    partial.write(wanted.extents[-1].end - 1, b"x")
    partial.name_extents(wanted)
    body = (volume.root / "incoming" / "1.json").read_bytes()
    assert len(body) <= RECORD_BYTES
    with pytest.raises(InvalidInput):
        encode_record(long, extents=f"{2**40}:{wanted.encode()}")
    named = state_of(volume).extents
    assert named == partial.extents
    assert named is not None
    assert 20 <= len(named) < MAX_EXTENTS
    assert volume.partial_record(RECORD.object_id) is not None
    partial.close()


def test_what_the_source_says_later_is_recorded_beside_the_extents(volume: Volume) -> None:
    partial = volume.open_partial_for_writing(replace(RECORD, media_type=None))
    write(partial, 0, BLOCK)
    partial.make_sparse(BLOCK)
    partial.set_media_type("video/webm")
    write(partial, BLOCK, 2 * BLOCK)
    known = volume.partial_record(RECORD.object_id)
    assert known is not None
    assert known.media_type == "video/webm"
    assert state_of(volume).extents == Extents.of((0, BLOCK))
    partial.close()


RANGES = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(sorted)
STEPS = st.one_of(
    st.tuples(st.just("write"), RANGES),
    st.tuples(st.just("name"), st.just([0, 0])),
    st.tuples(st.just("crash"), RANGES),
    st.tuples(st.just("restart"), st.just([0, 0])),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(STEPS, min_size=1, max_size=20))
def test_whatever_happens_followers_read_what_was_written(steps: list[tuple[str, list[int]]]) -> None:
    """A writer writes right bytes anywhere, names them, is killed and resumed. What it was about to write when it was
    killed is torn. One follower stays, and one comes after each step."""
    with tempfile.TemporaryDirectory() as folder:
        volume = Volume(Path(folder) / "volume")
        volume.prepare()
        partial = sparse(volume, 0)
        staying, written = follow(volume), Extents()
        for step, (first, end) in steps:
            if step == "write":
                write(partial, first, end)
                written = written.adding(first, end)
            elif step == "name":
                partial.name_extents(written)
            elif step == "crash":
                gap = written.gap_at(first, SIZE)
                if gap is not None:
                    partial.write(gap.first, b"?" * min(gap.length, end - first))
                partial.close()
                partial = volume.open_partial_for_writing(RECORD)
                assert partial.is_sparse
                for extent in partial.extents:
                    assert written.contains(extent.first, extent.end)
                written = partial.extents
            else:
                partial.restart()
                partial.make_sparse(0)
                written = Extents()
                assert staying.state().unlinked
                staying.close()
                staying = follow(volume)
            newcomer = follow(volume)
            for reader in (staying, newcomer):
                named = reader.state().extents
                assert named is not None
                for extent in named:
                    assert reader.read(extent.first, extent.length) == DATA[extent.first : extent.end]
            newcomer.close()
        staying.close()
        partial.close()
        volume.close()


def test_what_a_file_holds(volume: Volume) -> None:
    """Of a prefix its size, of a file with holes its blocks, also those that were not named."""
    partial = volume.open_partial_for_writing(RECORD)
    write(partial, 0, 5000)
    assert partial.held == 5000
    partial.make_sparse(5000)
    write(partial, 60 * BLOCK, 62 * BLOCK)
    named = partial.total
    assert named <= partial.held < 20 * BLOCK
    assert partial.held >= BLOCK + 2 * BLOCK
    held = partial.held
    with pytest.raises(PartialHeld):
        volume.measure_partial(RECORD.object_id)
    partial.close()
    [found] = volume.scan_partials()
    assert isinstance(found, FoundPartial)
    assert volume.measure_partial(RECORD.object_id) == found.held == held
    assert volume.measure_partial(ObjectId("2")) is None
    assert not volume.open_partial_for_writing(RECORD).is_verified


def test_measuring_changes_nothing(volume: Volume) -> None:
    partial = volume.open_partial_for_writing(RECORD)
    write(partial, 0, SIZE)
    partial.mark_verified()
    partial.close()
    assert volume.measure_partial(RECORD.object_id) == SIZE
    assert state_of(volume).verified


def test_a_followed_file_is_resumed_and_not_evicted(volume: Volume) -> None:
    write(partial := volume.open_partial_for_writing(RECORD), 0, 5000)
    reader = follow(volume)
    partial.close()
    with pytest.raises(PartialHeld, match="being read"):
        volume.discard_partial(RECORD.object_id, SIZE, unless_read=True)
    partial = volume.open_partial_for_writing(RECORD)
    write(partial, 5000, 9000)
    assert reader.read(0, SIZE) == DATA[:9000]
    partial.close()
    reader.close()
    volume.discard_partial(RECORD.object_id, SIZE, unless_read=True)
    assert volume.open_partial(RECORD.object_id) is None


def test_a_follower_finds_no_file_that_is_being_evicted(volume: Volume) -> None:
    write(partial := volume.open_partial_for_writing(RECORD), 0, 5000)
    early = follow(volume)
    early.close()
    seen: list[PartialReader | None] = []
    with patch("os.unlink", side_effect=lambda *_, **__: seen.append(volume.open_partial(RECORD.object_id))):
        partial.discard(unless_read=True)
    assert seen
    assert seen == [None] * len(seen)


def test_a_purged_file_goes_although_it_is_followed(volume: Volume) -> None:
    write(partial := volume.open_partial_for_writing(RECORD), 0, 5000)
    partial.close()
    reader = follow(volume)
    volume.discard_partial(RECORD.object_id, SIZE)
    assert reader.state().unlinked
    reader.close()


def test_one_kind_of_lock_is_enough(volume: Volume) -> None:
    """On a file system that keeps both kinds as one, followers take none: the writer would exclude them."""
    with patch("distributor_node.shared.adapters.volume.volume.locks_are_apart", return_value=False):
        write(partial := volume.open_partial_for_writing(RECORD), 0, 5000)
        reader = follow(volume)
        partial.close()
        volume.discard_partial(RECORD.object_id, SIZE, unless_read=True)
        assert reader.state().unlinked
        reader.close()


def test_a_follower_on_a_read_only_mount_keeps_its_file(volume: Volume) -> None:
    """As the API in containers: it can make no file to try the locks out."""
    write(partial := volume.open_partial_for_writing(RECORD), 0, 5000)
    partial.close()
    module = "distributor_node.shared.adapters.volume.volume"
    evictor = Volume(volume.root)
    read_only = OSError(errno.EROFS, "read-only file system")
    with patch(f"{module}.locks_are_apart", side_effect=read_only):
        for is_local in (True, False):
            api = Volume(volume.root)
            with patch(f"{module}.is_on_local_file_system", return_value=is_local):
                reader = follow(api)
            if is_local:
                with pytest.raises(PartialHeld):
                    evictor.discard_partial(RECORD.object_id, SIZE, unless_read=True)
            reader.close()
            api.close()
    evictor.discard_partial(RECORD.object_id, SIZE, unless_read=True)
    evictor.close()


def test_the_lock_of_a_process_with_the_same_id_is_no_sign_of_one_kind(volume: Volume) -> None:
    """In two containers that share the volume, the first processes often have equal ids."""
    with ExitStack() as stack:
        other = stack.enter_context((volume.root / f".lock-probe-{os.getpid()}").open("w"))
        fcntl.flock(other, fcntl.LOCK_EX)
        descriptor = os.open(volume.root, os.O_RDONLY)
        stack.callback(os.close, descriptor)
        assert locks_are_apart(descriptor)
    assert len([path for path in volume.root.iterdir() if "lock-probe" in path.name]) == 1  # the other's


def test_holes_take_no_space(volume: Volume) -> None:
    assert volume.has_holes()
    assert not [path for path in volume.root.iterdir() if "hole" in path.name]
