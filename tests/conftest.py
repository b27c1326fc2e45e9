pytest_plugins = ["tests.servers.redis_fixture", "tests.servers.rabbitmq_fixture"]
