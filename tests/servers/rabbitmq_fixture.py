"""Fixtures for everything that needs RabbitMQ."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aio_pika
import pytest

from distributor_node.shared.adapters.queue_rabbitmq.connection import Topology
from distributor_node.shared.domain.jobs import RetryPlan
from tests.servers.rabbitmq_server import MISSING, RabbitServer


def _require_rabbitmq() -> None:
    if not RabbitServer.is_installed():
        pytest.exit(f"these tests need RabbitMQ: {MISSING}", returncode=4)


@pytest.fixture(scope="session")
def rabbitmq_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitServer]:
    """One broker for all tests; use `queue_prefix`, and leave it running."""
    _require_rabbitmq()
    with RabbitServer(tmp_path_factory.mktemp("rabbitmq")) as server:
        yield server


@pytest.fixture
def amqp_url(rabbitmq_server: RabbitServer) -> str:
    return rabbitmq_server.url


@pytest.fixture
def retry_plan() -> RetryPlan:
    """Two delays, short enough to wait for."""
    return RetryPlan(delays=(0.1, 0.3))


@pytest.fixture
async def queue_prefix(amqp_url: str, retry_plan: RetryPlan) -> AsyncIterator[str]:
    """Unique to the test; the queues of that name are deleted after it."""
    prefix = f"test-{uuid.uuid4().hex[:12]}"
    yield prefix
    async with await aio_pika.connect(amqp_url, timeout=60) as connection, connection.channel() as channel:
        for name in Topology(prefix, retry_plan).names:
            await channel.queue_delete(name)


@pytest.fixture(scope="module")
def own_rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitServer]:
    """A broker that the tests of one file may stop, freeze and kill. Jobs unanswered for 2 s are delivered again."""
    _require_rabbitmq()
    folder: Path = tmp_path_factory.mktemp("own-rabbitmq")
    with RabbitServer(folder, {"consumer_timeout": "2000"}) as server:
        yield server
