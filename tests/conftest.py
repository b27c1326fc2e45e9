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

_SLOWEST_FIRST = ("chaos", "end_to_end", "integration", "deploy", "contract", "unit")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Order tests for workers side by side, each of which begins with an equal share of the list.

    Half of them begin with tests that wait, while the others need the CPUs, and what is left for the end is short.
    """
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    if workers < 2:
        return
    shares = workers // 2
    files = {file: number for number, file in enumerate(dict.fromkeys(item.path for item in items))}

    def place(item: pytest.Item) -> tuple[int, int]:
        kind = item.path.relative_to(config.rootpath / "tests").parts[0]
        rank = _SLOWEST_FIRST.index(kind) if kind in _SLOWEST_FIRST else len(_SLOWEST_FIRST)
        return files[item.path] % shares, rank

    items.sort(key=place)


@pytest.fixture(autouse=True)
def logs_as_they_were() -> Iterator[None]:
    """Code that configures logging for its process, such as a command, must not silence later tests."""
    yield
    structlog.reset_defaults()
