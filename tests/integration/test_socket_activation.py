"""Under systemd: the public port is opened by it and outlives the process; readiness and end are told."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from distributor_node.services.api.listen import ListenAddress
from distributor_node.services.api.sanic_app import build_app, unregister_application
from distributor_node.services.api.server import PublicServer
from distributor_node.shared.domain.errors import ConfigurationError
from distributor_node.shared.runtime.systemd import activated_socket, child_environment, watchdog_interval
from tests.end_to_end.client import get
from tests.servers.api_fixture import FakeAssets, RunningApi, running_api
from tests.servers.redis_server import free_port
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(120)

SOCKET_ACTIVATE = shutil.which("systemd-socket-activate")


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """The socket that systemd holds. A port that the system chose would be lost when the socket is stopped."""
    with socket.create_server(("127.0.0.1", free_port()), backlog=128) as held:
        yield held


@pytest.fixture
def notifications(tmp_path: Path) -> Iterator[socket.socket]:
    """Where systemd hears of states; its path is its name."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        receiver.settimeout(60)
        yield receiver


def settings(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "manifest.yaml").write_text("version: 1\nobjects: []\n")
    return {
        "DISTRIBUTOR_CATALOG__MANIFEST": str(tmp_path / "manifest.yaml"),
        "DISTRIBUTOR_STORAGE__PATH": str(tmp_path / "volume"),
        "DISTRIBUTOR_METRICS__HOST": "127.0.0.1",
        "DISTRIBUTOR_METRICS__PORT": str(free_port()),
        "DISTRIBUTOR_PUBLIC_API__PORT": "1",  # not to be used
        "DISTRIBUTOR_SHUTDOWN_DEADLINE": "10",
    }


WORKERS = {
    "DISTRIBUTOR_STATE_STORE__URL": "redis://127.0.0.1:1/0",
    "DISTRIBUTOR_JOB_QUEUE__URL": "amqp://127.0.0.1:1/",
    "DISTRIBUTOR_PUBLIC_API__WORKERS": "2",
}


