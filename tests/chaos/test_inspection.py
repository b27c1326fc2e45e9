"""The inspection at the end of each chaos test finds what is wrong with the accounts."""

from __future__ import annotations

import os
import zlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from distributor_node.shared.adapters.state_redis import RedisStateStore
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.ports.state_store import Granted, IndexEntry, Term
from tests.chaos.harness import ChaosHarness
from tests.chaos.invariants import accounting_problem, left_in_incoming

SIZE = 50_000


@pytest.fixture
async def leading(chaos: ChaosHarness) -> AsyncIterator[tuple[RedisStateStore, Term]]:
    """A store whose index stands for an empty volume; no process runs."""
    chaos.limit = 100 * SIZE
    for folder in ("objects", "incoming", "leaving"):
        (chaos.stack.volume / folder).mkdir(parents=True)
    async with chaos.state() as state:
        term = await state.lead("test", 3600)
        assert term is not None
        await state.set_reconciled(term)
        yield state, term


def put_object(volume: Path, name: str) -> Path:
    folder = volume / "objects" / f"{zlib.crc32(name.encode()) % 256:02x}"
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x" * SIZE)
    return folder / name


async def test_an_object_that_one_of_both_does_not_know(
    chaos: ChaosHarness, leading: tuple[RedisStateStore, Term]
) -> None:
    state, term = leading
    assert await accounting_problem(chaos) is None
    path = put_object(chaos.stack.volume, "77")
    assert "index and disk differ" in str(await accounting_problem(chaos))
    assert await state.adopt(term, IndexEntry(ObjectId("77"), SIZE, 1, 0.0))
    assert await accounting_problem(chaos) is None
    path.unlink()
    assert "index and disk differ" in str(await accounting_problem(chaos))
    path.write_bytes(b"x" * SIZE)


async def test_bytes_that_nothing_accounts_for(
    chaos: ChaosHarness, leading: tuple[RedisStateStore, Term]
) -> None:
    state, _ = leading
    for where, name in (("incoming", "5.part"), ("leaving", "5"), ("objects", "unlinked")):
        path = chaos.stack.volume / where / name
        with path.open("wb") as file:
            file.write(b"x" * SIZE)
            file.flush()
            if where == "objects":
                path.unlink()
                assert os.fstat(file.fileno()).st_nlink == 0
            assert await accounting_problem(chaos) is not None, where
        path.unlink(missing_ok=True)
        assert await accounting_problem(chaos) is None
    assert isinstance(await state.begin(ObjectId("5"), SIZE, "worker"), Granted)
    assert await accounting_problem(chaos) is None
    await chaos.redis.command("HINCRBY", f"{chaos.prefix}:usage", "used", "4096")
    assert await accounting_problem(chaos) is not None
    await chaos.redis.command("HINCRBY", f"{chaos.prefix}:usage", "used", "-4096")


@pytest.mark.usefixtures("leading")
async def test_records_that_a_killed_worker_has_left_are_no_work(chaos: ChaosHarness) -> None:
    incoming = chaos.stack.volume / "incoming"
    for name in ("1.part", "1.json", "2.json", "3.json,0a1b2c3d,new"):
        (incoming / name).touch()
    assert left_in_incoming(chaos) == ["1.json", "1.part", "2.json", "3.json,0a1b2c3d,new"]
    process = chaos.stack.add("fetcher")
    assert len(left_in_incoming(chaos)) == 4
    process.kill()
    assert left_in_incoming(chaos) == ["1.json", "1.part"]
    (incoming / "1.part").unlink()
    assert left_in_incoming(chaos) == []
