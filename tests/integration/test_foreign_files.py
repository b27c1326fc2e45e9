"""Names of the volume that are no plain files, and a disk that fails: a miss, counted, said once, never a hang."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from distributor_node.services.api.assets import growing_file
from distributor_node.shared.adapters.volume import Volume
from distributor_node.shared.domain.errors import VolumeError
from distributor_node.shared.domain.objects import ObjectId, StoredRecord
from distributor_node.shared.ports.state_store import Granted
from tests.counters import counted
from tests.integration.assets_harness import MIB, AssetsHarness, assets_harness

ID, SIZE = ObjectId("1"), 2 * MIB
RECORD = StoredRecord(ID, 5, None, None, "image/png", 1_700_000_000)
FOREIGN = "distributor_foreign_files_opened_total"

pytestmark = pytest.mark.timeout(60)  # by a signal, which ends a blocked open


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(path))


def make_link(path: Path) -> None:
    path.symlink_to("/etc/hostname")


KINDS: dict[str, Callable[[Path], None]] = {
    "fifo": os.mkfifo,
    "directory": Path.mkdir,
    "link": make_link,
    "socket": make_socket,
}


@pytest.fixture(params=sorted(KINDS))
def make(request: pytest.FixtureRequest) -> Callable[[Path], None]:
    """Makes something that is no plain file."""
    return KINDS[request.param]


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Volume]:
    made = Volume(tmp_path / "v")
    made.prepare()
    yield made
    made.close()


def publish(volume: Volume) -> Path:
    partial = volume.open_partial_for_writing(RECORD)
    partial.write(0, b"hello")
    partial.mark_verified()
    partial.publish(RECORD)
    partial.close()
    (path,) = volume.root.glob(f"objects/*/{ID}")
    return path


@pytest.mark.parametrize("place", ["objects", "records"])
def test_a_foreign_file_is_a_miss_counted_and_logged_once(
    volume: Volume, make: Callable[[Path], None], place: str
) -> None:
    path = Path(str(publish(volume)).replace("/objects/", f"/{place}/"))
    path.unlink()
    make(path)
    before = counted(FOREIGN)
    with capture_logs() as logs:
        for _ in range(3):
            assert volume.open_object(ID) is None
            (volume.open_raw if place == "objects" else volume.read_record)(ID)
    assert counted(FOREIGN) - before == 6
    assert [line["event"] for line in logs] == ["foreign_file_ignored"]
    assert logs[0]["path"] == f"{place}/{path.parent.name}/{ID}"
    assert os.path.lexists(path), "it was left alone"


@pytest.mark.parametrize("suffix", [".part", ".json"])
def test_a_foreign_partial_file_is_none(volume: Volume, make: Callable[[Path], None], suffix: str) -> None:
    make(volume.root / "incoming" / f"{ID}{suffix}")
    if suffix == ".json":
        assert volume.partial_record(ID) is None
        return
    assert volume.open_partial(ID) is None
    assert volume.open_verified_partial(RECORD) is None
    with pytest.raises(VolumeError, match=r"expected a regular file at 1\.part"):
        volume.open_partial_for_writing(RECORD)


@pytest.mark.parametrize("name", [".format", ".standalone"])
def test_a_foreign_file_in_the_root_is_an_error_in_words(
    volume: Volume, make: Callable[[Path], None], name: str
) -> None:
    path = volume.root / name
    path.unlink(missing_ok=True)
    make(path)
    with pytest.raises(VolumeError, match=f"expected a regular file at {name}"):
        volume.prepare() if name == ".format" else volume.lock_standalone()


def test_a_fifo_is_replaced_by_the_object_and_a_directory_is_found_before_the_download(
    volume: Volume,
) -> None:
    path = publish(volume)
    path.unlink()
    os.mkfifo(path)
    assert publish(volume).read_bytes() == b"hello"
    path.unlink()
    path.mkdir()
    with pytest.raises(VolumeError, match="expected a file, got a directory"):
        volume.open_partial_for_writing(RECORD)


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[AssetsHarness]:
    async with assets_harness(tmp_path, first_byte_wait=0.3) as running:
        running.add("1", SIZE)
        yield running


async def test_a_client_gets_the_object_past_a_foreign_file(
    harness: AssetsHarness, make: Callable[[Path], None]
) -> None:
    """The partial file first: a request that follows it must end by its deadline."""
    part = harness.volume.root / "incoming" / "1.part"
    make(part)
    granted = await harness.context.state.begin(ID, SIZE, "worker-1")
    assert isinstance(granted, Granted)
    answer = await harness.get("1")
    assert (answer.status, answer.body) == (200, harness.data["1"])
    assert answer.headers["x-data-source"] == "external"
    await harness.context.state.release(granted.lease)
    part.rmdir() if part.is_dir() and not part.is_symlink() else part.unlink()
    path = harness.store("1")
    path.unlink()
    make(path)
    answer = await harness.get("1")
    assert (answer.status, answer.body) == (200, harness.data["1"])


async def test_a_partial_file_that_the_disk_cannot_read_is_proxied_and_said_once(
    harness: AssetsHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(_descriptor: int, _offset: int, _length: int) -> memoryview:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    fetch = await harness.begin("1", written=MIB)
    monkeypatch.setattr(growing_file, "read_chunk", fail)
    before = counted("distributor_volume_read_errors_total")
    with capture_logs() as logs:
        for _ in range(3):
            answer = await harness.get("1")
            assert (answer.status, answer.body) == (200, harness.data["1"])
            assert answer.headers["x-data-source"] == "external"
    assert counted("distributor_volume_read_errors_total") - before == 3
    assert [line["reason"] for line in logs if line["event"] == "volume_read_failed"] == [
        "read the partial file of 1: Input/output error"
    ]
    await fetch.complete()
