"""A node under faults for each test, on servers of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path

import pytest

from tests.chaos.harness import ChaosHarness, chaos_harness
from tests.chaos.invariants import inspect
from tests.servers.rabbitmq_server import RabbitServer
from tests.servers.redis_server import RedisServer


@pytest.fixture(scope="session")
def chaos_rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitServer]:
    """A broker that these tests may stop, freeze and kill; they leave it running, and well."""
    if not RabbitServer.is_installed():
        pytest.exit("these tests need rabbitmq-server", returncode=4)
    with RabbitServer(tmp_path_factory.mktemp("chaos-rabbitmq")) as server:
        yield server


_PASSED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.when == "call":
        item.stash[_PASSED] = report.passed
    return report


@pytest.fixture
async def chaos(
    tmp_path: Path, own_redis: RedisServer, chaos_rabbitmq: RabbitServer, request: pytest.FixtureRequest
) -> AsyncIterator[ChaosHarness]:
    """After every test that passed: index and sums are compared with the volume (`inspect`)."""
    async with chaos_harness(tmp_path, own_redis, chaos_rabbitmq) as chaos:
        yield chaos
        if request.node.stash.get(_PASSED, False):
            await inspect(chaos)


@pytest.fixture
def faketime_library() -> str:
    """Debian's libfaketime: a clock of one's own for processes, changed while they run."""
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    if not found:
        pytest.skip("needs libfaketime (Debian package faketime, which `make test-chaos` installs)")
    return str(found[0])
