from collections.abc import Iterator

import pytest
import structlog
from hypothesis import HealthCheck, settings

pytest_plugins = [
    "tests.contract.state_fixture",
    "tests.servers.redis_fixture",
    "tests.servers.rabbitmq_fixture",
]

# One example has no time limit: on a busy machine any of them may take long.
settings.register_profile("distributor", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("distributor")


@pytest.fixture(autouse=True)
def logs_as_they_were() -> Iterator[None]:
    """Code that configures logging for its process, such as a command, must not silence later tests."""
    yield
    structlog.reset_defaults()
