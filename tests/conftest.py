pytest_plugins = [
    "tests.contract.state_fixture",
    "tests.servers.redis_fixture",
    "tests.servers.rabbitmq_fixture",
]
