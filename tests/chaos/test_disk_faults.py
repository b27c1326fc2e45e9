"""A volume that is full, read-only, missing or tampered with: the node keeps running and serves correct bytes only."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from distributor_node.services.api.fast_path.object_cache import REVALIDATE_SECONDS
from distributor_node.services.demo.objects import MIB, DemoObject, generated_object
from tests.chaos.figures import record_result
from tests.chaos.harness import ChaosHarness
from tests.chaos.http import cache_all, events, get_all, get_correct, get_until_complete, metric
from tests.chaos.invariants import check_logs, wait_until_settled
from tests.end_to_end.client import get
from tests.mounting import mount, small_file_system
from tests.waiting import eventually

OBJECTS = [generated_object(str(number), MIB + number) for number in range(1, 41)]


@pytest.fixture
def small_volume(tmp_path: Path) -> Iterator[Path]:
    """The node's volume is a file system of 16 MiB. Request it before the node, which is gone before it then."""
    volume = tmp_path / "volume"
    volume.mkdir()
    with small_file_system(volume, "16m"):
        yield volume


@pytest.mark.timeout(120)
async def test_a_full_disk_below_the_storage_limit(small_volume: Path, chaos: ChaosHarness) -> None:
    assert chaos.stack.volume == small_volume
    await chaos.up(OBJECTS, 1024 * MIB)
    began = time.monotonic()
    cut = sum([await get_until_complete(chaos, item) for item in OBJECTS[:18]])
    assert cut == 0, "found out before the first byte, as long as no two fill it at once"
    free = asyncio.Semaphore(6)

    async def ask(item: DemoObject) -> int:
        async with free:
            return await get_until_complete(chaos, item)

    cut += sum(await asyncio.gather(*(ask(item) for item in OBJECTS[:22])))
    took = time.monotonic() - began
    reasons = [event["reason"] or "" for event in events(chaos.only("fetcher"), "job_ended")]
    full = sum("volume full" in reason for reason in reasons)
    assert full, "the disk was never full"
    assert await metric(chaos.only("fetcher"), "distributor_fetches_total", 'outcome="retry"') >= full
    hits = [await get(chaos.stack.url(item.object_id), method="HEAD") for item in OBJECTS[:22]]
    cached = sum(answer.headers["x-cache"] == "hit" for answer in hits)
    assert cached >= 3
    check_logs(chaos)
    record_result(
        "disk_full", requests=40 + cut, cut=cut, failed=0, jobs_that_met_it=full, cached=cached, seconds=took
    )


@pytest.mark.chaos
@pytest.mark.timeout(120)
async def test_a_volume_that_becomes_read_only(small_volume: Path, chaos: ChaosHarness) -> None:
    await chaos.up(OBJECTS, 12 * MIB)
    await cache_all(chaos, OBJECTS[:4])
    mount("-o", "remount,ro", str(small_volume))
    for answer in await get_all(chaos, OBJECTS[:4]):
        assert answer.headers["x-cache"] == "hit"
    missed = await get_all(chaos, OBJECTS[4:12])
    assert {answer.headers["x-data-source"] for answer in missed} == {"external"}
    reasons = [event["reason"] or "" for event in events(chaos.only("fetcher"), "job_ended")]
    assert any("Read-only" in reason for reason in reasons), reasons
    assert (await get(f"{chaos.only('api').health_url}/healthz")).status == 200
    mount("-o", "remount,rw", str(small_volume))
    began = time.monotonic()
    await cache_all(chaos, OBJECTS[4:8])
    recovery = time.monotonic() - began
    await wait_until_settled(chaos, OBJECTS)
    record_result("disk_read_only", requests=12, failed=0, caching_again_after=recovery)


@pytest.mark.chaos
@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["fetcher", "evictor"])
async def test_no_volume_at_the_start_is_refused(chaos: ChaosHarness, kind: str) -> None:
    chaos.stack.volume.write_text("not a directory")
    chaos.publish(OBJECTS)
    process = chaos.stack.add(kind)
    assert process.process is not None
    assert await asyncio.to_thread(process.process.wait, 30) == 2
    assert "storage.path" in process.tail()
    assert "Traceback" not in process.tail()


@pytest.mark.chaos
@pytest.mark.timeout(60)
async def test_an_api_without_a_volume_proxies(chaos: ChaosHarness) -> None:
    chaos.stack.volume.write_text("not a directory")
    chaos.publish(OBJECTS)
    api = chaos.stack.add("api")
    await eventually(lambda: "server_listening" in api.tail(), 30, pause=0.1)
    answers = await get_all(chaos, OBJECTS[:4])
    assert {answer.headers["x-data-source"] for answer in answers} == {"external"}
    assert list(events(api, "volume_not_writable"))
    check_logs(chaos)