class Unit:
    """A service as systemd would start it, on a socket that stays open.

    systemd-socket-activate passes on the socket that it was given, and becomes the service when a client connects.
    """

    def __init__(self, listener: socket.socket, environment: dict[str, str], command: str, log: Path) -> None:
        self._listener, self._environment, self._log = listener, environment, log
        self._command = [sys.executable, "-m", "distributor_node.services.command_line", command]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        number = self._listener.fileno()
        given = f'exec 3<&{number}; export LISTEN_FDS=1 LISTEN_FDNAMES=public_api LISTEN_PID=$$; exec "$@"'
        variables = {"PYTHONPATH": os.environ.get("PYTHONPATH", ""), **self._environment}
        activate: list[str] = []
        if SOCKET_ACTIVATE is not None:
            through = [f"--setenv={name}={value}" for name, value in variables.items()]
            activate = [SOCKET_ACTIVATE, "--fdname=public_api", *through]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                ["/bin/bash", "-c", given, "bash", *activate, *self._command],
                env={**os.environ, **variables},
                pass_fds=(number,),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def stop(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(60)

    def kill(self) -> None:
        """SIGKILL to all its processes, as systemd does when TimeoutStopSec is over."""
        assert self.process is not None
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(60)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "more"), [("standalone", {}), ("api", WORKERS)])
async def test_a_restart_under_load_refuses_no_client(
    tmp_path: Path, listener: socket.socket, notifications: socket.socket, command: str, more: dict[str, str]
) -> None:
    environment = {**settings(tmp_path), **more, "NOTIFY_SOCKET": str(tmp_path / "notify")}
    unit = Unit(listener, environment, command, tmp_path / "log")
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/api/v1/status"
    answered, ended = 0, asyncio.Event()

    async def client() -> None:
        nonlocal answered
        while not ended.is_set():
            answer = await get(url, timeout=60)
            assert answer.status == 200
            answered += 1

    async def told(state: bytes) -> None:
        while await asyncio.to_thread(notifications.recv, 100) != state:
            continue

    unit.start()
    try:
        async with asyncio.TaskGroup() as clients:
            for _ in range(8):
                clients.create_task(client())
            for _ in range(2):
                await told(b"READY=1")
                before = answered
                while answered < before + 50:  # noqa: ASYNC110 - an event for each answer would slow the load down
                    await asyncio.sleep(0.01)
                assert await asyncio.to_thread(unit.stop) == 0, (tmp_path / "log").read_text()
                await told(b"STOPPING=1")
                unit.start()
            await told(b"READY=1")
            ended.set()
    finally:
        unit.stop()
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("command", "more"), [("standalone", {}), ("api", WORKERS)])
async def test_a_kill_while_it_stops_refuses_no_client(
    tmp_path: Path, listener: socket.socket, notifications: socket.socket, command: str, more: dict[str, str]
) -> None:
    """What was being answered is cut, once for each client. Later clients wait in the socket's queue."""
    environment = {**settings(tmp_path), **more, "NOTIFY_SOCKET": str(tmp_path / "notify")}
    unit = Unit(listener, environment, command, tmp_path / "log")
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/api/v1/status"
    answered, cut, kills, ended = 0, 0, 2, asyncio.Event()

    async def client() -> None:
        nonlocal answered, cut
        while not ended.is_set():
            try:
                complete = (await get(url, timeout=60)).complete
            except ConnectionRefusedError:
                raise
            except (ConnectionError, asyncio.IncompleteReadError):
                complete = False
            answered, cut = answered + complete, cut + (not complete)

    async def told(state: bytes) -> None:
        while await asyncio.to_thread(notifications.recv, 100) != state:
            continue

    unit.start()
    try:
        async with asyncio.TaskGroup() as clients:
            for _ in range(8):
                clients.create_task(client())
            for _ in range(kills):
                await told(b"READY=1")
                before = answered
                await eventually(lambda before=before: answered >= before + 50, 60)  # type: ignore[misc]
                assert unit.process is not None
                unit.process.terminate()
                await told(b"STOPPING=1")
                await asyncio.to_thread(unit.kill)
                unit.start()
            await told(b"READY=1")
            before = answered
            await eventually(lambda: answered >= before + 50, 60)
            ended.set()
        assert await asyncio.to_thread(unit.stop) == 0, (tmp_path / "log").read_text()
    finally:
        unit.kill()
    assert cut <= 8 * kills
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.skipif(SOCKET_ACTIVATE is None, reason="no systemd-socket-activate here")
async def test_systemd_socket_activate_starts_a_node(tmp_path: Path, notifications: socket.socket) -> None:
    port = free_port()
    given = {
        **settings(tmp_path),
        "NOTIFY_SOCKET": str(tmp_path / "notify"),
        "WATCHDOG_USEC": "200000",
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
    }
    process = await asyncio.create_subprocess_exec(
        "systemd-socket-activate",
        *(f"--listen=127.0.0.1:{port}", "--fdname=public_api"),
        *(f"--setenv={name}={value}" for name, value in given.items()),
        *(sys.executable, "-m", "distributor_node.services.command_line", "standalone"),
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stderr is not None
        await process.stderr.readline()  # it listens
        assert (await get(f"http://127.0.0.1:{port}/api/v1/status", timeout=60)).status == 200
        missing = {b"READY=1", b"WATCHDOG=1"}
        while missing:
            missing.discard(await asyncio.to_thread(notifications.recv, 100))
    finally:
        process.terminate()
        _, log = await process.communicate()
    assert process.returncode == 0, log
    assert b"Traceback" not in log


@asynccontextmanager
async def server_on(api: RunningApi, inherited: socket.socket) -> AsyncIterator[PublicServer]:
    application = build_app(api.context, FakeAssets())
    server = PublicServer(application, ListenAddress("", 0, inherited=inherited))
    try:
        yield server
    finally:
        await server.close(0, ending=True)
        await application.ctx.usage.close()
        unregister_application(application)


async def test_a_stopped_port_refuses_and_listens_again(tmp_path: Path, listener: socket.socket) -> None:
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/healthz"
    async with running_api(tmp_path, FakeAssets()) as api:
        async with server_on(api, listener) as server, server_on(api, listener) as other:
            for _ in range(2):
                for one in (server, other):
                    await one.open()
                assert (await get(url, timeout=5)).status == 200
                for one in (server, other):
                    await one.close(5)
                with pytest.raises(ConnectionRefusedError):
                    await get(url, timeout=5)
        # The process has ended, and systemd has a socket that listens.
        asked = asyncio.create_task(get(url, timeout=20))
        await asyncio.sleep(0.1)
        assert not asked.done()
        async with server_on(api, listener) as server:
            await server.open()
            assert (await asked).status == 200


def activated(monkeypatch: pytest.MonkeyPatch, **variables: str) -> socket.socket | None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return activated_socket("public_api")


def test_without_systemd_nothing_is_activated(monkeypatch: pytest.MonkeyPatch) -> None:
    assert activated(monkeypatch) is None
    assert activated(monkeypatch, LISTEN_PID="1", LISTEN_FDS="1") is None
    assert activated(monkeypatch, LISTEN_PID=str(os.getpid()), LISTEN_FDS="0") is None
    assert activated(monkeypatch, LISTEN_PID=str(os.getpid()), LISTEN_FDS="many") is None


def test_foreign_sockets_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigurationError, match="expected one socket with FileDescriptorName=public_api, got 2: a:b"
    ):
        activated(monkeypatch, LISTEN_PID=str(os.getpid()), LISTEN_FDS="2", LISTEN_FDNAMES="a:b")


def test_children_do_not_talk_to_systemd() -> None:
    given = {"PATH": "/bin", "NOTIFY_SOCKET": "/x", "LISTEN_PID": "1", "WATCHDOG_USEC": "5"}
    assert child_environment(given) == {"PATH": "/bin"}


@pytest.mark.parametrize(
    ("variables", "interval"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "3000000"}, 1.5),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_watchdog_interval(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], interval: float | None
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert watchdog_interval() == interval
