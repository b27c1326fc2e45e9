"""A private RabbitMQ (3.10 to 4.x) on free ports, that tests and benchmarks may stop, kill, freeze and start again.

Nothing global is touched: it has its own epmd, node name, cookie, data, logs and configuration, and both processes are
killed by the kernel when this one dies (PR_SET_PDEATHSIG, set by util-linux' setpriv).
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

MISSING = "rabbitmq-server not found: apt-get install rabbitmq-server (Debian), or `make servers`"

_START_SECONDS = 120.0
_STOP_SECONDS = 20.0
_PATTERNS = (
    "/usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin",
    "/opt/rabbitmq/sbin",
    "/usr/local/lib/rabbitmq*/sbin",
)

# A child counts the thread that started it as its parent: this one lives as long as the process does.
_spawner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rabbitmq-spawner")


def scripts_folder() -> Path | None:
    """Where the real scripts are: Debian's wrappers in /usr/sbin insist on root or the rabbitmq user."""
    for pattern in _PATTERNS:
        found = sorted(Path("/").glob(pattern.lstrip("/")))
        if found and (found[-1] / "rabbitmq-server").exists():
            return found[-1]
    return None


class RabbitServer:
    """Runs until `stop` or `kill`; durable queues and persistent messages in `folder` survive a restart.

    `settings` are lines of rabbitmq.conf. Consumer timeouts are looked at each second (a minute by default).
    """

    def __init__(self, folder: Path, settings: Mapping[str, str] | None = None) -> None:
        self._folder = folder
        self._settings = dict(settings or {})
        self._server: subprocess.Popen[bytes] | None = None
        self._epmd: subprocess.Popen[bytes] | None = None
        self.port, self._distribution_port, self._epmd_port = _free_ports(3)

    @staticmethod
    def is_installed() -> bool:
        return scripts_folder() is not None and _epmd_program() is not None

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}/"

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def start(self) -> Self:
        """Returns when clients can connect; also after `stop` or `kill`, on the same port, with the data kept."""
        self._write_configuration()
        self._start_epmd()
        log = self._folder / "console.log"
        self._server = self._spawn([str(_scripts() / "rabbitmq-server")], log)
        deadline = time.monotonic() + _START_SECONDS
        while not self.answers():
            if time.monotonic() > deadline or self._server.poll() is not None:
                self.kill()
                raise RuntimeError(
                    f"rabbitmq-server did not start: {log.read_text(errors='replace')[-3000:]}"
                )
            time.sleep(0.05)
        return self

    def stop(self) -> None:
        """An orderly stop."""
        self._end(signal.SIGTERM)
        self._end_epmd()

    def kill(self) -> None:
        """As by the kernel or a power cut: no last words."""
        self._end(signal.SIGKILL)
        self._end_epmd()

    def restart(self) -> None:
        self.stop()
        self.start()

    def freeze(self) -> None:
        """Connections stay open, nothing answers."""
        os.killpg(self._running().pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.killpg(self._running().pid, signal.SIGCONT)

    def control(self, *words: str) -> str:
        """Run rabbitmqctl (takes seconds); returns what it prints."""
        command = [str(_scripts() / "rabbitmqctl"), "--quiet", "--node", self._node, *words]
        done = subprocess.run(
            command, env=self._environment(), capture_output=True, text=True, timeout=240, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"rabbitmqctl {words[0]} failed: {done.stderr[-2000:]}")
        return done.stdout

    def raise_memory_alarm(self) -> None:
        """From now on the broker blocks every connection that publishes."""
        self.control("set_vm_memory_high_watermark", "0")

    def clear_memory_alarm(self) -> None:
        self.control("set_vm_memory_high_watermark", "0.4")

    def delete_queue(self, name: str) -> None:
        self.control("delete_queue", name)

    def list_queues(self) -> dict[str, int]:
        """Messages, ready and unacknowledged, by queue."""
        lines = self.control("list_queues", "--no-table-headers", "name", "messages").splitlines()
        return {name: int(count) for name, _, count in (line.rpartition("\t") for line in lines) if name}

    def close_all_connections(self) -> None:
        self.control("close_all_connections", "test")

    def answers(self) -> bool:
        """True if the broker takes up an AMQP 0-9-1 handshake."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
                connection.sendall(b"AMQP\x00\x00\x09\x01")
                return connection.recv(1) == b"\x01"
        except OSError:
            return False

    @property
    def _node(self) -> str:
        return f"rabbit-{self.port}@localhost"

    def _write_configuration(self) -> None:
        settings = {
            "listeners.tcp.default": f"127.0.0.1:{self.port}",
            "vm_memory_high_watermark.relative": "0.4",
            "disk_free_limit.absolute": "20MB",
            "log.console": "false",
            **self._settings,
        }
        lines = "".join(f"{name} = {value}\n" for name, value in settings.items())
        (self._folder / "rabbitmq.conf").write_text(lines)
        (self._folder / "enabled_plugins").write_text("[].\n")
        (self._folder / "environment").touch()

    def _environment(self) -> dict[str, str]:
        folder = self._folder
        return {
            "PATH": f"{os.environ.get('PATH', '')}:/usr/bin:/bin:/usr/sbin:/sbin",
            "LANG": "C.UTF-8",
            "HOME": str(folder),
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_CONF_ENV_FILE": str(folder / "environment"),
            "RABBITMQ_NODENAME": self._node,
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(folder / "data"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_PID_FILE": str(folder / "pid"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
                "+S 1:1 +SDcpu 1:1 +SDio 2 +A 2 -rabbit channel_tick_interval 1000 "
                "-kernel inet_dist_use_interface {127,0,0,1}"
            ),
            "RABBITMQ_CTL_ERL_ARGS": "+S 1:1 +SDcpu 1:1 +SDio 1 +A 1",
            "detached": "yes",  # the script then becomes the server, instead of waiting beside it
        }

    def _start_epmd(self) -> None:
        if self._epmd is None:
            program = _epmd_program() or "epmd"
            command = [program, "-port", str(self._epmd_port), "-address", "127.0.0.1"]
            self._epmd = self._spawn(command, self._folder / "epmd.log")

    def _spawn(self, command: list[str], log: Path) -> subprocess.Popen[bytes]:
        def spawn() -> subprocess.Popen[bytes]:
            with log.open("ab") as output:
                return subprocess.Popen(
                    ["setpriv", "--pdeathsig", "KILL", "--", *command],
                    env=self._environment(),
                    cwd=self._folder,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )

        return _spawner.submit(spawn).result()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._server is None:
            raise RuntimeError("rabbitmq-server is not running")
        return self._server

    def _end(self, how: signal.Signals) -> None:
        if self._server is not None:
            _end_group(self._server, how)
            self._server = None

    def _end_epmd(self) -> None:
        if self._epmd is not None:
            _end_group(self._epmd, signal.SIGKILL)
            self._epmd = None


def _end_group(process: subprocess.Popen[bytes], how: signal.Signals) -> None:
    try:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGCONT)
            os.killpg(process.pid, how)
        process.wait(timeout=_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=_STOP_SECONDS)


def _scripts() -> Path:
    folder = scripts_folder()
    if folder is None:
        raise RuntimeError(MISSING)
    return folder


def _epmd_program() -> str | None:
    bundled = sorted(Path("/").glob("usr/lib/erlang/erts-*/bin/epmd"))
    return shutil.which("epmd") or (str(bundled[-1]) if bundled else None)


def _free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, all different."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()