@pytest.mark.chaos
@pytest.mark.timeout(180)
async def test_a_volume_that_disappears_and_returns(chaos: ChaosHarness) -> None:
    await chaos.up(OBJECTS, 100 * MIB)
    await cache_all(chaos, OBJECTS[:4])
    away = chaos.stack.volume.with_name("away")
    chaos.stack.volume.rename(away)
    chaos.stack.volume.mkdir()  # as the mount point shows when the disk is not mounted
    await get_all(chaos, OBJECTS[:8])
    await asyncio.sleep(3)
    await get_all(chaos, OBJECTS[:12])
    for path in sorted(chaos.stack.volume.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    chaos.stack.volume.rmdir()
    away.rename(chaos.stack.volume)
    began = time.monotonic()
    await cache_all(chaos, OBJECTS[:16])
    recovery = time.monotonic() - began
    await wait_until_settled(chaos, OBJECTS)
    record_result("disk_gone_and_back", requests=36, failed=0, caching_again_after=recovery)


def objects_on(volume: Path, ids: Sequence[str]) -> list[Path]:
    (found,) = zip(*(volume.glob(f"objects/*/{object_id}") for object_id in ids), strict=True)
    return list(found)


@pytest.mark.chaos
@pytest.mark.timeout(180)
async def test_files_deleted_truncated_swapped_and_corrupted_externally(
    chaos: ChaosHarness, tmp_path: Path
) -> None:
    chaos.stack.environment["DISTRIBUTOR_EVICTOR__SCRUB_RATE"] = "50M"
    secret = tmp_path / "secret"
    secret.write_bytes(b"s" * OBJECTS[3].size)
    await chaos.up(OBJECTS[:6], 100 * MIB)
    await cache_all(chaos, OBJECTS[:6])
    deleted, cut, grown, linked, corrupt, _ = objects_on(chaos.stack.volume, [str(n) for n in range(1, 7)])
    deleted.unlink()
    for path, size in ((cut, 1000), (grown, 3 * MIB)):
        path.chmod(0o644)
        with path.open("r+b") as file:
            file.truncate(size)
    linked.unlink()
    linked.symlink_to(secret)
    await asyncio.sleep(2 * REVALIDATE_SECONDS)  # an object asked for just now is believed for so long
    answers = await get_all(chaos, OBJECTS[:4])
    assert all(answer.headers["x-cache"] != "hit" for answer in answers)
    corrupt.chmod(0o644)
    with corrupt.open("r+b") as file:
        file.seek(500_000)
        file.write(b"rot")
    began = time.monotonic()
    await eventually(lambda: list(events(chaos.only("evictor"), "object_corrupt")), 60, pause=0.1)
    found = time.monotonic() - began
    await cache_all(chaos, OBJECTS[:6])
    assert secret.read_bytes() == b"s" * OBJECTS[3].size
    rest = await wait_until_settled(chaos, OBJECTS)
    record_result("disk_tampered", requests=16, failed=0, rot_found_after=found, at_rest_after=rest)


@pytest.mark.chaos
@pytest.mark.timeout(120)
async def test_unknown_files_and_links_are_left_alone_and_not_followed(
    chaos: ChaosHarness, tmp_path: Path
) -> None:
    item, outside = OBJECTS[0], tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    await chaos.up(OBJECTS[:8], 100 * MIB)
    await cache_all(chaos, [item])
    (own,) = chaos.stack.volume.glob("objects/*/1")
    strangers = [own.parent / "notes.txt", own.parent / "..data", chaos.stack.volume / "objects" / "README"]
    for path in strangers:
        path.write_bytes(b"mine")
    (own.parent / "777").symlink_to(outside / "secret")
    (chaos.stack.volume / "incoming" / "778.part").symlink_to(outside / "secret")
    for asked in ("777", "778", "notes.txt", "..data", "%2e%2e%2fsecret", "..%2f..%2fmanifest.json"):
        answer = await get(chaos.stack.url(asked))
        assert answer.status in (400, 404), (asked, answer.status)
        assert b"secret" not in answer.body
    evictor = chaos.only("evictor")
    assert await evictor.stop() == 0
    evictor.start()
    await evictor.healthy()
    await eventually(lambda: list(events(evictor, "unknown_files_found")), 30, pause=0.1)
    assert await metric(evictor, "distributor_unknown_files") >= 3
    await get_correct(chaos, item)
    assert all(path.read_bytes() == b"mine" for path in strangers)
    assert (outside / "secret").read_bytes() == b"secret"
    check_logs(chaos)
    record_result("disk_foreign_files", requests=8, failed=0)
