pytest_plugins = ["tests.servers.redis_fixture"]
