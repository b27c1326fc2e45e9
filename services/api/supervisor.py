"""Several API processes on one port: starts workers, replaces those that die or hang, stops them together.

Each worker is a new interpreter (services/api/worker.py) in a session of its own, so that a Ctrl-C reaches only the
supervisor. It reads its settings from its standard input. The end of that pipe tells it that the supervisor is gone,
however the supervisor died. A second pipe carries the heartbeat of the worker's event loop: one byte per interval. On
STACK_SIGNAL, `faulthandler` writes the stacks of all its threads to the same pipe: it needs neither the event loop nor
the interpreter lock.

This module and what it imports must not import prometheus_client: `run_supervisor` chooses multiprocess metrics first.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import time
from asyncio.subprocess import PIPE, Process
from contextlib import AsyncExitStack, ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import structlog
from pydantic import SecretStr

from distributor_node.services.api.listen import ListenAddress, bind
from distributor_node.services.api.worker_probes import WorkerProbes
from distributor_node.shared.domain.errors import ConfigurationError
from distributor_node.shared.observability.multiprocess import (
    forget_process,
    owned_directory,
    prepare_multiprocess,
)
from distributor_node.shared.observability.probe_server import ProbeServer
from distributor_node.shared.runtime.run_service import CLEAN, MISCONFIGURED, ServiceScope, run_service
from distributor_node.shared.runtime.systemd import (
    PUBLIC_SOCKET,
    READY,
    activated_socket,
    child_environment,
    notify,
)
from distributor_node.shared.settings.model import Settings
from distributor_node.shared.waiting import Backoff, background, cancel_and_wait, wait_event

SHUTDOWN_ORDERED = 3
"""Exit code of a worker that ended because an operator shut the whole node down. The supervisor then ends with 0."""
HEARTBEAT, HEARTBEAT_INTERVAL = b".", 0.5
STACK_SIGNAL = signal.SIGXCPU
"""Its default action ends the process, which suits a worker that hangs before it has installed its handler."""
FIRST_HEARTBEAT_TIMEOUT = 60.0
"""Seconds from the start of a worker to its first heartbeat: it imports, and a machine that starts is busy."""
PORT_RETRY_INTERVAL = 0.25
"""Seconds between attempts to bind a port that the workers of a killed supervisor still hold."""
_MIN_RESTART_DELAY, _MAX_RESTART_DELAY = 0.5, 10.0
_STABLE_AFTER = 30.0
_SHUTDOWN_MARGIN = 5.0
_STACK_WAIT = 1.0  # seconds for the stacks to arrive
_MAX_STACK = 32 * 1024

logger = structlog.get_logger()


def run_supervisor(settings: Settings) -> int:
    """Run `public_api.workers` workers until a signal. Returns the exit code, 0 if all of them ended cleanly."""
    with ExitStack() as resources:
        directory = settings.metrics.multiprocess_dir
        prepare_multiprocess(directory or resources.enter_context(owned_directory("distributor-metrics-")))
        return _run(settings)


def _run(settings: Settings) -> int:
    async def main(scope: ServiceScope) -> None:
        await supervise(scope, settings)

    deadline = settings.shutdown_deadline + _SHUTDOWN_MARGIN
    return run_service(main, name="api-supervisor", settings=settings, shutdown_deadline=deadline)


async def supervise(scope: ServiceScope, settings: Settings) -> None:
    """Keep the workers running until a stop is requested. A reload is passed on to them.

    Raises ConfigurationError if the port is taken or a worker exits with MISCONFIGURED.
    """
    stop_requested = scope.stop_requested
    async with AsyncExitStack() as resources:
        listener = activated_socket(PUBLIC_SOCKET)
        port, operator_port = await _reserve_ports(settings, stop_requested, resources, listener)
        directory = resources.enter_context(owned_directory("distributor-probes-"))
        paths = [directory / str(number) for number in range(1, settings.public_api.workers + 1)]
        workers = [
            Worker(
                number,
                worker_input(settings, port, operator_port, path, listener),
                settings.shutdown_deadline,
                listener,
                settings.public_api.hang_timeout,
            )
            for number, path in enumerate(paths, start=1)
        ]
        scope.reloads.extend(worker.reload for worker in workers)
        host, metrics_port = settings.metrics.host, settings.metrics.port_of("api")
        probes = WorkerProbes(paths)
        await resources.enter_async_context(ProbeServer(host, metrics_port, probes.probes()))
        await resources.enter_async_context(background(_notify_ready(probes), "notify-ready"))
        logger.info("workers_starting", workers=len(workers), port=port)
        tasks = [
            asyncio.create_task(worker.keep_running(stop_requested), name=f"api-worker-{worker.number}")
            for worker in workers
        ]
        try:
            await asyncio.gather(*tasks)
        finally:
            await cancel_and_wait(*tasks)


async def _notify_ready(probes: WorkerProbes) -> None:
    await probes.wait_started()
    notify(READY)


async def _reserve_ports(
    settings: Settings,
    stop_requested: asyncio.Event,
    resources: AsyncExitStack,
    listener: socket.socket | None,
) -> tuple[int, int]:
    """Keep the public port and the operator API's until `resources` are closed. Returns both.

    `listener`: the public port, if systemd has opened it.
    """
    public, operator = settings.public_api, settings.operator_api
    timeout = settings.shutdown_deadline + _SHUTDOWN_MARGIN
    if listener is None:
        listener = await reserve_port(ListenAddress(public.host, public.port), timeout, stop_requested)
    port = resources.enter_context(listener).getsockname()[1]
    operator_port = operator.port
    if operator.secret is not None:
        address = ListenAddress(operator.host, operator.port, setting="operator_api")
        reserved = await reserve_port(address, timeout, stop_requested)
        operator_port = resources.enter_context(reserved).getsockname()[1]
    return port, operator_port


async def reserve_port(
    address: ListenAddress, timeout: float, stop_requested: asyncio.Event
) -> socket.socket:
    """Bind a socket without listening: it keeps the port while no worker holds it, and receives no connections.

    The workers of a supervisor that was just killed may still be finishing responses. Wait up to `timeout` seconds for
    them. Raises ConfigurationError at once if any other process holds the port.
    """
    deadline, port, logged = time.monotonic() + timeout, None, False
    while port is None:
        try:
            port = _exclusive_port(address)
        except ConfigurationError:
            if stop_requested.is_set() or time.monotonic() >= deadline or not _held_by_own_workers(address):
                raise
            if not logged:
                logged = True
                logger.warning("waiting_for_port", setting=f"{address.setting}.port", port=address.port)
            await wait_event(stop_requested, PORT_RETRY_INTERVAL)
    return bind(replace(address, port=port, shared=True))


def _exclusive_port(address: ListenAddress) -> int:
    """Return the port if no process holds it.

    Binds without SO_REUSEPORT: with it, an unrelated process of the same user could share the port unnoticed.
    """
    with bind(address) as probe:
        port: int = probe.getsockname()[1]
    return port


def _held_by_own_workers(address: ListenAddress) -> bool:
    """Whether the process that holds the port shares it with this user, as workers do."""
    try:
        bind(replace(address, shared=True)).close()
    except ConfigurationError:
        return False
    return True


class Worker:
    """One worker process, and the processes that replace it."""

    def __init__(
        self,
        number: int,
        standard_input: bytes,
        deadline: float,
        listener: socket.socket | None,
        hang_timeout: float,
    ) -> None:
        """`standard_input`: written to the worker's standard input. `deadline`: seconds that it may take to stop.

        `listener`: passed on to the worker. `hang_timeout`: seconds without a heartbeat before it is killed.
        """
        self.number = number
        self._standard_input = standard_input
        self._deadline = deadline
        self._listener = listener
        self._hang_timeout = hang_timeout
        self._running: tuple[Process, HeartbeatReader] | None = None
        self._restart_backoff = Backoff(_MIN_RESTART_DELAY, _MAX_RESTART_DELAY, jitter=False)

    async def keep_running(self, stop_requested: asyncio.Event) -> None:
        """Run the worker, and restart it when it dies, until `stop_requested`.

        Raises RuntimeError if the worker then does not end cleanly.
        """
        while not stop_requested.is_set():
            started = time.monotonic()
            async with HeartbeatReader() as heartbeat:
                process = await self._start(heartbeat)
                self._running = process, heartbeat
                try:
                    await self._run(process, heartbeat, stop_requested)
                finally:
                    if process.returncode is None:
                        process.kill()
                        await process.wait()
                    self._running = None
                    forget_process(process.pid)
            if process.returncode == SHUTDOWN_ORDERED:
                stop_requested.set()
            elif not stop_requested.is_set():
                await self._delay_restart(process, time.monotonic() - started, stop_requested)

    async def _start(self, heartbeat: HeartbeatReader) -> Process:
        inherited = [] if self._listener is None else [self._listener.fileno()]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-m",
            "distributor_node.services.api.worker",
            str(heartbeat.write_end),
            stdin=PIPE,
            start_new_session=True,
            env=child_environment(),
            pass_fds=(*inherited, heartbeat.write_end),
        )
        heartbeat.close_write_end()
        if process.stdin is None:
            raise RuntimeError("a worker was started without a standard input")
        process.stdin.write(self._standard_input)
        logger.info("worker_started", worker=self.number, process=process.pid)
        return process

    async def _run(self, process: Process, heartbeat: HeartbeatReader, stop_requested: asyncio.Event) -> None:
        ended = asyncio.create_task(process.wait(), name=f"api-worker-{self.number}-process")
        stop = asyncio.create_task(stop_requested.wait(), name=f"api-worker-{self.number}-stop")
        silence = asyncio.create_task(
            heartbeat.wait_silent(self._hang_timeout), name=f"api-worker-{self.number}-heartbeat"
        )
        try:
            await asyncio.wait({ended, stop, silence}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancel_and_wait(stop, silence)
        if ended.done():
            return
        if not stop_requested.is_set():
            await self._kill_hung(process, heartbeat)
            return
        process.send_signal(signal.SIGTERM)
        await asyncio.wait({ended}, timeout=self._deadline + _SHUTDOWN_MARGIN / 2)
        if not ended.done():
            process.kill()
        # -SIGTERM: the signal came before the worker had installed its handler.
        if await ended not in (CLEAN, SHUTDOWN_ORDERED, -signal.SIGTERM):
            raise RuntimeError(f"worker {self.number} ended with exit code {process.returncode}")

    async def reload(self) -> None:
        """Pass a SIGHUP on. A worker that still starts reads everything anyway."""
        if self._running is not None:
            process, heartbeat = self._running
            if heartbeat.has_begun and process.returncode is None:
                process.send_signal(signal.SIGHUP)

    async def _kill_hung(self, process: Process, heartbeat: HeartbeatReader) -> None:
        """Kill a worker whose event loop hangs, and log where it hangs."""
        from distributor_node.shared.observability.metrics import WORKERS_HUNG  # noqa: PLC0415

        process.send_signal(STACK_SIGNAL)
        stack = await heartbeat.read_stack()
        process.kill()
        WORKERS_HUNG.inc()
        logger.error(
            "worker_hung",
            worker=self.number,
            process=process.pid,
            silent_for=self._hang_timeout,
            stack=stack or "none: the process is stopped, or in a system call that cannot be interrupted",
        )
        await process.wait()

    async def _delay_restart(self, process: Process, uptime: float, stop_requested: asyncio.Event) -> None:
        if process.returncode == MISCONFIGURED:
            raise ConfigurationError(f"worker {self.number} cannot start with these settings")
        if uptime > _STABLE_AFTER:
            self._restart_backoff.reset()
        delay = self._restart_backoff.next_delay()
        logger.error("worker_died", worker=self.number, code=process.returncode, pause=delay)
        await wait_event(stop_requested, delay)


class HeartbeatReader:
    """The supervisor's end, for one worker process."""

    def __init__(self) -> None:
        self._reader = asyncio.StreamReader()
        self._transport: asyncio.BaseTransport | None = None
        self.write_end = -1  # for the worker
        self.has_begun = False  # whether a beat has arrived

    async def __aenter__(self) -> Self:
        read_end, self.write_end = os.pipe()
        self._transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(self._reader), os.fdopen(read_end, "rb", 0)
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close_write_end()
        if self._transport is not None:
            self._transport.close()

    def close_write_end(self) -> None:
        """The worker has inherited it."""
        if self.write_end >= 0:
            os.close(self.write_end)
            self.write_end = -1

    async def wait_silent(self, timeout: float) -> None:
        """Return once no beat has arrived for `timeout` seconds. Never returns after the end of the pipe.

        What counts are waits, not the time of a clock: while the supervisor itself stands still, beats collect in the
        pipe, and the first wait afterwards finds them.
        """
        silent, limit = 0.0, FIRST_HEARTBEAT_TIMEOUT
        while silent < max(limit, timeout):
            try:
                async with asyncio.timeout(HEARTBEAT_INTERVAL):
                    ended = not await self._reader.read(4096)
            except TimeoutError:
                silent += HEARTBEAT_INTERVAL
                continue
            if ended:
                await asyncio.get_running_loop().create_future()
            self.has_begun, silent, limit = True, 0.0, timeout

    async def read_stack(self) -> str:
        """Return what the worker writes within a second after STACK_SIGNAL."""
        stack = bytearray()
        with suppress(TimeoutError):
            async with asyncio.timeout(_STACK_WAIT):
                while len(stack) < _MAX_STACK and (more := await self._reader.read(4096)):
                    stack += more
        return stack.decode(errors="replace").strip(HEARTBEAT.decode() + "\n")


def worker_input(
    settings: Settings, port: int, operator_port: int, probe_path: Path, listener: socket.socket | None
) -> bytes:
    """Encode settings, the path of the worker's probe server and its listener as one line of JSON, secrets included.

    It travels through a pipe, never through arguments or the environment.
    """
    fields = settings.model_dump()
    fields["public_api"]["port"] = port
    fields["operator_api"]["port"] = operator_port
    given = {
        "settings": fields,
        "file": settings.file,
        "probe_path": probe_path,
        "listener": None if listener is None else listener.fileno(),
    }
    return json.dumps(given, default=_plain).encode() + b"\n"


def _plain(value: Any) -> Any:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, frozenset):
        return sorted(value)
    raise TypeError(f"a setting of type {type(value).__name__} cannot be sent to a worker")
